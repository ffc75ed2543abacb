"""Which backend computes on which device."""

from __future__ import annotations

from kvant.errors import ConfigError
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps


def available_backends() -> dict[str, type[Ops]]:
    """The backends that can run here, by name. One that is not built or has no device is absent, not an error."""
    return {ReferenceOps.name: ReferenceOps}


def select_ops(device: str) -> Ops:
    """The fastest backend for a device ("auto" or "cpu").

    Raises:
        ConfigError: no backend runs on that device.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={device!r}: no backend here runs on it; use 'cpu'")
    return ReferenceOps()
