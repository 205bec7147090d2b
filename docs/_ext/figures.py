"""How plots of the gallery are saved: transparent SVG, in colors that suit light and dark pages."""

from typing import Any

from cycler import cycler
from matplotlib import pyplot as plt
from sphinx_gallery.scrapers import matplotlib_scraper

GRAY = "#808080"
STYLE: Any = {
    "figure.figsize": (6.4, 3.6),
    "savefig.transparent": True,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",
    "svg.hashsalt": "kdtl_jax",  # the same numbers give the same file
    "font.size": 11,
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "axes.prop_cycle": cycler(color=["#3b82c4", "#c2703d", "#4f9d69", "#9467bd"]),
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.color": GRAY,
    "axes.labelcolor": GRAY,
    "axes.edgecolor": GRAY,
    "grid.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}


def style(gallery: Any, script: Any) -> None:
    """Before a script runs."""
    plt.rcParams.update(STYLE)


def svg(block: Any, variables: Any, gallery: Any) -> str:
    """After a block that plots."""
    return matplotlib_scraper(block, variables, gallery, format="svg", metadata={"Date": None})
