"""What tests of more than one op share."""

from __future__ import annotations

import pytest

from kvant.kernels.ops import Ops
from kvant.kernels.select import available_backends


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "triton")) for name in sorted(available_backends())],
    scope="module",
)
def attending(request: pytest.FixtureRequest) -> Ops:
    return available_backends()[request.param]()
