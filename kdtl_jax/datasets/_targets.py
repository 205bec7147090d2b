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
from kdtl_jax.datasets._dataset import (
    Dataset,
    checked,
    decode_text,
    finite_numbers,
    first_of,
    from_text,
)
from kdtl_jax.datasets._preprocessing import Kind, Preprocessing
from kdtl_jax.datasets._tables import is_number

# The kind of targets; auto decides by the values.
Target = Literal["auto", "classes", "labels", "numbers"]
TARGETS: tuple[Target, ...] = get_args(Target)
SEPARATORS = "|;"  # between labels in one cell; also "," if targets are given as labels
MAX_LABELS = 10_000
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
    values, amount_notices = _parse_lists(_simplify(np.asarray(targets))), ()
    amounts = _parse_amounts(values, target if like is None else like.kind, decimal_comma)
    if amounts is not None:
        values, amount_notices = amounts
    kind = like.kind if like is not None else _detect_kind(name, values, target)
    if kind == "classes":
        return _class_dataset(name, inputs, values, classes, like, names)
    inputs = finite_numbers(name, inputs)
    if len(values) != len(inputs) or values.ndim > 2:
        raise ValueError(
            f"{name}: targets of every example are needed, got inputs {list(inputs.shape)} and "
            f"targets {list(values.shape)}. Are these two files of one split?"
        )
    if not inputs.size:
        raise ValueError(f"{name}: holds no examples, got inputs {list(inputs.shape)}.")
    if kind == "numbers" and (stacked := _stack_integer_lists(values)) is not None:
        values = stacked
    convert = _multi_hot_labels if kind == "labels" else _regression_targets
    labels, names, notices = convert(name, values, like, tuple(names))
    form = Preprocessing(kind, names, labels.shape[1])
    return Dataset(name, inputs, labels, labels.shape[1], names, (*amount_notices, *notices), form)


def _class_dataset(
    name: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    classes: int | None,
    like: Dataset | None,
    names: Sequence[str],
) -> Dataset:
    if not names:
        return checked(name, inputs, targets, classes, like=like)
    count, notices = len(names), ()
    if targets.ndim == 2 and targets.shape[1] > 1:
        notice = (
            f"columns {_text.shown(', '.join(names[:6]), 300)} are one-hot: read as one class each"
        )
        count, notices = classes, (notice,)
    ignores_names = like is not None and not like.names
    data = checked(name, inputs, targets, count, like=like if ignores_names else None)
    data = data._replace(names=tuple(names), notices=notices)
    if like is None or ignores_names:
        return data
    return checked(name, inputs, np.array(names)[data.labels], like=like)._replace(notices=notices)


def _match_columns(
    name: str, targets: np.ndarray, names: tuple[str, ...], like: Dataset | None
) -> np.ndarray:
    """Reorders columns of targets as in another part; no change if either has no names."""
    if like is None or not names or not like.names or names == like.names:
        return targets
    if set(names) != set(like.names):
        expected, got = (_text.shown(", ".join(each), 300) for each in (like.names, names))
        raise ValueError(f"{name}: the columns of targets are {got}, expected {expected}.")
    return targets[:, [names.index(each) for each in like.names]]


def _simplify(targets: np.ndarray) -> np.ndarray:
    """Converts objects to text or numbers if all are, bytes to text, and `[N, 1]` to `[N]`."""
    targets = decode_text(targets)
    if targets.dtype.kind == "O" and targets.size:
        number_types = (int, float, np.number, np.bool_)
        if all(isinstance(cell, number_types) for cell in targets.ravel()):
            targets = targets.astype(np.float64)
    return targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets


def _parse_lists(targets: np.ndarray) -> np.ndarray:
    """Parses lists of text in Python's notation, such as "['cat', 'dog']"."""
    if targets.dtype.kind != "U" or targets.ndim != 1 or not len(targets):
        return targets
    cells = [LIST.fullmatch(cell.strip()) for cell in targets.tolist()]
    if not all(cells) or not any(cell and cell[1] for cell in cells):
        return targets
    lists = np.empty(len(targets), object)
    lists[:] = [[a or b for a, b in QUOTED.findall(cell[1])] for cell in cells if cell]
    return lists


