"""`kvant convert` with a miniature model, and what the other verbs make of its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvant.config import EngineConfig, SamplingParams
from kvant.pipelines import pipeline
from tests.engine.checkpoint import write_checkpoint
from tests.support import NATIVE

TEXT = str(Path(__file__).parents[1] / "data" / "truman_1945.txt")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels compute."""
    if not NATIVE:
        pytest.skip("the native kernels are not built")
    monkeypatch.delenv("KVANT_CPU_ISA")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), hidden_size=64, intermediate_size=128, head_dim=64))


def said(path: str | Path, **config: object) -> tuple[int, ...]:
    engine = EngineConfig(max_model_len=64, num_kv_blocks=20, **config)
    with pipeline(path, engine=engine) as pipe:
        return pipe([{"role": "user", "content": "hello"}], GREEDY).token_ids


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("flags", [{}, {"weights": "int4"}, {"weights": "int8", "weights_group_size": 64}])
def test_the_result_is_used_where_a_model_is(kvant, tiny, tmp_path, flags):
    out = tmp_path / "out"
    asked = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = kvant("convert", tiny, "-o", str(out), *asked)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{out}\n", "")
    expected = said(tiny, **flags)
    assert said(out) == expected
    assert said(out, **flags) == expected


@pytest.mark.usefixtures("native")
def test_eval_measures_a_result_that_says_what_it_is(kvant, tiny, tmp_path):
    small = ("--text", TEXT, "--windows", "1", "--window-size", "24", "--kv-cache-dtype", "int8")
    for weights in ("int4", "dense"):
        out = str(tmp_path / weights)
        assert kvant("convert", tiny, "-o", out, "--weights", weights).exit_code == 0
        direct, mapped = kvant("eval", tiny, "--weights", weights, *small), kvant("eval", out, *small)
        assert (direct.exit_code, mapped.exit_code) == (0, 0), mapped.output
        assert mapped.stdout.splitlines()[:3] == direct.stdout.splitlines()[:3]


@pytest.mark.usefixtures("native")
def test_eval_refuses_stored_blocks_that_it_cannot_expand(kvant, tiny, tmp_path):
    out = tmp_path / "out"
    assert kvant("convert", tiny, "-o", str(out), "--weights", "int4").exit_code == 0
    header = json.loads((out / "workspace.json").read_text())
    (out / "workspace.json").write_text(json.dumps(header | {"weights": "auto"}))  # as of a checkpoint of few bits
    result = kvant("eval", str(out), "--text", TEXT, "--windows", "1", "--window-size", "24")
    assert result.exit_code == 1
    assert "Use the model it was made from" in result.stderr


def test_what_cannot_be_done_is_told(kvant, tiny, tmp_path):
    refused = kvant("convert", tiny, "-o", str(tmp_path / "out"))
    assert refused.exit_code == 1
    assert "native kernels" in refused.stderr
    assert kvant("convert", tiny, "-o", str(tmp_path / "out"), "--tp", "3", "--backend", "cuda").exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert kvant("convert", tiny, "-o", str(tmp_path / "cuda"), "--tp", "2", "--backend", "cuda").exit_code == 0
    unused = kvant("chat", str(tmp_path / "cuda"), "-q", "hello")
    assert unused.exit_code == 1
    assert "made for a cuda device" in unused.stderr
    assert kvant("convert", tiny).exit_code == 2


@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_a_real_model(kvant, smollm2, tmp_path):
    out = tmp_path / "out"
    assert kvant("convert", "smollm2", "-o", str(out)).exit_code == 0
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.2, "top_p": 0.9}
    assert said(out) == said(smollm2)
    refused = kvant("eval", str(out), "--text", TEXT, "--windows", "1", "--window-size", "24")
    assert "Use the model it was made from" in refused.stderr
