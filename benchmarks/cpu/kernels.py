"""The native kernels one by one, on one thread, beside the limits that the same run measures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import kernels_attention
import kernels_linear
import kernels_rows
import kernels_write
import torch
from kernel import Planned, Timing, measure, measure_limits
from machine import commit, describe_machine

from kvant.errors import ConfigError
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.select import select_ops

PARTS = (kernels_linear, kernels_attention, kernels_write, kernels_rows)  # modules with kernels(ops)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; a JSON file where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure kernels with this in their names")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each kernel")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ops = select_ops("cpu", threads=1)
    if not isinstance(ops, CpuOps):
        raise ConfigError("the native kernels are not built, or KVANT_CPU_ISA leaves them out")
    limits = measure_limits(ops.native, chosen.seconds)
    print(f"{ops.name}: reads {limits['read'] / 1e9:.1f} GB/s, {limits['dot'] / 1e9:.0f} GOP/s of integer dots, "
          f"{limits['fma'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    timings = list(_timings(ops, chosen.only, limits, chosen.seconds))
    if chosen.out:
        head = {"machine": describe_machine(), "commit": commit(), "isa": ops.name, "limits": limits}
        rows = [asdict(timing) for timing in timings]
        chosen.out.write_text(json.dumps({**head, "kernels": rows}, indent=2) + "\n", encoding="utf-8")


def _timings(ops: CpuOps, only: str, limits: dict[str, float], seconds: float) -> Iterator[Timing]:
    planned: Iterator[Planned] = chain.from_iterable(part.kernels(ops) for part in PARTS)
    print(f"{'kernel':<40} {'ns/unit':>8} {'GB/s':>6} {'of limit':>8} {'GOP/s':>6} {'of limit':>8}")
    for name, make in planned:
        if only in name:
            it = measure(name, make(), limits, seconds)  # one kernel's data at a time
            print(f"{it.name:<40} {it.ns_per_unit:8.2f} {it.gb_per_s:6.1f} {it.of_reading:8.0%} "
                  f"{it.gop_per_s:6.0f} {it.of_products:8.0%}")  # fmt: skip
            yield it


if __name__ == "__main__":
    main()
