"""Fixed splits and standardization: the same rows for the same seed on every machine."""

from typing import NamedTuple

import numpy as np

from kdtl_jax.datasets._dataset import Dataset


class Splits(NamedTuple):
    """Three disjoint parts of one data set."""

    train: Dataset
    validation: Dataset
    test: Dataset


class Standardizer(NamedTuple):
    """Shift and scale, measured on training data; both broadcast against the inputs."""

    mean: np.ndarray
    scale: np.ndarray

    def apply(self, data: Dataset) -> Dataset:
        """`(x - mean) / scale`."""
        return data._replace(inputs=(data.inputs - self.mean) / self.scale)


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
    return kept._replace(labels=kept.labels - np.int32(classes.start), classes=len(classes))


def standardizer(train: Dataset) -> Standardizer:
    """Mean 0 and standard deviation 1 per feature: per channel of images, per entry of vectors.

    Measure it on training data alone and apply it to all parts. Pixels share one scale: by its
    own, a pixel that is nearly always blank here would be huge where another task draws on it.
    A constant feature is only shifted.
    """
    axes = tuple(range(train.inputs.ndim - 1)) if train.inputs.ndim == 4 else (0,)
    mean = train.inputs.mean(axis=axes, dtype=np.float64)
    deviation = train.inputs.std(axis=axes, dtype=np.float64)
    scale = np.where(deviation > 1e-6, deviation, 1.0)
    return Standardizer(mean.astype(np.float32), scale.astype(np.float32))


def standardized(splits: Splits) -> Splits:
    """All three parts standardized by the training part."""
    measured = standardizer(splits.train)
    return Splits(*(measured.apply(part) for part in splits))
