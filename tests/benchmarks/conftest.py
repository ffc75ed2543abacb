"""The benchmarks are scripts, which import what lies beside them; so must their tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "benchmarks" / folder) for folder in ("kv", "cpu")]
