"""GPTQ's layout, as AutoGPTQ and GPTQModel write it: codes along the inputs, both versions of its zero points."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight, unpair
from kvant.weights.codecs.codec import (
    FLOATS,
    WORD_BITS,
    StoredModule,
    StoredTensor,
    as_bytes,
    group_order,
    group_size,
    in_order,
    object_of,
    packed,
    packed_bits,
    pattern_of,
)
from kvant.weights.codecs.layout import (
    Layout,
    byte_words,
    check_groups,
    checked_planes,
    code_words,
    half_scales,
    named,
    noted_group_sizes,
    refused,
)

BITS = (4, 8)
# Version 1 stores each zero point less one. The difference was taken from whole words, with borrows, and is given back
# to whole words.
ONES = {4: 0x11111111, 8: 0x01010101}
_FORMATS = {"gptq": 1, "gptq_v2": 2}
# vLLM and SGLang make one module of these, and look in the notes for its name, not for theirs.
_FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),  # InternLM2
    ("gate_up_proj", ("w2", "w1")),  # Qwen v1
)

_Settings = tuple[tuple[str, Any], ...]
_Noted = tuple[str, _Settings]  # "+:" and a module's own settings, or "-:" and none: it is dense


class GptqCodec:
    """A module is `qweight` int32 [K * bits / 32, N], `qzeros` int32 [G, N * bits / 32], `scales` [G, N], and maybe
    `g_idx` int32 [K], each input's group: w = (q - zero) * scale.
    """

    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, note: Mapping[str, Any], where: Path) -> None:
        """Of a checkpoint with this note. What tensors say by themselves is not asked of it.

        Raises:
            UnsupportedModelError: another layout.
        """
        stored_as = str(note.get("checkpoint_format") or note.get("format") or "gptq")
        if stored_as not in _FORMATS or note.get("is_marlin_format"):
            raise UnsupportedModelError(
                f"{where}: GPTQ weights in the format {stored_as!r} are not read; kvant reads {' and '.join(_FORMATS)}"
            )
        self._version = _FORMATS[stored_as]
        self._note = note
        self._overrides = {
            pattern_of(pattern.removeprefix("+:"), where): object_of({pattern: override}, pattern)
            for pattern, override in object_of(note, "dynamic").items()
            if not pattern.startswith("-:")
        }

    def owns(self, parts: Mapping[str, StoredTensor]) -> bool:
        return bool(parts)

    def shape(self, module: StoredModule) -> tuple[int, int]:
        words, rows = module.part("qweight", ("I32",), (None, None)).shape
        return rows, words * WORD_BITS // self._code_bits(module)

    def bits(self, module: StoredModule) -> float:
        (_, columns), scales = self.shape(module), module.parts["scales"]
        zeros = not self._setting(module, "sym", True)
        return packed_bits(self._code_bits(module), columns, scales.shape[0], scales.dtype, zeros)

    def decode(self, module: StoredModule) -> PackedWeight:
        bits, (_, columns) = self._code_bits(module), self.shape(module)
        scales = module.parts["scales"]
        groups = scales.shape[0]
        found = group_order(module, "g_idx", columns, groups)
        noted = self._setting(module, "group_size", None)
        order, group = found or (None, group_size(module, columns, groups, noted))
        q = in_order(as_bytes(module.parts["qweight"].read().T), bits, order)
        return packed(bits, q, scales.read().T.contiguous(), self._zeros(module, bits), group, order)

    def _code_bits(self, module: StoredModule) -> int:
        """Of a code: what makes the zero points as wide as they are."""
        rows = module.part("qweight", ("I32",), (None, None)).shape[1]
        groups = module.part("scales", FLOATS, (None, rows)).shape[0]
        width = module.part("qzeros", ("I32",), (groups, None)).shape[1]
        bits = next((bits for bits in (4, 8, 2, 3) if width == -(-rows * bits // WORD_BITS)), None)
        if bits is None:
            raise module.corrupt("qzeros", f"is {width} words wide, which {rows} zero points are not in any bits")
        if bits not in BITS:
            raise UnsupportedModelError(
                f"{module.parts['qzeros'].file}: {module.name!r} is quantized by GPTQ in {bits} bits; kvant reads 4 "
                "and 8 bits"
            )
        return bits

    def _zeros(self, module: StoredModule, bits: int) -> Tensor:
        """[N, G] uint8."""
        words, rows = module.parts["qzeros"].read(), module.parts["scales"].shape[1]
        stored, shifted = (_codes(data, bits)[:, :rows] for data in (words, words + ONES[bits]))
        middle = 1 << (bits - 1)
        # Notes are not to be relied on here: where the scheme is symmetric, the values tell the version.
        if self._setting(module, "sym", True) and any(bool((zero == middle).all()) for zero in (stored, shifted)):
            return torch.full_like(stored.T, middle, memory_format=torch.contiguous_format)
        return (shifted if self._version == 1 else stored).T.contiguous()

    def _setting(self, module: StoredModule, key: str, default: Any) -> Any:
        """What the note says for this module."""
        overrides = (override for pattern, override in self._overrides.items() if pattern.match(module.name))
        return {**self._note, **next(overrides, {})}.get(key, default)


class GptqWriter:
    """Version 1, which all readers know: 4 or 8 bits, float16 scales, columns in order."""

    name = "gptq"

    def check(self, layout: Layout, module: str, shape: tuple[int, int]) -> None:
        rows, columns = shape
        if layout.inputs != "none":
            raise refused(self.name, module, "its inputs are rounded, which the format has no place for")
        if columns % WORD_BITS or rows % 8:
            why = f"its {columns} inputs are no multiple of {WORD_BITS}, or its {rows} outputs none of 8"
            raise refused(self.name, module, why)
        check_groups(self.name, layout, module, columns)

    def encode(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        layout, q, scale, zero = checked_planes(self, module, weight)
        index = torch.arange(weight.in_features, dtype=torch.int32) // layout.group_size
        return named(
            module,
            qweight=byte_words(q).T,
            qzeros=code_words(zero.T, layout.bits) - ONES[layout.bits],
            scales=half_scales(self.name, module, scale).T,
            g_idx=index,
        )

    def config(self, layouts: Mapping[str, Layout], ignored: Sequence[str]) -> dict[str, Any]:
        sizes = noted_group_sizes(layouts)
        settings = {name: _settings(layout, sizes[name]) for name, layout in layouts.items()}
        common = Counter(settings.values()).most_common(1)[0][0]
        noted: dict[str, _Noted] = {name: ("+:", own) for name, own in settings.items() if own != common}
        # The head is dense wherever `lm_head` does not say otherwise.
        noted |= {name: ("-:", ()) for name in ignored if name != "lm_head"}
        dynamic = {sign + _pattern(name, noted): dict(own) for name, (sign, own) in noted.items()}
        return {
            "quant_method": "gptq",
            **dict(common),
            "desc_act": False,
            "lm_head": "lm_head" in layouts,
            "checkpoint_format": "gptq",
            **({"dynamic": dynamic} if dynamic else {}),
        }


def _settings(layout: Layout, group_size: int) -> _Settings:
    return ("bits", layout.bits), ("group_size", group_size), ("sym", layout.symmetric)


def _pattern(module: str, noted: Mapping[str, _Noted]) -> str:
    """The pattern of this name, which readers match from the start; one for all parts of a fused module, and for its
    name, where the same is noted of all.
    """
    parent, _, name = module.rpartition(".")
    for fused, parts in _FUSED:
        if name in parts and all(noted.get(f"{parent}.{part}") == noted[module] for part in parts):
            return f"{re.escape(parent)}\\.(?:{'|'.join((*parts, fused))})$"
    return re.escape(module) + "$"


def _codes(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> the codes in it, uint8 [..., 32 n / bits]."""
    return as_bytes(words) if bits == 8 else unpair(as_bytes(words))
