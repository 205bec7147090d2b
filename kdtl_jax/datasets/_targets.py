"""Targets of every kind: one class per example, several labels at once, or numbers.

The values in a file determine the kind unless it is given: text and whole numbers are classes;
lists, "cat|dog", "cat;dog" and rows of 0 and 1 that are not one-hot are labels; other numbers are
numbers. One column of 0 and 1 given as labels is one label, for a model with one logit.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from kdtl_jax import _text
from kdtl_jax.datasets import _amounts
from kdtl_jax.datasets._dataset import Dataset, checked, finite_numbers, from_text
from kdtl_jax.datasets._preprocessing import Kind, Preprocessing
from kdtl_jax.datasets._tables import is_number

# What the label column holds; auto decides by its values.
Target = Literal["auto", "classes", "labels", "numbers"]
TARGETS: tuple[Target, ...] = get_args(Target)
SEPARATORS = "|;"  # between labels in one cell; also "," if targets are given as labels
MOST_LABELS = 10_000
QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
LIST = re.compile(r"""\[((?:\s*(?:'[^']*'|"[^"]*")\s*,?)*)\s*\]""")


def from_arrays(
    name: str,
    inputs: np.ndarray,
    targets: Any,
    *,
    target: Target = "auto",
    classes: int | None = None,
    like: Dataset | None = None,
    names: Sequence[str] = (),
    decimal_comma: bool = False,
) -> Dataset:
    """A `Dataset` from inputs and targets of any kind.

    Args:
      name: of the data, for messages.
      inputs: numbers, `[N, ...]`.
      targets: `[N]` or `[N, K]`: numbers, text, or lists of labels as an object array.
      target: their kind; "auto" decides by the values.
      classes: as in `checked`.
      like: another part of the data, or a model's, whose kind and names this part follows. If
        both have names, classes and columns are matched by name, in any order.
      names: of the classes 0..K-1, or of the K columns.
      decimal_comma: whether text writes 1,5 for 1.5.

    Raises:
      ValueError: if targets are not of their kind, or have other names than `like`; rows are named.
    """
    if not np.ndim(targets):
        raise ValueError(f"{name}: targets must hold one value per example, got {targets!r:.80}.")
    found, told = _listed(_plain(np.asarray(targets))), ()
    if (read := _read(found, target if like is None else like.kind, decimal_comma)) is not None:
        found, told = read
    kind = like.kind if like is not None else _kind(name, found, target)
    if kind == "classes":
        return _classes(name, inputs, found, classes, like, names)
    inputs = finite_numbers(name, inputs)
    if len(found) != len(inputs) or found.ndim > 2:
        raise ValueError(
            f"{name}: targets of every example are needed, got inputs {list(inputs.shape)} and "
            f"targets {list(found.shape)}. Are these two files of one split?"
        )
    if not inputs.size:
        raise ValueError(f"{name}: holds no examples, got inputs {list(inputs.shape)}.")
    if kind == "numbers" and (stacked := _equal_numbers(found)) is not None:
        found = stacked
    make = _labels if kind == "labels" else _numbers
    labels, names, notices = make(name, found, like, tuple(names))
    form = Preprocessing(kind, names, labels.shape[1])
    return Dataset(name, inputs, labels, labels.shape[1], names, (*told, *notices), form)


def _classes(
    name: str,
    inputs: np.ndarray,
    found: np.ndarray,
    classes: int | None,
    like: Dataset | None,
    names: Sequence[str],
) -> Dataset:
    if not names:
        return checked(name, inputs, found, classes, like=like)
    count, notices = len(names), ()
    if found.ndim == 2 and found.shape[1] > 1:
        note = (
            f"columns {_text.shown(', '.join(names[:6]), 300)} are one-hot: read as one class each"
        )
        count, notices = classes, (note,)
    unnamed = like is not None and not like.names
    made = checked(name, inputs, found, count, like=like if unnamed else None)
    made = made._replace(names=tuple(names), notices=notices)
    if like is None or unnamed:
        return made
    return checked(name, inputs, np.array(names)[made.labels], like=like)._replace(notices=notices)


def _in_order_of(
    name: str, targets: np.ndarray, names: tuple[str, ...], like: Dataset | None
) -> np.ndarray:
    """Columns of targets in the order of another part's, or unchanged if either has no names."""
    if like is None or not names or not like.names or names == like.names:
        return targets
    if set(names) != set(like.names):
        wanted, got = (_text.shown(", ".join(each), 300) for each in (like.names, names))
        raise ValueError(f"{name}: the columns of targets are {got}, expected {wanted}.")
    return targets[:, [names.index(each) for each in like.names]]


def _plain(found: np.ndarray) -> np.ndarray:
    """Objects that are all text or all numbers as such; bytes as text; `[N, 1]` as `[N]`."""
    if found.dtype.kind == "O" and found.size:
        cells = found.ravel()
        if all(isinstance(cell, str) for cell in cells):
            found = found.astype(str)
        elif all(isinstance(cell, (int, float, np.number, np.bool_)) for cell in cells):
            found = found.astype(np.float64)
    if found.dtype.kind == "S":
        found = np.char.decode(found, "utf-8", "replace")
    return found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found


def _listed(found: np.ndarray) -> np.ndarray:
    """Lists of text stored in a table in Python's notation, "['cat', 'dog']", as lists."""
    if found.dtype.kind != "U" or found.ndim != 1 or not len(found):
        return found
    cells = [LIST.fullmatch(cell.strip()) for cell in found.tolist()]
    if not all(cells) or not any(cell and cell[1] for cell in cells):
        return found
    out = np.empty(len(found), object)
    out[:] = [[a or b for a, b in QUOTED.findall(cell[1])] for cell in cells if cell]
    return out


def _read(
    found: np.ndarray, kind: Target, decimal_comma: bool
) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Amounts such as "$1,234" as numbers, if numbers are meant or they have fractions, with
    notices about them. None if there is nothing to read."""
    if found.dtype.kind != "U" or found.ndim != 1 or kind not in ("auto", "numbers"):
        return None
    marked = next((cell for cell in found.tolist() if not is_number(cell)), None)
    read = _amounts.amounts(found.tolist(), decimal_comma=decimal_comma)
    if marked is None or read is None or read[1] == _amounts.DAYS:
        return None
    if kind == "auto" and (read[0] == np.floor(read[0])).all():
        return None
    return read[0], (f"targets: {_amounts.told(marked, decimal_comma)}",)


def _kind(name: str, found: np.ndarray, target: Target) -> Kind:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r:.40}.")
    if target != "auto":
        return target
    if found.dtype.kind == "O":
        known = [cell for cell in found.ravel() if not _lacks(cell)]
        lists = all(isinstance(cell, (list, tuple, np.ndarray)) for cell in known)
        if _equal_numbers(found) is not None:
            raise ValueError(
                f"{name}: the lists of {len(found[0])} whole numbers may be labels that an example "
                "has, or numbers. Say which: --target labels or --target numbers."
            )
        return "labels" if lists and known else "classes"
    if found.ndim == 2 and found.dtype.kind in "iufb" and found.size:
        if np.isin(found, (0, 1)).all():
            return "classes" if (found.sum(axis=1) == 1).all() else "labels"
        if found.dtype.kind == "f":
            return "numbers"
        raise ValueError(
            f"{name}: targets {list(found.shape)} of {found.dtype} are neither 0 and 1 nor "
            "fractions: classes of several questions, or numbers? Choose one column with --label, "
            "or --target numbers."
        )
    if found.dtype.kind == "U" and found.ndim == 1:
        if any(mark in cell for mark in SEPARATORS for cell in found):
            return "labels"
        found = from_text(name, np.char.strip(found)) if not (found == "").any() else found
    if found.dtype.kind == "f":
        finite = found[np.isfinite(found)]
        return "numbers" if (finite != np.floor(finite)).any() else "classes"
    return "classes"


def _labels(
    name: str, found: np.ndarray, like: Dataset | None, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """`[N, K]` of 0 and 1, float32, and the names of the labels."""
    if found.ndim == 1 and (like is None or like.classes == 1):
        answers = _answers(found)  # to one question: whether an example has the label
        found = found if answers is None else answers[:, None]
    if found.ndim == 2:
        return _multi_hot(name, found, like, names)
    if like is not None and not like.names:
        raise ValueError(
            f"{name}: the {like.classes} labels of the training part or of the model have no names "
            f"with which to match a cell such as {found[0]!s:.80}. Give "
            f"[N, {like.classes}] of 0 and 1."
        )
    mark = _separator(found, like.names if like is not None else names)
    rows = [_split(name, i, cell, mark) for i, cell in enumerate(found)]
    known = like.names if like is not None else names
    known = known or tuple(sorted({label for row in rows for label in row}, key=_in_order))
    place = {label: i for i, label in enumerate(known)}
    if not 1 < len(known) <= MOST_LABELS:
        raise ValueError(
            f"{name}: {len(known)} different labels in {len(rows)} examples; from 2 to "
            f"{MOST_LABELS:,} are possible. Is this the label column?"
        )
    hot = np.zeros((len(rows), len(known)), np.float32)
    for i, row in enumerate(rows):
        for label in row:
            if label not in place:
                listed = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
                raise ValueError(
                    f"{name}: label {label!r:.80} at row {i} does not occur in the training part "
                    f"or the model, whose labels are {listed}."
                )
            hot[i, place[label]] = 1
    shown = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
    notice = f"several labels per example, {len(known)} in all: {shown}"
    return hot, known, [] if like is not None else [notice]


def _answers(found: np.ndarray) -> np.ndarray | None:
    """0 and 1 from one column that holds only these, or yes and no; None for other columns."""
    if found.dtype.kind in "iufb":
        return found if np.isin(found, (0, 1)).all() else None
    if found.dtype.kind != "U":
        return None
    said = np.char.lower(np.char.strip(found))
    pairs = (("0", "1"), ("no", "yes"), ("false", "true"))
    return next(
        ((said == pair[1]).astype(np.int64) for pair in pairs if np.isin(said, pair).all()), None
    )


def _multi_hot(
    name: str, found: np.ndarray, like: Dataset | None, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    count = found.shape[1] if like is None else like.classes
    if found.dtype.kind not in "iufb" or found.shape[1] != count or not count:
        raise ValueError(
            f"{name}: several labels per example must be [N, {count}] of 0 and 1, got "
            f"{list(found.shape)} of {found.dtype}."
        )
    wrong = np.flatnonzero(~np.isin(found, (0, 1)).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{name}: several labels per example must be 0 or 1, got "
            f"{found[wrong[0]].tolist()!s:.80} at row {wrong[0]}."
        )
    columns = "1 column: a label that" if count == 1 else f"{count} columns: several labels that"
    notice = f"targets are 0 or 1 in {columns} an example has or lacks"
    found = _in_order_of(name, found, names, like)
    known = (like.names if like is not None else ()) or names
    return found.astype(np.float32), known, [] if like is not None else [notice]


def _numbers(
    name: str, found: np.ndarray, like: Dataset | None, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """`[N, K]` float64 in their own units."""
    if found.dtype.kind == "U":
        flat = np.char.strip(found)
        try:
            found = flat.astype(np.float64)
        except ValueError:
            row = next(i for i, cell in enumerate(flat.ravel()) if not is_number(cell))
            shown = str(flat.ravel()[row])
            raise ValueError(
                f"{name}: targets must be numbers, got {shown!r:.80} at row "
                f"{row // max(1, flat[0].size)}."
            ) from None
    if found.dtype.kind not in "iufb":
        raise ValueError(f"{name}: targets must be numbers, got {found.dtype}.")
    targets = found.reshape(len(found), -1).astype(np.float64)
    with np.errstate(over="ignore"):  # what overflows float32 is refused
        wrong = np.flatnonzero(~np.isfinite(targets.astype(np.float32)).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{name}: targets must be finite numbers, got {targets[wrong[0]].tolist()!s:.80} at "
            f"row {wrong[0]} ({len(wrong)} such rows)."
        )
    if like is not None:
        if targets.shape[1] != like.classes:
            raise ValueError(
                f"{name}: {like.classes} numbers per example are needed, got {targets.shape[1]}."
            )
        return _in_order_of(name, targets, names, like), like.names, []
    constant = np.flatnonzero((targets == targets[:1]).all(axis=0))
    if len(constant):
        which = _text.shown(names[constant[0]], 80) if names else constant[0]
        raise ValueError(
            f"{name}: every target {which} is {targets[0, constant[0]]:g}: nothing can be learned."
        )
    one = "a number" if targets.shape[1] == 1 else f"{targets.shape[1]} numbers"
    return targets, names, [f"targets are {one} per example (regression)"]


def _separator(found: np.ndarray, known: Sequence[str]) -> str | None:
    """The separator between labels in a cell, which no known label contains."""
    cells = [cell for cell in found if isinstance(cell, str)]
    for mark in f"{SEPARATORS},":
        if any(mark in cell for cell in cells) and not any(mark in label for label in known):
            return mark
    return None


def _split(name: str, row: int, cell: Any, mark: str | None) -> list[str]:
    parts = cell.split(mark) if isinstance(cell, str) and mark else cell
    if not isinstance(parts, (list, tuple, np.ndarray)):
        parts = [parts]
    if any(_lacks(part) for part in parts):
        raise ValueError(
            f"{name}: a label is missing at row {row}, got {cell!s:.80}. Fill it in or leave it "
            "out; an example without labels has an empty list."
        )
    return [text for part in parts if (text := str(part).strip())]


def _equal_numbers(found: np.ndarray) -> np.ndarray | None:
    """`[N, K]` of lists of K whole numbers each, K > 1."""
    if found.dtype.kind != "O" or not found.size or not isinstance(found[0], list):
        return None
    length = len(found[0])
    if length < 2 or not all(isinstance(row, list) and len(row) == length for row in found):
        return None
    if not all(isinstance(cell, int) for row in found for cell in row):
        return None
    return np.array(found.tolist())


def _lacks(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and np.isnan(cell))


def _in_order(label: str) -> tuple[int, int | str]:
    """Whole numbers in order, then text."""
    return (0, int(label)) if label.isdecimal() and len(label) < 19 else (1, label)
