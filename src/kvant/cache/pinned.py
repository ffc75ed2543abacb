"""Memory of the host that a device copies to and from by itself, without anyone waiting."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: for every device


def pin_in_place(memory: Tensor, owner: object) -> None:
    """Pin a tensor of the host where it is, for as long as `owner` lives; it must keep the tensor so long.

    `Tensor.pin_memory` would copy it into memory whose size is rounded up to a power of two, as PyTorch's allocator for
    pinned memory does it (CachingHostAllocator.h): up to twice of what was asked for.

    Raises:
        MemoryError: the system refuses.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
    if code:
        raise MemoryError(f"CUDA refused to pin {memory.nbytes:,} bytes (error {code})")
    weakref.finalize(owner, _unpin, memory.data_ptr())


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # copies may be on their way
    torch.cuda.cudart().cudaHostUnregister(address)
