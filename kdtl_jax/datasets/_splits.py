"""Train, validation and test parts: split and standardized, identically on every machine."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kdtl_jax import _checks, _text
from kdtl_jax.datasets._dataset import Dataset
from kdtl_jax.datasets._preprocessing import Preprocessing, Standardizer


class Splits(NamedTuple):
    """Three disjoint parts of one data set."""

    train: Dataset
    validation: Dataset
    test: Dataset

    def __repr__(self) -> str:
        """Shapes and sizes in place of arrays."""
        train = self.train
        sizes = ", ".join(f"{name} {len(part.labels)}" for name, part in self._asdict().items())
        shapes = f"inputs {train.inputs.dtype}{list(train.inputs.shape[1:])}"
        return (
            f"Splits({_text.quoted(train.name)}, {shapes}, {train.classes} {train.kind}: {sizes})"
        )


def stratified(
    data: Dataset, *, validation: float = 0.2, test: float = 0.2, seed: int = 0
) -> Splits:
    """Splits rows into train, validation and test parts with equal proportions of classes.

    A function of `(labels, fractions, seed)` alone. Each part keeps the data set's order. Rows with
    several labels or with numbers are drawn regardless of them.

    Raises:
      ValueError: if fractions are negative or leave nothing to train on, or a class has too few
        examples to appear in all parts.
    """
    _checks.scalar(validation=validation, test=test)
    _checks.count(0, seed=seed)
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            "validation and test must be fractions >= 0 with a sum below 1, got "
            f"{validation} and {test}."
        )
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[], [], []]
    is_classes = data.kind == "classes"
    for label in range(data.classes if is_classes else 1):
        rows = np.flatnonzero(data.labels == label) if is_classes else np.arange(len(data.labels))
        rows = rng.permutation(rows)
        cuts = [round(test * len(rows)), round((test + validation) * len(rows))]
        pieces = np.split(rows, cuts)
        fractions = (test, validation, 1 - test - validation)
        if len(rows) and any(f > 0 and not len(p) for f, p in zip(fractions, pieces, strict=True)):
            subject = f"class {_class_name(data, label)} has" if is_classes else "there are"
            raise ValueError(
                f"{data.name}: {subject} {len(rows)} examples, too few for "
                f"every part with validation={validation}, test={test}. Merge or drop the class, "
                "or change the fractions."
            )
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    test_rows, validation_rows, train_rows = (np.sort(np.concatenate(part)) for part in parts)
    return Splits(*(data.subset(rows) for rows in (train_rows, validation_rows, test_rows)))


def per_class(data: Dataset, count: int, *, seed: int = 0) -> Dataset:
    """Draws `count` examples of every class: a few-label training set.

    Raises:
      ValueError: if a class has fewer, or targets are not classes.
    """
    if data.kind != "classes":
        raise ValueError(f"{data.name}: targets are {data.kind}: there is no number per class.")
    rng = np.random.default_rng(seed)
    rows_per_class = []
    for label in np.unique(data.labels):
        rows = np.flatnonzero(data.labels == label)
        if len(rows) < count:
            raise ValueError(
                f"{data.name}: class {_class_name(data, label)} has {len(rows)} examples, but "
                f"{count} are needed."
            )
        rows_per_class.append(rng.permutation(rows)[:count])
    return data.subset(np.sort(np.concatenate(rows_per_class)))


def _class_name(data: Dataset, label: int) -> str:
    return _text.shown(data.class_names()[label], 80)


def only_classes(data: Dataset, classes: range) -> Dataset:
    """The examples with labels in `classes`, renumbered from 0.

    Raises:
      ValueError: if there are none.
    """
    rows = np.flatnonzero(np.isin(data.labels, classes))
    if not len(rows):
        raise ValueError(f"{data.name} has no example of classes {list(classes)}.")
    subset, names = data.subset(rows), data.names
    if names or classes.start:  # class 5 keeps its name when it becomes number 0
        names = data.class_names()[classes.start : classes.stop]
    labels = subset.labels - np.int32(classes.start)
    return subset._replace(labels=labels, classes=len(classes), names=names)


def standardizer(train: Dataset) -> Standardizer:
    """Measures the scaling to mean 0 and standard deviation 1 per image channel or vector entry.

    Measured on training data only and applied to all parts. Pixels share one scale per channel:
    scaled alone, a pixel that is nearly always blank here would be huge in a task that uses it.
    A constant feature is only shifted.
    """
    axes = tuple(range(train.inputs.ndim - 1)) if train.inputs.ndim == 4 else (0,)
    dtype = train.inputs.dtype
    mean = train.inputs.mean(axis=axes, dtype=np.float64)
    deviation = train.inputs.std(axis=axes, dtype=np.float64)
    # A feature is constant if it varies by less than its rounding, in any unit.
    varies = deviation > np.finfo(dtype).eps * np.abs(mean)
    return Standardizer(mean.astype(dtype), np.where(varies, deviation, 1.0).astype(dtype))


def standardized(splits: Splits) -> Splits:
    """Standardizes all three parts by the training part."""
    scaling = standardizer(splits.train)
    return Splits(*(scaling.apply(part) for part in splits))


def prepared(splits: Splits) -> tuple[Splits, Preprocessing]:
    """Standardizes inputs, and targets that are numbers, by the training part.

    The returned `Preprocessing` describes all that was done to the inputs and targets in the file.

    Raises:
      TypeError: if `splits` are not those of a reader.
    """
    if not isinstance(splits, Splits):
        raise TypeError(
            f"splits must be those of datasets.read_splits, got {type(splits).__name__}."
        )
    train = splits.train
    form = train.form._replace(names=train.names, outputs=train.classes)
    form = form._replace(shape=train.inputs.shape[1:], scaling=standardizer(train))
    if train.kind == "numbers":
        mean, deviation = train.labels.mean(axis=0), train.labels.std(axis=0)
        target_scaling = Standardizer(mean, np.where(deviation > 0, deviation, 1.0))
        form = form._replace(target_scaling=target_scaling)
    return scaled(splits, form), form


def scaled(splits: Splits, preprocessing: Preprocessing) -> Splits:
    """Scales inputs, and targets that are numbers, by a `Preprocessing`; `form` records it."""
    scaling, target_scaling = preprocessing.scaling, preprocessing.target_scaling
    parts = [part if scaling is None else scaling.apply(part) for part in splits]
    if target_scaling is not None:
        mean, scale = target_scaling
        labels = [((part.labels - mean) / scale).astype(np.float32) for part in parts]
        parts = [part._replace(labels=x) for part, x in zip(parts, labels, strict=True)]
    return Splits(*(part._replace(form=part.form._replace(scaling=scaling)) for part in parts))


def with_drawn_parts(
    train: Dataset, others: Mapping[str, Dataset], validation: float, test: float, seed: int
) -> Splits:
    """All three parts; those that `others` lack are drawn from the training part."""
    fractions = {"validation": validation, "test": test}
    fractions |= dict.fromkeys(others, 0.0)
    return stratified(train, **fractions, seed=seed)._replace(**others)
