"""How a kernel is launched: where Triton runs, and the sizes that a launch is compiled for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled with: its block sizes by name, warps a program, and stages of its pipelined loops."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_here() -> bool:
    """Whether Triton is installed, and has a device or its interpreter to run kernels on."""
    return importlib.util.find_spec("triton") is not None and (interpreted() or torch.cuda.is_available())
