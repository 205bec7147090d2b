"""One part of a data set as stored, before targets are numbered and inputs encoded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax.datasets import _tables
from kdtl_jax.datasets._images import Pictures
from kdtl_jax.datasets._preprocessing import Preprocessing
from kdtl_jax.datasets._tables import Missing, Table


class Choices(NamedTuple):
    """The choices that a path alone does not determine."""

    label: str = "label"
    inputs: str | None = None
    missing: Missing | None = None
    drop: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    one_hot: bool = False
    with_targets: bool = True  # if False, sources need none, and `targets` are columns to leave out
    targets: tuple[str, ...] = ()
    may_be_none: bool = False  # an empty cell of targets is an example without any label
    takes: Preprocessing | None = None  # form of the model to read inputs for, if any

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns of inputs that a model reads; () means all."""
        return () if self.takes is None else tuple(column.name for column in self.takes.columns)


class Source(NamedTuple):
    """One part as stored."""

    name: str
    inputs: np.ndarray | Table | Pictures
    targets: Any = None  # [N] or [N, K]
    names: tuple[str, ...] = ()  # of the classes 0..K-1, or of K columns of targets
    columns: tuple[str, ...] = ()  # where the targets were found
    notices: tuple[str, ...] = ()
    decimal_comma: bool = False  # in text


def with_channels(inputs: np.ndarray) -> np.ndarray:
    """Images `[N, H, W]` with a channel axis, numbers `[N]` as `[N, 1]`."""
    return inputs.reshape(_with_channels(inputs.shape))


def _with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1) if len(shape) in (1, 3) else shape


def check_shape(name: str, shape: tuple[int, ...], form: Preprocessing | None) -> None:
    """Refuses an array `[N, ...]`, perhaps not yet read, whose shape a model does not take.

    Raises:
      ValueError: naming both shapes.
    """
    each = _with_channels(shape)[1:]
    if form is not None and form.shape and each != form.shape:
        raise ValueError(
            f"{name}: its examples are {list(each)}, but the model takes {list(form.shape)}."
        )


def check_columns(name: str, header: Sequence[str], form: Preprocessing | None) -> None:
    """Refuses a table, perhaps not yet read, that lacks a model's inputs.

    Raises:
      ValueError: naming the first missing column, or the shape that the model takes.
    """
    if form is None:
        return
    if not form.columns:
        raise ValueError(f"{name}: a table, but the model takes {list(form.shape)}, not columns.")
    _tables.check_read(name, [column.name for column in form.columns], header)


def check_pictures(name: str, form: Preprocessing | None) -> None:
    """Refuses image files if a model was not trained on image files.

    Raises:
      ValueError: naming the data.
    """
    if form is not None and form.images is None:
        raise ValueError(f"{name}: image files, but the model was not trained on such files.")
