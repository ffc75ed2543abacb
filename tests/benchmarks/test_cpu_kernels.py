"""The benchmarks of single kernels and of what lies between them: they run, and their figures are of what they say."""

from __future__ import annotations

import json
from itertools import chain

import overhead
import pytest

import kernels
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.select import select_ops
from tests.engine.checkpoint import write_checkpoint


@pytest.fixture
def ops(monkeypatch):
    monkeypatch.delenv("KVANT_CPU_ISA")
    found = select_ops("cpu", threads=1)
    if not isinstance(found, CpuOps):
        pytest.skip("the native kernels are not built here")
    return found


@pytest.mark.parametrize(
    "name",
    [
        "linear int4 3072x576 rows 8 cached",
        "linear fp16 3072x576 rows 1 cached",
        "attention int4 d64 gqa3 cached",
        "attention int8 d64 gqa3 prompt 256 of 256",
        "write int4 d64 kv3 decode",
        "rms_norm 576 rows 256",
        "gated silu 1536 rows 1",
        "embedding int4 576 rows 1",
        "sample top_p 0.9 of 49152",
    ],
)
@pytest.mark.usefixtures("ops")
def test_a_kernel_is_set_beside_the_limits_of_the_same_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr("kernel._READ_BYTES", 1 << 20)
    out = tmp_path / "kernels.json"
    kernels.main(["--only", name, "--seconds", "0", "--out", str(out)])
    written = json.loads(out.read_text())
    [row] = written["kernels"]
    assert row["name"] == name
    assert row["bytes"] > 0 < row["ns_per_unit"]
    assert row["of_reading"] == pytest.approx(row["gb_per_s"] * 1e9 / written["limits"]["read"])


def test_each_kernel_has_a_name_of_its_own(ops):
    names = [name for name, _ in chain.from_iterable(part.kernels(ops) for part in kernels.PARTS)]
    assert len(names) == len(set(names)) > 100


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("sequences", [1, 3])
def test_what_is_outside_of_native_calls_is_a_part_of_a_step(sequences, tmp_path):
    core = overhead.core_of(str(write_checkpoint(tmp_path, intermediate_size=64)), "int8", 1, sequences)
    step, outside, bursts = overhead.measure(core, sequences, tokens=40)
    assert 0 < outside < step
    assert 0 < bursts <= 40
