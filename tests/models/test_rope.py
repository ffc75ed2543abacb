"""Rotary embeddings whose frequencies depend on a length."""

from __future__ import annotations

import pytest
import torch

from kvant.models.rope import RotaryEmbedding, inverse_frequencies
from kvant.models.spec import RopeSpec

SPECS = {
    "dynamic": RopeSpec(dim=16, kind="dynamic", factor=2.0, original_length=64),
    "qwen": RopeSpec(dim=16, kind="qwen", original_length=64),
    "longrope": RopeSpec(
        dim=8,
        kind="longrope",
        original_length=64,
        short_factors=(1.0, 1.1, 1.2, 1.3),
        long_factors=(1.0, 2.0, 4.0, 8.0),
    ),
    "default": RopeSpec(dim=16),
    "yarn": RopeSpec(dim=16, kind="yarn", factor=4.0, original_length=64, attention_factor=1.1),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_token_turns_by_the_frequencies_of_its_length(spec):
    lengths = torch.tensor([1, 63, 64, 65, 127, 128, 129, 256, 257, 1000, 5000, 64 * 128, 64 * 128 + 1])
    positions = lengths - 1
    cos, sin = RotaryEmbedding(spec)(positions, lengths)
    for row, (length, position) in enumerate(zip(lengths.tolist(), positions.tolist(), strict=True)):
        angles = position * inverse_frequencies(spec, length).double()
        # In float32 an angle of thousands of radians is good to a few digits after the point.
        tolerance = {"rtol": 0, "atol": 1e-6 + 4e-7 * position}
        torch.testing.assert_close(cos[row].double(), angles.cos() * spec.attention_factor, **tolerance)
        torch.testing.assert_close(sin[row].double(), angles.sin() * spec.attention_factor, **tolerance)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_nothing_looks_at_the_numbers(spec):
    """As in a step that is recorded: tensors of shapes alone have none to look at."""
    numbers = torch.ones(5, dtype=torch.int64, device="meta")
    cos, sin = RotaryEmbedding(spec, "meta")(numbers, numbers)
    assert cos.shape == sin.shape == (5, spec.dim // 2)
