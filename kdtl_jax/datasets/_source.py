"""One part of a data set as it is stored, before targets are numbered and inputs encoded."""

from typing import Any, NamedTuple

import numpy as np

from kdtl_jax.datasets._images import Pictures
from kdtl_jax.datasets._tables import Missing, Table


class Choices(NamedTuple):
    """What a path leaves open."""

    label: str = "label"
    inputs: str | None = None
    missing: Missing | None = None
    drop: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    one_hot: bool = False
    with_targets: bool = True  # False: sources need none, and `targets` are columns to leave out
    targets: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # the columns of inputs that a model reads; (): all


class Source(NamedTuple):
    """One part as it is stored."""

    name: str
    inputs: np.ndarray | Table | Pictures
    targets: Any = None  # [N] or [N, K]
    names: tuple[str, ...] = ()  # of the classes 0..K-1, or of K columns of targets
    columns: tuple[str, ...] = ()  # where the targets were found
    notices: tuple[str, ...] = ()


def with_channels(inputs: np.ndarray) -> np.ndarray:
    """Images `[N, H, W]` with a channel axis, numbers `[N]` as `[N, 1]`."""
    return inputs[..., None] if inputs.ndim in (1, 3) else inputs
