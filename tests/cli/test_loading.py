"""What the collector does while a model is loaded."""

from __future__ import annotations

import gc

import pytest

from kvant.cli.loading import nothing_collected


def test_the_collector_rests_and_takes_what_was_made_for_old():
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
        made = [[]]
    assert gc.isenabled()
    assert any(known is made for known in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_the_collector_works_again_after_an_error():
    with pytest.raises(KeyError), nothing_collected():
        raise KeyError
    assert gc.isenabled()
