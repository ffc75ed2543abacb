"""Which codec a checkpoint's notes on its quantization ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvant.errors import UnsupportedModelError
from kvant.weights.codecs.awq import AwqCodec
from kvant.weights.codecs.codec import Codec, object_of
from kvant.weights.codecs.compressed_tensors import CompressedTensorsCodec
from kvant.weights.codecs.gptq import GptqCodec

Note = Mapping[str, Any]

_CODECS: Mapping[str, Callable[[Note, Path], Codec]] = MappingProxyType(
    {"awq": AwqCodec, "gptq": GptqCodec, "compressed-tensors": CompressedTensorsCodec}
)
# With these methods, a checkpoint may have a quantized KV cache and nothing else.
_KEEP_PLAIN_WEIGHTS = ("compressed-tensors", "modelopt")


def codec_for(notes: Iterable[Note], where: Path) -> Codec | None:
    """The codec of a checkpoint's quantized weights; None for plain ones, beside which scales for a KV cache may lie.

    Which modules are quantized, their tensors tell.

    Args:
        notes: what its files say of its quantization.
        where: the checkpoint, for errors.

    Raises:
        UnsupportedModelError: a method, or a layout of it, that is not read.
        CorruptModelError: a note contradicts itself.
    """
    codecs = []
    for note in notes:
        method = str(note.get("quant_method") or object_of(note, "producer").get("name") or "unknown")
        if method in _KEEP_PLAIN_WEIGHTS and not _quantizes_weights(note):
            continue
        if method not in _CODECS:
            raise UnsupportedModelError(
                f"{where}: checkpoints quantized by {method!r} are not read; kvant reads {', '.join(_CODECS)}, and "
                "16-bit weights"
            )
        codecs.append(_CODECS[method](note, where))
    return codecs[0] if codecs else None


def _quantizes_weights(note: Note) -> bool:
    groups = object_of(note, "config_groups")
    quantized = note.get("quant_algo") or any(object_of(groups, name).get("weights") for name in groups)
    return bool(quantized) or object_of(note, "sparsity_config").get("format", "dense") != "dense"
