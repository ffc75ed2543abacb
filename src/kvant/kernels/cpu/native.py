"""The library's functions on tensors: pointers out, errors in, memory kept alive."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.kernels.cpu import structs

_KERNELS_AND_THREADS = (c_void_p, ctypes.c_int)
_STEP = (
    POINTER(structs.Model),
    POINTER(structs.KvLayer),
    POINTER(structs.Batch),
    POINTER(structs.Rope),
    c_int32,
    *(c_void_p,) * 2,
)
_CALLS = {
    "kvant_linear": (POINTER(structs.Linear), c_void_p, c_int64, c_void_p),
    "kvant_embedding": (POINTER(structs.Weight), c_void_p, c_int64, c_void_p),
    "kvant_rms_norm": (c_void_p, c_void_p, c_float, c_int64, c_int32, c_void_p),
    "kvant_gated": (c_void_p, c_int64, c_int32, c_int32, c_void_p),
    "kvant_write_kv": (
        POINTER(structs.KvLayer),
        POINTER(structs.AttentionShape),
        POINTER(structs.Batch),
        *(c_void_p,) * 3,
    ),
    "kvant_attention": (
        POINTER(structs.KvLayer),
        POINTER(structs.AttentionShape),
        POINTER(structs.Batch),
        *(c_void_p,) * 2,
    ),
    "kvant_forward": (*_STEP, c_void_p, c_int64, c_void_p),
    "kvant_draw": (*_STEP, POINTER(structs.Sampling), POINTER(structs.Burst), c_void_p),
    "kvant_sample": (c_void_p, c_int64, c_int32, POINTER(structs.Sampling), c_void_p),
    "kvant_logits": (POINTER(structs.Model), c_void_p, c_int64, c_void_p),
}


@dataclass(frozen=True, eq=False)
class Native:
    """The kernels of one instruction set, and how many threads they use."""

    library: ctypes.CDLL
    isa: str
    threads: int
    _kernels: int

    @classmethod
    def bind(cls, library: ctypes.CDLL, isa: str, threads: int) -> Native:
        """Declare the library's functions and take the kernels of `isa`, one of those that it offers here."""
        library.kvant_kernels.restype, library.kvant_kernels.argtypes = c_void_p, (c_char_p,)
        library.kvant_pack.restype = None
        library.kvant_pack.argtypes = (c_int32, c_void_p, c_int64, c_int64, c_void_p)
        library.kvant_pack_blocks.restype = None
        library.kvant_pack_blocks.argtypes = (c_int32, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p)
        library.kvant_limit.restype = c_int64
        library.kvant_limit.argtypes = (c_void_p, c_int32, c_void_p, c_int64)
        for name, arguments in _CALLS.items():
            getattr(library, name).argtypes = (*_KERNELS_AND_THREADS, *arguments)
        kernels = library.kvant_kernels(isa.encode())
        if kernels is None:
            raise ValueError(f"the library has no kernels for {isa!r} on this CPU")
        return cls(library, isa, threads, kernels)

    def call(self, name: str, *arguments: object) -> bool:
        """Call `kvant_{name}`; true where it reports numbers that are not finite.

        Raises:
            MemoryError: the call's working memory could not be had.
            RuntimeError: a thread could not be had; the message tells what to set.
        """
        result = getattr(self.library, f"kvant_{name}")(self._kernels, self.threads, *arguments)
        if result == -1:
            raise MemoryError("the system refused the memory that one step of the model needs")
        if result == -3:
            raise RuntimeError(
                f"the system refused one of {self.threads} threads for the native kernels; set num_threads lower, "
                "or allow this process more (ulimit -u, a container's limit of pids)"
            )
        if result < 0:
            raise RuntimeError(f"the native kernels failed in {name}")
        return bool(result)

    def reach(self, limit: str, data: Tensor, count: int) -> int:
        """Do nothing but read memory, or add up products, on this thread: for benchmarks to compare kernels with.

        Args:
            limit: "read", "dot" (of 8-bit numbers) or "fma" (of float32).
            data: `count` bytes to read, or 64 bytes of operands.
            count: bytes, or rounds of products.

        Returns:
            The bytes read, or the operations: two a product.
        """
        done: int = self.library.kvant_limit(self._kernels, structs.LIMITS[limit], pointer(data), count)
        return done


def pointer(x: Tensor | None) -> int | None:
    """The address of a contiguous tensor's memory, which must outlive the call."""
    assert x is None or x.is_contiguous()
    return None if x is None else x.data_ptr()


def floats(x: Tensor) -> Tensor:
    """Contiguous float32, the tensor itself where it is that already."""
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
