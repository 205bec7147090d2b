"""Labeled data sets, the checks that all readers share, and the built-in digits.

The digits: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, licensed under the Creative Commons
Attribution 4.0 International license (CC BY 4.0). These are its 1,797 test images, as scikit-learn
distributes them, stored here as integers 0..16 without any other change.
"""

import importlib.resources
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdtl_jax import _text
from kdtl_jax.datasets._preprocessing import Kind, Preprocessing

ROWS_PER_CHECK = 4096  # rows that are checked together
MIN_ROWS = 20  # with at least this many rows, labels that hardly repeat are taken for an id


class Dataset(NamedTuple):
    """Labeled examples on the host.

    Labels are 0..classes-1, or `[N, classes]` if an example has several (0 and 1, float32) or if
    targets are numbers (float64, in their own units); `kind` says which. Readers check that, and
    that no input is NaN or infinite. Inputs are float32, except vectors whose differences float32
    would round away (Unix times), which stay float64 until a `Standardizer` has centered them.
    """

    name: str
    inputs: np.ndarray  # [N, ...]; images [N, H, W, C]
    labels: np.ndarray  # int32 [N]; for other kinds [N, classes]
    classes: int  # the number of classes, labels or numbers
    names: tuple[str, ...] = ()  # of the classes, if they are not the numbers themselves
    notices: tuple[str, ...] = ()  # from the reader
    form: Preprocessing = Preprocessing()  # how the inputs were read

    @property
    def kind(self) -> Kind:
        """The kind of targets: "classes", "labels" or "numbers"."""
        return self.form.kind

    def __repr__(self) -> str:
        """Shapes in place of arrays."""
        inputs, labels = (f"{x.dtype}{list(x.shape)}" for x in (self.inputs, self.labels))
        name = _text.quoted(self.name)
        return f"Dataset({name}, inputs {inputs}, labels {labels}, {self.classes} {self.kind})"

    def subset(self, rows: np.ndarray) -> "Dataset":
        """The examples `rows`."""
        return self._replace(inputs=self.inputs[rows], labels=self.labels[rows])

    def class_names(self) -> tuple[str, ...]:
        """A name for every class; its number if the data has no other."""
        return self.names or tuple(map(str, range(self.classes)))


def digits() -> Dataset:
    """1,797 gray images of handwritten digits, 8x8, values 0..16, ten classes.

    Returns:
      `Dataset` with `inputs` float32 `[1797, 8, 8, 1]`, `labels` int32 `[1797]`.
    """
    file = importlib.resources.files("kdtl_jax.datasets") / "digits.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    return Dataset(
        "UCI handwritten digits", images.astype(np.float32)[..., None], labels.astype(np.int32), 10
    )


