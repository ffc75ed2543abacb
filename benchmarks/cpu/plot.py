"""Plot how many times as fast as llama.cpp kvant is, from what compare.py wrote: a panel a model and number of threads.

    python benchmarks/cpu/plot.py benchmarks/results/cpu/NAME.json --out docs/images/cpu-ratios.svg

A mark is the median over the repeats, its bar goes from the least to the most. Needs matplotlib, which kvant does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from points import OURS, PEERS, REFERENCE, Point

COLOURS = ("#1f6feb", "#8250df", "#bf3989")


def draw(groups: list[dict[str, Any]], out: Path) -> None:
    """Points downwards, ratios to the right, kvant's KV caches side by side."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvant"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 4.2), sharey=True, squeeze=False)
    for panel, group in zip(panels[0], groups, strict=True):
        for place, kv_cache in enumerate(PEERS[OURS].kv_caches):
            _series(panel, group["figures"], f"{OURS}:{kv_cache}", place)
        panel.axvline(1, color="#8b949e", linewidth=1)
        threads = "1 thread" if group["threads"] == 1 else f"{group['threads']} threads"
        panel.set(title=f"{group['model']}, {threads}", xlabel=f"times {REFERENCE}'s tokens/s", xlim=(0, None))
        panel.set_yticks(range(len(group["figures"])), [Point.parse(row["point"]).label for row in group["figures"]])
        panel.grid(visible=True, axis="x", alpha=0.3)
    panels[0][0].invert_yaxis()  # shared, so once
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _series(panel: Any, figures: list[dict[str, Any]], name: str, place: int) -> None:
    rows = [(row, figure["ratios"][name]) for row, figure in enumerate(figures) if name in figure["ratios"]]
    if not rows:
        return
    medians = [ratio["median"] for _, ratio in rows]
    spread = [[r["median"] - r["min"] for _, r in rows], [r["max"] - r["median"] for _, r in rows]]
    height = [row + 0.2 * (place - 1) for row, _ in rows]
    panel.errorbar(medians, height, xerr=spread, fmt="o", capsize=3, label=name, color=COLOURS[place])


def main() -> None:
    """Read the results, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of compare.py")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg")
    args = parser.parse_args()
    groups = [group for path in args.results for group in json.loads(path.read_text(encoding="utf-8"))["groups"]]
    draw(groups, args.out)


if __name__ == "__main__":
    main()
