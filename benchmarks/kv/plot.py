"""Plot KL against bits from what `kvant eval --json` wrote, one line of points a model.

    python benchmarks/kv/plot.py benchmarks/results/kv/*-wikitext2.json --out docs/images/kv-kl-bits.svg

Needs matplotlib, which kvant itself does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def load(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The model's name and the rows that differ from 16 bit at all."""
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in report["rows"] if row["kl"]]
    return report["model"].removesuffix(".gguf"), rows


def draw(reports: list[tuple[str, list[dict[str, Any]]]], out: Path) -> None:
    """One panel a model, so that the formats' names have room; both share their axes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvant"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(reports), figsize=(5.2 * len(reports), 4.2), sharey=True, squeeze=False)
    for panel, (model, rows) in zip(panels[0], reports, strict=True):
        for row in rows:
            ours = not row["kv_cache_dtype"].endswith("_plain")
            style = {"color": "#1f6feb" if ours else "#8b949e", "marker": "o" if ours else "s"}
            panel.errorbar(row["bits_per_element"], row["kl"], yerr=2 * row["kl_stderr"], capsize=3, **style)
            panel.annotate(
                row["kv_cache_dtype"],
                (row["bits_per_element"], row["kl"]),
                xytext=(6, 3),
                textcoords="offset points",
                fontsize=8,
            )
        panel.set(title=model, xlabel="stored bits per element", yscale="log", xlim=(4, 11))
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("mean KL to the 16-bit cache (nats)")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Read the reports, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="files of `kvant eval --json`")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg")
    arguments = parser.parse_args()
    draw([load(path) for path in arguments.reports], arguments.out)


if __name__ == "__main__":
    main()
