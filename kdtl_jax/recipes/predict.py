"""What a student says about each example: its class and probability, in the data's order.

kdtl predict runs/distill/students/kd.safetensors new.npz --out predictions.csv
"""

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from kdtl_jax import _files
from kdtl_jax.recipes import _inputs
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import scores

EXAMPLES = """
  kdtl predict runs/distill/students/kd.safetensors new.npz
  kdtl predict runs/distill/students/kd.safetensors new.npy --out predictions.csv --probabilities
"""


@dataclass(frozen=True)
class Settings(_inputs.Used):
    """What `kdtl predict` reads and writes."""

    data: str | None = setting(
        None, "examples, with or without labels: digits, an .npz, .npy or .csv, a folder of idx "
        "files", positional=True,
    )  # fmt: skip
    out: str | None = setting(
        None, "write this CSV file; default: print", metavar="FILE"
    )  # fmt: skip
    probabilities: bool = setting(False, "a column with every class's probability")


def run(settings: Settings) -> int:
    """Writes or prints a row per example."""
    if settings.student is None or settings.data is None:
        raise UsageError(f"name STUDENT and DATA, for example: {EXAMPLES.strip().splitlines()[0]}")
    model = _inputs.model_of(settings)
    found = _inputs.read(
        settings.data, model, part=settings.part, label=settings.label, with_labels=False
    )
    logits = model.predict(found.inputs)
    text = io.StringIO()
    names = _inputs.class_names(model)
    csv.writer(text, lineterminator="\n").writerows(rows(logits, names, settings.probabilities))
    if settings.out is None:
        print(text.getvalue(), end="")
        return 0
    _files.write_atomic(Path(settings.out), text.getvalue().encode())
    print(f"{settings.out}: {found.said}", file=sys.stderr)
    return 0


def rows(
    logits: np.ndarray, names: tuple[str, ...], with_probabilities: bool
) -> Iterator[list[str]]:
    """The table: a header, then a line per example; no class where logits are not finite."""
    extra = [f"p({name})" for name in names] if with_probabilities else []
    yield ["row", "class", "probability", *extra]
    named = np.asarray(scores.predicted(jnp.asarray(logits)))
    with np.errstate(invalid="ignore", over="ignore"):
        p = softmax(logits.astype(np.float64), axis=-1)
    for i, (at, each) in enumerate(zip(named.tolist(), p.tolist(), strict=True)):
        chosen = ["", ""] if at == scores.WRONG else [names[at], f"{each[at]:.6g}"]
        yield [str(i), *chosen, *(f"{value:.6g}" for value in each if extra)]
