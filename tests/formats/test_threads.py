"""Work on several threads at once."""

from __future__ import annotations

import threading

import pytest
import torch

from kvant.formats.threads import map_each


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of_another() -> int:
    """How many threads PyTorch's ops take on a thread that starts now."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_are_in_order_and_pieces_at_work_together():
    meeting = threading.Barrier(2, timeout=60)

    def double(piece: int) -> int:
        meeting.wait()
        return 2 * piece

    assert map_each(double, range(6), 2) == [0, 2, 4, 6, 8, 10]


def test_ops_of_a_piece_stay_on_its_thread_and_others_are_as_before():
    assert map_each(lambda _: torch.get_num_threads(), range(4), 2) == [1] * 4
    assert map_each(lambda _: torch.get_num_threads(), range(4), 1) == [3] * 4
    assert (torch.get_num_threads(), threads_of_another()) == (3, 3)


def test_a_piece_that_fails_ends_the_work():
    def refuse(piece: int) -> int:
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 0"):
        map_each(refuse, range(100), 2)
    assert (torch.get_num_threads(), threads_of_another()) == (3, 3)
