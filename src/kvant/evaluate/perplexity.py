"""What keeping the KV cache in fewer bits costs: perplexity, KL divergence, changed tokens.

The model reads windows of a text. Every key and value that is attended to is the stored one, also within a prompt, so
the numbers are those of decoding. Each format is compared with a 16-bit cache, token by token, on the same windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvant.config import EngineConfig
from kvant.errors import ConfigError, NotFiniteError
from kvant.evaluate.rows import Row, summarize
from kvant.evaluate.texts import BUNDLED_TEXT, check_windows, read_text
from kvant.formats.kv import KVFormat, KVPlan, resolve_kv_format
from kvant.models.decoder import Decoder
from kvant.models.families import model_spec
from kvant.models.forcing import force, new_store
from kvant.quantize.kv_plan import check_kv_settings, plan_kv_cache
from kvant.quantize.load import load_configured
from kvant.quantize.scores import Scores, score
from kvant.quantize.texts import Window, cut_windows
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import LoadedModel, open_source
from kvant.weights.locate import DEFAULT_MODEL, locate
from kvant.weights.source import TensorSource
from kvant.weights.tokenizer import read_tokenizer
from kvant.weights.workspace import WorkspaceSource

BASELINE = "auto"

_ROWS = 64  # predictions compared at once: bounds the logits

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Comparison:
    """The rows of several KV caches, the baseline's first, and what they were measured on."""

    model: str
    text: str
    engine: EngineConfig
    dtype: str
    rows: tuple[Row, ...]


def compare_kv_formats(
    model: str | Path | None,
    formats: Sequence[str],
    *,
    engine: EngineConfig | None = None,
    text: Path | None = None,
    windows: int = 8,
    window_size: int = 1024,
    progress: Progress = _silent,
) -> Comparison:
    """What each KV-cache format costs a model, against a 16-bit cache.

    Args:
        model: as `kvant.pipeline` takes it.
        formats: names of KV-cache formats.
        engine: how the model is run; each format takes the place of its `kv_cache_dtype`.
        text: a UTF-8 file; None takes the bundled text.
        windows: how many consecutive pieces of the text are read, from its beginning.
        window_size: tokens in each of them, BOS included where the tokenizer adds one.
        progress: see `compare_kv`.

    Raises:
        KvantError: an unknown format, an unreadable or too short text, a window too long for the model, or whatever
            keeps the model from being loaded.
    """
    engine = engine or EngineConfig()
    content, path = read_text(text), locate(model)
    source = open_source(path)
    spec, kept = model_spec(source.config), _without_noise(engine, source)
    for name in formats:  # all that can be told early is told before the weights are read
        check_kv_settings(dataclasses.replace(engine, kv_cache_dtype=name), spec, torch.float32)
    check_windows(windows, window_size, spec.max_position)
    tokenizer = read_tokenizer(source)
    pieces = cut_windows(content, tokenizer, windows, window_size)
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    loaded = load_configured(source, kept)
    rows = compare_kv(loaded, _plans(engine, formats, loaded, tokenizer), pieces, progress)
    dtype = str(loaded.dtype).removeprefix("torch.")
    return Comparison(_shown(model or DEFAULT_MODEL), _shown(text or BUNDLED_TEXT), engine, dtype, rows)


def _without_noise(engine: EngineConfig, source: TensorSource) -> EngineConfig:
    """Stored blocks expanded: kernels that compute on them round activations, which covers what a good format costs.

    Weights that the user had rounded stay so, when they are loaded and in a converted model.
    """
    if engine.weights != "auto":
        return engine
    if not isinstance(source, WorkspaceSource):
        return dataclasses.replace(engine, weights="dense")
    if source.made.weights == "auto" and source.is_quantized():
        raise ConfigError(
            f"{source.path} is a converted model, whose weights cannot be expanded any more; what a KV cache costs is "
            "measured so. Use the model it was made from."
        )
    return engine


def _shown(name: str | Path) -> str:
    """A file by its name alone: where it lies says nothing about the result."""
    return Path(name).name if Path(name).exists() else str(name)


def _plans(engine: EngineConfig, formats: Sequence[str], model: LoadedModel, tokenizer: Tokenizer) -> dict[str, KVPlan]:
    """Each format's plan; that of "auto" only where the config gives some layer another format than the baseline's."""
    configs = {name: dataclasses.replace(engine, kv_cache_dtype=name) for name in formats}
    plans = {name: plan_kv_cache(config, model, tokenizer) for name, config in configs.items()}
    if BASELINE in plans and all(layer.format == _baseline_format(model) for layer in plans[BASELINE].layers):
        del plans[BASELINE]
    return plans


def compare_kv(
    model: LoadedModel, plans: Mapping[str, KVPlan], windows: Sequence[Window], progress: Progress = _silent
) -> tuple[Row, ...]:
    """What each plan costs against a 16-bit cache, whose row, `BASELINE`, comes first.

    A plan whose logits are not finite has a perplexity of nan or inf.

    Args:
        model: its decoder runs every plan.
        plans: by the names that the rows get.
        windows: token ids, all of the same length, at least 2.
        progress: called after each window of each plan with how many of them are done, and how many there are.
    """
    names = (BASELINE, *plans)
    contenders = (KVPlan.uniform(_baseline_format(model), len(model.spec.layers)), *plans.values())
    found: list[list[Scores]] = []
    for window in windows:
        hidden = []
        for plan in contenders:
            hidden.append(_hidden_states(model, plan, window))
            progress(len(found) * len(contenders) + len(hidden), len(windows) * len(contenders))
        targets = torch.tensor(window[1:], device=model.decoder.ops.device)
        found.append(_score_window(model.decoder, hidden, targets))
    scores = [_joined(of_plan, torch.stack) for of_plan in zip(*found, strict=True)]
    return tuple(
        summarize(name, plan.name, plan.bits_per_element(model.spec.kv_shape), of_plan, scores[0])
        for name, plan, of_plan in zip(names, contenders, scores, strict=True)
    )


def _hidden_states(model: LoadedModel, plan: KVPlan, window: Window) -> Tensor:
    """After each token but the last, whose successor is not known; nan where the plan gives nothing finite."""
    try:
        store = new_store(model.decoder, plan, len(window))
        return force(model.decoder, store, window[:-1], len(window))
    except NotFiniteError:
        size, device = (len(window) - 1, model.spec.hidden_size), model.decoder.ops.device
        return torch.full(size, torch.nan, dtype=model.dtype, device=device)


@torch.inference_mode()
def _score_window(decoder: Decoder, hidden: Sequence[Tensor], targets: Tensor) -> list[Scores]:
    """One window's scores for each plan's hidden states, of which the first are the baseline's."""
    parts: list[list[Scores]] = [[] for _ in hidden]
    for rows in (slice(first, first + _ROWS) for first in range(0, len(targets), _ROWS)):
        baseline = decoder.logits(hidden[0][rows])
        parts[0].append(score(baseline, baseline, targets[rows]))
        for part, states in zip(parts[1:], hidden[1:], strict=True):
            part.append(score(baseline, decoder.logits(states[rows]), targets[rows]))
    return [_joined(part, torch.cat) for part in parts]


def _joined(parts: Sequence[Scores], join: Callable[[list[Tensor]], Tensor]) -> Scores:
    return Scores(*(join([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Scores)))


def _baseline_format(model: LoadedModel) -> KVFormat:
    return resolve_kv_format(BASELINE, model.dtype)
