"""Loading a model as an `EngineConfig` says: its device, its types, its weights."""

from __future__ import annotations

from functools import partial

from kvant.config import WEIGHT_BITS, EngineConfig
from kvant.kernels.select import select_ops
from kvant.quantize.rtn import rtn
from kvant.weights.load import LoadedModel, load_model
from kvant.weights.matrices import Rounding
from kvant.weights.source import TensorSource

_SCALE_BITS = 16


def load_configured(source: TensorSource, config: EngineConfig) -> LoadedModel:
    """An open checkpoint, ready to run as an engine of this config runs it.

    Raises:
        KvantError: as `load_model` does.
    """
    ops = select_ops(config.device, config.num_threads)
    return load_model(source, dtype=config.dtype, ops=ops, weights=_weights(config))


def _weights(config: EngineConfig) -> str | Rounding:
    if config.weights not in WEIGHT_BITS:
        return config.weights
    bits, group = WEIGHT_BITS[config.weights], config.weights_group_size
    quantize = partial(rtn, bits=bits, group_size=group)
    return Rounding(f"{config.weights} in groups of {group}", bits + _SCALE_BITS / group, quantize)
