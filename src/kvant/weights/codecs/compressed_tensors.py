"""The layouts of compressed-tensors that hold integers: pack-quantized (W4A16, W8A16), int-quantized (W8A8)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.formats.weight import InputCodes, PackedWeight, unpair
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
)
from kvant.weights.codecs.layout import (
    WHOLE_ROW,
    Inputs,
    Layout,
    byte_words,
    check_groups,
    checked_planes,
    code_words,
    named,
    noted_group_sizes,
    refused,
)

PACKED, INT, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_FORMATS = (PACKED, INT, "naive-quantized", MIXED)
_READ = "kvant reads integer weights of 4 and 8 bits (pack-quantized, int-quantized, naive-quantized)"
_SIGN = 0x80  # turns a signed byte into an unsigned one that is 128 more
_INTEGERS = ("I8", "U8", "I16", "I32", "I64")


@dataclass(frozen=True)
class _Scheme:
    """What a config group says of the modules that it targets."""

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    inputs: Inputs


class CompressedTensorsCodec:
    """A module is `weight_scale` ([N, G], [N, 1] or a single one), maybe `weight_zero_point`, `weight_g_idx`, and

    - `weight_packed` int32 [N, ceil(K * bits / 32)] with `weight_shape` int64 [2]; zero points int32, packed along N
    - or `weight` int8 [N, K], maybe `input_scale`; zero points as scales, int8.
    """

    parts = frozenset(
        {"weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"}
        | {"input_scale", "input_zero_point"}
    )

    def __init__(self, note: Mapping[str, Any], where: Path) -> None:
        """Of a checkpoint with this note.

        Raises:
            UnsupportedModelError: it says something that is not read.
            CorruptModelError: it contradicts itself.
        """
        named = object_of(note, "config_groups")
        groups = [group for name in named if (group := object_of(named, name)).get("weights")]
        for stored_as in {str(note.get("format")), *(str(g["format"]) for g in groups if g.get("format"))}:
            if stored_as not in _FORMATS:
                raise UnsupportedModelError(f"{where}: compressed-tensors' format {stored_as!r} is not read; {_READ}")
        for extra in ("sparsity_config", "transform_config"):
            if object_of(note, extra).get("format", "dense") != "dense" or object_of(note, extra).get("config_groups"):
                raise UnsupportedModelError(f"{where}: compressed-tensors' {extra} is not read; {_READ}")
        self._schemes = tuple(_scheme(group, where) for group in groups)

    def owns(self, parts: Mapping[str, StoredTensor]) -> bool:
        if "weight" in parts:
            return parts["weight"].dtype == "I8" or "weight_packed" in parts
        return "weight_packed" in parts or "weight_scale" in parts

    def shape(self, module: StoredModule) -> tuple[int, int]:
        if "weight_packed" not in module.parts:
            rows, columns = module.part("weight", ("I8",), (None, None)).shape
            return rows, columns
        if "weight" in module.parts:
            raise module.corrupt("weight", "lies beside a quantized form of itself")
        stored = module.part("weight_shape", ("I32", "I64"), (2,)).read()
        rows, columns = int(stored[0]), int(stored[1])
        module.part("weight_packed", ("I32",), (rows, _words(columns, self._scheme(module).bits)))
        if columns % 2:
            raise UnsupportedModelError(f"{module.name!r} has an odd number of inputs, {columns}; kvant needs pairs")
        return rows, columns

    def bits(self, module: StoredModule) -> float:
        rows, columns = self.shape(module)
        groups, zeros = self._groups(module, rows), "weight_zero_point" in module.parts
        return packed_bits(self._code_bits(module), columns, groups, module.parts["weight_scale"].dtype, zeros)

    def decode(self, module: StoredModule) -> PackedWeight:
        scheme, (rows, columns), bits = self._scheme(module), self.shape(module), self._code_bits(module)
        groups = self._groups(module, rows)
        found = group_order(module, "weight_g_idx", columns, groups)
        order, group = found or (None, group_size(module, columns, groups, scheme.group_size))
        scale = module.parts["weight_scale"].read().reshape(-1, groups).expand(rows, groups).contiguous()
        q = in_order(self._codes(module, columns, bits), bits, order)
        return packed(bits, q, scale, _zeros(module, bits, rows, groups), group, order, _inputs(module, scheme))

    def _scheme(self, module: StoredModule) -> _Scheme:
        """By name, by pattern, or by class, in that order. The class is not known here: any that is left will do."""

        def rank(target: str) -> int | None:
            if target.startswith("re:"):
                return 1 if re.match(target.removeprefix("re:"), module.name) else None
            return 0 if target == module.name else 2 if target == "Linear" else None

        ranked = [(found, i) for i, s in enumerate(self._schemes) if (found := _best(map(rank, s.targets))) is not None]
        if not ranked and len(self._schemes) != 1:
            file = next(iter(module.parts.values())).file
            raise CorruptModelError(f"{file}: {module.name!r} is quantized, but no config group says how")
        return self._schemes[min(ranked)[1] if ranked else 0]

    def _code_bits(self, module: StoredModule) -> int:
        return self._scheme(module).bits if "weight_packed" in module.parts else 8

    def _groups(self, module: StoredModule, rows: int) -> int:
        """Of a row; 1 where rows have one scale, or all have one."""
        found = module.parts.get("weight_scale")
        if (
            found is not None
            and found.dtype in FLOATS
            and (torch.Size(found.shape).numel() == 1 or found.shape == (rows,))
        ):
            return 1
        return module.part("weight_scale", FLOATS, (rows, None)).shape[1]

    def _codes(self, module: StoredModule, columns: int, bits: int) -> Tensor:
        if "weight_packed" not in module.parts:
            return module.parts["weight"].read().view(torch.uint8) ^ _SIGN
        return as_bytes(module.parts["weight_packed"].read())[:, : columns * bits // 8].contiguous()


def _scheme(group: Mapping[str, Any], where: Path) -> _Scheme:
    weights = object_of(group, "weights")
    bits, kind, strategy = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("strategy")
    if kind != "int" or bits not in (4, 8) or strategy not in (None, "tensor", "channel", "group"):
        raise UnsupportedModelError(
            f"{where}: compressed-tensors weights of type {kind!r}, {bits} bits, strategy {strategy!r} are not read; "
            f"{_READ}"
        )
    if group.get("output_activations"):
        raise UnsupportedModelError(f"{where}: compressed-tensors' output_activations are not read; {_READ}")
    targets = group.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CorruptModelError(f"{where}: a config group's targets must be a list of names, not {targets!r:.40}")
    size = weights.get("group_size")
    return _Scheme(tuple(targets), bits, size if isinstance(size, int) and size > 0 else None, _rounding(group, where))


def _rounding(group: Mapping[str, Any], where: Path) -> Inputs:
    """How the group's inputs are rounded."""
    inputs = object_of(group, "input_activations")
    if not inputs:
        return "none"
    integers = inputs.get("type", "int") == "int" and inputs.get("num_bits", 8) == 8 and inputs.get("symmetric", True)
    dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy")
    if integers and dynamic is True and strategy in (None, "token"):
        return "token"
    if integers and dynamic is False and strategy in (None, "tensor"):
        return "static"
    raise UnsupportedModelError(
        f"{where}: compressed-tensors' input_activations {dict(inputs)} are not read; kvant rounds inputs to 8 bits, "
        "symmetrically, with a scale for each token or a static one"
    )


