"""Miniature GGUF files, laid out as llama.cpp's converter lays the families out, from an HF config and HF weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor

from tests.families.configs.base import Config
from tests.families.oracles.internlm2 import split_wqkv

ROTARY_PAIRS_INTERLEAVED = {"llama", "internlm2"}
NORMS_PLUS_ONE = {"gemma", "gemma2", "gemma3"}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file holds it; `data` is [rows, ...], bytes where the kind is quantized."""

    kind: Kind
    data: np.ndarray

    @property
    def values(self) -> Tensor:
        """What the stored bytes mean."""
        return torch.from_numpy(np.ascontiguousarray(dequantize(self.data, self.kind), dtype=np.float32))

    def rows(self, order: Tensor) -> Stored:
        """The same tensor with its rows in this order: blocks run along rows, so that each row keeps its bytes."""
        return Stored(self.kind, self.data[order.numpy()])


def store(weight: Tensor, kind: Kind) -> Stored:
    """Quantize a weight; of the K-quants, which cannot be quantized here, random blocks of its shape and spread."""
    if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return _random_blocks(weight, kind)
    return Stored(kind, quantize(np.ascontiguousarray(weight.numpy()), kind))


def _random_blocks(weight: Tensor, kind: Kind) -> Stored:
    """Random codes and sub-block scales; d (and dmin, which centres the values) gives them the weight's spread."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(weight.numel() + kind)
    data = random.integers(0, 256, (weight.shape[0], weight.shape[1] // block, size), dtype=np.uint8)

    def scale(d: float) -> np.ndarray:
        centre = {Kind.Q4_K: 7.5, Kind.Q5_K: 15.5}.get(kind)
        header = np.array([d] if centre is None else [d, centre * d], dtype=np.float16).view(np.uint8)
        if centre is None:
            data[..., -2:] = header
        else:
            data[..., :4] = header
        return data.reshape(len(data), -1)

    trial = 2.0**-10
    spread = dequantize(scale(trial), kind).std()
    return Stored(kind, scale(trial * weight.std().item() / spread).copy())


def write_gguf(path: Path, arch: str, config: Config, weights: dict[str, Stored]) -> None:
    """Write `weights`, under their HF names, as the file of an HF model with this config."""
    writer = gguf.GGUFWriter(path, arch)
    _write_metadata(writer, arch, config)
    for name, stored in _tensors(arch, config, weights).items():
        raw = None if stored.kind is Kind.F32 else stored.kind
        writer.add_tensor(name, stored.data, raw_dtype=raw)
    for name, values in _rope_factors(config).items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(arch: str, config: Config, weights: dict[str, Stored]) -> dict[str, Stored]:
    model = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(model, config["num_hidden_layers"])
    tensors = {}
    for name, stored in _split(config, weights).items():
        if name.endswith((".q_proj.weight", ".q_proj.bias")) and arch in ROTARY_PAIRS_INTERLEAVED:
            stored = stored.rows(_interleave(config["num_attention_heads"], _head_dim(config)))
        if name.endswith((".k_proj.weight", ".k_proj.bias")) and arch in ROTARY_PAIRS_INTERLEAVED:
            kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
            stored = stored.rows(_interleave(kv_heads, _head_dim(config)))
        if name.endswith("norm.weight") and arch in NORMS_PLUS_ONE:
            stored = Stored(Kind.F32, stored.data + 1)
        tensors[names.get_name(name, (".weight", ".bias"))] = stored
    return tensors


def _split(config: Config, weights: dict[str, Stored]) -> dict[str, Stored]:
    """InternLM2's wqkv as three; all else as it is."""
    split = {}
    for name, stored in weights.items():
        layer, wqkv, _ = name.partition(".attention.wqkv")
        if not wqkv:
            split[name] = stored
            continue
        orders = split_wqkv(config, torch.arange(len(stored.data)))
        for part, rows in zip("qkv", orders, strict=True):
            split[f"{layer}.self_attn.{part}_proj.weight"] = stored.rows(rows)
    return split


def _interleave(heads: int, head_dim: int) -> Tensor:
    """Rows of a projection whose rotary pairs are (i, i + D / 2) -> rows whose pairs are neighbours."""
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).flatten()


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def _rotated(config: Config) -> int:
    return int(_head_dim(config) * config.get("partial_rotary_factor", 1.0))


def _write_metadata(writer: gguf.GGUFWriter, arch: str, config: Config) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", config.get("layer_norm_epsilon")))
    if "num_key_value_heads" in config:
        writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch == "llama":
        writer.add_vocab_size(config["vocab_size"])
    if arch in ("llama", "phi3", "qwen"):
        writer.add_rope_dimension_count(_rotated(config))
    if arch in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    _write_rope(writer, arch, config)


def _write_rope(writer: gguf.GGUFWriter, arch: str, config: Config) -> None:
    if arch not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(config.get("rope_theta", config.get("rotary_emb_base", 10000.0)))
    if "rope_local_base_freq" in config:
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if arch == "phi3":
        limit, original = config["max_position_embeddings"], config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if scaling:
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(limit / original) / math.log(original)))


def _rope_factors(config: Config) -> dict[str, list[float]]:
    """Divisors of the rotary frequencies that are kept as tensors: LongRoPE's two lists, Llama 3's one."""
    scaling = config.get("rope_scaling") or {}
    if "long_factor" in scaling:
        return {f"rope_factors_{key}.weight": scaling[f"{key}_factor"] for key in ("long", "short")}
    if scaling.get("rope_type") != "llama3":
        return {}
    low, high, dim = scaling["low_freq_factor"], scaling["high_freq_factor"], _head_dim(config)
    divisors = []
    for i in range(dim // 2):
        turns = scaling["original_max_position_embeddings"] * config["rope_theta"] ** (-2 * i / dim) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / scaling["factor"]))
    return {"rope_freqs.weight": divisors}
