"""The benchmarks are scripts, which import what lies beside them; so must their tests."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS / folder) for folder in ("kv", "cpu")] + [str(BENCHMARKS)]
