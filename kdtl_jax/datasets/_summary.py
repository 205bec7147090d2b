"""What is printed about data before training: what they are, and what looks wrong."""

import numpy as np

from kdtl_jax import _text
from kdtl_jax.datasets._dataset import Dataset
from kdtl_jax.datasets._splits import Splits

SHOWN = 8  # classes, columns
DOMINATES = 0.99  # a class with this share of the examples
FEWEST_ROWS = 20  # for warnings about columns
PIXELS = (1, 3, 4)  # channels of an image


def summary(splits: Splits) -> list[str]:
    """Inputs, targets and sizes of the parts, one per line, then notices and warnings.

    Args:
      splits: as read, before scaling.
    """
    train, sizes = splits.train, [len(part.labels) for part in splits]
    shape = " x ".join(map(str, train.inputs.shape[1:]))
    what = {
        2: "number" if shape == "1" else "numbers",
        4: "images (height x width x channels)",
    }.get(train.inputs.ndim, "arrays")
    lines = [
        f"data: {_text.shown(train.name)}: {sizes[0]} training, {sizes[1]} validation and "
        f"{sizes[2]} test examples",
        f"inputs: {shape} {what}, from {train.inputs.min():.6g} to {train.inputs.max():.6g}",
        f"targets: {_targets(train)}",
    ]
    lines += [f"note: {_text.shown(notice, 300)}" for notice in train.notices]
    return lines + [f"warning: {line}" for line in warnings(splits)]


def warnings(splits: Splits) -> list[str]:
    """What looks wrong, one line each."""
    train = splits.train
    return [
        *_of_targets(splits),
        *(_of_images(train) if train.inputs.ndim == 4 else []),
        *(_of_columns(train) if train.inputs.ndim == 2 else []),
        *_of_copies(splits),
    ]


def _targets(train: Dataset) -> str:
    if train.kind == "numbers":
        names = (
            train.names
            or ("target",) * (train.classes == 1)
            or tuple(f"target {i}" for i in range(train.classes))
        )
        low, high, mean = train.labels.min(0), train.labels.max(0), train.labels.mean(0)
        each = [f"{_text.shown(name)} from {low[i]:.4g} to {high[i]:.4g}, mean {mean[i]:.4g}"
                for i, name in enumerate(names[:SHOWN])]  # fmt: skip
        return "; ".join(each) + ("; …" if train.classes > SHOWN else "")
    counts = _counts(train)
    names = train.class_names()
    each = ", ".join(f"{_text.shown(names[i])} {counts[i]}" for i in range(min(SHOWN, len(names))))
    more = f", … (from {counts.min()} to {counts.max()})" if train.classes > SHOWN else ""
    kind = "classes"
    if train.kind != "classes":
        kind = "label" if train.classes == 1 else "labels, several at once"
    return f"{train.classes} {kind}: {each}{more}"


def _counts(part: Dataset) -> np.ndarray:
    if part.kind == "labels":
        return part.labels.sum(axis=0).astype(int)
    return np.bincount(part.labels, minlength=part.classes)


def _of_targets(splits: Splits) -> list[str]:
    said, train = [], splits.train
    if train.kind == "numbers":
        return said
    for part, data in splits._asdict().items():
        if len(data.labels) and (absent := np.flatnonzero(_counts(data) == 0)).size:
            names = _text.listed([data.class_names()[i] for i in absent], 3)
            said.append(f"no {part} example of {names}")
    share = _counts(train) / max(1, len(train.labels))
    often = int(share.argmax())
    if share[often] >= DOMINATES:
        name = _text.quoted(train.class_names()[often])
        said.append(
            f"{100 * share[often]:.1f}% of the training examples are {name}: accuracy says little"
        )
    return said


def _of_images(train: Dataset) -> list[str]:
    _, first, height, last = train.inputs.shape
    if first in PIXELS and last not in PIXELS and height > 4:
        return [
            f"inputs {list(train.inputs.shape[1:])} look like channels first: images are [height, "
            "width, channels] here. Transpose them (np.moveaxis(x, 1, -1))"
        ]
    if last == 1 and max(first, height) > 2 * min(first, height):
        return [
            f"inputs {first} x {height} are taken for gray images. If each is a sequence of "
            f"{height} numbers per step, your own model finds it in x[..., 0]"
        ]
    return []


def _of_columns(train: Dataset) -> list[str]:
    x, said = train.inputs, []
    if len(x) < FEWEST_ROWS:
        return said
    names = [
        f"{column.name}={category}" if category else column.name
        for column in train.form.columns
        for category in (column.categories or ("",))
    ]
    names = names if len(names) == x.shape[1] else [f"number {i}" for i in range(x.shape[1])]
    constant = np.flatnonzero((x == x[:1]).all(axis=0))
    if constant.size:
        said.append(
            f"{_text.listed([names[i] for i in constant], 3)}: the same in every training example"
        )
    if train.kind == "classes" and (told := [names[i] for i in _giving_away(x, train.labels)]):
        said.append(
            f"{_text.listed(told, 3)}: each of its values stands for one class: is it the label "
            "under another name? Leave it out (--drop-columns)"
        )
    steps = np.diff(x, axis=0)
    whole = (x == np.floor(x)).all(axis=0)
    # Rows keep their order: an index rises, by one if no row was drawn for another part.
    rises = whole & (steps > 0).all(axis=0) & (np.median(steps, axis=0) <= 2)
    for i in np.flatnonzero(rises)[:SHOWN]:
        said.append(
            f"{_text.quoted(names[i])} rises from row to row: is it an index? Leave it out "
            "(--drop-columns)"
        )
    deviation = x.std(axis=0)
    if np.abs(x.mean(axis=0)).max() < 0.05 and np.abs(deviation - 1).max() < 0.05:
        said.append(
            "inputs are already standardized: give them as measured, so that the model's "
            "file knows how"
        )
    return said


def _giving_away(x: np.ndarray, labels: np.ndarray) -> list[int]:
    """Columns with a single value for each class."""
    first = [np.flatnonzero(labels == each)[0] for each in np.unique(labels)]
    values = x[first]  # [classes, D], each class's value
    place = np.searchsorted(np.unique(labels), labels)
    same = (x == values[place]).all(axis=0)
    apart = np.array([len(np.unique(column)) == len(first) for column in values.T], bool)
    return np.flatnonzero(same & apart).tolist()


def _of_copies(splits: Splits) -> list[str]:
    """Test examples that were trained on."""
    test = splits.test
    if not len(test.labels):
        return []
    seen = {hash(row.tobytes()) for row in splits.train.inputs}  # not a second copy of the data
    copies = sum(
        hash(row.tobytes()) in seen for row in test.inputs.astype(splits.train.inputs.dtype)
    )
    if copies < max(1, 0.01 * len(test.labels)):
        return []
    return [
        f"{copies} of {len(test.labels)} test examples are also in the training part: the test "
        "accuracy is too optimistic"
    ]