def _inputs(module: StoredModule, scheme: _Scheme) -> InputCodes | None:
    if "input_zero_point" in module.parts and module.part("input_zero_point", _INTEGERS, _any(module)).read().any():
        raise UnsupportedModelError(
            f"{module.parts['input_zero_point'].file}: the inputs of {module.name!r} are rounded asymmetrically, which "
            "kvant does not"
        )
    if scheme.inputs != "static":
        if "input_scale" in module.parts:
            raise module.corrupt("input_scale", "is there, but its config group has no static scale of the inputs")
        return None if scheme.inputs == "none" else InputCodes()
    dimensions = len(module.parts["input_scale"].shape) if "input_scale" in module.parts else 1
    return InputCodes(module.part("input_scale", FLOATS, (1,) * dimensions).read().reshape(1).float())


def _any(module: StoredModule) -> tuple[None, ...]:
    return (None,) * len(module.parts["input_zero_point"].shape)


def _zeros(module: StoredModule, bits: int, rows: int, groups: int) -> Tensor | None:
    """[N, G] uint8."""
    found = module.parts.get("weight_zero_point")
    if found is None:
        return None
    if found.dtype == "I32" and "weight_packed" in module.parts:
        words = module.part("weight_zero_point", ("I32",), (_words(rows, bits), groups)).read().T
        codes = as_bytes(words) if bits == 8 else unpair(as_bytes(words))
        return codes[:, :rows].T.contiguous()
    same = module.part("weight_zero_point", _INTEGERS, module.parts["weight_scale"].shape).read()
    return (same.reshape(-1, groups).int() + (1 << (bits - 1))).to(torch.uint8).expand(rows, groups).contiguous()


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // WORD_BITS)


