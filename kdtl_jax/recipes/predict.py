"""Predicts a class and its probability for every example, in the order of the data.

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
from scipy.special import expit, softmax

from kdtl_jax import _files, _text
from kdtl_jax.recipes import _inputs
from kdtl_jax.recipes.settings import setting
from kdtl_jax.run import scores

EXAMPLES = """
  kdtl predict runs/distill/students/kd.safetensors new.npz
  kdtl predict runs/distill/students/kd.safetensors new.npy --out predictions.csv --probabilities
"""


@dataclass(frozen=True)
class Settings(_inputs.Used, _inputs.Written):
    """Settings of `kdtl predict`."""

    data: str | None = setting(
        None, "examples as for kdtl distill, with or without labels; also an .npy or one image",
        positional=True,
    )  # fmt: skip
    out: str | None = setting(
        None, "write this CSV file; default: print", metavar="FILE"
    )  # fmt: skip
    probabilities: bool = setting(False, "add a column with each class's probability")


def run(settings: Settings) -> int:
    """Writes or prints a row per example; the last column names image files."""
    example = EXAMPLES.strip().splitlines()[0]
    _inputs.check_out(settings)
    model, examples = _inputs.load(settings, example, with_labels=False)
    logits = model.predict(examples.inputs)
    names, kind = _inputs.class_names(model), _inputs.target_kind(model)
    # A class may be masked with -inf.
    is_valid = _classes(logits) != scores.WRONG if kind == "classes" else _is_finite(logits)
    if (invalid := np.flatnonzero(~is_valid)).size:
        print(
            f"warning: {settings.student} answers {invalid.size} of {len(logits)} examples with "
            f"numbers that are not finite, row {invalid[0]} first",
            file=sys.stderr,
        )
    if kind == "numbers":
        table = number_rows(logits, model.about.names)
    elif kind == "labels":
        table = label_rows(logits, names, settings.probabilities)
    else:
        table = class_rows(logits, names, settings.probabilities)
    if examples.files:
        table = ([*row, file] for row, file in zip(table, ("file", *examples.files), strict=True))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    if settings.out is None:
        content = text.getvalue()
        if sys.stdout.isatty():  # names could contain terminal commands
            content = "".join(f"{_text.escaped(x)}\n" for x in content[:-1].split("\n"))
        print(content, end="")
        return 0
    _inputs.check_out(settings)  # another command may have written there in the meantime
    _files.write_atomic(Path(settings.out), text.getvalue().encode())
    print(f"{settings.out}: {examples.description}", file=sys.stderr)
    return 0


def class_rows(
    logits: np.ndarray, names: tuple[str, ...], with_probabilities: bool
) -> Iterator[list[str]]:
    """The table of classes: a header and a line per example; no class for non-finite logits."""
    extra = [f"p({name})" for name in names] if with_probabilities else []
    yield ["row", "class", "probability", *extra]
    with np.errstate(invalid="ignore", over="ignore"):
        p = softmax(logits.astype(np.float64), axis=-1)
    for i, index in enumerate(_classes(logits).tolist()):
        prediction = ["", ""] if index == scores.WRONG else [names[index], f"{p[i, index]:.6g}"]
        yield [str(i), *prediction, *(f"{value:.6g}" for value in (p[i] if extra else ()))]


def label_rows(
    logits: np.ndarray, names: tuple[str, ...], with_probabilities: bool
) -> Iterator[list[str]]:
    """The table of labels: those with probability above 1/2, separated by semicolons.

    `nan` for non-finite logits, since an empty cell means that no label is likely.
    """
    yield ["row", "labels", *([f"p({name})" for name in names] if with_probabilities else [])]
    p = expit(logits.astype(np.float64))
    for i, (probabilities, is_valid) in enumerate(zip(p.tolist(), _is_finite(logits), strict=True)):
        likely = (name for name, value in zip(names, probabilities, strict=True) if value > 0.5)
        labels = ";".join(likely) if is_valid else "nan"
        yield [str(i), labels, *(f"{value:.6g}" for value in probabilities if with_probabilities)]


def number_rows(values: np.ndarray, names: tuple[str, ...]) -> Iterator[list[str]]:
    """The table of a regression's numbers, in the units of the targets."""
    default = ["value"] if values.shape[1] == 1 else [f"value_{i}" for i in range(values.shape[1])]
    yield ["row", *(names or default)]
    for i, row in enumerate(values.tolist()):
        yield [str(i), *(f"{value:.7g}" for value in row)]


def _classes(logits: np.ndarray) -> np.ndarray:
    return np.asarray(scores.predicted(jnp.asarray(logits)))


def _is_finite(logits: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether all numbers of an example are finite."""
    return np.asarray(np.isfinite(logits).all(axis=-1))
