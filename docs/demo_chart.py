"""Accuracy of every method of `kdtl demo`, from the run's results, for light or for dark pages.

kdtl demo
python docs/demo_chart.py runs/demo/results.json docs/_static/demo-light.svg
python docs/demo_chart.py runs/demo/results.json docs/_static/demo-dark.svg dark
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt


class Theme(NamedTuple):
    """Colors on the ground of a page."""

    ink: str
    quiet: str
    better: str
    other: str


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#0969da", "#8c959f"),
    "dark": Theme("#e6edf3", "#9198a1", "#4493f8", "#7d8590"),
}


def main(results: str, out: str, theme: str = "light") -> None:
    rows: list[dict[str, Any]] = json.loads(Path(results).read_text())["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    groups = [[row for row in rows if row["family"] == family] for family in families]
    ink, quiet, better, other = THEMES[theme]
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "kdtl_jax",
            "font.size": 11,
            "font.family": "sans-serif",
            "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        }
    )
    drawing, panels = plt.subplots(
        len(groups),
        figsize=(8.4, 0.34 * len(rows) + 1.5),
        height_ratios=[len(group) for group in groups],
        squeeze=False,
        layout="constrained",
    )
    for axes, family, group in zip(panels[:, 0], families, groups, strict=True):
        for i, row in enumerate(group):
            mean = 100 * row["test_accuracy"]["mean"]
            low, high = (100 * x for x in row["test_accuracy"]["ci95"])
            is_better = row["versus"] is not None and row["versus"]["verdict"] == "better"
            color = better if is_better else other
            axes.plot([low, high], [i, i], color=color, lw=6, alpha=0.4)
            axes.plot(mean, i, "o", color=color, ms=7)
            axes.annotate(
                f"{mean:.1f}", (high, i), (10, 0), textcoords="offset points", va="center",
                color=ink, fontsize=10,
            )  # fmt: skip
        axes.set_title(family.capitalize(), color=ink, loc="left", fontsize=11, weight="bold")
        axes.set_yticks(range(len(group)), [row["label"] for row in group])
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.tick_params(axis="x", colors=quiet, length=0)
        axes.tick_params(axis="y", colors=ink, length=0)
        axes.grid(axis="x", color=quiet, alpha=0.25)
        axes.spines[:].set_visible(False)
    drawing.supxlabel(
        "test accuracy in % with its 95% interval (seeds and test images); "
        "blue: better than training alone",
        color=quiet,
        fontsize=11,
    )
    drawing.savefig(out, transparent=True, metadata={"Date": None})
    plt.close(drawing)


if __name__ == "__main__":
    main(*sys.argv[1:])
