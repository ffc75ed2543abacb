"""kv_cache_scales.json, the file of vLLM's `--quantization-param-path`, which Ascend-vLLM and SGLang read too.

    {"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {RANK: {LAYER: STEP}}}}

STEP serves keys and values alike. It is a number, for all KV heads of the tensor-parallel rank, or a list with one
number for each of them. Every rank reads its own entry, so ranks with different numbers mean different steps of their
heads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.quantize.scales.kv_scales import KVScales, flaw_of, known_codes
from kvant.quantize.scales.ranks import join, split
from kvant.quantize.scales.writing import write_whole
from kvant.weights.sources.safetensors import read_json

PARAM_FILE = "kv_cache_scales.json"


def read_param_file(path: Path, num_layers: int, num_kv_heads: int) -> KVScales:
    """The scales of a file in this layout. Its "dtype" says nothing about the codes; kvant's files have "codes".

    Raises:
        CorruptModelError: the file has another layout, or not exactly one usable entry for each rank and layer.
    """
    ranks = _numbered(_scaling_factor(path), f"{path}: kv_cache.scaling_factor", "tensor-parallel rank")
    tables = [_numbered(table, f"{path}: rank {rank}", "layer") for rank, table in enumerate(ranks)]
    for rank, table in enumerate(tables):
        if len(table) != num_layers:
            raise CorruptModelError(
                f"{path}: rank {rank} has scales for {len(table)} layers, the model has {num_layers} layers; use the "
                "file that was made for this model"
            )
    steps = tuple(
        join(
            [_step(table[layer], f"{path}: layer {layer}") for table in tables], num_kv_heads, f"{path}: layer {layer}"
        )
        for layer in range(num_layers)
    )
    return KVScales(steps, steps, known_codes(read_json(path).get("codes")))


def write_param_file(path: Path, scales: KVScales, *, model_type: str | None = None, tp_size: int = 1) -> None:
    """Write scales in this layout, the whole file or nothing. Where keys and values differ, the larger step is written.

    Args:
        path: the file; one that is there is replaced.
        scales: [kv_heads] steps are split over the ranks.
        model_type: of the model's config.json; vLLM refuses a file that names another.
        tp_size: tensor-parallel ranks that will read the file.

    Raises:
        ConfigError: the KV heads do not divide over the ranks, or the file cannot be written.
    """
    parts = [split(step, tp_size) for step in scales.shared()]
    factors = {
        str(rank): {str(layer): part[rank].tolist() for layer, part in enumerate(parts)} for rank in range(tp_size)
    }
    # vLLM and SGLang refuse any other dtype; engines with int8 codes do not read it.
    document: dict[str, Any] = {
        "model_type": model_type,
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": factors},
    }
    if scales.codes is not None:
        document["codes"] = scales.codes
    write_whole(path, (json.dumps(document, indent=4) + "\n").encode())


def _scaling_factor(path: Path) -> Any:
    cache = read_json(path).get("kv_cache")
    factors = cache.get("scaling_factor") if isinstance(cache, dict) else None
    if not isinstance(factors, dict) or not factors:
        raise CorruptModelError(
            f'{path} is no file of KV scales: {{"kv_cache": {{"scaling_factor": {{"0": {{"0": 0.0123}}}}}}}} was '
            "expected, by rank and layer; `kvant extract-scales` writes one"
        )
    return factors


def _numbered(table: Any, where: str, kind: str) -> list[Any]:
    """The values of {"0": ..., "1": ...} in order."""
    if not isinstance(table, dict):
        raise CorruptModelError(f"{where} must be an object with one entry for each {kind}, not {table!r:.40}")
    entries = {}
    for key, value in table.items():
        # The oldest files say "rank0".
        if (match := re.fullmatch(r"(?:rank)?(0|[1-9][0-9]{0,5})", key)) is None:
            raise CorruptModelError(f"{where}: {key!r} is no number of a {kind}; count them from 0")
        entries[int(match[1])] = value
    missing = next((index for index in range(len(table)) if index not in entries), None)
    if missing is not None or not entries:
        raise CorruptModelError(
            f"{where} has no entry for {kind} {missing or 0}; write the file again, with all of them"
        )
    return [entries[index] for index in range(len(entries))]


def _step(entry: Any, where: str) -> Tensor:
    """An entry as a scalar or a vector, float32."""
    numbers = entry if isinstance(entry, list) else [entry]
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise CorruptModelError(f"{where}: {entry!r:.40} is no scale; give a number, or a list of one for each KV head")
    # An integer may be too large for any float.
    floats = [float(min(max(number, -1e300), 1e300)) if isinstance(number, int) else number for number in numbers]
    step = torch.tensor(floats, dtype=torch.float64).float()
    if flaw := flaw_of(step):
        raise CorruptModelError(f"{where}: {entry!r:.40} is {flaw} as a 32-bit scale; calibrate the model again")
    return step if isinstance(entry, list) else step[0]
