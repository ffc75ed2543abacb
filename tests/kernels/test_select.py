"""Which backend computes where."""

from __future__ import annotations

import pytest

from kvant.errors import ConfigError
from kvant.kernels.ops import Ops
from kvant.kernels.select import available_backends, select_ops

OPS = [name for name, member in vars(Ops).items() if callable(member) and not name.startswith("_")]


def test_every_backend_has_every_op_under_its_own_name():
    backends = available_backends()
    assert "reference" in backends
    assert {"linear", "attention", "rope_write_kv", "sample"} <= set(OPS)
    for name, backend in backends.items():
        assert backend.name == name
        assert all(callable(getattr(backend, op)) for op in OPS)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_cpu_is_served_by_a_backend_that_is_available(device):
    assert type(select_ops(device)) in available_backends().values()


def test_a_device_that_nothing_runs_on_is_refused():
    with pytest.raises(ConfigError, match="device='tpu'.*use 'cpu'"):
        select_ops("tpu")
