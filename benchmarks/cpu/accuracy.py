"""What the native kernels' rounding costs: the same model and formats on them and on the reference backend.

The reference computes in float32 on the same weights of few bits and the same KV cache. What differs is activations in
8 bits and attention in integers, of prompts and of decodes, which have kernels of their own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import commit, describe_machine
from torch import Tensor

from kvant.config import EngineConfig
from kvant.evaluate.rows import Row, summarize
from kvant.kernels.ops import AttentionBatch
from kvant.models.forcing import new_store
from kvant.quantize.kv_plan import plan_kv_cache
from kvant.quantize.load import load_configured
from kvant.quantize.scores import Scores, score
from kvant.quantize.texts import cut_windows, read_text_file
from kvant.weights.load import LoadedModel, open_source
from kvant.weights.tokenizer import read_tokenizer

ROWS = 128  # of logits at once


@torch.inference_mode()
def logits_of(model: LoadedModel, plan: Any, window: Sequence[int], at_once: int) -> list[Tensor]:
    """Of all tokens but the last, which is not followed, computed so many at once."""
    store, ids = new_store(model.decoder, plan, len(window)), torch.tensor(window[:-1])
    table, states = torch.arange(store.num_blocks).unsqueeze(0), []
    for positions in torch.arange(len(ids)).split(at_once):
        stop = int(positions[-1]) + 1
        batch = AttentionBatch(positions, positions + store.paging.lead, (0, len(positions)), (stop,), table)
        states.append(model.decoder.forward(ids[positions], batch, positions + 1, store.layers))
    return [model.decoder.logits(rows) for rows in torch.cat(states).split(ROWS)]


def compare(
    models: dict[str, LoadedModel], plan: Any, windows: Sequence[Sequence[int]], ways: dict[str, int]
) -> list[Row]:
    """A row for the reference and one for each way of the native kernels: its name, and how many tokens at once."""
    parts: dict[str, list[Scores]] = {"reference": [], **{way: [] for way in ways}}
    for window in windows:
        baseline = logits_of(models["reference"], plan, window, len(window))
        found = {"reference": baseline} | {
            way: logits_of(models["native"], plan, window, at_once) for way, at_once in ways.items()
        }
        targets = torch.tensor(window[1:]).split(ROWS)
        for way, logits in found.items():
            pieces = [score(*three) for three in zip(baseline, logits, targets, strict=True)]
            parts[way].append(_joined(pieces, torch.cat))
    scores = {way: _joined(of_way, torch.stack) for way, of_way in parts.items()}
    return [summarize(way, plan.name, 0.0, of_way, scores["reference"]) for way, of_way in scores.items()]


def _joined(parts: Sequence[Scores], join: Any) -> Scores:
    return Scores(*(join([getattr(part, name) for part in parts]) for name in Scores.__dataclass_fields__))


def load_both(path: Path, config: EngineConfig) -> dict[str, LoadedModel]:
    """The model on the native kernels, and on the reference backend."""
    native = load_configured(open_source(path), config)
    chosen = os.environ.get("KVANT_CPU_ISA")
    os.environ["KVANT_CPU_ISA"] = "reference"
    reference = load_configured(open_source(path), config)
    os.environ.pop("KVANT_CPU_ISA")
    if chosen:
        os.environ["KVANT_CPU_ISA"] = chosen
    if native.decoder.ops.name == reference.decoder.ops.name:
        raise SystemExit("no native kernels run here: there is nothing to compare")
    return {"native": native, "reference": reference}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--kv", default="fp16,int8,int4", help="KV cache formats")
    parser.add_argument("--ways", default="prompt,decode")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    config = EngineConfig(weights="int4", weights_group_size=32, dtype="float32")
    models, tokenizer = load_both(args.model, config), read_tokenizer(open_source(args.model))
    windows = cut_windows(read_text_file(args.text), tokenizer, args.windows, args.window_size)
    ways = {way: {"prompt": args.window_size, "decode": 1}[way] for way in args.ways.split(",")}
    results = {}
    for name in args.kv.split(","):
        plan = plan_kv_cache(EngineConfig(kv_cache_dtype=name), models["native"], tokenizer)
        rows = compare(models, plan, windows, ways)
        results[name] = {row.kv_cache_dtype: row.__dict__ for row in rows}
        for row in rows:
            change = f"{row.ppl_change:+8.3%} ± {row.ppl_change_stderr:.3%}"
            print(f"{name:6} {row.kv_cache_dtype:10} {row.ppl:9.4f} {change}  KL {row.kl:.5f}", flush=True)
    if args.out:
        head = {"machine": describe_machine(), "commit": commit(), "isa": models["native"].decoder.ops.name}
        args.out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
