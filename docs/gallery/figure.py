"""The gallery's data, and its curves: SVG on a transparent ground, with the spread over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np

from kdtl_jax import datasets
from kdtl_jax.run import report

matplotlib.use("svg")
from matplotlib import pyplot as plt

GRAY = "#808080"  # reads on light and on dark pages
COLORS = ("#3b82c4", "#c2703d", "#4f9d69", "#9467bd")


def digits(examples: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(data, test)`: the first examples of the training part, and the whole test part."""
    splits = datasets.standardized(datasets.stratified(datasets.digits()))

    def arrays(part: datasets.Dataset, count: int | None = None) -> dict[str, Any]:
        inputs, labels = jnp.asarray(part.inputs[:count]), jnp.asarray(part.labels[:count])
        return {"inputs": inputs, "labels": labels}

    return arrays(splits.train, examples), arrays(splits.test)


def save(
    path: str,
    x_values: Sequence[float],
    curves: Mapping[str, Any],
    *,
    x: str,
    y: str,
    log: bool = True,
) -> None:
    """Writes curves `{name: [x, seeds]}`: the mean, and the 95 % interval of it."""
    # Fixed ids and no date: the same numbers give the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kdtl_jax", "font.size": 11})
    drawing, axes = plt.subplots(figsize=(6.4, 3.6))
    for color, (name, values) in zip(COLORS, curves.items(), strict=False):
        found = [report.interval(seeds) for seeds in np.asarray(values)]
        middle = np.array([each.mean for each in found])
        low = [each.mean if each.low is None else each.low for each in found]
        high = [each.mean if each.high is None else each.high for each in found]
        axes.plot(x_values, middle, color=color, marker="o", label=name)
        axes.fill_between(x_values, low, high, color=color, alpha=0.25, lw=0)
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(x_values, [f"{value:g}" for value in x_values])
    axes.set_xlabel(x, color=GRAY)
    axes.set_ylabel(y, color=GRAY)
    axes.tick_params(colors=GRAY)
    axes.grid(color=GRAY, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRAY)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=GRAY)
    drawing.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(drawing)