def checked(
    name: str,
    inputs: np.ndarray,
    labels: np.ndarray,
    classes: int | None = None,
    *,
    like: Dataset | None = None,
) -> Dataset:
    """Makes a `Dataset` after checking every value. All readers share these rules for labels.

    Labels may be whole numbers `[N]` or `[N, 1]`, text, or one-hot rows `[N, K]`. Numbers 0..K-1
    are kept; text and other codes (10, 20, 30) are numbered in sorted order, with their names in
    `names` and a notice.

    Args:
      name: of the data, for messages.
      inputs: numbers, `[N, ...]`.
      labels: one label per example.
      classes: number of classes, if labels already are 0..classes-1 and some may be missing.
      like: another part of the data, whose numbering of classes this part follows.

    Raises:
      ValueError: if there are no examples, counts differ, a label is not whole, is negative or has
        no class, there is only one class, labels hardly repeat (an id), or an input is NaN or
        infinite; rows are named.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    label_vector, notices = _label_vector(name, inputs, labels)
    if inputs.size == 0:
        raise ValueError(f"{name}: holds no examples, got inputs {list(inputs.shape)}.")
    inputs = finite_numbers(name, inputs)
    values = _integers_or_text(name, label_vector)
    one_hot = labels.shape[-1] if labels.ndim == 2 and labels.shape[-1] > 1 else None
    if like is not None:
        numbers, count, names = *_number_classes_like(name, values, like), like.names
    elif classes is not None or one_hot is not None:
        numbers, count, names = *_in_range(name, values, classes or one_hot or 0), ()
    else:
        numbers, names, notice = _number_classes(name, values)
        count, notices = int(numbers.max()) + 1, [*notices, *notice]
    return Dataset(name, inputs, numbers.astype(np.int32), count, names, (*notices,))


def _label_vector(
    name: str, inputs: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Labels `[N]`, from `[N, 1]` or one-hot `[N, K]` as well."""
    label_vector, notices = labels, []
    if labels.ndim == 2 and labels.shape[1] == 1:
        label_vector = labels[:, 0]
    elif labels.ndim == 2 and labels.dtype.kind in "iufb" and labels.size:
        if not np.isin(labels, (0, 1)).all() or not (labels.sum(axis=1) == 1).all():
            row = int(np.flatnonzero(labels.sum(axis=1) != 1)[:1].sum())
            raise ValueError(
                f"{name}: labels {list(labels.shape)} are not one-hot, see row {row}: every row "
                "needs a single 1 among zeros. Several labels per example need target='labels'."
            )
        label_vector = labels.argmax(axis=1)
        notices = [f"labels are one-hot rows: read as the numbers 0..{labels.shape[1] - 1}"]
    if inputs.ndim < 1 or label_vector.ndim != 1 or len(inputs) != len(label_vector):
        raise ValueError(
            f"{name}: one label per example is needed, got inputs {list(inputs.shape)} and labels "
            f"{list(labels.shape)}. Are these two files of one split?"
        )
    return label_vector, notices


def _integers_or_text(name: str, labels: np.ndarray) -> np.ndarray:
    """Labels as integers of any width, or as text that is not numeric."""
    labels = decode_text(labels)
    if labels.dtype.kind == "U":
        labels = from_text(name, np.char.strip(labels))
    if labels.dtype.kind == "U":
        return labels
    if labels.dtype.kind not in "iufb":
        raise ValueError(f"{name}: labels must be numbers or text, got {labels.dtype}.")
    if labels.dtype.kind != "f":
        return labels.astype(np.int8) if labels.dtype.kind == "b" else labels
    if labels.dtype.itemsize < 8:  # float16 ends below the bound
        labels = labels.astype(np.float64)
    bad = np.flatnonzero(
        ~np.isfinite(labels) | (labels != np.floor(labels)) | (np.abs(labels) > 2.0**53)
    )
    if len(bad):
        row = int(bad[0])
        if np.abs(labels[row]) > 2.0**53 and np.isfinite(labels[row]):
            raise ValueError(
                f"{name}: labels must be whole numbers, got {labels[row]:g} at row {row}: above "
                "2^53 they cannot be told apart. Number the classes from 0 on, or write them as "
                "text such as 'id-123'."
            )
        raise ValueError(
            f"{name}: labels must be whole numbers, got {labels[row]} at row {row}. "
            "Is this the label column?"
        )
    return labels.astype(np.int64)


def decode_text(cells: np.ndarray) -> np.ndarray:
    """Bytes, and objects that all are text, as text; other cells are unchanged."""
    if cells.dtype.kind == "S":
        return np.char.decode(cells, "utf-8", "replace")
    is_text = cells.dtype.kind == "O" and cells.size
    is_text = is_text and all(isinstance(cell, str) for cell in cells.ravel())
    return cells.astype(str) if is_text else cells


