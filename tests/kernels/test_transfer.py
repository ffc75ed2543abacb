"""Many tensors in one copy."""

from __future__ import annotations

import pytest
import torch

from kvant.kernels.ops import AttentionBatch, SamplingBatch
from kvant.kernels.transfer import pack, sent, unpack

CPU = torch.device("cpu")


def test_what_is_packed_comes_out_as_it_was_and_aligned():
    tensors = [
        torch.tensor([1.5, -2.0, 3.25]),
        torch.tensor([[1, 2, 3], [4, 5, 2**60]]).t(),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.tensor([7], dtype=torch.int32),
        torch.tensor([True, False, True]),
        torch.tensor([0.1], dtype=torch.float64),
    ]
    packed = pack(tensors, pinned=False)
    for tensor, out in zip(tensors, unpack(packed, tensors), strict=True):
        assert out.dtype == tensor.dtype
        assert torch.equal(out, tensor)
        assert out.is_contiguous()
        assert (out.data_ptr() - packed.data_ptr()) % 16 == 0


def test_on_the_host_nothing_is_copied():
    tensors = [torch.ones(2), torch.zeros(3)]
    assert all(a is b for a, b in zip(sent(tensors, CPU), tensors, strict=True))


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """How many copies are made to a device, which is the host again."""
    made: list[int] = []

    def packing(tensors, device):
        made.append(len(tensors))
        return unpack(pack(tensors, pinned=False), tensors)

    monkeypatch.setattr("kvant.kernels.ops.sent", packing)
    return made


def test_a_batch_and_what_goes_with_it_are_sent_at_once(copies):
    numbers = torch.arange(3)
    batch = AttentionBatch(numbers, numbers + 8, (0, 1, 3), (4, 6), torch.tensor([[1, 2], [3, 0]]))
    moved, (ids,) = batch.to(CPU, numbers + 5)
    assert copies == [6]
    for name in ("positions", "slots", "block_tables", "starts", "lengths"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
        assert getattr(moved, name).dtype == getattr(batch, name).dtype
    assert (moved.query_starts, moved.context_lens, ids.tolist()) == ((0, 1, 3), (4, 6), [5, 6, 7])
    assert copies == [6]


def test_wishes_are_sent_at_once(copies):
    half = torch.full((3,), 0.5)
    wishes = SamplingBatch(half, torch.tensor([0, 4, 8]), half + 1, half + 2, half.double())
    moved = wishes.to(torch.device("cpu"))
    assert copies == [5]
    assert all(torch.equal(getattr(moved, name), getattr(wishes, name)) for name in vars(wishes))
