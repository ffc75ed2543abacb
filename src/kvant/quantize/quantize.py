"""From a model's name and a text to a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kvant.errors import ConfigError
from kvant.models.families import model_spec
from kvant.quantize.documents import read_documents
from kvant.quantize.outcome import Outcome
from kvant.quantize.recipe import Recipe
from kvant.quantize.run import Texts, quantize
from kvant.quantize.texts import Window, calibration_text, cut_windows
from kvant.quantize.unfinished import Unfinished
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import open_source
from kvant.weights.locate import locate
from kvant.weights.save import CheckpointWriter
from kvant.weights.tokenizer import read_tokenizer

UNSEEN_WINDOWS, UNSEEN_SIZE = 8, 512


def quantize_model(
    model: str | Path | None,
    out: Path,
    recipe: Recipe,
    *,
    calib: Path | None = None,
    unseen: str,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Quantize a model into a new directory, and measure what it costs.

    Args:
        model: as `kvant.pipeline` takes it.
        out: the directory that is made. An interrupted run leaves OUT.partial, and the same call goes on with it.
        recipe: how.
        calib: a file of text, JSON lines or chats that layers are quantized on; None takes the text that comes with
            kvant.
        unseen: another text, which the cost is measured on.
        num_threads: CPU threads; None leaves the choice to PyTorch.
        progress: called with how many layers are done, and how many there are.

    Raises:
        KvantError: with the cause. A directory that looks whole is whole.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another directory, or remove it")
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads={num_threads} must be at least 1")
    source = open_source(locate(model))
    tokenizer, limit = read_tokenizer(source), model_spec(source.config).max_position
    if recipe.seqlen > limit:
        raise ConfigError(f"seqlen={recipe.seqlen} is longer than the model's context of {limit} tokens")
    text = calibration_text() if calib is None else read_documents(calib, tokenizer)
    name = "speeches that come with kvant" if calib is None else calib.name
    windows = cut_windows(text, tokenizer, recipe.samples, recipe.seqlen)
    texts = Texts(name, windows, _unseen_windows(unseen, tokenizer, min(UNSEEN_SIZE, limit)))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return quantize(source, out, recipe, texts, progress)


def is_begun(out: Path) -> bool:
    """Whether a run into this directory was interrupted, and can be gone on with."""
    return Unfinished.is_kept(CheckpointWriter(out, 0).partial)


def _unseen_windows(text: str, tokenizer: Tokenizer, size: int) -> tuple[Window, ...]:
    """As many windows as there are, up to some."""
    count = min(UNSEEN_WINDOWS, len(tokenizer.encode(text, add_special_tokens=False)) // size)
    return cut_windows(text, tokenizer, max(count, 1), size)
