"""One part of a data set as stored, before classes are numbered and inputs encoded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax.datasets import _tables
from kdtl_jax.datasets._images import EncodedImages
from kdtl_jax.datasets._preprocessing import Preprocessing
from kdtl_jax.datasets._tables import ColumnTable, Missing


class Choices(NamedTuple):
    """How to read a path: the user's choices, and the model to read for."""

    label: str = "label"
    inputs: str | None = None
    missing: Missing | None = None
    drop: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    one_hot: bool = False
    with_targets: bool = True  # if False, data need none, and `targets` are columns to leave out
    targets: tuple[str, ...] = ()
    allow_unlabeled: bool = False  # whether an empty cell of targets means no labels
    model: Preprocessing | None = None  # of the model to read for, if any

    @property
    def model_columns(self) -> tuple[str, ...]:
        """The columns of inputs that the model reads; () means all."""
        return () if self.model is None else tuple(column.name for column in self.model.columns)


class StoredPart(NamedTuple):
    """One part as stored."""

    name: str
    inputs: np.ndarray | ColumnTable | EncodedImages
    targets: Any = None  # [N] or [N, K]
    names: tuple[str, ...] = ()  # of the classes 0..K-1, or of K columns of targets
    columns: tuple[str, ...] = ()  # of the targets
    notices: tuple[str, ...] = ()
    decimal_comma: bool = False  # in text


def with_channels(inputs: np.ndarray) -> np.ndarray:
    """Images `[N, H, W]` with a channel axis, numbers `[N]` as `[N, 1]`."""
    return inputs.reshape(_shape_with_channels(inputs.shape))


def _shape_with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1) if len(shape) in (1, 3) else shape


def check_shape(name: str, shape: tuple[int, ...], form: Preprocessing | None) -> None:
    """Refuses the shape `[N, ...]` of an array that a model does not take.

    Raises:
      ValueError: naming both shapes.
    """
    got = _shape_with_channels(shape)[1:]
    if form is not None and form.shape and got != form.shape:
        raise ValueError(
            f"{name}: its examples are {list(got)}, but the model takes {list(form.shape)}."
        )


def check_columns(name: str, header: Sequence[str], form: Preprocessing | None) -> None:
    """Refuses the header of a table that lacks a model's inputs.

    Raises:
      ValueError: naming the first missing column, or the shape that the model takes.
    """
    if form is None:
        return
    if not form.columns:
        raise ValueError(f"{name}: a table, but the model takes {list(form.shape)}, not columns.")
    _tables.check_model_columns(name, [column.name for column in form.columns], header)


def check_images(name: str, form: Preprocessing | None) -> None:
    """Refuses image files if a model was not trained on image files.

    Raises:
      ValueError: naming the data.
    """
    if form is not None and form.images is None:
        raise ValueError(f"{name}: image files, but the model was not trained on such files.")
