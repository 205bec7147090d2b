"""Train, validation and test parts: read, split and standardized, the same on every machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdtl_jax.datasets._dataset import Dataset, digits
from kdtl_jax.datasets._preprocessing import Standardizer
from kdtl_jax.datasets._readers import npz_names, read_csv, read_idx, read_npz

# Names of (inputs, labels) in an npz, in the order in which they are looked for.
TRAIN_KEYS = (("x_train", "y_train"), ("train_images", "train_labels"))
TEST_KEYS = (("x_test", "y_test"), ("test_images", "test_labels"))
VALIDATION_KEYS = (
    ("x_validation", "y_validation"),
    ("x_valid", "y_valid"),
    ("x_val", "y_val"),
    ("val_images", "val_labels"),
)
WHOLE_KEYS = (("x", "y"), ("inputs", "labels"), ("images", "labels"), ("data", "target"))
EXPECTED = (
    "digits (embedded), an .npz (x_train, y_train, x_test, y_test, or x, y), a folder of idx files "
    "(train-images-idx3-ubyte, train-labels-…, t10k-…, .gz too), or a .csv with a label column"
)


class Splits(NamedTuple):
    """Three disjoint parts of one data set."""

    train: Dataset
    validation: Dataset
    test: Dataset


def read_splits(
    text: str,
    *,
    label: str = "label",
    validation: float = 0.2,
    test: float = 0.3,
    seed: int = 0,
) -> Splits:
    """Train, validation and test parts of the data that a text names.

    Args:
      text: `digits`; an `.npz` with `x_train`, `y_train`, `x_test`, `y_test` (and, if it has one,
        `x_validation`, `y_validation`), or with `x`, `y` alone; a folder of idx files in MNIST's
        names; a `.csv` with a header line. Other usual names of arrays are understood
        (`TRAIN_KEYS` and its neighbors); arrays with other names are not unpacked.
      label: the label column of a CSV.
      validation: share of the training rows (of all rows, if there is no test part either).
      test: share of all rows, if there is no test part.
      seed: of the rows drawn; parts keep their proportions of classes.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if there is nothing of the kind, or its contents are not what they should be.
    """
    if text == "digits":
        return stratified(digits(), validation=validation, test=test, seed=seed)
    path = Path(text)
    if path.is_dir():
        train = read_idx(_idx(path, "train", "images"), _idx(path, "train", "labels"))
        images, labels = _idx(path, "t10k", "images"), _idx(path, "t10k", "labels")
        final = read_idx(images, labels, like=train)
        return _completed(path, train, None, final, validation, 0.0, seed)
    if not path.exists():
        raise ValueError(f"{text}: no such file or folder. Expected {EXPECTED}.")
    if path.suffix == ".npz":
        return _from_npz(path, validation, test, seed)
    if path.suffix == ".csv":
        whole = read_csv(path, label=label)
        return stratified(whole, validation=validation, test=test, seed=seed)
    raise ValueError(f"{text}: not recognized by its name. Expected {EXPECTED}.")


def stratified(
    data: Dataset, *, validation: float = 0.2, test: float = 0.2, seed: int = 0
) -> Splits:
    """Train, validation and test rows with every class in its own proportion in each part.

    A function of `(labels, fractions, seed)` alone. Each part keeps the data set's order.

    Raises:
      ValueError: if fractions are negative or leave nothing to train on, or a class has too few
        examples to appear in all parts.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            "validation and test must be fractions >= 0 with a sum below 1, got "
            f"{validation} and {test}."
        )
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in range(data.classes):
        rows = rng.permutation(np.flatnonzero(data.labels == label))
        cuts = [round(test * len(rows)), round((test + validation) * len(rows))]
        pieces = np.split(rows, cuts)
        asked = [test > 0, validation > 0, True]
        if len(rows) and any(a and not len(p) for a, p in zip(asked, pieces, strict=True)):
            raise ValueError(
                f"{data.name}: class {label} has {len(rows)} examples, too few for "
                f"every part with validation={validation}, test={test}. Merge or drop the class, "
                "or change the fractions."
            )
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    test_rows, validation_rows, train_rows = (np.sort(np.concatenate(p)) for p in parts)
    return Splits(*(data.subset(rows) for rows in (train_rows, validation_rows, test_rows)))


