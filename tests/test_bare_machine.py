"""With torch, transformers, safetensors and numpy alone, and what these bring along, kvant runs from src/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.checkpoint import write_checkpoint
from tests.support import NATIVE

# Neither these packages nor the native library are to be found; sys.path begins with the sources.
_RUN = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"gguf", "fastapi", "uvicorn", "starlette", "pydantic", "psutil", "accelerate", "sentencepiece"}:
            raise ImportError(f"{name} is not on this machine")
        if name == "kvant.kernels.cpu._kernels":
            raise ImportError("the library was not built")

sys.meta_path.insert(0, Absent())
from kvant import EngineConfig, SamplingParams, pipeline
from kvant.errors import MissingDependencyError

with pipeline(sys.argv[1], engine=EngineConfig(kv_cache_dtype="int4", kv_cache_memory="1MiB")) as pipe:
    print(len(pipe("abc", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)).token_ids))
try:
    pipeline(sys.argv[2])
except MissingDependencyError as error:
    print(error)
"""


def test_it_runs_without_optional_packages(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    command = [sys.executable, "-c", _RUN, str(checkpoint), str(gguf)]
    env = {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "KVANT_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["5", "reading GGUF files needs the gguf package: pip install gguf"]
    assert done.stderr.count("PyTorch computes everything, slowly") == 1


_LEAVE = """
import sys
from kvant import EngineConfig, SamplingParams, pipeline

pipe = pipeline(sys.argv[1], engine=EngineConfig(kv_cache_memory="1MiB"))
stream = pipe.stream("abc", SamplingParams(max_tokens=400, ignore_eos=True))
print(next(stream).index)
"""


@pytest.mark.parametrize("isa", [*NATIVE, "reference"][:2])
def test_a_program_may_end_while_the_engine_works(isa: str, tmp_path: Path) -> None:
    """Without `with` or `close`: the engine's thread must not be torn down inside of PyTorch or a native kernel."""
    command = [sys.executable, "-c", _LEAVE, str(write_checkpoint(tmp_path))]
    env = {**os.environ, "KVANT_CPU_ISA": isa}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
