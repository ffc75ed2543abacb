"""Where things are measured: the card, or the CPU with Triton's interpreter, and random tensors there."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import launch

_USUAL_L2 = 64 << 20


@dataclass
class Machine:
    """A device and the ops on it.

    Attributes:
        card: as the driver names it; on a CPU, what computes there.
        small: miniatures, and few of them: everything runs, nothing is measured.
        dtype: of activations; bfloat16 on a card, which Triton's interpreter multiplies as if it were integers.
        rotates: whether calls are measured on inputs that no cache holds; see `timing.rotated`.
        kept: the one large thing that several cases in a row use, and what it is.
        tuned: the (op, key) pairs whose configurations are known, and not to be measured again.
        match: a regular expression: only cases with this in their names are measured.
    """

    device: torch.device
    card: str
    ops: Ops
    small: bool
    dtype: torch.dtype = torch.float16
    rotates: bool = True
    kept: dict[Hashable, Any] = field(default_factory=dict)
    tuned: set[tuple[str, str]] = field(default_factory=set)
    match: str = ""

    @classmethod
    def here(cls, small: bool) -> Machine:
        """The first card, or the CPU where there is none."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        ops: Ops = ReferenceOps()
        if launch.runs_here():
            from kvant.kernels.triton.ops import TritonOps

            ops = TritonOps(device) if cuda else TritonOps()
        card = torch.cuda.get_device_name(device) if cuda else f"cpu {ops.name}"
        return cls(device, card, ops, small, torch.bfloat16 if cuda else torch.float16)

    @property
    def cuda(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    @property
    def l2_bytes(self) -> int:
        """Of the card's last cache: what is read again within so much is not read from memory."""
        if not self.cuda:
            return 0
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or _USUAL_L2

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, of the activations' type; never zeros, which make cards run faster."""
        return torch.randn(*shape, dtype=torch.float32, device=self.device).to(dtype or self.dtype)

    def random_bytes(self, *shape: int) -> Tensor:
        """[*shape] uint8."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def keep(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """The large thing called `what`: the one that is kept, or a new one when that is gone."""
        if what not in self.kept:
            self.kept.clear()
            self.tidy()
            self.kept[what] = make()
        return self.kept[what]

    def tidy(self) -> None:
        """Give back what nobody holds any more, graphs and their memory included."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the card has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        """Card, versions and commit, for the results."""
        facts: dict[str, Any] = {"card": self.card, "ops": self.ops.name, "python": platform.python_version()}
        for name in ("torch", "triton"):
            try:
                facts[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                facts[name] = None
        facts |= {"cuda": torch.version.cuda, "commit": _commit(), "l2_bytes": self.l2_bytes}
        if self.cuda:
            properties = torch.cuda.get_device_properties(0)
            facts |= {"memory_bytes": properties.total_memory, "processors": properties.multi_processor_count}
        return facts


def _commit() -> str | None:
    try:
        where = Path(__file__).parent
        command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
