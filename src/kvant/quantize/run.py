"""Quantizing a model: one layer after the other is read, quantized and written, and the texts go on to the next.

In memory are one layer and the next, the statistics of one linear, and the hidden states of all texts. Beside the texts
that layers are quantized on goes an unseen one, through the layers as they were and as they have become: it tells what
the quantization costs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kvant.errors import ConfigError, NotFiniteError, UnsupportedModelError
from kvant.models.families import family_of, model_spec
from kvant.models.layers import LayerWeights
from kvant.models.spec import ModelSpec
from kvant.quantize.chunked import ChunkedOps, UnpreparedOps
from kvant.quantize.folds import Fold, find_folds
from kvant.quantize.grid import GridSpec
from kvant.quantize.layer import LayerQuantizer, QuantizedLayer
from kvant.quantize.methods import METHODS
from kvant.quantize.outcome import REPORT_FILE, Outcome, model_card, unseen_scores
from kvant.quantize.reader import Reader, prepared
from kvant.quantize.recipe import Recipe
from kvant.quantize.stored import StoredModel
from kvant.quantize.texts import Window
from kvant.quantize.unfinished import Streams, Unfinished
from kvant.version import __version__
from kvant.weights.codecs.plain import read_vector
from kvant.weights.codecs.writing import Layout, writer
from kvant.weights.hf_config import hf_config
from kvant.weights.load import CHECKPOINT_DTYPES, WeightLoader, check_places
from kvant.weights.matrices import MatrixReader
from kvant.weights.parts import fused_linears
from kvant.weights.save import CheckpointWriter
from kvant.weights.source import TensorSource

Progress = Callable[[int, int], None]

_TEXTS_AT_ONCE = 8
_TRIAL_TOKENS = 32  # that folds are tried on


@dataclass(frozen=True)
class Texts:
    """Token ids, windows of one length.

    Attributes:
        name: what the calibration text is called.
        calibration: what layers are quantized on.
        unseen: what tells the cost.
    """

    name: str
    calibration: Sequence[Window]
    unseen: Sequence[Window]


def quantize(source: TensorSource, out: Path, recipe: Recipe, texts: Texts, progress: Progress) -> Outcome:
    """Quantize an open checkpoint into a new directory, or go on with a run that was interrupted.

    Args:
        source: the checkpoint.
        out: the directory; OUT.partial is what it is called until it is whole.
        recipe: how.
        texts: that are read.
        progress: called with how many layers are done, and how many there are.

    Raises:
        KvantError: the directory exists or cannot be written, the format has no place for what the recipe asks for,
            which is told before any work; the model gives nothing finite on the text.
    """
    # Not inference mode, which would keep the threads that read a file from filling tensors made here.
    with torch.no_grad():
        return _Run.of(source, out, recipe, texts).all(texts, progress)


@dataclass(frozen=True)
class _Run:
    source: TensorSource
    recipe: Recipe
    loader: WeightLoader
    stored: StoredModel
    checkpoint: CheckpointWriter
    layouts: Mapping[str, Layout]
    reader: Reader
    unseen_reader: Reader
    settings: Mapping[str, object]

    @classmethod
    def of(cls, source: TensorSource, out: Path, recipe: Recipe, texts: Texts) -> _Run:
        """Ready to begin; what can be told before is told here."""
        spec, config = model_spec(source.config), hf_config(source)
        stored_spec = model_spec(config)
        dtype = (
            CHECKPOINT_DTYPES.get(spec.dtype, torch.bfloat16)
            if recipe.format == "compressed-tensors"
            else torch.float16
        )
        stored = StoredModel(stored_spec, family_of(config).names, writer(recipe.format), dtype)
        recipe = _with_one_group(recipe, stored) if recipe.format == "awq" else recipe
        loader = WeightLoader(source, spec, MatrixReader(source, torch.float32, "dense", False), UnpreparedOps())
        check_places(source, set(source.shapes()) - loader.places())
        return cls(
            source=source,
            recipe=recipe,
            loader=loader,
            stored=stored,
            checkpoint=CheckpointWriter(out, len(spec.layers) + 1),
            layouts=_checked_layouts(stored, recipe),
            reader=Reader.of(spec, ChunkedOps(), _TEXTS_AT_ONCE, len(texts.calibration[0])),
            unseen_reader=Reader.of(spec, ChunkedOps(), _TEXTS_AT_ONCE, len(texts.unseen[0])),
            settings=_settings(source, recipe, texts),
        )

    @property
    def spec(self) -> ModelSpec:
        return self.loader.spec

    def all(self, texts: Texts, progress: Progress) -> Outcome:
        """From the first layer, or where an interrupted run stopped, to the end."""
        self.checkpoint.make()
        with self.checkpoint.locked():
            return self._all(texts, progress)

    def _all(self, texts: Texts, progress: Progress) -> Outcome:
        begun = time.monotonic()
        run = Unfinished.load(self.checkpoint.partial, self.settings)
        if run is None:
            self.checkpoint.clear()
            run = self._start(texts)
        self.checkpoint.check(run.layer + 1)
        begun -= run.seconds
        count = len(self.spec.layers)
        progress(run.layer, count)
        following = self._read(run.layer)
        for index in range(run.layer, count):
            layer = following  # before the next is read: no more than two are held
            following = self._read(index + 1)
            assert layer is not None
            streams, result = self._layer(index, layer, following, run.streams)
            self.checkpoint.write(index + 2, self.stored.layer(index, result.weights))
            run = Unfinished(index + 1, streams, run.reports + result.linears, time.monotonic() - begun)
            run.save(self.checkpoint.partial, self.settings)
            progress(index + 1, count)
        scores = unseen_scores(self.loader, run.streams.original, run.streams.quantized, texts.unseen)
        seconds = time.monotonic() - begun
        return self._finish(
            Outcome.of(self.source, self.recipe, texts.name, self.checkpoint.size, run.reports, scores, seconds)
        )

    def _finish(self, outcome: Outcome) -> Outcome:
        """Write what is said of the checkpoint, and give it its name."""
        ignored = sorted({self.stored.names.head, *_ignored(self.stored, self.recipe)})
        note = self.stored.writer.config(self.layouts, ignored)
        dtype = str(self.stored.dtype).removeprefix("torch.")
        self.checkpoint.write_json(REPORT_FILE, outcome.as_json())
        self.checkpoint.write_text("README.md", model_card(outcome, self.checkpoint.out.name))
        config = {**hf_config(self.source), "torch_dtype": dtype, "quantization_config": note}
        config.pop("dtype", None)
        self.checkpoint.complete(config, self.source)
        Unfinished.forget(self.checkpoint.partial)
        self.checkpoint.publish()
        return outcome

    def _start(self, texts: Texts) -> Unfinished:
        """Write what stays as it is, and look up the texts' embeddings."""
        names, stored, spec = self.loader.names, self.stored, self.spec
        shape = (spec.vocab_size, spec.hidden_size)
        embedding = self.source.checked(f"{names.embedding}.weight", shape, stored.dtype)
        tensors = {
            f"{stored.names.embedding}.weight": stored.dense(names.embedding, embedding),
            f"{stored.names.norm}.weight": stored.norm(names.norm, self.loader.norm()),
        }
        if not spec.tied_embeddings:
            head = self.source.checked(f"{names.head}.weight", shape, stored.dtype)
            tensors[f"{stored.names.head}.weight"] = stored.dense(names.head, head)
        if (bias := self._head_bias()) is not None:
            tensors[f"{stored.names.head}.bias"] = stored.dense(names.head, bias)
        self.checkpoint.write(1, tensors)
        embed = partial(_embedded, embedding, spec.embedding_scale)
        unseen = embed(texts.unseen)
        return Unfinished(0, Streams(embed(texts.calibration), unseen, list(unseen)), (), 0.0)

    def _head_bias(self) -> Tensor | None:
        spec, names = self.spec, self.loader.names
        name = names.embedding if spec.tied_embeddings else names.head
        return read_vector(self.source, f"{name}.bias", spec.vocab_size, self.stored.dtype)

    def _read(self, index: int) -> LayerWeights | None:
        """A layer as it is stored; None after the last."""
        return self.loader.layer(index) if index < len(self.spec.layers) else None

    def _layer(
        self, index: int, layer: LayerWeights, following: LayerWeights | None, streams: Streams
    ) -> tuple[Streams, QuantizedLayer]:
        """A layer quantized, and the texts after it."""
        specs = self._specs(index, layer)
        folds = {
            kind: fold
            for kind, fold in self._folds(index, layer, streams.calibration[0]).items()
            if fold.stored is not None or fold.producer in specs  # what is ignored is not changed either
        }
        dense = prepared(layer, ChunkedOps())
        original = [self.unseen_reader.layer(index, dense, hidden) for hidden in streams.original]
        del dense
        quantizer = LayerQuantizer(self.reader, METHODS[self.recipe.method], specs, self.recipe.method == "auto")
        try:
            result, calibration = quantizer(index, layer, following, folds, streams.calibration)
        except NotFiniteError as error:
            remedy = "the model cannot be quantized on this text: give another text, or check the model's files"
            raise NotFiniteError(f"layer {index} of {self.source.path}: {error}; {remedy}") from error
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"layer {index} of {self.source.path}: {error}") from error
        rounded = prepared(result.weights, ChunkedOps())
        quantized = [self.unseen_reader.layer(index, rounded, hidden) for hidden in streams.quantized]
        return Streams(calibration, original, quantized), result

    def _folds(self, index: int, layer: LayerWeights, hidden: Tensor) -> dict[str, Fold]:
        sample = hidden[: min(_TRIAL_TOKENS, self.reader.length)]
        reader = Reader.of(self.spec, UnpreparedOps(), 1, len(sample))
        stored = self.stored
        return find_folds(
            layer, stored.spec, stored.dtype, lambda changed: reader.layer(index, changed, sample) - sample
        )

    def _specs(self, index: int, layer: LayerWeights) -> dict[str, GridSpec]:
        """What each linear's codes are like, but for those that stay as they are."""
        return {
            kind: _grid(self.recipe, linear.weight.in_features, self.stored.dtype)
            for kind, linear in layer.linears.items()
            if not any(map(self.recipe.ignores, self.stored.modules(index, kind)))
        }