def _parse_amounts(
    targets: np.ndarray, kind: Target, decimal_comma: bool
) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Parses amounts such as "$1,234" if `kind` is "numbers" or they have fractions.

    Returns:
      Numbers and notices about them; None if the targets stay as they are.
    """
    if targets.dtype.kind != "U" or targets.ndim != 1 or kind not in ("auto", "numbers"):
        return None
    cell_with_unit = next((text for text in targets.tolist() if not is_number(text)), None)
    amounts = _amounts.amounts(targets.tolist(), decimal_comma=decimal_comma)
    if cell_with_unit is None or amounts is None or amounts[1] == _amounts.DAYS:
        return None
    if kind == "auto" and (amounts[0] == np.floor(amounts[0])).all():
        return None
    return amounts[0], (f"targets: {_amounts.reading_notice(cell_with_unit, decimal_comma)}",)


def _detect_kind(name: str, targets: np.ndarray, target: Target) -> Kind:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r:.40}.")
    if target != "auto":
        return target
    if targets.dtype.kind == "O":
        cells = [each for each in targets.ravel() if not _is_missing(each)]
        lists = all(isinstance(each, (list, tuple, np.ndarray)) for each in cells)
        if _stack_integer_lists(targets) is not None:
            raise ValueError(
                f"{name}: the lists of {len(targets[0])} whole numbers may be labels that an "
                "example has, or numbers. Say which: --target labels or --target numbers."
            )
        return "labels" if lists and cells else "classes"
    if targets.ndim == 2 and targets.dtype.kind in "iufb" and targets.size:
        if np.isin(targets, (0, 1)).all():
            return "classes" if (targets.sum(axis=1) == 1).all() else "labels"
        if targets.dtype.kind == "f":
            return "numbers"
        raise ValueError(
            f"{name}: targets {list(targets.shape)} of {targets.dtype} are neither 0 and 1 nor "
            "fractions: classes of several questions, or numbers? Choose one column with --label, "
            "or --target numbers."
        )
    if targets.dtype.kind == "U" and targets.ndim == 1:
        if any(mark in each for mark in SEPARATORS for each in targets):
            return "labels"
        targets = from_text(name, np.char.strip(targets)) if not (targets == "").any() else targets
    if targets.dtype.kind == "f":
        finite = targets[np.isfinite(targets)]
        return "numbers" if (finite != np.floor(finite)).any() else "classes"
    return "classes"


def _multi_hot_labels(
    name: str, targets: np.ndarray, like: Dataset | None, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """`[N, K]` of 0 and 1, float32, and the names of the labels."""
    if targets.ndim == 1 and (like is None or like.classes == 1):
        binary = _binary_column(targets)  # to one question: whether an example has the label
        targets = targets if binary is None else binary[:, None]
    if targets.ndim == 2:
        return _check_multi_hot(name, targets, like, names)
    if like is not None and not like.names:
        raise ValueError(
            f"{name}: the {like.classes} labels of the training part or of the model have no names "
            f"with which to match a cell such as {targets[0]!s:.80}. Give "
            f"[N, {like.classes}] of 0 and 1."
        )
    separator = _separator(targets, like.names if like is not None else names)
    rows = [_split_cell(name, i, cell, separator) for i, cell in enumerate(targets)]
    labels = like.names if like is not None else names
    labels = labels or tuple(sorted({label for row in rows for label in row}, key=_natural_order))
    column_of = {label: i for i, label in enumerate(labels)}
    if not 1 < len(labels) <= MAX_LABELS:
        raise ValueError(
            f"{name}: {len(labels)} different labels in {len(rows)} examples; from 2 to "
            f"{MAX_LABELS:,} are possible. Is this the label column?"
        )
    multi_hot = np.zeros((len(rows), len(labels)), np.float32)
    for i, row in enumerate(rows):
        for label in row:
            if label not in column_of:
                raise ValueError(
                    f"{name}: label {label!r:.80} at row {i} does not occur in the training part "
                    f"or the model, whose labels are {first_of(labels, 8)}."
                )
            multi_hot[i, column_of[label]] = 1
    notice = f"several labels per example, {len(labels)} in all: {first_of(labels, 6)}"
    return multi_hot, labels, [] if like is not None else [notice]


def _binary_column(targets: np.ndarray) -> np.ndarray | None:
    """0 and 1 from a column that holds only these, or yes and no; None for other columns."""
    if targets.dtype.kind in "iufb":
        return targets if np.isin(targets, (0, 1)).all() else None
    if targets.dtype.kind != "U":
        return None
    words = np.char.lower(np.char.strip(targets))
    pairs = (("0", "1"), ("no", "yes"), ("false", "true"))
    return next(
        ((words == pair[1]).astype(np.int64) for pair in pairs if np.isin(words, pair).all()), None
    )


def _check_multi_hot(
    name: str, targets: np.ndarray, like: Dataset | None, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    count = targets.shape[1] if like is None else like.classes
    if targets.dtype.kind not in "iufb" or targets.shape[1] != count or not count:
        raise ValueError(
            f"{name}: several labels per example must be [N, {count}] of 0 and 1, got "
            f"{list(targets.shape)} of {targets.dtype}."
        )
    invalid = np.flatnonzero(~np.isin(targets, (0, 1)).all(axis=1))
    if len(invalid):
        raise ValueError(
            f"{name}: several labels per example must be 0 or 1, got "
            f"{targets[invalid[0]].tolist()!s:.80} at row {invalid[0]}."
        )
    columns = "1 column: a label that" if count == 1 else f"{count} columns: several labels that"
    notice = f"targets are 0 or 1 in {columns} an example has or lacks"
    targets = _match_columns(name, targets, names, like)
    label_names = (like.names if like is not None else ()) or names
    return targets.astype(np.float32), label_names, [] if like is not None else [notice]


def _regression_targets(
    name: str, values: np.ndarray, like: Dataset | None, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """`[N, K]` float64 in their own units."""
    if values.dtype.kind == "U":
        flat = np.char.strip(values)
        try:
            values = flat.astype(np.float64)
        except ValueError:
            row = next(i for i, cell in enumerate(flat.ravel()) if not is_number(cell))
            cell = str(flat.ravel()[row])
            raise ValueError(
                f"{name}: targets must be numbers, got {cell!r:.80} at row "
                f"{row // max(1, flat[0].size)}."
            ) from None
    if values.dtype.kind not in "iufb":
        raise ValueError(f"{name}: targets must be numbers, got {values.dtype}.")
    targets = values.reshape(len(values), -1).astype(np.float64)
    with np.errstate(over="ignore"):  # what overflows float32 is refused
        invalid = np.flatnonzero(~np.isfinite(targets.astype(np.float32)).all(axis=1))
    if len(invalid):
        raise ValueError(
            f"{name}: targets must be finite numbers, got {targets[invalid[0]].tolist()!s:.80} at "
            f"row {invalid[0]} ({len(invalid)} such rows)."
        )
    if like is not None:
        if targets.shape[1] != like.classes:
            raise ValueError(
                f"{name}: {like.classes} numbers per example are needed, got {targets.shape[1]}."
            )
        return _match_columns(name, targets, names, like), like.names, []
    constant = np.flatnonzero((targets == targets[:1]).all(axis=0))
    if len(constant):
        target = _text.shown(names[constant[0]], 80) if names else constant[0]
        raise ValueError(
            f"{name}: every target {target} is {targets[0, constant[0]]:g}: nothing can be learned."
        )
    description = "a number" if targets.shape[1] == 1 else f"{targets.shape[1]} numbers"
    return targets, names, [f"targets are {description} per example (regression)"]


def _separator(targets: np.ndarray, labels: Sequence[str]) -> str | None:
    """The separator between labels in a cell, one that no known label contains."""
    cells = [cell for cell in targets if isinstance(cell, str)]
    for separator in f"{SEPARATORS},":
        is_used = any(separator in cell for cell in cells)
        if is_used and not any(separator in label for label in labels):
            return separator
    return None


def _split_cell(name: str, row: int, cell: Any, separator: str | None) -> list[str]:
    parts = cell.split(separator) if isinstance(cell, str) and separator else cell
    if not isinstance(parts, (list, tuple, np.ndarray)):
        parts = [parts]
    if any(_is_missing(part) for part in parts):
        raise ValueError(
            f"{name}: a label is missing at row {row}, got {cell!s:.80}. Fill it in or leave it "
            "out; an example without labels has an empty list."
        )
    return [text for part in parts if (text := str(part).strip())]


def _stack_integer_lists(targets: np.ndarray) -> np.ndarray | None:
    """Stacks lists of K > 1 whole numbers each as `[N, K]`; None for other targets."""
    if targets.dtype.kind != "O" or not targets.size or not isinstance(targets[0], list):
        return None
    length = len(targets[0])
    if length < 2 or not all(isinstance(row, list) and len(row) == length for row in targets):
        return None
    if not all(isinstance(cell, int) for row in targets for cell in row):
        return None
    return np.array(targets.tolist())


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and np.isnan(cell))


def _natural_order(label: str) -> tuple[int, int | str]:
    """Whole numbers in order, then text."""
    return (0, int(label)) if label.isdecimal() and len(label) < 19 else (1, label)
