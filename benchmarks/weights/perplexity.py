"""Perplexity of checkpoints in any format that kvant reads, with the values that they store, in float32.

A model is read layer by layer, so that memory holds one layer and the texts' hidden states. Changes are relative to the
first model that is named, token by token on the same windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.models.families import model_spec
from kvant.quantize.chunked import ChunkedOps
from kvant.quantize.reader import Reader
from kvant.quantize.scores import standard_error
from kvant.quantize.texts import cut_windows, read_text_file
from kvant.weights.load import WeightLoader, open_source
from kvant.weights.matrices import MatrixReader
from kvant.weights.tokenizer import read_tokenizer

TEXTS_AT_ONCE = 4
ROWS = 64


@torch.no_grad()
def losses(path: Path, windows: Tensor) -> Tensor:
    """Negative log-likelihoods of the windows' tokens but the first, [windows, predictions] float64, in nats."""
    source, ops = open_source(path), ChunkedOps()
    spec = model_spec(source.config)
    # "auto" keeps what rounds its inputs, and expands the rest.
    loader = WeightLoader(source, spec, MatrixReader(source, torch.float32, "auto", False), ops)
    reader = Reader.of(spec, ops, TEXTS_AT_ONCE, windows.shape[1])
    embedding = loader.embedding()
    texts = [embedding[ids.flatten()] * spec.embedding_scale for ids in windows.split(TEXTS_AT_ONCE)]
    for index in range(len(spec.layers)):
        weights = loader.layer(index)
        texts = [reader.layer(index, weights, hidden) for hidden in texts]
    hidden = torch.cat([ops.rms_norm(text, loader.norm(), spec.rms_eps) for text in texts])
    hidden = hidden.view(*windows.shape, -1)[:, :-1].flatten(0, 1)
    targets, head, cap = windows[:, 1:].flatten(), loader.head(), spec.final_softcap
    # Made before the loop: small results that are kept between large blocks would leave the heap full of holes.
    found = torch.empty(len(targets), dtype=torch.float64)
    for first in range(0, len(targets), ROWS):
        rows = slice(first, first + ROWS)
        logits = head(ops, hidden[rows])
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        found[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
    return found.view(len(windows), -1)


def measured(names: dict[str, Path], text: Path, count: int, length: int) -> dict[str, dict[str, float]]:
    """A row for each checkpoint."""
    first = next(iter(names.values()))
    windows = torch.tensor(cut_windows(read_text_file(text), read_tokenizer(open_source(first)), count, length))
    plain, rows = None, {}
    for name, path in names.items():
        found = losses(path, windows)
        plain = found if plain is None else plain
        difference, ppl = found - plain, float(found.mean().exp())
        ratio = float(difference.mean().exp())
        rows[name] = {"ppl": ppl, "change": ratio - 1, "change_stderr": ratio * standard_error(difference)}
        print(f"{name:40} {ppl:9.4f} {ratio - 1:+8.2%} ± {rows[name]['change_stderr']:.2%}", flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="NAME=PATH, or a path; the first is the original")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = (model.split("=", 1) if "=" in model else (Path(model).name, model) for model in args.models)
    rows = measured({name: Path(path) for name, path in pairs}, args.text, args.windows, args.window_size)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
