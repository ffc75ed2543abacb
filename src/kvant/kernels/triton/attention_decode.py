"""Attention of single new tokens over the paged cache, whose codes are read once and never decoded to keys.

Programs share a context, each takes a part of it. What a codec does to keys is done to the query instead, and what it
does to values is undone on the sum of the parts.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import triton
from torch import Tensor

from kvant.formats.kv import SINK_SPAN, KVLayer
from kvant.formats.kv_stats import CENTRE_TILE
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.triton.attention_parts import LOG2E, merge
from kvant.kernels.triton.attention_tiles import attend_tiles
from kvant.kernels.triton.kv_layout import Side, centre_arguments, dot_types, layer_key, side_arguments, side_of
from kvant.kernels.triton.launch import Config, interpreted

MOST_MEMBERS = 16  # query heads that a program takes
ROWS, COLUMNS = 16, 8  # that a product has at least
MULTIPROCESSORS = 132  # of an H100; an A100 has 108
MOST_SPLITS = 64
MOST_REGISTERS = 255  # of a thread
CENTRE_TERMS = 4  # of a query head and a tile of the keys' centre
MOST_TERMS = 1 << 24  # 64 MiB, less than the largest step takes of other memory
_WORTH_A_PART = 8  # tiles, to be attended to by a program of their own
FEW_TILES = 4  # whose terms are computed one by one
# What `merge` takes of a cache's sides.
_MERGED = ("k_codes", "v_codes", "v_balance", "K_KIND", "V_KIND", "V_HADAMARD", "K_CODE_STRIDE", "V_CODE_STRIDE")


def attention_decode(
    q: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    shape: AttentionShape,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Attention of the sequences that have one new token, as `Ops.attention`, into their rows of `out`, contiguous."""
    config = config or default(q, cache, batch, shape)
    keys, values = side_of(cache, "key"), side_of(cache, "value")
    _check_groups(shape.head_dim, keys, values)
    q = q if q.stride(2) == 1 and q.stride(1) == shape.head_dim else q.contiguous()
    group = shape.num_heads // shape.num_kv_heads
    members = min(triton.next_power_of_2(group), MOST_MEMBERS)
    sequences, splits = len(batch.context_lens), config.blocks["SPLITS"]
    grid = (sequences, shape.num_kv_heads * triton.cdiv(group, members), splits)
    least = _least_tiles(grid[0] * grid[1])
    sums = tops = None
    if splits > 1:
        sums = torch.empty(sequences, shape.num_heads, splits, shape.head_dim, dtype=torch.float32, device=q.device)
        tops = torch.empty(sequences, shape.num_heads, splits, 2, dtype=torch.float32, device=q.device)
    softcap = shape.softcap or 0.0
    common = {
        "q": q, "out": out, "sums": sums, "tops": tops, "starts": batch.starts, "lengths": batch.lengths,
        "tables": batch.block_tables, "scale": shape.scale if softcap else shape.scale * LOG2E,
        "q_stride": q.stride(0), "table_stride": batch.block_tables.stride(0),
        "least": least, "SINKS": cache.format.sinks,
        "SPAN": SINK_SPAN, "LEAD": cache.lead, "BLOCK_SIZE": cache.block_size, "HEADS": shape.num_heads,
        "KV_HEADS": shape.num_kv_heads, "DIM": shape.head_dim, "WINDOW": shape.window or 0, "SOFTCAP": softcap,
        "SPLITS": splits, "TILE": config.blocks["TILE"],
    }  # fmt: skip
    sides = side_arguments(keys, "k") | side_arguments(values, "v")
    launch = {**common, **sides, **centre_arguments(keys), "CENTRE_TILE": CENTRE_TILE}
    launch |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch |= {"maxnreg": config.blocks.get("REGISTERS", MOST_REGISTERS)}
    k_type, v_type = dot_types(q.dtype, keys, values)
    tiles = _centre_tiles(cache, batch, shape, config, least)
    terms = _room_for_terms(keys, math.prod(grid) * tiles, members)
    attend_tiles[grid](
        **launch, K_TYPE=k_type, V_TYPE=v_type, MEMBERS=members, ROWS=max(members, COLUMNS // 2), COLUMNS=COLUMNS,
        ASSEMBLY=q.dtype != torch.float32 and not interpreted(), terms=terms, term_tiles=tiles,
        MANY_TERMS=terms is not None and tiles > FEW_TILES,
    )  # fmt: skip
    if splits > 1:
        merged = {name: sides[name] for name in _MERGED}
        merge[(sequences, shape.num_heads)](**common, **merged, num_warps=2)


def _least_tiles(programs: int) -> int:
    """Tiles that are worth a part of their own, where contexts in one piece have so many programs.

    Where these fill the card, short parts take it longer: to begin, end and merge one is the work of two tiles.
    """
    return _WORTH_A_PART if programs >= 8 * MULTIPROCESSORS else 1


def _centre_tiles(cache: KVLayer, batch: AttentionBatch, shape: AttentionShape, config: Config, least: int) -> int:
    """How many tiles of the keys' centre a part of a context, of at least so many tiles, reaches into at most."""
    tiles = triton.cdiv(_context(batch, shape) + cache.lead, config.blocks["TILE"]) + 1
    part = max(triton.cdiv(tiles, config.blocks["SPLITS"]), 2 * least - 1)
    return int(part * config.blocks["TILE"] // CENTRE_TILE + 2)


def _room_for_terms(keys: Side, tiles: int, members: int) -> Tensor | None:
    """Where all programs leave the terms of so many tiles of the centre, before their loops; None if not before."""
    room = tiles * members * CENTRE_TERMS
    if not keys.order or members == 1 or room > MOST_TERMS:
        return None
    return torch.empty(room, dtype=torch.float32, device=keys.codes.device)


def _check_groups(head_dim: int, *sides: Side) -> None:
    """Four codes are read at once, and are of one group."""
    for side in sides:
        if side.groups > 1 and head_dim % (4 * side.groups):
            raise NotImplementedError(
                f"vectors of {head_dim} elements in {side.groups} groups have no kernel on a GPU; take a format "
                "whose groups have a multiple of 4 elements, such as int8"
            )


def key(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> str:
    """What the best configuration depends on: the layer, and the sequences by powers of two.

    Not the context: a recorded step is launched for the longest that may come.
    """
    return f"s{triton.next_power_of_2(len(batch.context_lens))} {layer_key(q, cache, shape)}"


def default(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Config:
    """A good guess for data-center GPUs of compute capability 8.0 and 9.0."""
    # Stages: what says where a tile lies comes two before the tile, and a tile two before its products. Codes have much
    # to be done with each byte, and one warp waits for no other; but it has no registers for the sums of many heads.
    group = shape.num_heads // shape.num_kv_heads
    two = min(_most_warps(cache), 2)
    if "float" in (side_of(cache, "key").kind, side_of(cache, "value").kind):
        return _config(cache, batch, shape, two, 8, 5, 168)
    if group > 4:
        return _config(cache, batch, shape, two, 8, 5, MOST_REGISTERS)
    # Preparing heads that share keys takes long, and each part does it. Others may have small parts: they end together.
    return _config(cache, batch, shape, 1, 8 if group > 1 else 64, 5, MOST_REGISTERS)


def candidates(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> list[Config]:
    """What may be the fastest."""
    sizes = [(1, 168), (1, MOST_REGISTERS), (2, 128), (2, 168), (2, MOST_REGISTERS), (4, 128)]
    found = [
        _config(cache, batch, shape, warps, each, stages, registers)
        for (warps, registers), each, stages in product(sizes, (8, 16, 64), (3, 5))
        if warps <= _most_warps(cache)
    ]
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _config(
    cache: KVLayer, batch: AttentionBatch, shape: AttentionShape, warps: int, each: int, stages: int, registers: int
) -> Config:
    """Parts for at least so many programs on each multiprocessor, that have room there with so many registers."""
    tile = CENTRE_TILE if shape.head_dim <= 128 else CENTRE_TILE // 2
    group = shape.num_heads // shape.num_kv_heads
    programs = len(batch.context_lens) * shape.num_kv_heads * triton.cdiv(group, MOST_MEMBERS)
    splits = triton.next_power_of_2(max(1, each * MULTIPROCESSORS // programs))
    most = triton.next_power_of_2(triton.cdiv(_context(batch, shape), tile))
    blocks = {"TILE": tile, "SPLITS": min(splits, most, MOST_SPLITS), "REGISTERS": registers}
    return Config(blocks, warps, stages)


def _most_warps(cache: KVLayer) -> int:
    """More would have no rows of their own in the values' product: a row is a word of a value's codes."""
    side = side_of(cache, "value")
    words = int(side.codes.shape[-1]) // (1 if side.kind == "float" else 2)
    return int(max(1, min(4, triton.next_power_of_2(words) // ROWS)))


def _context(batch: AttentionBatch, shape: AttentionShape) -> int:
    """The longest that is attended to."""
    return min(max(batch.context_lens), shape.window or max(batch.context_lens))
