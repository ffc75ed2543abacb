"""Perplexity of checkpoints in any format that kvant reads, with the values that they store, in float32.

A model is read layer by layer, so that memory holds one layer and the texts' hidden states. KL and top-1 are against
the first model that is named.
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
from kvant.quantize.scores import Scores, score_all, standard_error
from kvant.quantize.texts import cut_windows, read_text_file
from kvant.weights.load import WeightLoader, open_source
from kvant.weights.matrices import MatrixReader
from kvant.weights.tokenizer import read_tokenizer

TEXTS_AT_ONCE = 4
ROWS = 64


@torch.no_grad()
def hidden_states(path: Path, windows: Tensor) -> tuple[Tensor, Tensor]:
    """After the last norm, [windows, length, hidden], and the output head [vocab, hidden]."""
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
    return hidden.view(*windows.shape, -1), loader.head().weight


@torch.no_grad()
def scores(baseline: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], windows: Tensor) -> Scores:
    """Every prediction of the windows, [windows, predictions]."""
    (expected, head), (hidden, other) = ((states[:, :-1].flatten(0, 1), matrix) for states, matrix in (baseline, found))
    targets = windows[:, 1:].flatten()
    found = score_all(
        lambda rows: F.linear(expected[rows], head), lambda rows: F.linear(hidden[rows], other), targets, ROWS
    )
    return found.by_window(len(windows))


def measured(names: dict[str, Path], text: Path, count: int, length: int) -> dict[str, dict[str, float]]:
    """A row for each checkpoint."""
    first = next(iter(names.values()))
    windows = torch.tensor(cut_windows(read_text_file(text), read_tokenizer(open_source(first)), count, length))
    baseline, rows = hidden_states(first, windows), {}
    plain = scores(baseline, baseline, windows)
    for name, path in names.items():
        found = plain if path == first else scores(baseline, hidden_states(path, windows), windows)
        ppl, difference = float(found.nll.mean().exp()), found.nll - plain.nll
        rows[name] = {
            "ppl": ppl,
            "change": float(difference.mean().exp()) - 1,
            "change_stderr": float(difference.mean().exp()) * standard_error(difference) if path != first else 0.0,
            "kl": float(found.kl.mean()),
            "top1": float(found.agrees.mean()),
        }
        print(f"{name:40} ppl {ppl:8.4f} {rows[name]['change']:+.2%} KL {rows[name]['kl']:.4f}", flush=True)
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
