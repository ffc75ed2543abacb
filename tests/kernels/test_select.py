"""Which backend computes where."""

from __future__ import annotations

import pytest

from kvant.errors import ConfigError
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.select import available_backends, num_cores, select_ops
from tests.support import NATIVE

OPS = [name for name, member in vars(Ops).items() if callable(member) and not name.startswith("_")]


def test_every_backend_has_every_op_under_its_own_name():
    backends = available_backends()
    assert "reference" in backends
    assert {"linear", "attention", "rope_write_kv", "sample"} <= set(OPS)
    for name, make in backends.items():
        ops = make()
        assert ops.name == name
        assert all(callable(getattr(ops, op)) for op in OPS)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_cpu_is_served_by_the_best_backend_that_is_available(device, monkeypatch):
    monkeypatch.delenv("KVANT_CPU_ISA")
    assert select_ops(device).name == next(iter(NATIVE), "reference")


@pytest.mark.parametrize("name", [*NATIVE, "reference"])
def test_the_environment_may_name_another(name, monkeypatch):
    monkeypatch.setenv("KVANT_CPU_ISA", name)
    ops = select_ops("cpu")
    assert ops.name == name
    assert (type(ops) is ReferenceOps) == (name == "reference")


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize(("threads", "used"), [(None, num_cores()), (1, 1), (3, 3)])
def test_a_native_backend_uses_every_core_unless_told_otherwise(isa, threads, used, monkeypatch):
    monkeypatch.setenv("KVANT_CPU_ISA", isa)
    assert select_ops("cpu", threads).native.threads == used


def test_a_device_that_nothing_runs_on_is_refused():
    with pytest.raises(ConfigError, match="device='tpu'.*use 'cpu'"):
        select_ops("tpu")
