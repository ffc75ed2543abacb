"""Loading or converting a model as an `EngineConfig` says: its device, its types, its weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvant.config import WEIGHT_BITS, EngineConfig
from kvant.kernels.select import select_ops
from kvant.quantize.rtn import rtn
from kvant.weights.convert import Backend, Progress, Target, convert, silent
from kvant.weights.load import LoadedModel, load_model
from kvant.weights.matrices import Rounding
from kvant.weights.pull import PULLABLE
from kvant.weights.source import TensorSource

_SCALE_BITS = 16


def load_configured(source: TensorSource, config: EngineConfig) -> LoadedModel:
    """An open checkpoint, ready to run as an engine of this config runs it.

    Raises:
        KvantError: as `load_model` does.
    """
    ops = select_ops(config.device, config.num_threads)
    return load_model(source, dtype=config.dtype, ops=ops, weights=_weights(config))


def convert_configured(
    source: TensorSource,
    config: EngineConfig,
    directory: Path,
    *,
    backend: Backend,
    tp: int,
    name: str = "",
    progress: Progress = silent,
) -> None:
    """An open checkpoint, repacked for engines of this config.

    Args:
        source: the checkpoint.
        config: its dtype and weights are what the result will have.
        directory: see `convert`, as progress.
        backend: see `Target`, as tp.
        tp: see there.
        name: what the user called the model; sampling settings may be known for it.
        progress: see there.

    Raises:
        KvantError: as `convert` does.
    """
    target = Target(backend, tp, config.dtype, _weights(config))
    known = PULLABLE[name].sampling if name in PULLABLE else None
    ops = select_ops("cpu", config.num_threads)
    convert(source, directory, target, ops, generation=known, progress=progress)


def _weights(config: EngineConfig) -> str | Rounding:
    if config.weights not in WEIGHT_BITS:
        return config.weights
    bits, group = WEIGHT_BITS[config.weights], config.weights_group_size
    quantize = partial(rtn, bits=bits, group_size=group)
    return Rounding(f"{config.weights} in groups of {group}", bits + _SCALE_BITS / group, quantize)
