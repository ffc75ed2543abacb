"""GGUF files: tensors by name from the mapped file, metadata translated to the terms of an HF config."""

from __future__ import annotations

import struct
import sys
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvant.errors import CorruptModelError, MissingDependencyError, UnsupportedModelError
from kvant.formats.weight import PackedWeight
from kvant.models.families import FAMILIES, Family, Names
from kvant.weights.source import TensorSource

try:
    from gguf import GGUFReader, GGUFValueType, ReaderField
except ImportError as error:
    raise MissingDependencyError("reading GGUF files needs the gguf package: pip install gguf") from error

from kvant.weights.codecs.ggml import decode_ggml
from kvant.weights.codecs.ggml_blocks import pack_ggml, packed_bits

_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


class _PlainReader(GGUFReader):
    """The package's reader over a plain view of its memory map: slicing a numpy.memmap object is four times slower."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray[Any, Any]:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray[Any, Any]) -> None:
        self._data = np.asarray(mapped).view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[np.ndarray[Any, Any]], list[int], list[GGUFValueType]]:
        """As the package's; arrays, such as a vocabulary, in a tenth of its time."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, start = GGUFValueType(int(kind[0])), orig_offs + 12
        if item == GGUFValueType.STRING:
            size, values = self._strings(start, int(count[0]))
        elif item in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[item], int(count[0]))
            size = values.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return 12 + size, [kind, count, values], [2], [GGUFValueType.ARRAY, item]

    def _strings(self, start: int, count: int) -> tuple[int, np.ndarray[Any, Any]]:
        """The bytes that so many strings take, and the strings: one part, where the package makes two of each."""
        raw, size, end, texts = self._data.data, len(self._data), start, []
        little = (sys.byteorder == "little") == (self.byte_order == "I")
        length = struct.Struct("<Q" if little else ">Q").unpack_from
        for _ in range(count):
            begin = end + 8
            end = begin + length(raw, end)[0]
            if end > size:
                raise ValueError(f"the string at byte {begin} reaches beyond the file's end")
            texts.append(str(raw[begin:end], "utf-8"))
        return end - start, np.array(texts, dtype=object)

    def metadata(self) -> dict[str, Any]:
        """All fields as plain Python."""
        return {name: _contents(field) for name, field in self.fields.items()}


def _contents(field: ReaderField) -> Any:
    """The package would make strings of `_strings`' objects once more."""
    if len(field.types) > 1 and field.types[-1] == GGUFValueType.STRING:
        return [text for part in field.data for text in field.parts[part].tolist()]
    return field.contents()


