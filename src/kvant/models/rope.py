"""Rotary position embedding: frequencies for every scaling rule the families use.

Sources: RoPE (Su et al. 2021), linear interpolation (Chen et al. 2023), NTK-aware dynamic scaling (bloc97, emozilla
2023), YaRN (Peng et al. 2023), Llama 3.1's ramp (Meta 2024), LongRoPE (Ding et al. 2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvant.models.spec import RopeSpec

_DOUBLINGS = 16  # of Qwen's original length: more than any text has


def inverse_frequencies(spec: RopeSpec, length: int) -> Tensor:
    """Radians per position for each pair, [dim / 2] float32, in a prompt of `length` tokens."""
    match spec.kind:
        case "linear":
            return _plain(spec, spec.theta) / spec.factor
        case "dynamic" | "qwen":
            stretch = _ntk_stretch(spec, length)
            return _plain(spec, spec.theta * stretch ** (spec.dim / (spec.dim - 2)))
        case "yarn":
            return _yarn(spec)
        case "llama3":
            return _llama3(spec)
        case "longrope":
            factors = spec.long_factors if length > spec.original_length else spec.short_factors
            return _plain(spec, spec.theta) / torch.tensor(factors, device="cpu")
        case _:
            return _plain(spec, spec.theta)


def _plain(spec: RopeSpec, base: float) -> Tensor:
    return 1.0 / (base ** (torch.arange(0, spec.dim, 2, device="cpu").float() / spec.dim))


def _ntk_stretch(spec: RopeSpec, length: int) -> float:
    """How much the base grows: continuously (dynamic), or in powers of two (Qwen)."""
    ratio = max(length, spec.original_length) / spec.original_length
    if spec.kind == "dynamic":
        return spec.factor * ratio - (spec.factor - 1)
    return max(2.0 ** math.ceil(math.log2(ratio) + 1) - 1, 1.0)


def _yarn(spec: RopeSpec) -> Tensor:
    """Fast pairs keep their frequency, slow ones are interpolated, a linear ramp between."""

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return spec.dim * math.log(spec.original_length / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_of(spec.beta_fast), pair_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = ((torch.arange(spec.dim // 2, device="cpu").float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    plain = _plain(spec, spec.theta)
    return plain * (1 - ramp) + plain / spec.factor * ramp


def _llama3(spec: RopeSpec) -> Tensor:
    plain = _plain(spec, spec.theta)
    turns = spec.original_length * plain / (2 * math.pi)
    ramp = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return plain * ramp + plain / spec.factor * (1 - ramp)


class RotaryEmbedding:
    """cos and sin for the tokens of a step; nothing looks at their numbers, which a recorded step could not do.

    Attributes:
        factor: what cosines and sines are multiplied by.
    """

    def __init__(self, spec: RopeSpec, device: torch.device | str = "cpu") -> None:
        self._spec = spec
        self.factor = spec.attention_factor
        self._bounds = torch.tensor(_bounds(spec), dtype=torch.int64, device="cpu").to(device)
        lengths = [*_bounds(spec), max(_bounds(spec), default=spec.original_length) + 1]
        self._rows = torch.stack([inverse_frequencies(spec, length) for length in lengths]).to(device)
        self._exponents = (torch.arange(0, spec.dim, 2, device="cpu").double() / -spec.dim).to(device)

    def __call__(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Angles' cosines and sines, each [T, dim / 2] float32.

        Args:
            positions: [T] int64.
            lengths: [T] int64, the length whose frequencies rule each token; see `rope_lengths`.
        """
        angles = positions.float().unsqueeze(1) * self.frequencies(lengths)
        return angles.cos() * self.factor, angles.sin() * self.factor

    @property
    def fixed(self) -> bool:
        """Whether the frequencies are the same for all lengths."""
        return self._spec.kind != "dynamic" and not len(self._bounds)

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Radians per position for each pair, [T, dim / 2] float32; [1, dim / 2] where they are `fixed`."""
        spec = self._spec
        if spec.kind == "dynamic":  # other ones for every length
            ratio = lengths.clamp(min=spec.original_length).double() / spec.original_length
            stretch = (spec.factor * ratio - (spec.factor - 1)) ** (spec.dim / (spec.dim - 2))
            return (spec.theta * stretch).unsqueeze(1).pow(self._exponents).float()
        return self._rows[torch.bucketize(lengths, self._bounds)] if len(self._bounds) else self._rows


def _bounds(spec: RopeSpec) -> list[int]:
    """The lengths up to which the same frequencies hold; one more set holds beyond the last."""
    if spec.kind == "qwen":
        return [spec.original_length << doublings for doublings in range(_DOUBLINGS)]
    return [spec.original_length] if spec.kind == "longrope" and spec.depends_on_length else []


def rope_lengths(spec: RopeSpec, prompt_lengths: Tensor, positions: Tensor) -> Tensor:
    """The length that rules each token's frequencies where they depend on one; all [T] int64.

    A prompt's tokens share the prompt's length, whatever the chunks. A generated token has its own, as when it is
    decoded one by one; Qwen keeps the prompt's. So a token's rotation is known when it is written, and never changes.
    """
    return prompt_lengths if spec.kind == "qwen" else torch.maximum(prompt_lengths, positions + 1)
