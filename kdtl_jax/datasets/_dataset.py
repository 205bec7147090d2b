"""What a labelled data set is, and the checks that every reader makes of its values."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Labelled examples on the host.

    Labels are 0..classes-1; readers check that, and that no input is NaN or infinite.
    """

    name: str
    inputs: np.ndarray  # float32 [N, ...]; images [N, H, W, C]
    labels: np.ndarray  # int32 [N]
    classes: int

    def subset(self, rows: np.ndarray) -> "Dataset":
        """The examples `rows`."""
        return self._replace(inputs=self.inputs[rows], labels=self.labels[rows])


def checked(
    name: str, inputs: np.ndarray, labels: np.ndarray, classes: int | None = None
) -> Dataset:
    """A `Dataset`, after looking at every value.

    Args:
      name: of the data, for messages.
      inputs: numbers, `[N, ...]`.
      labels: whole numbers, `[N]`.
      classes: their number; None takes the largest label plus one.

    Raises:
      ValueError: if there are no examples, counts differ, a label is not whole or outside
        `0..classes-1`, there is one class only, or an input is NaN or infinite; rows are named.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.ndim < 1 or labels.ndim != 1 or len(inputs) != len(labels):
        raise ValueError(
            f"{name}: one label per example is needed, got inputs {list(inputs.shape)} and labels "
            f"{list(labels.shape)}. Are these two files of one split?"
        )
    if inputs.size == 0:
        raise ValueError(f"{name}: holds no examples, got inputs {list(inputs.shape)}.")
    for what, array in (("inputs", inputs), ("labels", labels)):
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{name}: {what} must be numbers, got {array.dtype}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
        inputs = np.ascontiguousarray(inputs, np.float32)
    _all_finite(name, inputs)
    return Dataset(name, inputs, *_whole_labels(name, labels, classes))


def _all_finite(name: str, inputs: np.ndarray) -> None:
    finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(
            f"{name}: {len(rows)} of {len(inputs)} examples hold NaN or infinity, the first at row "
            f"{rows[0]}. Drop or impute them first."
        )


def _whole_labels(name: str, labels: np.ndarray, classes: int | None) -> tuple[np.ndarray, int]:
    exact = labels.astype(np.float64)
    odd = np.flatnonzero(~np.isfinite(exact) | (exact != np.floor(exact)))
    if len(odd):
        row = int(odd[0])
        raise ValueError(
            f"{name}: labels must be whole numbers, got {labels[row]} at row {row}. "
            "Is this the label column?"
        )
    whole = labels.astype(np.int64)
    if whole.min() == whole.max() and classes is None:
        raise ValueError(
            f"{name}: every label is {whole[0]}: one class cannot be learned. Is this the label "
            "column? Give classes= for a part in which the others happen to be missing."
        )
    count = int(whole.max()) + 1 if classes is None else classes
    wrong = np.flatnonzero((whole < 0) | (whole >= count))
    if len(wrong):
        raise ValueError(
            f"{name}: labels must lie in 0..{count - 1}, got {whole[wrong[0]]} at row {wrong[0]} "
            f"({len(wrong)} such rows). Renumber the labels from 0, or drop these rows."
        )
    return whole.astype(np.int32), count
