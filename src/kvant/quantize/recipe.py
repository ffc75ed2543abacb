"""How a model is to be quantized, as its user says it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from kvant.errors import ConfigError

METHOD_NAMES = ("auto", "gptq", "awq", "rtn", "smoothquant", "plain")
FORMAT_NAMES = ("compressed-tensors", "awq", "gptq")
WHOLE_ROW = -1
_SMALLEST_GROUP = 16


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model's linear layers are quantized; embeddings, norms and the output head stay as they are.

    Attributes:
        method: "awq", "gptq", "rtn" (to nearest, ranges weighed by what the inputs are like), "plain" (to nearest, full
            ranges), "auto" (what measures best, layer by layer), or "smoothquant" (W8A8).
        bits: 4 or 8; None is 4, and 8 for smoothquant, which has no other.
        group_size: inputs that share a scale; -1 is a whole row. None is 128, and -1 for smoothquant, which
            has no other. A layer whose inputs are not whole groups has the largest half, quarter ... that fits.
        symmetric: without zero points, as smoothquant always is. None is what most readers of the format take: with
            zero points for "awq", without for the others.
        format: of the checkpoint: "compressed-tensors", "awq" or "gptq".
        samples: pieces of the calibration text, and
        seqlen: tokens in each.
        ignore: patterns (`fnmatch`) of modules that stay as they are.
    """

    method: str = "auto"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    format: str = FORMAT_NAMES[0]
    samples: int = 128
    seqlen: int = 512
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        w8a8 = self.method == "smoothquant"
        if self.bits is None:
            object.__setattr__(self, "bits", 8 if w8a8 else 4)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.format != "awq")
        if self.group_size is None:
            object.__setattr__(self, "group_size", WHOLE_ROW if w8a8 else 128)
        for name, known in (("method", METHOD_NAMES), ("format", FORMAT_NAMES)):
            value = getattr(self, name)
            _require(value in known, f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
        _require(self.bits in (4, 8), f"bits={self.bits!r} is not supported; choose 4 or 8")
        _require(not w8a8 or self.bits == 8, "smoothquant has 8 bits; leave bits out, or choose another method")
        _require(
            not w8a8 or self.format == "compressed-tensors",
            f"format={self.format!r} has no place for rounded inputs; smoothquant needs compressed-tensors",
        )
        _require(not w8a8 or bool(self.symmetric), "smoothquant has no zero points; leave symmetric out")
        _require(
            self.format != "awq" or self.bits == 4, "format='awq' has 4 bits only; choose compressed-tensors or gptq"
        )
        size = self.group_size or 0
        _require(
            not w8a8 or size == WHOLE_ROW,
            "smoothquant has one scale a row; leave group_size out, or choose another method",
        )
        _require(
            size == WHOLE_ROW or (size >= _SMALLEST_GROUP and size & (size - 1) == 0),
            f"group_size={size!r} must be a power of two from {_SMALLEST_GROUP} on, or -1 for whole rows",
        )
        _require(self.samples >= 1, f"samples={self.samples!r} must be at least 1")
        _require(self.seqlen >= 2, f"seqlen={self.seqlen!r} must be at least 2: one token to read, one to foresee")

    def group(self, columns: int) -> int:
        """How many of a linear's inputs share a scale."""
        size = columns if self.group_size in (None, WHOLE_ROW) else self.group_size
        assert size is not None
        while columns % size:
            size //= 2
        return size if size >= _SMALLEST_GROUP else columns

    def ignores(self, module: str) -> bool:
        """Whether a module stays as it is."""
        return any(fnmatchcase(module, pattern) for pattern in self.ignore)
