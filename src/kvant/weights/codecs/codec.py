"""The contract of codecs: the stored tensors of one quantized module are one `PackedWeight`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.formats.weight import InputCodes, PackedWeight, pair, unpair

FLOATS = ("F16", "BF16", "F32")
WORD_BITS = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: that the file has for it.
        dtype: as safetensors spells it: "I32", "BF16".
        read: reads it as it is stored.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredModule:
    """A quantized module's tensors, by the last part of their names.

    Attributes:
        name: that the checkpoint has for the module, and that its notes use.
    """

    name: str
    parts: Mapping[str, StoredTensor]

    def part(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> StoredTensor:
        """One that must be there, of one of these dtypes and in this shape; None stands for any size.

        Raises:
            CorruptModelError: it is not.
        """
        found = self.parts.get(name)
        if found is None:
            file = next(iter(self.parts.values())).file
            raise CorruptModelError(
                f"{file}: {self.name!r} is quantized, but its tensor '{self.name}.{name}' is missing; the download may "
                "be incomplete"
            )
        fits = len(shape) == len(found.shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        if found.dtype not in dtypes or not fits:
            sizes = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.corrupt(name, f"is {found.dtype} {list(found.shape)}, not {' or '.join(dtypes)} [{sizes}]")
        return found

    def corrupt(self, part: str, problem: str) -> CorruptModelError:
        """The error that this tensor has such a problem."""
        tensor = self.parts[part]
        return CorruptModelError(f"{tensor.file}: tensor {tensor.name!r} {problem}")


class Codec(Protocol):
    """A way to store quantized modules.

    Attributes:
        parts: the last parts of the names of all tensors that such a module may have.
    """

    parts: frozenset[str]

    def owns(self, parts: Mapping[str, StoredTensor]) -> bool:
        """Whether a module with these tensors, all named in `self.parts`, is a quantized one, even one not whole."""

    def shape(self, module: StoredModule) -> tuple[int, int]:
        """[out_features, in_features]."""

    def bits(self, module: StoredModule) -> float:
        """That an element takes as it is decoded, with its share of scales and zero points."""

    def decode(self, module: StoredModule) -> PackedWeight:
        """The module's weight, bit for bit; its scales keep their dtype.

        Raises:
            CorruptModelError: a tensor is missing, or of another dtype or shape than the rest implies.
            UnsupportedModelError: the module is whole and stored in a way that is not read.
        """


def packed(
    bits: int,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    order: Tensor | None = None,
    inputs: InputCodes | None = None,
) -> PackedWeight:
    """The weight of these planes; zero points that all are the middle code are left out, which says the same."""
    if zero is not None and bool((zero == 1 << (bits - 1)).all()):
        zero = None
    weight = PackedWeight.quantized(bits, q, scale, zero=zero, group_size=group_size)
    return replace(weight, order=order, inputs=inputs)


def packed_bits(bits: int, columns: int, groups: int, scale_dtype: str, zeros: bool) -> float:
    """Bits an element takes with so many groups a row."""
    scale = WORD_BITS if scale_dtype == "F32" else 16
    return bits + (scale + 8 * zeros) * groups / columns


def as_bytes(words: Tensor) -> Tensor:
    """int32 [..., n] -> its bytes [..., 4n], the lowest first: codes in a word's order, whether of 4 or 8 bits."""
    return words.flatten().view(torch.uint8).view(*words.shape[:-1], -1)


def group_size(module: StoredModule, columns: int, groups: int, noted: Any) -> int:
    """What makes so many groups of a row: the size that the checkpoint's note says, if it does, else equal ones.

    Raises:
        CorruptModelError: a row cannot be cut so.
    """
    if isinstance(noted, int) and noted > 0 and -(-columns // noted) == groups:
        return noted
    if groups < 1 or columns % groups:
        file = next(iter(module.parts.values())).file
        raise CorruptModelError(f"{file}: {module.name!r} has {groups} scales a row for {columns} inputs")
    return columns // groups


def group_order(module: StoredModule, part: str, columns: int, groups: int) -> tuple[Tensor | None, int] | None:
    """Act-order: the order that puts each group's columns side by side, None where they lie so, and the group's size.

    Args:
        module: whose tensor `part` [columns] int32 says each column's group.
        part: None is returned where the module has none, or it says nothing.
        columns: of the weight.
        groups: how many there are.

    Raises:
        CorruptModelError: a group is out of range.
        UnsupportedModelError: groups differ in size, other than by a smaller last one.
    """
    if part not in module.parts:
        return None
    index = module.part(part, ("I32", "I64"), (columns,)).read().long()
    # Some writers leave it as they made it.
    if (groups > 1 and not index.any()) or bool((index == -1).all()):
        return None
    if index.min() < 0 or index.max() >= groups:
        raise module.corrupt(part, f"names group {int(index.max())} or {int(index.min())} of {groups}")
    sizes = torch.bincount(index, minlength=groups)
    size = int(sizes[0])
    if bool((sizes[:-1] != size).any()) or sizes[-1] > size or sizes[-1] == 0:
        raise UnsupportedModelError(
            f"{module.parts[part].file}: {module.name!r} has groups of {int(sizes.min())} to {int(sizes.max())} "
            "columns; kvant reads groups of one size"
        )
    order = index.argsort(stable=True)
    return (None if torch.equal(order, torch.arange(columns)) else order), size


def in_order(q: Tensor, bits: int, order: Tensor | None) -> Tensor:
    """Codes as a `PackedWeight` has them, [N, K * bits / 8], with their columns put in this order."""
    if order is None:
        return q
    return q[:, order] if bits == 8 else pair(unpair(q)[:, order])


def object_of(holder: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key of a note, empty where it is absent or null.

    Raises:
        CorruptModelError: it is no object.
    """
    value = holder.get(key) or {}
    if not isinstance(value, dict):
        raise CorruptModelError(f"the checkpoint's quantization: {key!r} must be an object, not {value!r:.40}")
    return value
