"""What tests of native backends start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from kvant.kernels.ops import Ops
from kvant.kernels.select import available_backends
from tests.support import NATIVE

MakeOps = Callable[[int], Ops]


@pytest.fixture(autouse=True, scope="package")
def _single_thread() -> Iterator[None]:
    """For PyTorch, beside kernels that have threads of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> MakeOps:
    """Each native backend that runs here, for so many threads."""
    return lambda threads: available_backends(threads)[request.param]()