def _unwritten(mapped: np.ndarray[Any, Any]) -> Tensor:
    """The mapped file as a tensor, nowhere copied; nobody may write to it.

    To be able to, as PyTorch wants it, a map would count as memory, and no file could be larger than that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(mapped)


class GgufSource(TensorSource):
    """One .gguf file of a family that kvant knows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            reader = _PlainReader(path)
            self.metadata = reader.metadata()
        except (ValueError, IndexError, KeyError, OverflowError, OSError, struct.error) as error:
            raise CorruptModelError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._file = _unwritten(reader.data)
        self._refuse_what_is_not_one_dense_model()
        self._family = self._find_family()
        self.config = self._hf_config()
        self.generation: dict[str, Any] = {}

    def _refuse_what_is_not_one_dense_model(self) -> None:
        if self.metadata.get("split.count", 1) > 1:
            raise UnsupportedModelError(f"{self.path} is one part of a split GGUF; join the parts (gguf-split --merge)")
        if self.metadata.get(f"{self.metadata.get('general.architecture')}.expert_count", 0) > 0:
            raise UnsupportedModelError(f"{self.path} is a mixture of experts, which kvant does not run yet")

    def _find_family(self) -> Family:
        arch = self.metadata.get("general.architecture")
        for family in FAMILIES:
            if family.gguf_arch is not None and family.gguf_arch == arch:
                return family
        known = ", ".join(family.gguf_arch for family in FAMILIES if family.gguf_arch)
        raise UnsupportedModelError(f"{self.path}: GGUF architecture {arch!r} is not supported; kvant reads {known}")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        # GGUF lists the fastest dimension first.
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors[name]
        return decode_ggml(tensor.data, tensor.tensor_type, self._shapes[name], dtype)

    def packed(self, name: str) -> PackedWeight | None:
        tensor, shape = self._tensors[name], self._shapes[name]
        if packed_bits(tensor.tensor_type) is None:
            return None
        first, size = int(tensor.data_offset), int(tensor.n_bytes)
        return pack_ggml(self._file[first : first + size].view(shape[0], -1), tensor.tensor_type, shape)

    def packed_bits(self, name: str) -> float | None:
        return packed_bits(self._tensors[name].tensor_type)

    def names_of(self, family: Family) -> Names:
        return family.gguf_names

    def _hf_config(self) -> dict[str, Any]:
        arch = self._family.gguf_arch
        found = {key: self.metadata.get(f"{arch}.{key}") for key in _KEYS}
        config: dict[str, Any] = {_KEYS[key]: value for key, value in found.items() if value is not None}
        config |= {
            "architectures": [self._family.architectures[0]],
            "vocab_size": self._shapes.get("token_embd.weight", (0,))[0],
            "tie_word_embeddings": "output.weight" not in self._shapes,
            "torch_dtype": "float16",
            "norms_include_offset": True,
            "rope_parameters": self._rope(config),
        }
        config |= self._own_terms(config)
        eos = {self.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")}
        config["eos_token_id"] = sorted(token for token in eos if token is not None)
        return config

    def _rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        arch = self._family.gguf_arch
        kind = self.metadata.get(f"{arch}.rope.scaling.type", "none")
        trained = self.metadata.get(f"{arch}.rope.scaling.original_context_length")
        params: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0)}
        if trained is not None:
            params["original_max_position_embeddings"] = trained
        if rotated := self.metadata.get(f"{arch}.rope.dimension_count"):
            params["partial_rotary_factor"] = rotated / self._head_dim(config)
        if kind in ("linear", "yarn"):
            params |= {"rope_type": kind, "factor": self.metadata.get(f"{arch}.rope.scaling.factor", 1.0)}
            ramp = {key: self.metadata.get(f"{arch}.rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
            params |= {key: value for key, value in ramp.items() if value is not None}
        return params | self._frequency_factors(arch)

    def _frequency_factors(self, arch: str | None) -> dict[str, Any]:
        """Divisors of the rotary frequencies kept as tensors: LongRoPE's pair, or Llama 3's one list."""
        short, long = ("rope_factors_short.weight", "rope_factors_long.weight")
        if "rope_freqs.weight" in self._shapes:
            short = long = "rope_freqs.weight"
        if short not in self._shapes:
            return {}
        factors = {"rope_type": "longrope", "short_factor": self._list(short), "long_factor": self._list(long)}
        scale = self.metadata.get(f"{arch}.rope.scaling.attn_factor")
        if scale is None and short == long:
            scale = 1.0
        return factors if scale is None else {**factors, "attention_factor": scale}

    def _list(self, name: str) -> list[float]:
        return [float(value) for value in self.read(name, torch.float32)]

    def _head_dim(self, config: Mapping[str, Any]) -> int:
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])

    def _own_terms(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What single families keep in other terms than the rest."""
        match self._family.name:
            case "qwen":
                return {
                    "kv_channels": self._head_dim(config),
                    "seq_length": config["max_position_embeddings"],
                    "layer_norm_epsilon": config["rms_norm_eps"],
                    "rotary_emb_base": config.get("rope_theta", 10000.0),
                }
            case "gemma2" | "gemma3":
                # The metadata has no query scale: it is head_dim in all sizes but Gemma 2 27B and Gemma 3 27B.
                scalar = config["hidden_size"] // config["num_attention_heads"]
                large = config["num_hidden_layers"] in (46, 62)
                return {"query_pre_attn_scalar": scalar if large else self._head_dim(config)}
            case _:
                return {}
