"""The KV cache's memory: a pool of blocks, cut from what `KVFormat.planes` says, swap space, and the fit of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.pinned import pin_in_place
from kvant.config import EngineConfig
from kvant.errors import ConfigError, MemoryFitError
from kvant.formats.kv import KVLayer, KVPlan, KVShape, resolve_kv_format
from kvant.formats.memory import lazy_zeros

AUTOMATIC_FRACTION = 0.5
# Of what the largest step leaves: a little is for what was not foreseen.
DEVICE_FRACTION = 0.95
CPU = torch.device("cpu")


@dataclass(frozen=True)
class MemoryReport:
    """What the pool holds, and `swap_blocks` beside it, in numbers a user can check."""

    shape: KVShape
    plan: KVPlan
    num_blocks: int
    block_size: int
    swap_blocks: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in all layers, scales and zeros included."""
        return self.plan.bytes_per_token(self.shape)

    @property
    def paging(self) -> Paging:
        """Where a sequence's tokens lie in its blocks."""
        return Paging(self.block_size, self.plan.lead)

    @property
    def tokens(self) -> int:
        """Tokens of one sequence that the pool holds."""
        return self.paging.capacity(self.num_blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.block_size * self.bytes_per_token

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_bytes

    @property
    def swap_bytes(self) -> int:
        """Bytes of the whole swap space."""
        return self.swap_blocks * self.block_bytes

    def tokens_in(self, format_name: str) -> int:
        """Tokens the same bytes would hold in another format."""
        other = KVPlan.uniform(resolve_kv_format(format_name, torch.float32), self.shape.num_layers)
        one_block = replace(self, plan=other, num_blocks=1)
        return replace(one_block, num_blocks=self.pool_bytes // one_block.pool_bytes).tokens

    def describe(self) -> str:
        """The one log line that explains the memory."""
        gain = self.tokens / max(self.tokens_in("fp16"), 1)
        swap = f"; {_mib(self.swap_bytes)} of swap space" if self.swap_blocks else ""
        return (
            f"KV cache {self.plan.name}: {self.bytes_per_token:,} bytes per token; {_mib(self.pool_bytes)} in "
            f"{self.num_blocks:,} blocks of {self.block_size} hold {self.tokens:,} tokens, "
            f"{gain:.2f}x as many as 16 bit{swap}"
        )


class KVStore:
    """The pool. `layers[i].planes[name]` is [num_blocks, num_kv_heads, block_size, *plane.shape].

    A block lies in one piece, all layers' planes one after the other: the memory that is touched is that of the blocks
    in use, and a block is copied at once. So planes are views of `blocks` [num_blocks, bytes], not contiguous.
    """

    def __init__(self, layers: Sequence[KVLayer], blocks: Tensor, paging: Paging) -> None:
        self.layers = tuple(layers)
        self.blocks = blocks
        self.paging = paging

    @classmethod
    def allocate(
        cls, shape: KVShape, plan: KVPlan, num_blocks: int, block_size: int, device: torch.device = CPU
    ) -> KVStore:
        """A zeroed pool; the host's pages become resident when they are first written.

        Raises:
            MemoryFitError: the system refuses the memory.
        """
        report = MemoryReport(shape, plan, num_blocks, block_size)
        try:
            blocks = _zeros((num_blocks, report.block_bytes), device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MemoryFitError(
                f"the system refused {_mib(report.pool_bytes)} for the KV cache; lower kv_cache_memory, or use "
                "kv_cache_dtype='int4'"
            ) from error
        slots, start, layers = (shape.num_kv_heads, block_size), 0, []
        for layer in plan.layers:
            planes = {}
            for plane in layer.format.planes(shape.head_dim):
                size = plane.bytes * shape.num_kv_heads * block_size
                piece = blocks[:, start : start + size].view(plane.dtype)
                planes[plane.name] = piece.unflatten(1, (*slots, *plane.shape))
                start += size
            layers.append(KVLayer(layer.to(device), block_size, plan.lead, planes))
        return cls(layers, blocks, report.paging)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return len(self.blocks)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target) in order."""
        for source, target in copies:
            self.blocks[target] = self.blocks[source]


class SwapSpace:
    """Host memory for the content of blocks that others need now: blocks as the store's, bytes in all layers.

    Raises:
        MemoryFitError: the system refuses the memory.
    """

    def __init__(self, store: KVStore, num_blocks: int) -> None:
        try:
            self._kept = lazy_zeros((num_blocks, store.blocks.shape[1]), torch.uint8)
            if num_blocks and store.blocks.is_cuda:
                pin_in_place(self._kept, self)
        except MemoryError as error:
            raise MemoryFitError(f"the system refused {num_blocks:,} blocks of swap space; lower swap_space") from error
        self._blocks = store.blocks

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source in the store, target here); no target comes twice."""
        for source, target in moves:
            self._kept[target].copy_(self._blocks[source], non_blocking=True)

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks back, (source here, target in the store); no target comes twice."""
        for source, target in moves:
            self._blocks[target].copy_(self._kept[source], non_blocking=True)


def fit_pool(
    config: EngineConfig,
    shape: KVShape,
    plan: KVPlan,
    max_position: int,
    free: int,
    device: str = "cpu",
    host: int | None = None,
) -> MemoryReport:
    """How many blocks the pool and the swap space get.

    Given as num_kv_blocks or kv_cache_memory the pool is that; otherwise a fraction of the free memory, no more than
    max_num_seqs sequences of the full length could use.

    Args:
        config: the engine's.
        shape: the model's.
        plan: how each layer keeps its KV.
        max_position: the model's longest context.
        free: bytes available now, the weights already loaded.
        device: its kind, "cpu" or "cuda": a GPU's memory is for one program, where a CPU's is for many.
        host: bytes that the host has for the swap space; None where it is the host that computes, out of `free`.

    Raises:
        ConfigError: a block is too small for the sinks that the plan keeps.
        MemoryFitError: the request exceeds the free memory, not even one sequence of max_model_len fits, or the swap
            space holds no block.
    """
    _check_block_size(config.block_size, plan)
    block_bytes = MemoryReport(shape, plan, 1, config.block_size).block_bytes
    longest = config.max_model_len or max_position
    blocks_per_sequence = Paging(config.block_size, plan.lead).blocks_for(longest)
    budget = config.kv_cache_memory
    if config.num_kv_blocks is not None:
        blocks = config.num_kv_blocks
    elif budget is None:
        useful = config.limits(device).max_num_seqs * blocks_per_sequence
        fraction = DEVICE_FRACTION if device == "cuda" else AUTOMATIC_FRACTION
        blocks = min(int(free * fraction) // block_bytes, useful)
    else:
        assert not isinstance(budget, str), "EngineConfig parses sizes"
        blocks = int(free * budget if isinstance(budget, float) else budget) // block_bytes
    report = MemoryReport(shape, plan, blocks, config.block_size)
    _check_fit(config, report, free)
    left = free - report.pool_bytes if host is None else host
    return replace(report, swap_blocks=_fit_swap(config, report, free if host is None else host, left))


def _fit_swap(config: EngineConfig, report: MemoryReport, free: int, left: int) -> int:
    """Blocks of the swap space. A fraction is of all the host's free memory; what is left of that must do."""
    space = config.swap_space
    if space is None:
        return 0
    assert not isinstance(space, str), "EngineConfig parses sizes"
    asked = int(free * space) if isinstance(space, float) else space
    blocks = asked // report.block_bytes
    if not blocks:
        raise MemoryFitError(
            f"swap_space is {asked:,} bytes, one block of {report.block_size} tokens takes {report.block_bytes:,}; "
            "raise swap_space (a size has a unit: '2GiB', '800MB', '10%'), or leave it out"
        )
    if blocks * report.block_bytes > left:
        beside, remedy = ("", "") if left == free else ("beside the KV cache ", ", kv_cache_memory or num_kv_blocks")
        raise MemoryFitError(
            f"swap_space needs {_mib(asked)} of the host's memory, {beside}{_mib(left)} are free; "
            f"lower swap_space{remedy}"
        )
    return blocks


def _zeros(shape: tuple[int, int], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return lazy_zeros(shape, torch.uint8)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def _check_block_size(block_size: int, plan: KVPlan) -> None:
    """All sinks must lie in a sequence's first block: it is the one that is copied before any of them is written."""
    sinks = max(layer.format.sinks for layer in plan.layers)
    needed = plan.lead + sinks
    if block_size < needed:
        raise ConfigError(
            f"block_size={block_size} is too small for kv_cache_dtype={plan.name!r}: a text's first {sinks} tokens, "
            f"kept in 16 bit, take {needed} slots of one block; use block_size={1 << (needed - 1).bit_length()} or more"
        )


def _check_fit(config: EngineConfig, report: MemoryReport, free: int) -> None:
    remedy = "raise kv_cache_memory, use a smaller kv_cache_dtype (int8, int4), or lower max_model_len"
    if report.pool_bytes > free:
        raise MemoryFitError(
            f"{report.num_blocks:,} KV blocks need {_mib(report.pool_bytes)}, {_mib(free)} are free; "
            "lower num_kv_blocks or kv_cache_memory, or use a smaller kv_cache_dtype"
        )
    if report.num_blocks < 1:
        raise MemoryFitError(f"the KV cache's memory does not hold one block of {report.block_size} tokens; {remedy}")
    if config.max_model_len is not None and report.tokens < config.max_model_len:
        needed = replace(report, num_blocks=report.paging.blocks_for(config.max_model_len))
        raise MemoryFitError(
            f"max_model_len={config.max_model_len} needs {_mib(needed.pool_bytes)} of KV cache, "
            f"{_mib(report.pool_bytes)} hold {report.tokens:,} tokens; {remedy}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
