"""From a model's name to a running engine with its tokenizer."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvant.cache.store import MemoryReport
from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core, EngineStats
from kvant.engine.engine import Engine
from kvant.engine.inputs import Prompt, encode_prompt
from kvant.errors import ConfigError, CorruptModelError
from kvant.models.families import model_spec
from kvant.quantize.kv_plan import check_kv_settings, plan_kv_cache
from kvant.quantize.load import load_configured
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import generation_defaults, open_source
from kvant.weights.locate import DEFAULT_MODEL, locate
from kvant.weights.pull import PULLABLE
from kvant.weights.source import TensorSource
from kvant.weights.tokenizer import read_tokenizer

logger = logging.getLogger("kvant")


@dataclass(frozen=True)
class ServedModel:
    """An engine and what its callers need beside it.

    Attributes:
        name: the model as the user named it.
        default_sampling: what the checkpoint recommends, for requests that bring nothing.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    default_sampling: SamplingParams

    def encode(self, prompt: Prompt, **template_kwargs: Any) -> list[int]:
        """The token ids of a prompt.

        Raises:
            RequestError: it is no prompt, or the template refuses it.
        """
        return encode_prompt(self.tokenizer, prompt, **template_kwargs)


class Front:
    """What every front door shows of the model behind it. Forgotten, or at the program's end, it closes itself."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._close = weakref.finalize(self, served.engine.close)

    @property
    def model_name(self) -> str:
        """The model as it was named."""
        return self._served.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._served.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt and output together, in tokens."""
        return self._served.engine.core.max_model_len

    @property
    def memory(self) -> MemoryReport:
        """What the KV cache holds."""
        return self._served.engine.core.memory

    def stats(self) -> EngineStats:
        """The engine as it was after its last step."""
        return self._served.engine.stats()

    def close(self) -> None:
        """Stop the engine; requests that still run fail with EngineDeadError."""
        self._close()


def serve_model(model: str | Path | None, config: EngineConfig) -> ServedModel:
    """Load a model and start its engine.

    Raises:
        KvantError: of the kind that names the cause: not found, unsupported, corrupt, does not fit, bad setting.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    source = open_source(locate(model))
    # A wrong name is told before the weights are read.
    check_kv_settings(config, model_spec(source.config), torch.float32)
    loaded = load_configured(source, config)
    tokenizer = read_tokenizer(loaded.source)
    core = Core(loaded, config, tokenizer.end_ids, plan_kv_cache(config, loaded, tokenizer))
    logger.info("%s", core.memory.describe())
    if core.max_model_len < loaded.spec.max_position and config.max_model_len is None:
        logger.warning(
            "the KV cache holds %d tokens, so max_model_len is that instead of the model's %d",
            core.max_model_len,
            loaded.spec.max_position,
        )
    name = str(model or DEFAULT_MODEL)
    return ServedModel(name, Engine(core), tokenizer, _recommended(name, loaded.source))


def _recommended(name: str, source: TensorSource) -> SamplingParams:
    pulled = PULLABLE[name].sampling if name in PULLABLE else {}
    try:
        return SamplingParams(**{**pulled, **generation_defaults(source)})
    except ConfigError as error:
        raise CorruptModelError(f"{source.path / 'generation_config.json'}: {error}") from error
