"""Which blocks are whose, and which tokens lie in them: ids, reference counts, plain integers. No torch, no memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paging:
    """Where a sequence's tokens lie: token m in slot m + lead of its blocks, counted through them in order.

    Attributes:
        block_size: slots of a block.
        lead: slots at the beginning of a sequence's first block that its first tokens take beyond one each; less than
            `block_size`. See `kvant.formats.kv`.
    """

    block_size: int
    lead: int = 0

    def block_of(self, position: int) -> int:
        """Which of the sequence's blocks holds the token at `position`."""
        return (position + self.lead) // self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that the first `tokens` tokens need."""
        return -(-(tokens + self.lead) // self.block_size) if tokens else 0

    def full_blocks(self, tokens: int) -> int:
        """Blocks that the first `tokens` tokens fill to the end."""
        return (tokens + self.lead) // self.block_size

    def capacity(self, blocks: int) -> int:
        """Tokens that the first `blocks` blocks hold."""
        return max(blocks * self.block_size - self.lead, 0)


class BlockPool:
    """Block ids 0 .. num_blocks - 1, free or held by counted references.

    Attributes:
        num_used: blocks that somebody holds, beside what is only kept.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_used = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._kept = [False] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def take(self) -> int | None:
        """A free block with one reference, or None when there is none."""
        if not self._free:
            return None
        block = self._free.pop()
        self._references[block] = 1
        self.num_used += 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a held block."""
        self._add_reference(block)
        self.num_used += self._references[block] - self._kept[block] == 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        self._drop_reference(block)
        self.num_used -= self._references[block] == self._kept[block]

    def keep(self, block: int) -> None:
        """A reference to a held block of one who uses it only when it is shared again; a block has one such at most."""
        self._add_reference(block)
        self._kept[block] = True

    def forget(self, block: int) -> None:
        """Release what was kept."""
        self._drop_reference(block)
        self._kept[block] = False

    def references(self, block: int) -> int:
        """How many hold this block."""
        return self._references[block]

    def _add_reference(self, block: int) -> None:
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free and cannot be shared")
        self._references[block] += 1

    def _drop_reference(self, block: int) -> None:
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free already")
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)
