"""What a checkpoint says of its static scales: kv_cache_scheme in config.json, or ModelOpt's hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvant.errors import UnsupportedModelError
from kvant.quantize.scales.kv_scales import Codes
from kvant.weights.sources.safetensors import quantization_notes, read_json

SCHEME_FILE = "kv_cache_scheme.json"
MODELOPT_FILE = "hf_quant_config.json"

_NUMBER_TYPES: Mapping[str, Codes] = {"int": "int8", "float": "fp8"}
_ALGORITHMS: Mapping[str, Codes] = {"INT8": "int8", "FP8": "fp8"}


def declared_codes(directory: Path) -> Codes | None:
    """What the checkpoint's scales were measured for; None where it does not say.

    Raises:
        UnsupportedModelError: for a cache that is no 8-bit static symmetric one, whose scales mean something else.
    """
    ours = read_json(directory / SCHEME_FILE).get("quantization_config")
    # TensorRT-LLM's config.json has the "quantization" of a ModelOpt note at its top.
    theirs = read_json(directory / "config.json").get("quantization")
    notes = [*quantization_notes(directory), *(note for note in (ours, theirs) if isinstance(note, dict))]
    schemes = (note.get("kv_cache_scheme") or note.get("kv_cache_quant_algo") for note in notes)
    scheme = next((scheme for scheme in schemes if scheme), None)
    return None if scheme is None else _codes(scheme, directory)


def _codes(scheme: Any, directory: Path) -> Codes:
    if isinstance(scheme, Mapping):
        symmetric = scheme.get("symmetric", True) and not scheme.get("dynamic", False)
        per_head = scheme.get("strategy") in (None, "tensor", "attn_head")
        codes = _NUMBER_TYPES.get(str(scheme.get("type", "")))
        codes = codes if scheme.get("num_bits", 8) == 8 and symmetric and per_head else None
    else:
        codes = _ALGORITHMS.get(str(scheme).upper())
    if codes is None:
        raise UnsupportedModelError(
            f"{directory}: the checkpoint's KV cache is quantized as {scheme}; kvant reads static symmetric scales of "
            "int8 and fp8, one a layer or one a KV head. Calibrate the model for one of these"
        )
    return codes


def compressed_tensors_scheme(codes: Codes, *, per_head: bool) -> dict[str, Any]:
    """The entry for config.json: weights as they are, a KV cache with static scales."""
    number_type = next(name for name, meant in _NUMBER_TYPES.items() if meant == codes)
    scheme = {
        "num_bits": 8,
        "type": number_type,
        "strategy": "attn_head" if per_head else "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    method = {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": []}
    return {"quantization_config": {**method, "kv_cache_scheme": scheme}}


def modelopt_note(codes: Codes) -> dict[str, Any]:
    """The content of hf_quant_config.json: weights as they are, a KV cache with static scales."""
    algorithm = next(name for name, meant in _ALGORITHMS.items() if meant == codes)
    # Readers tell ModelOpt's layout by the producer's name.
    return {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": algorithm, "exclude_modules": []},
    }