def _best(ranks: Any) -> int | None:
    found = [rank for rank in ranks if rank is not None]
    return min(found) if found else None


class CompressedTensorsWriter:
    """pack-quantized, and int-quantized for modules whose inputs are rounded. Only keys that its config class knows."""

    name = "compressed-tensors"

    def check(self, layout: Layout, module: str, shape: tuple[int, int]) -> None:
        if layout.inputs != "none" and not (layout.bits == 8 and layout.symmetric and layout.channelwise):
            why = "beside rounded inputs it has 8 bits, no zero points and one scale a row, and this one has not"
            raise refused(self.name, module, why, "quantize it as w8a8, or without rounding its inputs")
        check_groups(self.name, layout, module, shape[1])

    def encode(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        layout, q, scale, zero = checked_planes(self, module, weight)
        parts = {"weight_scale": scale}
        if layout.inputs == "none":
            parts["weight_packed"] = byte_words(q)
            parts["weight_shape"] = torch.tensor([weight.out_features, weight.in_features])
        else:
            parts["weight"] = (q ^ _SIGN).view(torch.int8)
        if not layout.symmetric:
            parts["weight_zero_point"] = code_words(zero.T, layout.bits).T
        if weight.inputs is not None and weight.inputs.scale is not None:
            parts["input_scale"] = weight.inputs.scale
        return named(module, **parts)

    def config(self, layouts: Mapping[str, Layout], ignored: Sequence[str]) -> dict[str, Any]:
        sizes = noted_group_sizes(layouts)
        targets: dict[tuple[int, int, bool, Inputs], list[str]] = {}
        for name, layout in layouts.items():
            targets.setdefault((layout.bits, sizes[name], layout.symmetric, layout.inputs), []).append(name)
        formats = [PACKED if inputs == "none" else INT for *_, inputs in targets]
        mixed = len(set(formats)) > 1
        groups = {}
        for i, (scheme, names) in enumerate(targets.items()):
            # A format of its own is a newer key, and not written where it is not needed.
            own = {"format": formats[i]} if mixed else {}
            groups[f"group_{i}"] = _group(*scheme) | {"targets": names if len(targets) > 1 else ["Linear"]} | own
        return {
            "quant_method": "compressed-tensors",
            "format": MIXED if mixed else formats[0],
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }


def _group(bits: int, group_size: int, symmetric: bool, inputs: Inputs) -> dict[str, Any]:
    """A config group, its targets left out."""
    whole = group_size == WHOLE_ROW
    common = {"type": "int", "symmetric": True}
    weights = {
        "num_bits": bits,
        **common,
        "symmetric": symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else group_size,
        "dynamic": False,
    }
    strategy = {"token": {"strategy": "token", "dynamic": True}, "static": {"strategy": "tensor", "dynamic": False}}
    rounded = None if inputs == "none" else {"num_bits": 8, **common, **strategy[inputs]}
    return {"weights": weights, "input_activations": rounded, "output_activations": None}
