"""How an engine keeps its KV: each layer's format, and the statistics that the formats work with."""

from __future__ import annotations

from kvant.config import EngineConfig
from kvant.formats.kv import KVPlan, resolve_kv_format
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import LoadedModel


def plan_kv_cache(config: EngineConfig, model: LoadedModel, tokenizer: Tokenizer) -> KVPlan:
    """The KV plan that an engine of this config runs the model with."""
    return KVPlan.uniform(resolve_kv_format(config.kv_cache_dtype, model.dtype), len(model.spec.layers))
