"""The contract of writers: how modules are laid out, and what a way to store them takes and makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight, pair

Inputs = Literal["none", "token", "static"]
WHOLE_ROW = -1


@dataclass(frozen=True)
class Layout:
    """What a quantized module is like.

    Attributes:
        group_size: inputs that share a scale; all of them where `channelwise`.
        symmetric: without zero points.
        inputs: whether they are rounded too: not, with a scale for each token, with one measured beforehand.
        channelwise: there is one scale a row.
    """

    bits: int
    group_size: int
    symmetric: bool
    inputs: Inputs
    channelwise: bool

    @classmethod
    def of(cls, weight: PackedWeight) -> Layout:
        """Of a weight with scales, or scales and zero points.

        Raises:
            UnsupportedModelError: it is dense, or has biases.
        """
        if weight.format == "dense" or "bias" in weight.planes:
            raise UnsupportedModelError("only weights with scales and zero points can be written; quantize it first")
        channelwise = weight.planes["scale"].data.shape[1] == 1
        rounded = weight.inputs
        inputs: Inputs = "none" if rounded is None else "token" if rounded.scale is None else "static"
        group = weight.in_features if channelwise else weight.group_size
        return cls(weight.bits, group, "zero" not in weight.planes, inputs, channelwise)


class Writer(Protocol):
    """A way to store quantized modules."""

    name: str

    def check(self, layout: Layout, module: str, shape: tuple[int, int]) -> None:
        """Whether a module of this layout and shape [out_features, in_features] can be stored so.

        Raises:
            UnsupportedModelError: it cannot; with what to do instead.
        """

    def encode(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The stored tensors by their full names, in memory of their own; reading them gives the weight back, bit for
        bit.

        Raises:
            UnsupportedModelError: as `check`, or the columns are not in order, or scales have no place in their dtype.
        """

    def config(self, layouts: Mapping[str, Layout], ignored: Sequence[str]) -> dict[str, Any]:
        """The "quantization_config" of config.json.

        Args:
            layouts: every quantized module by its name.
            ignored: modules that are left dense.

        Raises:
            UnsupportedModelError: modules differ in what must be the same for all.
        """


def refused(writer: str, module: str, why: str, remedy: str = "use the format compressed-tensors") -> Exception:
    """The error that a module cannot be written in a format."""
    return UnsupportedModelError(f"{module} cannot be written as {writer}: {why}; {remedy}")


def check_groups(writer: str, layout: Layout, module: str, columns: int) -> None:
    """Groups of one size, in pairs of columns.

    Raises:
        UnsupportedModelError: the last group of a row would be smaller, or the number of columns is odd.
    """
    if columns % layout.group_size or columns % 2:
        why = f"its {columns} inputs are not whole groups of {layout.group_size}"
        raise refused(writer, module, why, "use a group size that divides them")


def checked_planes(writer: Writer, module: str, weight: PackedWeight) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """A weight's layout, its codes as it has them, scales, and zero points uint8 [N, G], the middle if it has none.

    Raises:
        UnsupportedModelError: the writer does not take it, or its columns are not in order.
    """
    weight = weight.planar()
    layout = Layout.of(weight)
    writer.check(layout, module, (weight.out_features, weight.in_features))
    if weight.order is not None:
        raise refused(writer.name, module, "its columns are not in order", "quantize it without act-order")
    planes = weight.planes
    scale = planes["scale"].data
    middle = torch.full_like(scale, 1 << (weight.bits - 1), dtype=torch.uint8)
    return layout, planes["q"].data, scale, planes["zero"].data if "zero" in planes else middle


def named(module: str, **parts: Tensor) -> dict[str, Tensor]:
    """A module's tensors by their full names, in memory of their own: safetensors files share none."""
    return {f"{module}.{name}": data.clone(memory_format=torch.contiguous_format) for name, data in parts.items()}


def half_scales(writer: str, module: str, scale: Tensor) -> Tensor:
    """The scales in float16.

    Raises:
        UnsupportedModelError: they are not the same there.
    """
    half = scale.half()
    if not torch.equal(half.to(scale.dtype), scale):
        raise refused(writer, module, f"its scales in {scale.dtype} have no float16 form, which the format asks for")
    return half


def noted_group_sizes(layouts: Mapping[str, Layout]) -> dict[str, int]:
    """By module, -1 for whole rows, but where these are as long as the groups of other modules."""
    sizes = {layout.group_size for layout in layouts.values() if not layout.channelwise}
    return {
        name: WHOLE_ROW if layout.channelwise and layout.group_size not in sizes else layout.group_size
        for name, layout in layouts.items()
    }


def code_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, n] uint8, one a byte -> int32 [R, ceil(n * bits / 32)], the first lowest; the rest of a row is 0."""
    padded = F.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    return byte_words(padded if bits == 8 else pair(padded))


def byte_words(data: Tensor) -> Tensor:
    """Bytes [R, n] -> int32 [R, ceil(n / 4)], the first lowest; the rest of a row is 0."""
    padded = F.pad(data, (0, -data.shape[1] % 4))
    return padded.flatten().view(torch.int32).view(len(data), -1)
