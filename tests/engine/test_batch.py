"""A plan as tensors, by hand."""

from __future__ import annotations

from array import array

from kvant.cache.blocks import Paging
from kvant.config import SamplingParams
from kvant.engine.batch import build_batch
from kvant.engine.sequence import Plan, Request, Row
from kvant.models.spec import RopeSpec

BLOCK = 8


def row(prompt: int, output: int, blocks: list[int], start: int, stop: int) -> Row:
    """Tokens count up from 100 in the prompt, from 200 in the output."""
    request = Request(tuple(range(100, 100 + prompt)), SamplingParams(), 0, lambda *event: None)
    [sequence] = request.sequences
    sequence.output, sequence.blocks, sequence.computed = list(range(200, 200 + output)), array("q", blocks), start
    return Row(sequence, start, stop, ())


PLAN = Plan((row(10, 3, [5, 2], 12, 13), row(20, 0, [7, 0, 4], 6, 17)), ())


def test_every_token_knows_its_place():
    batch = build_batch(PLAN, Paging(BLOCK), None)
    assert batch.ids.tolist() == [202, *range(106, 117)]
    assert batch.attention.positions.tolist() == [12, *range(6, 17)]
    expected = [2 * BLOCK + 4, *(7 * BLOCK + i for i in (6, 7)), *range(8), 4 * BLOCK]
    assert batch.attention.slots.tolist() == expected
    assert batch.attention.query_starts == (0, 1, 12)
    assert batch.attention.context_lens == (13, 17)
    assert [table[:n] for table, n in zip(batch.attention.block_tables.tolist(), (2, 3), strict=True)] == [
        [5, 2],
        [7, 0, 4],
    ]


def test_where_rotation_depends_on_the_prompt_its_tokens_share_the_prompts_length():
    dynamic = build_batch(PLAN, Paging(BLOCK), RopeSpec(dim=4, kind="dynamic", original_length=8))
    assert dynamic.rope_lengths.tolist() == [13, *[20] * 11]
    qwen = build_batch(PLAN, Paging(BLOCK), RopeSpec(dim=4, kind="qwen", original_length=8))
    assert qwen.rope_lengths.tolist() == [10, *[20] * 11]


def test_behind_a_lead_every_token_lies_so_many_slots_later():
    batch = build_batch(PLAN, Paging(BLOCK, lead=3), None)
    assert batch.attention.slots.tolist() == [2 * BLOCK + 7, *range(BLOCK - 7, BLOCK), *range(4 * BLOCK, 4 * BLOCK + 4)]
    without = build_batch(PLAN, Paging(BLOCK), None)
    assert batch.attention.positions.tolist() == without.attention.positions.tolist()
    assert batch.attention.context_lens == without.attention.context_lens


def test_few_decoded_tokens_are_put_as_many_are(monkeypatch):
    rows = (row(10, 3, [5, 2], 12, 13), row(20, 1, [7, 0, 4], 20, 21), row(3, 0, [6], 2, 3))
    few = build_batch(Plan(rows, ()), Paging(BLOCK, lead=3), None)
    monkeypatch.setattr("kvant.engine.batch._FEW", 0)
    many = build_batch(Plan(rows, ()), Paging(BLOCK, lead=3), None)
    assert few.ids.tolist() == many.ids.tolist() == [202, 200, 102]
    assert few.attention.positions.tolist() == many.attention.positions.tolist() == [12, 20, 2]
    assert (
        few.attention.slots.tolist() == many.attention.slots.tolist() == [2 * BLOCK + 7, 4 * BLOCK + 7, 6 * BLOCK + 5]
    )
    assert few.attention.context_lens == many.attention.context_lens
