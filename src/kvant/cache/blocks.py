"""Which blocks are whose: ids and reference counts. No torch, no memory."""

from __future__ import annotations


class BlockPool:
    """Block ids 0 .. num_blocks - 1, free or held by counted references."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

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
        return block

    def share(self, block: int) -> None:
        """One more reference to a held block."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free and cannot be shared")
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free already")
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def references(self, block: int) -> int:
        """How many hold this block."""
        return self._references[block]
