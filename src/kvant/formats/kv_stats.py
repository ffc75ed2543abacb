"""What was measured once for a model and helps its KV cache to be stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Constants of one layer's keys, or of its values, that its codec works with. Each may be absent.

    Attributes:
        scale: [kv_heads] float32, the step of a static format.
    """

    scale: Tensor | None = None


NO_STATS = LayerStats()
