"""What a recipe takes, and how rows are cut into groups."""

from __future__ import annotations

import pytest

from kvant.errors import ConfigError
from kvant.quantize.methods import METHODS
from kvant.quantize.recipe import FORMAT_NAMES, METHOD_NAMES, Recipe
from kvant.weights.codecs.writing import FORMATS


def test_names_are_those_of_what_there_is() -> None:
    assert set(METHOD_NAMES) == set(METHODS)
    assert set(FORMAT_NAMES) == set(FORMATS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "awk"}, "choose one of auto"),
        ({"format": "gguf"}, "choose one of compressed-tensors"),
        ({"bits": 3}, "choose 4 or 8"),
        ({"method": "smoothquant", "bits": 4}, "has 8 bits"),
        ({"method": "smoothquant", "format": "gptq"}, "needs compressed-tensors"),
        ({"method": "smoothquant", "symmetric": False}, "no zero points"),
        ({"format": "awq", "bits": 8}, "4 bits only"),
        ({"group_size": 48}, "power of two"),
        ({"group_size": 0}, "power of two"),
        ({"group_size": 8}, "from 16 on"),
        ({"samples": 0}, "at least 1"),
        ({"seqlen": 1}, "at least 2"),
        ({"method": "smoothquant", "group_size": 64}, "one scale a row"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**given)


@pytest.mark.parametrize(
    ("columns", "wanted", "group"),
    [(4096, 128, 128), (576, 128, 64), (896, 128, 128), (112, 64, 16), (100, 32, 100), (576, -1, 576)],
)
def test_groups_are_the_largest_that_fit(columns: int, wanted: int, group: int) -> None:
    assert Recipe(group_size=wanted).group(columns) == group


def test_smoothquant_has_one_scale_a_row_and_no_zero_points() -> None:
    recipe = Recipe(method="smoothquant")
    assert (recipe.bits, recipe.group(4864), recipe.symmetric) == (8, 4864, True)


def test_zero_points_are_where_readers_of_the_format_expect_them() -> None:
    assert [Recipe(format=name).symmetric for name in ("compressed-tensors", "gptq", "awq")] == [True, True, False]
    assert Recipe(format="awq", symmetric=True).symmetric
    assert not Recipe(symmetric=False).symmetric


def test_modules_are_ignored_by_pattern() -> None:
    recipe = Recipe(ignore=("*.down_proj", "model.layers.0.*"))
    assert recipe.ignores("model.layers.3.mlp.down_proj")
    assert recipe.ignores("model.layers.0.self_attn.q_proj")
    assert not recipe.ignores("model.layers.10.self_attn.q_proj")