def first_of(names: Sequence[str], most: int) -> str:
    """The first names, for a message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def from_text(name: str, labels: np.ndarray) -> np.ndarray:
    """Text labels as numbers if all of them are numeric, otherwise unchanged.

    Codes with leading zeros stay text: "007" and "07" are two names.
    """
    empty = np.flatnonzero(labels == "")
    if len(empty):
        raise ValueError(f"{name}: row {empty[0]} has no label.")
    if any(re.fullmatch(r"0[0-9]+", label) for label in labels):
        return labels
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels):
        return labels.astype(np.int64)
    try:
        return labels.astype(np.float64)
    except ValueError:
        return labels


def _in_range(name: str, labels: np.ndarray, classes: int) -> tuple[np.ndarray, int]:
    """Checks that labels are numbers 0..classes-1."""
    if labels.dtype.kind == "U" and all(re.fullmatch("[0-9]{1,18}", label) for label in labels):
        labels = labels.astype(np.int64)  # the classes are numbers: ignore leading zeros
    if labels.dtype.kind == "U":
        raise ValueError(
            f"{name}: labels must lie in 0..{classes - 1}, got {str(labels[0])!r} at row 0."
        )
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise ValueError(
            f"{name}: labels must lie in 0..{classes - 1}, got {labels[bad[0]]} at row "
            f"{bad[0]} ({len(bad)} such rows). Renumber the labels from 0, or drop these rows."
        )
    return labels, classes


def _number_classes_like(name: str, labels: np.ndarray, like: Dataset) -> tuple[np.ndarray, int]:
    """Numbers the classes of the labels as another part does."""
    if not like.names:
        return _in_range(name, labels, like.classes)
    text = labels.astype(str)
    order = np.argsort(like.names)
    positions = np.searchsorted(np.array(like.names)[order], text).clip(max=like.classes - 1)
    numbers = order[positions]
    bad = np.flatnonzero(np.array(like.names)[numbers] != text)
    if len(bad):
        classes = _text.shown(first_of(like.names, 8), 800)
        raise ValueError(
            f"{name}: label {_text.quoted(str(text[bad[0]]))} at row {bad[0]} does not occur "
            f"in the training part or the model, whose classes are {classes}."
        )
    return numbers, like.classes


def _number_classes(name: str, labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """Numbers 0..K-1, the names of the classes if they differ, and notices."""
    distinct, numbers = np.unique(labels, return_inverse=True)
    if len(distinct) == 1:
        raise ValueError(
            f"{name}: every label is {_text.shown(str(distinct[0]), 80)}: one class cannot be "
            "learned. Is this the label column? Give classes= for a part in which the others "
            "happen to be missing."
        )
    if len(labels) >= MIN_ROWS and 2 * len(distinct) > len(labels):
        raise ValueError(
            f"{name}: {len(distinct)} different labels in {len(labels)} examples: an id or a "
            "measurement? Name the column of labels (--label), or learn numbers (--target "
            "numbers). In Python, classes= says that these are classes."
        )
    is_text = distinct.dtype.kind == "U"
    if not is_text and distinct[0] < 0 and distinct.tolist() != [-1, 1]:  # these are two classes
        _in_range(name, labels, int(distinct[-1]) + 1)  # raises
    if not is_text and distinct[0] == 0 and distinct[-1] == len(distinct) - 1:
        return labels, (), []
    names = tuple(map(str, distinct))
    label_list = _text.shown(first_of(names, 6), 600)
    return numbers, names, [f"labels {label_list} are numbered 0..{len(names) - 1} in this order"]


def finite_numbers(name: str, inputs: np.ndarray) -> np.ndarray:
    """Inputs as float32, or as float64 if float32 would round their differences away."""
    if inputs.dtype.kind not in "iufb":
        raise ValueError(f"{name}: inputs must be numbers, got {inputs.dtype}.")
    # Values that overflow float32 become infinite, and are refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        single = np.ascontiguousarray(inputs, np.float32)
    is_finite = np.empty(len(single), bool)
    for start in range(0, len(single), ROWS_PER_CHECK):
        rows = slice(start, start + ROWS_PER_CHECK)
        is_finite[rows] = np.isfinite(single[rows]).all(axis=tuple(range(1, single.ndim)))
    if not is_finite.all():
        rows = np.flatnonzero(~is_finite)
        raise ValueError(
            f"{name}: {len(rows)} of {len(single)} examples hold NaN or infinity, the first at row "
            f"{rows[0]}. Drop or impute them first."
        )
    is_exact = inputs.dtype.itemsize < 4 or inputs.dtype == np.float32
    if is_exact or not inputs.size or inputs.ndim != 2:
        return single
    low, high = (x.astype(np.float64) for x in (inputs.min(axis=0), inputs.max(axis=0)))
    rounding = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    is_rounded = np.any((high > low) & (rounding > 1e-3 * (high - low)))
    return inputs.astype(np.float64) if is_rounded else single