def per_class(data: Dataset, count: int, *, seed: int = 0) -> Dataset:
    """`count` examples of every class, drawn from `data`: a few-label training set.

    Raises:
      ValueError: if a class has fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(data.labels):
        rows = np.flatnonzero(data.labels == label)
        if len(rows) < count:
            raise ValueError(f"{data.name}: class {label} has {len(rows)} examples, {count} asked.")
        chosen.append(rng.permutation(rows)[:count])
    return data.subset(np.sort(np.concatenate(chosen)))


def only_classes(data: Dataset, classes: range) -> Dataset:
    """The examples whose label lies in `classes`, renumbered from 0.

    Raises:
      ValueError: if there are none.
    """
    rows = np.flatnonzero(np.isin(data.labels, classes))
    if not len(rows):
        raise ValueError(f"{data.name} has no example of classes {list(classes)}.")
    kept = data.subset(rows)
    return kept._replace(
        labels=kept.labels - np.int32(classes.start),
        classes=len(classes),
        names=data.names[classes.start : classes.stop],
    )


def standardizer(train: Dataset) -> Standardizer:
    """Mean 0 and standard deviation 1 per feature: per channel of images, per entry of vectors.

    Measure it on training data alone and apply it to all parts. Pixels share one scale: by its
    own, a pixel that is nearly always blank here would be huge where another task draws on it.
    A constant feature is only shifted.
    """
    axes = tuple(range(train.inputs.ndim - 1)) if train.inputs.ndim == 4 else (0,)
    kind = train.inputs.dtype
    mean = train.inputs.mean(axis=axes, dtype=np.float64)
    deviation = train.inputs.std(axis=axes, dtype=np.float64)
    # Constant is what varies by less than the rounding of its own values, in whatever unit.
    varies = deviation > np.finfo(kind).eps * np.abs(mean)
    return Standardizer(mean.astype(kind), np.where(varies, deviation, 1.0).astype(kind))


def standardized(splits: Splits) -> Splits:
    """All three parts standardized by the training part."""
    measured = standardizer(splits.train)
    return Splits(*(measured.apply(part) for part in splits))


def _from_npz(path: Path, validation: float, test: float, seed: int) -> Splits:
    there = npz_names(path)
    train = _pair(path, there, TRAIN_KEYS, None)
    if train is None:
        whole = _pair(path, there, WHOLE_KEYS, None)
        if whole is None:
            raise ValueError(
                f"{path}: has no training data. Expected arrays x_train, y_train, x_test, y_test, "
                f"or x, y; it has {there or 'none'}."
            )
        whole = whole._replace(name=path.name)
        return stratified(whole, validation=validation, test=test, seed=seed)
    validation_part = _pair(path, there, VALIDATION_KEYS, train)
    test_part = _pair(path, there, TEST_KEYS, train)
    return _completed(path, train, validation_part, test_part, validation, test, seed)


def _pair(
    path: Path, there: Sequence[str], keys: Sequence[tuple[str, str]], like: Dataset | None
) -> Dataset | None:
    for inputs, labels in keys:
        if inputs in there and labels in there:
            return read_npz(path, inputs=inputs, labels=labels, like=like)
        if inputs in there and inputs.startswith("x"):
            raise ValueError(f"{path}: has {inputs!r} but not {labels!r}; it has {list(there)}.")
    return None


def _idx(folder: Path, part: str, kind: str) -> Path:
    """The one file of a part: `train-images-idx3-ubyte`, `train-images.idx3-ubyte.gz`, …"""
    found = sorted(folder.glob(f"{part}-{kind}*"))
    if part == "t10k" and not found:
        found = sorted(folder.glob(f"test-{kind}*"))
    if not found:
        there = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(
            f"{folder}: has no {part}-{kind}-idx file (.gz or not); it has "
            f"{there or 'nothing'}. Expected MNIST's four files."
        )
    return found[0]


def _completed(
    path: Path,
    train: Dataset,
    validation_part: Dataset | None,
    test_part: Dataset | None,
    validation: float,
    test: float,
    seed: int,
) -> Splits:
    """All three parts; what the data lacks is drawn from its training part."""
    parts = stratified(
        train,
        validation=validation if validation_part is None else 0.0,
        test=test if test_part is None else 0.0,
        seed=seed,
    )
    found = Splits(
        parts.train,
        parts.validation if validation_part is None else validation_part,
        parts.test if test_part is None else test_part,
    )
    shapes = [part.inputs.shape[1:] for part in found]
    if len(set(shapes)) > 1:
        raise ValueError(f"{path}: parts have examples of different shapes, {shapes}.")
    return Splits(*(part._replace(name=path.name) for part in found))
