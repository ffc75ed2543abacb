"""The ops on native kernels. Activations are float32 inside; weights of few bits meet activations of 8 bits."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer, check_finite
from kvant.formats.memory import Slabs
from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu import structs
from kvant.kernels.cpu.cache import bind_batch, bind_cache, bind_sampling, bind_shape, is_native
from kvant.kernels.cpu.native import Native, floats, pointer
from kvant.kernels.cpu.weights import NativeWeight, pack
from kvant.kernels.ops import AttentionBatch, AttentionShape, SamplingBatch
from kvant.kernels.reference import ReferenceOps, rotate


class CpuOps(ReferenceOps):
    """`kernels.ops.Ops` on a CPU; cache formats that the kernels have no loop for are left to the reference."""

    packed_weights = True

    def __init__(self, native: Native) -> None:
        super().__init__()
        self.native = native
        self.name = native.isa
        self._slabs = Slabs()

    def prepare(self, weight: PackedWeight) -> NativeWeight:
        return pack(self.native, weight, self._slabs)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        rows, added = floats(x), None if bias is None else floats(bias)
        out = torch.empty(len(x), weight.shape[0])
        linear = structs.Linear(weight.struct, pointer(added))
        self.native.call("linear", byref(linear), pointer(rows), len(x), pointer(out))
        return out.to(x.dtype)

    def embedding(self, ids: Tensor, weight: Any) -> Tensor:
        ids = ids.contiguous()
        out = torch.empty(len(ids), weight.shape[1])
        self.native.call("embedding", byref(weight.struct), pointer(ids), len(ids), pointer(out))
        return out.to(weight.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, factors = floats(x), floats(weight)
        out, width = torch.empty_like(rows), x.shape[-1]
        count = rows.numel() // width
        self.native.call("rms_norm", pointer(rows), pointer(factors), eps, count, width, pointer(out))
        return out.to(x.dtype)

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        if not is_native(cache, q.shape[-1]):
            return super().rope_write_kv(q, k, v, rotary, cache, batch)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        shape = structs.AttentionShape(heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[2])
        keys, values, bad = floats(k), floats(v), torch.zeros(len(q), dtype=torch.uint8)
        layer, tokens = bind_cache([cache]), bind_batch(batch)
        self.native.call(
            "write_kv", layer.structs, byref(shape), byref(tokens.struct), pointer(keys), pointer(values), pointer(bad)
        )
        check_finite(bad == 0)
        return q

    def attention(self, q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
        if not is_native(cache, q.shape[-1]):
            return super().attention(q, cache, batch, shape)
        queries = floats(q)
        out = torch.empty_like(queries)
        layer, tokens = bind_cache([cache]), bind_batch(batch)
        self.native.call(
            "attention", layer.structs, byref(bind_shape(shape)), byref(tokens.struct), pointer(queries), pointer(out)
        )
        return out.to(q.dtype)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        rows = floats(x)
        count, width = rows.shape[0], rows.shape[1] // 2
        out = torch.empty(count, width)
        self.native.call("gated", pointer(rows), count, width, structs.ACTIVATIONS[activation], pointer(out))
        return out.to(x.dtype)

    def sample(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        rows, tokens = floats(logits), torch.empty(len(logits), dtype=torch.int64)
        how = bind_sampling(params)
        self.native.call("sample", pointer(rows), *rows.shape, byref(how.struct), pointer(tokens))
        return tokens
