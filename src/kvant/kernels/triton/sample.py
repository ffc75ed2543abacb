"""Sampling without sorting.

Likeliest first, each filter keeps a beginning of the vocabulary, and a draw takes the token at which the kept mass
passes a target. Both are places in that order, given as a mass (or a count) before them; a place is found by its key,
an integer that orders logits: bit by bit, the largest key such that it and larger ones have more than that mass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvant.kernels.ops import SamplingBatch
from kvant.kernels.triton.launch import interpreted

BLOCK = 4096


def greedy(logits: Tensor) -> Tensor:
    """The first maximum of each row of logits [R, V] float32, its rows contiguous: [R] int64."""
    return _launch(logits, None)


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """`Ops.sample`. A row costs what it asks for: a draw, top_k and top_p, each as much as 20 of temperature 0."""
    return _launch(logits, (params.temperature, params.top_k, params.top_p, params.min_p, params.uniform))


def _launch(logits: Tensor, numbers: tuple[Tensor, ...] | None) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        # The interpreter takes as long for a program of one row.
        together = triton.next_power_of_2(rows) if interpreted() else 1
        block = min(BLOCK, triton.next_power_of_2(vocab))
        _sample[(triton.cdiv(rows, together),)](
            logits, logits.stride(0), numbers, tokens, rows, vocab, ROWS=together, BLOCK=block, num_warps=16
        )
    return tokens


# In kernels, what belongs to a row is a column [ROWS, 1]; `at` [1, BLOCK] are the tokens of a piece of the vocabulary.


@triton.jit(do_not_specialize=["count"])
def _sample(logits, stride, numbers, tokens, count, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live, at = row < count, tl.arange(0, BLOCK)[None, :]
    row = tl.minimum(row, count - 1)
    logits += row * stride
    best, token = _first_maximum(logits, at, vocab, ROWS, BLOCK)
    if numbers is not None:
        temperature = tl.load(numbers[0] + row)
        if _any(temperature > 0):
            # A temperature of 0 divides nothing.
            divisor = tl.where(temperature > 0, temperature, 1.0)
            mass = _kept(logits, at, vocab, best, divisor, numbers, row, BLOCK)
            drawn = _drawn(logits, at, vocab, best, divisor, mass, tl.load(numbers[4] + row), BLOCK)
            token = tl.where(temperature > 0, drawn, token)
    tl.store(tokens + row, token.to(tl.int64), live)


@triton.jit
def _first_maximum(logits, at, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    best, where = tl.full((ROWS, BLOCK), float("-inf"), tl.float32), tl.zeros((ROWS, BLOCK), tl.int32) + at
    for start in range(0, vocab, BLOCK):
        x = _piece(logits, at, start, vocab)
        where = tl.where(x > best, start + at, where)
        best = tl.maximum(x, best)
    largest = tl.max(best, axis=1, keep_dims=True)
    return largest, tl.min(tl.where(best == largest, where, vocab - 1), axis=1, keep_dims=True)


@triton.jit
def _kept(logits, at, vocab, best, temperature, numbers, row, BLOCK: tl.constexpr):
    """The mass that the filters keep, where the likeliest token's is 1; it always stays."""
    top_k, top_p, min_p = tl.load(numbers[1] + row), tl.load(numbers[2] + row), tl.load(numbers[3] + row)
    mass, _ = _beyond(logits, at, vocab, best, temperature, _key(best * 0 + float("-inf")), BLOCK)
    limited = (top_k > 0) & (top_k < vocab)
    if _any(limited):
        key = _place(logits, at, vocab, best, temperature, top_k - 0.5, True, BLOCK)
        above, count = _beyond(logits, at, vocab, best, temperature, key, BLOCK)
        within = above + (top_k - count) * _weight(_value(key), best, temperature).to(tl.float64)
        mass = tl.where(limited, within, mass)
    kept = mass
    if _any(min_p > 0):
        likely = _as_likely(logits, at, vocab, best, temperature, min_p, BLOCK)
        kept = tl.where(min_p > 0, tl.minimum(kept, likely), kept)
    # The token that reaches the bound is kept whole: a bound of 1 or less keeps the likeliest one alone.
    bound = top_p.to(tl.float64) * mass
    if _any((top_p < 1) & (bound > 1)):
        key = _place(logits, at, vocab, best, temperature, bound * (1 - 1e-15), False, BLOCK)
        above, _ = _beyond(logits, at, vocab, best, temperature, key, BLOCK)
        weight = _weight(_value(key), best, temperature).to(tl.float64)
        reached = above + tl.maximum(tl.ceil((bound - above) / weight), 1.0) * weight
        kept = tl.where(top_p < 1, tl.minimum(kept, reached), kept)
    kept = tl.where((top_p < 1) & (bound <= 1), 1.0, kept)
    return tl.maximum(kept, 1.0)


