"""Tables of launch configurations: written, found by the card's name, and refused where they are damaged."""

from __future__ import annotations

import json

import pytest

from kvant.errors import ConfigError
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.tuning import TABLES, Tuning, card_name

TABLE = Tuning({"linear": {"m1 n64 k64": Config({"BLOCK_N": 64}, num_warps=8, num_stages=3), "m16": Config()}})


def test_a_table_comes_back_as_it_was_written(tmp_path):
    TABLE.write(tmp_path / "nvidia-h200.json")
    table = Tuning.of("NVIDIA H200", tmp_path)
    assert table == TABLE
    assert table.lookup("linear", "m1 n64 k64") == Config({"BLOCK_N": 64}, num_warps=8, num_stages=3)


def test_what_was_not_measured_is_none(tmp_path):
    assert Tuning.of("NVIDIA H200", tmp_path) == Tuning()
    assert TABLE.lookup("linear", "m2") is TABLE.lookup("gated", "m1 n64 k64") is None


def test_cards_have_names_for_files():
    assert card_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert card_name(" A100-SXM4 (PG)") == "a100-sxm4-pg"


@pytest.mark.parametrize("content", ["", "[]", '{"linear": {"m1": {"num_warps": 4}}}', '{"linear": {"m1": 4}}'])
def test_a_damaged_table_says_what_to_do(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match="delete it"):
        Tuning.read(tmp_path / "x.json")


def test_the_tables_that_are_kept_here_can_be_read():
    for path in TABLES.glob("*.json"):
        assert path.stem == card_name(path.stem)
        assert json.loads(path.read_text()).keys() == Tuning.read(path).configs.keys()
