"""The structures of csrc/types.h and api.cpp, field for field; `check_sizes` holds both to each other."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "int4": 3, "int8": 4}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
LIMITS = {"read": 0, "dot": 1, "fma": 2}


class Weight(Structure):
    """A packed matrix."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "rows", "columns", "group")),
        *((name, c_void_p) for name in ("codes", "scales", "biases", "zeros", "order")),
    ]


class Linear(Structure):
    """A packed matrix and its bias."""

    _fields_ = [("weight", Weight), ("bias", c_void_p)]


class Side(Structure):
    """Keys or values of a layer's cache."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "groups", "shaped", "order")),
        *((name, c_void_p) for name in ("codes", "meta")),
        *((name, c_int64) for name in ("codes_stride", "meta_stride")),
        *((name, c_void_p) for name in ("centre", "balance", "feedback", "scale")),
    ]


class KvLayer(Structure):
    """A layer's cache."""

    _fields_ = [
        ("key", Side),
        ("value", Side),
        *((name, c_int32) for name in ("sinks", "block_size", "lead", "turning")),
        *((name, c_void_p) for name in ("turn_cos", "turn_sin", "basis")),
    ]


class Batch(Structure):
    """A step's tokens."""

    _fields_ = [
        *((name, c_int32) for name in ("tokens", "sequences", "table_width")),
        *((n, c_void_p) for n in ("ids", "positions", "slots", "query_starts", "context_lens", "block_tables")),
    ]


class Rope(Structure):
    """A rotary embedding: frequencies of all tokens, one row, or of each; and what cosines and sines are scaled by."""

    _fields_ = [("frequencies", c_void_p), ("rows", c_int32), ("pairs", c_int32), ("factor", c_float)]


class AttentionShape(Structure):
    """What an attention layer is like; 0 for no window and no soft-cap."""

    _fields_ = [
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
    ]


class Sampling(Structure):
    """How rows of logits are sampled."""

    _fields_ = [(name, c_void_p) for name in ("temperature", "top_k", "top_p", "min_p", "uniform")]


class Burst(Structure):
    """Decode steps one after the other."""

    _fields_ = [
        *((name, c_int32) for name in ("steps", "done")),
        *((name, c_void_p) for name in ("stops", "stop_starts")),
        ("seconds", c_double),
        ("interrupt", c_void_p),
    ]


_NORMS = ("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm", "q_norm", "k_norm")


class Layer(Structure):
    """A decoder layer's weights."""

    _fields_ = [
        *((name, c_void_p) for name in _NORMS),
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        ("attention", AttentionShape),
        ("rope", c_int32),
    ]


class Model(Structure):
    """A whole decoder."""

    _fields_ = [
        *((name, c_int32) for name in ("hidden", "intermediate", "layers", "activation")),
        *((name, c_float) for name in ("eps", "embedding_scale", "final_softcap")),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("embedding", Weight),
        ("head", Linear),
    ]


_ALL = (Weight, Linear, Side, KvLayer, Batch, Rope, AttentionShape, Sampling, Burst, Layer, Model)


def check_sizes(library: ctypes.CDLL) -> None:
    """Compare with what the library was compiled with.

    Raises:
        RuntimeError: they differ; the C++ was changed without this file, or the library is an old build.
    """
    sizes = (c_int64 * len(_ALL))()
    library.kvant_sizes(sizes)
    wrong = [mirror.__name__ for mirror, size in zip(_ALL, sizes, strict=True) if ctypes.sizeof(mirror) != size]
    if wrong:
        raise RuntimeError(f"the native kernels were built from other sources ({', '.join(wrong)}); build them again")
