"""From the host to a device, without waiting, as few copies as can be: each takes longer to begin than to do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 16  # of vector loads; kernels are compiled for it


def sent(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Tensors of the host on their way to a device, in one piece; on the host, themselves."""
    if device.type == "cpu":
        return tuple(tensors)
    packed = pack(tensors, pinned=True)
    return unpack(packed.to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[Tensor], pinned: bool) -> Tensor:
    """The bytes of tensors of the host, each from an aligned place on: [bytes] uint8; pinned, a device can fetch it."""
    *starts, size = _places(tensors)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    memory = packed.numpy()
    for tensor, start in zip(tensors, starts, strict=True):
        memory[start : start + tensor.nbytes].view(tensor.numpy().dtype)[:] = tensor.numpy().reshape(-1)
    return packed


def unpack(packed: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of what was packed, wherever it is now, with the shapes and dtypes of `tensors`."""
    starts = _places(tensors)
    return tuple(
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=False)
    )


def fetched(x: Tensor) -> Tensor:
    """A device's tensor on its way to the host, into memory that the device can write by itself."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins, in bytes, and where all of them end."""
    return list(accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors), initial=0))
