"""How the sums of a product are cut into parts, brought together and written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_STEPS = 4  # of a part: fewer would wait for memory more than they compute
_MOST_PARTS = 16


def split_for(steps: int, blocks: int, programs: int) -> int:
    """Into how many parts to cut sums of so many steps, for `blocks` of results to make about so many programs."""
    return max(1, min(_MOST_PARTS, steps // _LEAST_STEPS, programs // max(1, blocks)))


def room_for_parts(split: int, out: Tensor, blocks: int, arrivals: Tensor) -> Tensor | None:
    """Where parts of sums [split, M, N] are left; None if sums are not cut.

    Raises:
        ValueError: fewer arrivals can be counted than there are blocks of results.
    """
    if split == 1:
        return None
    if blocks > len(arrivals):
        raise ValueError(f"the sums of {blocks} blocks are cut, and {len(arrivals)} can be counted; take larger blocks")
    return torch.empty(split, *out.shape, dtype=torch.float32, device=out.device)


@triton.jit
def finish(total, bias, out, row, token, m, n):
    """Write sums [rows, tokens] to out [m, n], plus bias [n] if there is one."""
    if bias is not None:
        total += tl.load(bias + row, row < n, other=0.0).to(tl.float32)[:, None]
    to = out + token.to(tl.int64)[None, :] * n + row[:, None]
    tl.store(to, total.to(out.dtype.element_ty), (token < m)[None, :] & (row < n)[:, None])


@triton.jit
def leave(total, parts, arrivals, bias, out, row, token, m, n, SPLIT: tl.constexpr):
    """Write a part of the sums to parts [SPLIT, m, n]; who comes last adds them all, in order, and finishes."""
    held = (token < m)[None, :] & (row < n)[:, None]
    at = token[None, :] * n + row[:, None]
    tl.store(parts + tl.program_id(2).to(tl.int64) * m * n + at, total, held)
    tl.debug_barrier()  # all threads' parts are written before one of them says so
    arrival = arrivals + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(arrival, 1, sem="acq_rel") == SPLIT - 1:
        total = tl.zeros_like(total)
        for part in tl.static_range(SPLIT):
            # From the cache that all multiprocessors share.
            total += tl.load(parts + part * m * n + at, held, other=0.0, cache_modifier=".cg")
        tl.store(arrival, 0)
        finish(total, bias, out, row, token, m, n)
