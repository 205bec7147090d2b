"""What to do when a source leaf does not fit: a policy is a function.

`(source_leaf, target_shape, path) -> array of target_shape`, or None to keep the target's own
value. The ones here decide on shapes alone and change every axis that differs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _numerics
from kdtl_jax._types import Array
from kdtl_jax.transforms._resample import corner_aligned
from kdtl_jax.transforms._subset import uniform_indices

Shape = tuple[int, ...]


class Policy(Protocol):
    """Makes a leaf of `target_shape` from one of another shape; None keeps the target's own."""

    def __call__(self, source_leaf: Any, target_shape: Shape, path: str, /) -> Array | None: ...


def error(source_leaf: Any, target_shape: Shape, path: str) -> Array | None:
    """Refuses every difference in shape (the default)."""
    raise ValueError(
        f"{path}: source{list(np.shape(source_leaf))} does not fit target{list(target_shape)}. "
        "Pass on_mismatch=: transforms.keep_target, crop, pad, uniform, resize or a function."
    )


def keep_target(source_leaf: Any, target_shape: Shape, path: str) -> Array | None:
    """Leaves the target's own value where shapes differ."""
    del source_leaf, target_shape, path
    return None


def crop(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """The leading block of the source; no axis may grow."""
    _fits("crop", source_leaf, target_shape, path, shrink=True, grow=False)
    return jnp.asarray(source_leaf)[tuple(slice(n) for n in target_shape)]


def pad(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """The source followed by zeros along every axis that grows; none may shrink."""
    _fits("pad", source_leaf, target_shape, path, shrink=False, grow=True)
    missing = [(0, n - m) for n, m in zip(target_shape, np.shape(source_leaf), strict=True)]
    return jnp.pad(jnp.asarray(source_leaf), missing)


def crop_or_pad(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """Axes that are too long are cropped, axes that are too short end in zeros."""
    _fits("crop_or_pad", source_leaf, target_shape, path, shrink=True, grow=True)
    common = tuple(map(min, target_shape, np.shape(source_leaf)))
    return pad(crop(source_leaf, common, path), target_shape, path)


def select_with(choose: Callable[[int, int], Any]) -> Policy:
    """A policy that keeps the entries `choose(size, n)` of every axis that shrinks.

    `select_with(lambda size, n: random_indices(key, size, n))` is weight selection at random: one
    key gives one choice for all axes of the same lengths, so layers stay consistent.

    Args:
      choose: `(length of the axis, number to keep) -> [n] integers`.
    """

    def select(source_leaf: Any, target_shape: Shape, path: str) -> Array:
        _fits("select_with", source_leaf, target_shape, path, shrink=True, grow=False)
        return _selected(source_leaf, target_shape, choose)

    return select


def uniform(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """Weight selection: evenly spaced entries along every axis that shrinks; none may grow.

    It knows no structure: of fused projections and flattened heads it mixes units. For these name
    the axes and use `select_width` with `uniform_indices`.

    References:
      Xu et al., Initializing Models with Larger Ones, 2023 (2311.18823).
    """
    _fits("uniform", source_leaf, target_shape, path, shrink=True, grow=False)
    return _selected(source_leaf, target_shape, uniform_indices)


def resize(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """Linear interpolation along every axis that differs, end points kept.

    For axes with a geometry (positions, kernel height and width), not for feature axes, whose
    order means nothing.
    """
    _fits("resize", source_leaf, target_shape, path, shrink=True, grow=True)
    leaf = jnp.asarray(source_leaf)
    out = _numerics.upcast(leaf)
    for axis, size in enumerate(target_shape):
        if size != out.shape[axis]:
            matrix = jnp.asarray(corner_aligned(out.shape[axis], size), out.dtype)
            moved = jnp.tensordot(out, matrix, axes=(axis, 1), precision=jax.lax.Precision.HIGHEST)
            out = jnp.moveaxis(moved, -1, axis)
    return out.astype(leaf.dtype)


def _selected(leaf: Any, target_shape: Shape, choose: Callable[[int, int], Any]) -> Array:
    out = jnp.asarray(leaf)
    for axis, size in enumerate(target_shape):
        if size != out.shape[axis]:
            out = jnp.take(out, choose(out.shape[axis], size), axis=axis)
    return out


def _fits(
    name: str, source_leaf: Any, target_shape: Sequence[int], path: str, *, shrink: bool, grow: bool
) -> None:
    shape = np.shape(source_leaf)
    sizes = f"source{list(shape)}, target{list(target_shape)}"
    if len(shape) != len(target_shape):
        raise ValueError(
            f"{path}: {name} needs leaves of one rank, got {sizes}. Pass a function that reshapes."
        )
    if 0 in shape and 0 not in target_shape:
        raise ValueError(f"{path}: {name} cannot make values from an empty leaf, got {sizes}.")
    for axis, (n, m) in enumerate(zip(shape, target_shape, strict=True)):
        if (m > n and not grow) or (m < n and not shrink):
            raise ValueError(
                f"{path}: {name} cannot {'grow' if m > n else 'shrink'} axis {axis} from {n} to "
                f"{m}, got {sizes}. crop_or_pad and resize do both."
            )


# Policies that look at shapes alone, so that planning tries each pair of shapes once.
PATH_FREE: frozenset[Policy] = frozenset({crop, pad, crop_or_pad, uniform, resize})
