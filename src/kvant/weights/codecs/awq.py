"""AWQ's layouts: "gemm", 4-bit codes along the outputs in an order of their own, and "gemv", along the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight, pair, unpair
from kvant.weights.codecs.codec import (
    FLOATS,
    WORD_BITS,
    StoredModule,
    StoredTensor,
    as_bytes,
    group_size,
    packed,
    packed_bits,
)
from kvant.weights.codecs.layout import (
    Layout,
    byte_words,
    check_groups,
    checked_planes,
    half_scales,
    named,
    noted_group_sizes,
    refused,
)

BITS = 4
PER_WORD = WORD_BITS // BITS
# A word holds 8 outputs: which one each nibble has, and the nibble of each.
OUTPUT_OF = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
_VERSIONS = ("gemm", "gemv")


class AwqCodec:
    """A module is `qweight`, `qzeros` (int32), `scales`: w = (q - zero) * scale.

    "gemm": [K, N/8], [G, N/8], [G, N]. "gemv": [N, K/8], [N, W], [N, 8W] of which the first G columns count.
    """

    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, note: Mapping[str, Any], where: Path) -> None:
        """Of a checkpoint with this note.

        Raises:
            UnsupportedModelError: another layout, or another number of bits.
        """
        self._version = str(note.get("version") or note.get("checkpoint_format") or "gemm").lower()
        self._group_size = note.get("group_size", note.get("q_group_size"))
        bits = note.get("bits", note.get("w_bit", BITS))
        if self._version not in _VERSIONS or note.get("backend", "autoawq") != "autoawq":
            raise UnsupportedModelError(
                f"{where}: AWQ weights of version {note.get('version')!r} (backend {note.get('backend', 'autoawq')!r}) "
                f"are not read; kvant reads {' and '.join(_VERSIONS)} of autoawq"
            )
        if bits != BITS:
            raise UnsupportedModelError(f"{where}: AWQ weights of {bits} bits are not read; kvant reads those of 4")

    def owns(self, parts: Mapping[str, StoredTensor]) -> bool:
        return bool(parts)

    def shape(self, module: StoredModule) -> tuple[int, int]:
        words = module.part("qweight", ("I32",), (None, None)).shape
        rows, columns = (words[1] * PER_WORD, words[0]) if self._gemm else (words[0], words[1] * PER_WORD)
        if columns % 2:
            raise UnsupportedModelError(f"{module.name!r} has an odd number of inputs, {columns}; kvant needs pairs")
        return rows, columns

    def bits(self, module: StoredModule) -> float:
        columns = self.shape(module)[1]
        groups, _ = self._groups(module)
        return packed_bits(BITS, columns, groups, module.parts["scales"].dtype, zeros=True)

    def decode(self, module: StoredModule) -> PackedWeight:
        rows, _ = self.shape(module)
        groups, group = self._groups(module)
        words, scales = module.parts["qweight"], module.parts["scales"]
        if self._gemm:
            zeros = module.part("qzeros", ("I32",), (groups, rows // PER_WORD)).read()
            scale, zero = scales.read().T.contiguous(), _in_output_order(unpair(as_bytes(zeros))).T.contiguous()
            return packed(BITS, _pairs(words.read()), scale, zero, group)
        zeros = module.part("qzeros", ("I32",), (rows, scales.shape[1] // PER_WORD)).read()
        scale, zero = (data[:, :groups].contiguous() for data in (scales.read(), unpair(as_bytes(zeros))))
        return packed(BITS, as_bytes(words.read()), scale, zero, group)

    @property
    def _gemm(self) -> bool:
        return self._version == "gemm"

    def _groups(self, module: StoredModule) -> tuple[int, int]:
        """How many a row has, and how many inputs each."""
        rows, columns = self.shape(module)
        if self._gemm:
            groups = module.part("scales", FLOATS, (None, rows)).shape[0]
            return groups, group_size(module, columns, groups, self._group_size)
        width = module.part("scales", FLOATS, (rows, None)).shape[1]
        size = self._group_size if isinstance(self._group_size, int) and self._group_size > 0 else columns
        if columns % size or columns // size > width or width % PER_WORD:
            raise module.corrupt("scales", f"has {width} columns, which {columns} inputs in groups of {size} do not")
        return columns // size, size


class AwqWriter:
    """The "gemm" layout: 4 bits, float16 scales, one group size for all modules."""

    name = "awq"

    def check(self, layout: Layout, module: str, shape: tuple[int, int]) -> None:
        rows, columns = shape
        if layout.bits != BITS:
            raise refused(self.name, module, f"it has codes of {layout.bits} bits, the format only of 4")
        if layout.inputs != "none":
            raise refused(self.name, module, "its inputs are rounded, which the format has no place for")
        if rows % PER_WORD:
            raise refused(self.name, module, f"its {rows} outputs are no multiple of {PER_WORD}")
        check_groups(self.name, layout, module, columns)

    def encode(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        _, q, scale, zero = checked_planes(self, module, weight)
        return named(
            module,
            qweight=_words_of_pairs(q),
            qzeros=byte_words(pair(_in_nibble_order(zero.T))),
            scales=half_scales(self.name, module, scale).T,
        )

    def config(self, layouts: Mapping[str, Layout], ignored: Sequence[str]) -> dict[str, Any]:
        sizes = sorted(set(noted_group_sizes(layouts).values()))
        if len(sizes) != 1:
            raise UnsupportedModelError(
                f"AWQ checkpoints have one group size, these modules have {', '.join(map(str, sizes))}; use a group "
                "size that divides the inputs of all, or the format compressed-tensors"
            )
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": sizes[0],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignored),
        }


def _words_of_pairs(q: Tensor) -> Tensor:
    """The inverse of `_pairs`: [N, K/2] -> [K, N/8]."""
    codes = _in_nibble_order(q.T)
    low, high = codes[:, 0::2], codes[:, 1::2]
    both = torch.stack([(low & 15) | (high << 4), (low >> 4) | (high & 0xF0)], dim=1)
    return byte_words(both.flatten(0, 1))


def _pairs(words: Tensor) -> Tensor:
    """Codes [K, N/8] int32 of the "gemm" layout -> [N, K/2], two inputs to a byte."""
    data = as_bytes(words)
    even, odd = data[0::2], data[1::2]
    codes = torch.stack([(even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)], dim=-1).flatten(-2)
    return _in_output_order(codes).T.contiguous()


def _in_output_order(codes: Tensor) -> Tensor:
    """[..., N] in the order of a word's nibbles -> in that of the outputs."""
    ordered: Tensor = codes.unflatten(-1, (-1, PER_WORD))[..., NIBBLE_OF].flatten(-2)
    return ordered


def _in_nibble_order(codes: Tensor) -> Tensor:
    """The inverse of `_in_output_order`."""
    ordered: Tensor = codes.unflatten(-1, (-1, PER_WORD))[..., OUTPUT_OF].flatten(-2)
    return ordered