@triton.jit
def _drawn(logits, at, vocab, best, temperature, mass, uniform, BLOCK: tl.constexpr):
    """The token at which the mass passes uniform * mass; of equal logits, the one of the lowest id."""
    target = tl.minimum(uniform * mass, mass * (1 - 1e-15))
    key = _place(logits, at, vocab, best, temperature, target, False, BLOCK)
    above, _ = _beyond(logits, at, vocab, best, temperature, key, BLOCK)
    number = tl.floor((target - above) / _weight(_value(key), best, temperature).to(tl.float64)).to(tl.int32)
    seen, token = tl.zeros_like(number), tl.zeros_like(number)
    for start in range(0, vocab, BLOCK):
        equal = ((_key(_piece(logits, at, start, vocab)) == key) & (start + at < vocab)).to(tl.int32)
        rank = seen + tl.cumsum(equal, axis=1) - equal
        chosen = tl.where((equal > 0) & (rank <= number), start + at, 0)
        token = tl.maximum(token, tl.max(chosen, axis=1, keep_dims=True))
        seen += tl.sum(equal, axis=1, keep_dims=True)
    return token


@triton.jit
def _place(logits, at, vocab, best, temperature, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that the tokens of it and larger ones have more mass than the target, or number more."""
    key = _key(best) * 0
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        one = tl.zeros_like(best) + tl.zeros((1, BLOCK), tl.float32)
        two, three = one, one
        for start in range(0, vocab, BLOCK):
            x = _piece(logits, at, start, vocab)
            weight = tl.where(start + at < vocab, 1.0, 0.0) if COUNT else _weight(x, best, temperature)
            keys = _key(x)
            one += tl.where(keys >= key + step, weight, 0.0)
            two += tl.where(keys >= key + 2 * step, weight, 0.0)
            three += tl.where(keys >= key + 3 * step, weight, 0.0)
        passed = (_total(one) > target).to(tl.uint32) + (_total(two) > target).to(tl.uint32)
        key += step * (passed + (_total(three) > target).to(tl.uint32))
        step >>= 2
    return key


@triton.jit
def _beyond(logits, at, vocab, best, temperature, key, BLOCK: tl.constexpr):
    """Mass and number of the tokens with larger keys."""
    mass = tl.zeros_like(best) + tl.zeros((1, BLOCK), tl.float32)
    count = mass
    for start in range(0, vocab, BLOCK):
        x = _piece(logits, at, start, vocab)
        larger = _key(x) > key
        mass += tl.where(larger, _weight(x, best, temperature), 0.0)
        count += larger.to(tl.float32)
    return _total(mass), _total(count)


@triton.jit
def _as_likely(logits, at, vocab, best, temperature, least, BLOCK: tl.constexpr):
    """The mass of the tokens at least so likely as that fraction of the likeliest one."""
    mass = tl.zeros_like(best) + tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, vocab, BLOCK):
        weight = _weight(_piece(logits, at, start, vocab), best, temperature)
        mass += tl.where(weight >= least, weight, 0.0)
    return _total(mass)


@triton.jit
def _piece(logits, at, start, vocab):
    return tl.load(logits + start + at, start + at < vocab, other=float("-inf"))


@triton.jit
def _any(rows):
    return tl.max(rows.to(tl.int32)) > 0


@triton.jit
def _total(parts):
    return tl.sum(parts.to(tl.float64), axis=1, keep_dims=True)


@triton.jit
def _weight(x, best, temperature):
    return tl.exp((x - best) / temperature)


@triton.jit
def _key(x):
    """An unsigned integer that orders floats as they are; the two zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _value(key):
    """The float of a key."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits & 2147483647, ~bits).to(tl.float32, bitcast=True)
