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
    """What `kdtl predict` reads and writes."""

    data: str | None = setting(
        None, "examples as for kdtl distill, with or without labels; also an .npy or one image",
        positional=True,
    )  # fmt: skip
    out: str | None = setting(
        None, "write this CSV file; default: print", metavar="FILE"
    )  # fmt: skip
    probabilities: bool = setting(False, "add a column with each class's probability")


def run(settings: Settings) -> int:
    """Writes or prints a row per example; a last column names image files."""
    example = EXAMPLES.strip().splitlines()[0]
    _inputs.check_out(settings)
    model, found = _inputs.load(settings, example, with_labels=False)
    logits = model.predict(found.inputs)
    names, kind = _inputs.class_names(model), _inputs.target_kind(model)
    # A class may be masked with -inf.
    answers = _named(logits) != scores.WRONG if kind == "classes" else _are_answers(logits)
    if (broken := np.flatnonzero(~answers)).size:
        print(
            f"warning: {settings.student} answers {broken.size} of {len(logits)} examples with "
            f"numbers that are not finite, row {broken[0]} first",
            file=sys.stderr,
        )
    if kind == "numbers":
        table = rows_of_numbers(logits, model.about.names)
    elif kind == "labels":
        table = rows_of_labels(logits, names, settings.probabilities)
    else:
        table = rows(logits, names, settings.probabilities)
    if found.files:
        table = ([*row, file] for row, file in zip(table, ("file", *found.files), strict=True))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    if settings.out is None:
        said = text.getvalue()
        if sys.stdout.isatty():  # where names could hold terminal commands
            said = "".join(f"{_text.escaped(x)}\n" for x in said[:-1].split("\n"))
        print(said, end="")
        return 0
    _inputs.check_out(settings)  # another command may have written there in the meantime
    _files.write_atomic(Path(settings.out), text.getvalue().encode())
    print(f"{settings.out}: {found.description}", file=sys.stderr)
    return 0


def rows(
    logits: np.ndarray, names: tuple[str, ...], with_probabilities: bool
) -> Iterator[list[str]]:
    """The table: a header, then a line per example; no class if logits are not finite."""
    extra = [f"p({name})" for name in names] if with_probabilities else []
    yield ["row", "class", "probability", *extra]
    with np.errstate(invalid="ignore", over="ignore"):
        p = softmax(logits.astype(np.float64), axis=-1)
    for i, (at, each) in enumerate(zip(_named(logits).tolist(), p.tolist(), strict=True)):
        chosen = ["", ""] if at == scores.WRONG else [names[at], f"{each[at]:.6g}"]
        yield [str(i), *chosen, *(f"{value:.6g}" for value in each if extra)]


def rows_of_labels(
    logits: np.ndarray, names: tuple[str, ...], with_probabilities: bool
) -> Iterator[list[str]]:
    """Several labels at once: those of probability above one half, separated by semicolons.

    `nan` if logits are not finite; an empty cell would mean that no label is likely.
    """
    yield ["row", "labels", *([f"p({name})" for name in names] if with_probabilities else [])]
    p = expit(logits.astype(np.float64))
    for i, (each, told) in enumerate(zip(p.tolist(), _are_answers(logits), strict=True)):
        named = ";".join(name for name, value in zip(names, each, strict=True) if value > 0.5)
        yield [
            str(i),
            named if told else "nan",
            *(f"{value:.6g}" for value in each if with_probabilities),
        ]


def rows_of_numbers(values: np.ndarray, names: tuple[str, ...]) -> Iterator[list[str]]:
    """A regression's numbers, in the units of its targets."""
    plain = ["value"] if values.shape[1] == 1 else [f"value_{i}" for i in range(values.shape[1])]
    yield ["row", *(names or plain)]
    for i, each in enumerate(values.tolist()):
        yield [str(i), *(f"{value:.7g}" for value in each)]


def _named(logits: np.ndarray) -> np.ndarray:
    return np.asarray(scores.predicted(jnp.asarray(logits)))


def _are_answers(logits: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether all numbers of an example are finite."""
    return np.asarray(np.isfinite(logits).all(axis=-1))
