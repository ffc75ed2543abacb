"""How much memory there is to take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes this process could still take without swapping: the system's estimate, within its cgroup's limit."""
    limits = [_meminfo("MemAvailable"), _cgroup_headroom()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else _physical_memory()


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody has; what PyTorch keeps of what it has freed is given back first."""
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_headroom() -> int | None:
    """What the cgroup's limit (v2) leaves; file pages that can be dropped count as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used + _droppable(), 0)


def _droppable() -> int:
    try:
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("inactive_file", 0))


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
