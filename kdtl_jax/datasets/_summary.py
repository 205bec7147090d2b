"""Summaries and warnings about data, printed before training."""

import numpy as np

from kdtl_jax import _text
from kdtl_jax.datasets._dataset import Dataset
from kdtl_jax.datasets._splits import Splits

MAX_LISTED = 8  # classes, columns
DOMINANT_SHARE = 0.99  # a class with this share of the examples
MIN_ROWS = 20  # for warnings about columns
CHANNELS = (1, 3, 4)  # of an image


def summary(splits: Splits) -> list[str]:
    """Inputs, targets and sizes of the parts, one per line, then notices and warnings.

    Args:
      splits: as read, before scaling.
    """
    train, sizes = splits.train, [len(part.labels) for part in splits]
    shape = " x ".join(map(str, train.inputs.shape[1:]))
    description = {
        2: "number" if shape == "1" else "numbers",
        4: "images (height x width x channels)",
    }.get(train.inputs.ndim, "arrays")
    lines = [
        f"data: {_text.shown(train.name)}: {sizes[0]} training, {sizes[1]} validation and "
        f"{sizes[2]} test examples",
        f"inputs: {shape} {description}, from {train.inputs.min():.6g} to {train.inputs.max():.6g}",
        f"targets: {_targets(train)}",
    ]
    lines += [f"note: {_text.shown(notice, 300)}" for notice in train.notices]
    return lines + [f"warning: {line}" for line in warnings(splits)]


def warnings(splits: Splits) -> list[str]:
    """Warnings about data that look wrong, one line each."""
    train = splits.train
    return [
        *_target_warnings(splits),
        *(_image_warnings(train) if train.inputs.ndim == 4 else []),
        *(_column_warnings(train) if train.inputs.ndim == 2 else []),
        *_duplicate_warnings(splits),
    ]


def _targets(train: Dataset) -> str:
    if train.kind == "numbers":
        numbered = [f"target {i}" for i in range(train.classes)]
        names = train.names or (["target"] if train.classes == 1 else numbered)
        low, high, mean = train.labels.min(0), train.labels.max(0), train.labels.mean(0)
        parts = [
            f"{_text.shown(name)} from {low[i]:.4g} to {high[i]:.4g}, mean {mean[i]:.4g}"
            for i, name in enumerate(names[:MAX_LISTED])
        ]
        return "; ".join(parts) + ("; …" if train.classes > MAX_LISTED else "")
    counts = _counts(train)
    names = train.class_names()
    pairs = list(zip(names, counts, strict=True))[:MAX_LISTED]
    parts = ", ".join(f"{_text.shown(name)} {count}" for name, count in pairs)
    rest = f", … (from {counts.min()} to {counts.max()})" if train.classes > MAX_LISTED else ""
    kind = "classes"
    if train.kind != "classes":
        kind = "label" if train.classes == 1 else "labels, several at once"
    return f"{train.classes} {kind}: {parts}{rest}"


def _counts(part: Dataset) -> np.ndarray:
    if part.kind == "labels":
        return part.labels.sum(axis=0).astype(int)
    return np.bincount(part.labels, minlength=part.classes)


def _target_warnings(splits: Splits) -> list[str]:
    result, train = [], splits.train
    if train.kind == "numbers":
        return result
    for part, data in splits._asdict().items():
        if len(data.labels) and (missing := np.flatnonzero(_counts(data) == 0)).size:
            names = _text.listed([data.class_names()[i] for i in missing], 3)
            result.append(f"no {part} example of {names}")
    share = _counts(train) / max(1, len(train.labels))
    largest = int(share.argmax())
    if share[largest] >= DOMINANT_SHARE:
        name = _text.quoted(train.class_names()[largest])
        result.append(
            f"{100 * share[largest]:.1f}% of the training examples are {name}: accuracy says little"
        )
    return result


def _image_warnings(train: Dataset) -> list[str]:
    _, first, second, last = train.inputs.shape
    if first in CHANNELS and last not in CHANNELS and second > 4:
        return [
            f"inputs {list(train.inputs.shape[1:])} look like channels first: images are [height, "
            "width, channels] here. Transpose them (np.moveaxis(x, 1, -1))"
        ]
    if last == 1 and max(first, second) > 2 * min(first, second):
        return [
            f"inputs {first} x {second} are taken for gray images. If each is a sequence of "
            f"{second} numbers per step, your own model finds it in x[..., 0]"
        ]
    return []


def _column_warnings(train: Dataset) -> list[str]:
    x, result = train.inputs, []
    if len(x) < MIN_ROWS:
        return result
    names = [
        f"{column.name}={category}" if category else column.name
        for column in train.form.columns
        for category in (column.categories or ("",))
    ]
    names = names if len(names) == x.shape[1] else [f"number {i}" for i in range(x.shape[1])]
    constant = np.flatnonzero((x == x[:1]).all(axis=0))
    if constant.size:
        result.append(
            f"{_text.listed([names[i] for i in constant], 3)}: the same in every training example"
        )
    if train.kind == "classes" and (leaks := [names[i] for i in _leaking_columns(x, train.labels)]):
        result.append(
            f"{_text.listed(leaks, 3)}: each of its values stands for one class: is it the label "
            "under another name? Leave it out (--drop-columns)"
        )
    steps = np.diff(x, axis=0)
    is_integer = (x == np.floor(x)).all(axis=0)
    # Rows keep their order: an index rises, by one if no row was drawn for another part.
    is_index = is_integer & (steps > 0).all(axis=0) & (np.median(steps, axis=0) <= 2)
    for i in np.flatnonzero(is_index)[:MAX_LISTED]:
        result.append(
            f"{_text.quoted(names[i])} rises from row to row: is it an index? Leave it out "
            "(--drop-columns)"
        )
    deviation = x.std(axis=0)
    if np.abs(x.mean(axis=0)).max() < 0.05 and np.abs(deviation - 1).max() < 0.05:
        result.append(
            "inputs are already standardized: give them as measured, so that the model's "
            "file knows how"
        )
    return result


def _leaking_columns(x: np.ndarray, labels: np.ndarray) -> list[int]:
    """Columns with one distinct value per class."""
    first_rows = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)]
    values = x[first_rows]  # [classes, D], each class's value
    class_index = np.searchsorted(np.unique(labels), labels)
    is_constant_per_class = (x == values[class_index]).all(axis=0)
    is_distinct = np.array([len(np.unique(column)) == len(first_rows) for column in values.T], bool)
    return np.flatnonzero(is_constant_per_class & is_distinct).tolist()


def _duplicate_warnings(splits: Splits) -> list[str]:
    """Warns of test examples that are also in the training part."""
    test = splits.test
    if not len(test.labels):
        return []
    seen = {hash(row.tobytes()) for row in splits.train.inputs}  # not a second copy of the data
    duplicates = sum(
        hash(row.tobytes()) in seen for row in test.inputs.astype(splits.train.inputs.dtype)
    )
    if duplicates < max(1, 0.01 * len(test.labels)):
        return []
    return [
        f"{duplicates} of {len(test.labels)} test examples are also in the training part: the test "
        "accuracy is too optimistic"
    ]