def _embedded(embedding: Tensor, scale: float, windows: Sequence[Window]) -> list[Tensor]:
    """The hidden states before the first layer, of some texts each."""
    ids = torch.tensor(windows)
    return [embedding[some.flatten()].float() * scale for some in ids.split(_TEXTS_AT_ONCE)]


def _grid(recipe: Recipe, columns: int, dtype: torch.dtype) -> GridSpec:
    return GridSpec(recipe.bits or 4, recipe.group(columns), bool(recipe.symmetric), dtype)


def _with_one_group(recipe: Recipe, stored: StoredModel) -> Recipe:
    """With the group size that fits all layers, for a format that has no other."""
    widths = {fused.columns for fused in fused_linears(stored.spec, stored.names).values()}
    return dataclasses.replace(recipe, group_size=min(map(recipe.group, widths)))


def _ignored(stored: StoredModel, recipe: Recipe) -> list[str]:
    """The projections that stay as they are: those that the recipe names, and those that are fused with them."""
    kinds = fused_linears(stored.spec, stored.names)
    groups = (stored.modules(index, kind) for index in range(len(stored.spec.layers)) for kind in kinds)
    return [module for modules in groups if any(map(recipe.ignores, modules)) for module in modules]


def _checked_layouts(stored: StoredModel, recipe: Recipe) -> dict[str, Layout]:
    """What each module will be like.

    Raises:
        ConfigError, UnsupportedModelError: the format has no place for it, or nothing is left to be quantized.
    """
    _check_patterns(stored, recipe)
    layouts, ignored = {}, set(_ignored(stored, recipe))
    inputs: Literal["token", "none"] = "token" if recipe.method == "smoothquant" else "none"
    for kind, fused in fused_linears(stored.spec, stored.names).items():
        grid = _grid(recipe, fused.columns, stored.dtype)
        whole = grid.group_size == fused.columns
        layout = Layout(grid.bits, grid.group_size, grid.symmetric, inputs, whole)
        for index in range(len(stored.spec.layers)):
            for module, part in zip(stored.modules(index, kind), fused.parts, strict=True):
                if module not in ignored:
                    stored.writer.check(layout, module, (part.rows, fused.columns))
                    layouts[module] = layout
    if not layouts:
        raise ConfigError(f"ignore={list(recipe.ignore)} leaves nothing to quantize")
    stored.writer.config(layouts, sorted(ignored))
    return layouts


def _check_patterns(stored: StoredModel, recipe: Recipe) -> None:
    kinds = fused_linears(stored.spec, stored.names)
    names = [name for index in range(len(stored.spec.layers)) for kind in kinds for name in stored.modules(index, kind)]
    for pattern in recipe.ignore:
        if not any(fnmatchcase(name, pattern) for name in (*names, stored.names.head)):
            raise ConfigError(f"ignore={pattern!r} is no module's name, such as {names[-1]!r}; '*' stands for any text")


def _settings(source: TensorSource, recipe: Recipe, texts: Texts) -> dict[str, object]:
    """What must be the same for an interrupted run to be gone on with; in JSON's types."""
    stamps = [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in sorted(source.files())]
    model, text = (hashlib.sha256(repr(facts).encode()).hexdigest() for facts in (stamps, texts))
    settings = dataclasses.asdict(recipe) | {"ignore": list(recipe.ignore)}
    return {**settings, "kvant version": __version__, "model": model, "text": text}
