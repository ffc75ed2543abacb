"""What models were measured to be on the bundled text, kept in the cache directory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence

from kvant.errors import ConfigError, CorruptModelError
from kvant.quantize.kv_constants import RULES
from kvant.quantize.kv_measure import measure_kv
from kvant.quantize.kv_statistics import STATISTICS_FILE, VERSION, KVStatistics
from kvant.quantize.scales.tensors import SCALES_FILE
from kvant.quantize.texts import Window, calibration_text, cut_windows
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import LoadedModel
from kvant.weights.pull import cache_dir

WINDOWS, WINDOW_SIZE = 4, 512
_CHARACTERS = 64_000  # of the text: enough for any tokenizer, and quickly cut

logger = logging.getLogger("kvant")


def known_statistics(model: LoadedModel, tokenizer: Tokenizer) -> KVStatistics:
    """A model's statistics on the bundled text: from the cache directory, where they are kept once measured."""
    size = min(WINDOW_SIZE, model.spec.max_position)
    windows = cut_windows(calibration_text()[:_CHARACTERS], tokenizer, WINDOWS, size)
    path = cache_dir() / "kv" / f"{_fingerprint(model, windows)}.safetensors"
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a directory may not be searched
        try:
            return KVStatistics.load(path, model.spec.kv_shape)
        except CorruptModelError as error:
            logger.warning("%s; kvant does so now", error)
    logger.warning("measuring the keys of %s for its KV cache; this is done once", model.source.path)
    statistics = measure_kv(model.decoder, windows)
    try:
        statistics.save(path)
    except ConfigError as error:
        logger.warning("the KV statistics cannot be kept, and will be measured again next time: %s", error)
    return statistics


def _fingerprint(model: LoadedModel, windows: Sequence[Window]) -> str:
    """Other or otherwise rounded weights, another tokenizer or text, another dtype or way of measuring have another."""
    files = [file for file in sorted(model.source.files()) if file.name not in (SCALES_FILE, STATISTICS_FILE)]
    stamps = [(str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    facts = (VERSION, RULES, str(model.dtype), model.rounding, windows, stamps)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
