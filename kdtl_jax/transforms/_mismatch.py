"""Policies for source leaves of another shape, and resizing of leaves with a geometry.

A *policy* is a function `(source_leaf, target_shape, path) -> array of target_shape`, or None to
keep the target's own value. The policies here only look at shapes, change every axis that differs
and do not change a leaf that fits. A policy of your own is called for every leaf it is given for,
even if the shapes happen to agree: a square kernel may still need its transpose, and a grid of
another form may have as many cells. None then means that the leaf is right as it is.

The resizing functions take one array and keep its dtype (TypeError unless it is floating point;
ValueError if a shape, a size or an axis does not fit).
To use one as a policy, wrap it in a lambda:
`[("pos_embed", lambda leaf, shape, path: resize_positions_bicubic(leaf, (16, 16), prefix=1))]`.
Their matrices `[n_out, n_in]`, one per axis, are computed in float64 from lengths alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array
from kdtl_jax.transforms._units import uniform_indices

Shape = tuple[int, ...]


class Policy(Protocol):
    """Makes a leaf of `target_shape` from one of another shape; None keeps the target's value."""

    def __call__(self, source_leaf: Any, target_shape: Shape, path: str, /) -> Array | None: ...


def raise_on_mismatch(source_leaf: Any, target_shape: Shape, path: str) -> Array | None:
    """Refuses every difference in shape (the default)."""
    raise ValueError(
        f"{path}: source{list(np.shape(source_leaf))} does not fit target{list(target_shape)}. "
        "Pass on_mismatch=: transforms.keep_on_mismatch, crop, pad, select_uniform, "
        "resize_linear or a function."
    )


def keep_on_mismatch(source_leaf: Any, target_shape: Shape, path: str) -> Array | None:
    """Keeps the target's own value where shapes differ."""
    del source_leaf, target_shape, path
    return None


def crop(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """The leading block of the source; no axis may grow."""
    _check_fits("crop", source_leaf, target_shape, path, shrink=True, grow=False)
    return jnp.asarray(source_leaf)[tuple(slice(n) for n in target_shape)]


def pad(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """The source followed by zeros along every axis that grows; none may shrink."""
    _check_fits("pad", source_leaf, target_shape, path, shrink=False, grow=True)
    missing = [(0, n - m) for n, m in zip(target_shape, np.shape(source_leaf), strict=True)]
    return jnp.pad(jnp.asarray(source_leaf), missing)


def crop_or_pad(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """Crops axes that are too long, and pads axes that are too short with zeros at the end."""
    _check_fits("crop_or_pad", source_leaf, target_shape, path, shrink=True, grow=True)
    common = tuple(map(min, target_shape, np.shape(source_leaf)))
    return pad(crop(source_leaf, common, path), target_shape, path)


class SelectWith(NamedTuple):
    """The policy that `select_with` returns."""

    choose: Callable[[int, int], Any]

    def __call__(self, source_leaf: Any, target_shape: Shape, path: str, /) -> Array:
        _check_fits("select_with", source_leaf, target_shape, path, shrink=True, grow=False)
        return _select(source_leaf, target_shape, self.choose)


def select_with(choose: Callable[[int, int], Any]) -> Policy:
    """A policy that keeps the entries `choose(size, n)` of every axis that shrinks.

    `select_with(lambda size, n: random_indices(key, size, n))` is random weight selection: one key
    makes the same choice for all axes of the same length, so layers stay consistent.

    Args:
      choose: `(length of the axis, number to keep) -> [n] integers`.
    """
    return SelectWith(choose)


def select_uniform(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """Weight selection: evenly spaced entries along every axis that shrinks; none may grow.

    It does not know the structure of a leaf, so it mixes units of fused projections and flattened
    heads. For these, name the axes and use `select_width` with `uniform_indices`.

    References:
      Xu et al., Initializing Models with Larger Ones, 2023 (2311.18823).
    """
    _check_fits("select_uniform", source_leaf, target_shape, path, shrink=True, grow=False)
    return _select(source_leaf, target_shape, uniform_indices)


def resize_linear(source_leaf: Any, target_shape: Shape, path: str) -> Array:
    """Linear interpolation along every axis that differs; end points are kept.

    For axes with a geometry (positions, kernel height and width), not for feature axes, whose
    order has no meaning.
    """
    _check_fits("resize_linear", source_leaf, target_shape, path, shrink=True, grow=True)
    leaf = jnp.asarray(source_leaf)
    out = _numerics.upcast(leaf)
    for axis, size in enumerate(target_shape):
        if size != out.shape[axis]:
            matrix = jnp.asarray(corner_aligned(out.shape[axis], size), out.dtype)
            resized = jnp.tensordot(
                out, matrix, axes=(axis, 1), precision=jax.lax.Precision.HIGHEST
            )
            out = jnp.moveaxis(resized, -1, axis)
    return out.astype(leaf.dtype)


def _select(leaf: Any, target_shape: Shape, choose: Callable[[int, int], Any]) -> Array:
    out = jnp.asarray(leaf)
    for axis, size in enumerate(target_shape):
        if size != out.shape[axis]:
            out = jnp.take(out, choose(out.shape[axis], size), axis=axis)
    return out


def _check_fits(
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
                f"{m}, got {sizes}. crop_or_pad and resize_linear do both."
            )


# Policies that only look at shapes, so planning tries each pair of shapes once.
PATH_FREE: frozenset[Policy] = frozenset({crop, pad, crop_or_pad, select_uniform, resize_linear})


def keeps_fitting_leaves(policy: Policy) -> bool:
    """Whether the policy is one of this module's, which do nothing where shapes agree."""
    shape_policies = (raise_on_mismatch, keep_on_mismatch)
    return isinstance(policy, SelectWith) or policy in shape_policies or policy in PATH_FREE


def corner_aligned(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation with end points kept: output `i` reads at `i (n_in-1)/(n_out-1)`.

    A single output reads at 0; a single input is repeated.
    """
    return _linear(np.arange(n_out) * ((n_in - 1) / max(n_out - 1, 1)), n_in)


def half_pixel_linear(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation between pixel centers, without antialiasing, borders repeated."""
    positions = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    return _linear(np.clip(positions, 0, n_in - 1), n_in)


def half_pixel_cubic(n_in: int, n_out: int) -> np.ndarray:
    """Cubic convolution (A = -0.75, four taps) between pixel centers, borders repeated."""
    positions = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    rows, floors = np.arange(n_out), np.floor(positions).astype(np.int64)
    matrix = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        weight = _cubic_kernel(positions - floors - tap, -0.75)
        np.add.at(matrix, (rows, np.clip(floors + tap, 0, n_in - 1)), weight)
    return matrix


def antialiased_cubic(n_in: int, n_out: int) -> np.ndarray:
    """Cubic convolution (A = -0.5), widened when shrinking; taps inside only, rows sum to 1."""
    positions = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    stretch = max(n_in / n_out, 1.0)
    matrix = _cubic_kernel((positions[:, None] - np.arange(n_in)) / stretch, -0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _linear(positions: np.ndarray, n_in: int) -> np.ndarray:
    floors = np.clip(np.floor(positions).astype(np.int64), 0, max(n_in - 2, 0))
    matrix = np.zeros((len(positions), n_in))
    rows = np.arange(len(positions))
    matrix[rows, floors] += 1 - (positions - floors)
    matrix[rows, np.minimum(floors + 1, n_in - 1)] += positions - floors
    return matrix


def _cubic_kernel(t: np.ndarray, a: float) -> np.ndarray:
    t = np.abs(t)
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0.0))


Grid = tuple[int, int]


def resize_positions(
    embeddings: Array, new_grid: Grid, *, old_grid: Grid | None = None, prefix: int = 0
) -> Array:
    """Resizes the position embeddings of a grid, bilinearly, with the corners kept.

    This is big_vision's resampling, for positions that encode absolute places and should keep
    their extremes. `resize_positions_bicubic` is timm's, which differs by design.

    Args:
      embeddings: `[..., prefix + h * w, dim]`, the grid row by row.
      new_grid: `(h', w')`.
      old_grid: `(h, w)`; a square if None.
      prefix: leading tokens (class token, registers) that are copied.

    Returns:
      `[..., prefix + h' * w', dim]` in the dtype of `embeddings`.

    Raises:
      ValueError: if the tokens are not `prefix` plus a grid.
    """
    return _resize_grid(embeddings, new_grid, old_grid, prefix, corner_aligned)


def resize_positions_bicubic(
    embeddings: Array,
    new_grid: Grid,
    *,
    old_grid: Grid | None = None,
    prefix: int = 1,
    antialias: bool = True,
) -> Array:
    """Resizes the position embeddings of a grid, bicubically between pixel centers.

    This is timm's resampling, a cubic convolution: with antialiasing, A = -0.5 and a kernel that
    widens when shrinking; without it, A = -0.75 and four taps. The other arguments, the result and
    the errors are those of `resize_positions`.

    Args:
      antialias: whether the kernel widens when shrinking.
    """
    matrix = antialiased_cubic if antialias else half_pixel_cubic
    return _resize_grid(embeddings, new_grid, old_grid, prefix, matrix)


def resize_patch_kernel(kernel: Array, new_size: Grid) -> Array:
    """Converts a patch-embedding kernel to another patch size by the pseudo-inverse of resizing.

    `w' = pinv(R^T) vec(w)` with `R` the bilinear resize of a patch: the embedding of an enlarged
    patch under `w'` is exactly that of the patch under `w` (in least squares when shrinking).
    Plain interpolation of the kernel would change its norm and its outputs.

    Args:
      kernel: `[h, w, in, out]`.
      new_size: `(h', w')`.

    Returns:
      `[h', w', in, out]` in the dtype of `kernel`.

    References:
      Beyer et al., FlexiViT, 2022 (2212.08013).
    """
    _checks.rank(4, 4, kernel=kernel)
    _checks.floating(kernel=kernel)
    _check_grid(new_size)
    # The resize is separable, and the pseudo-inverse of a Kronecker product is that of its parts.
    rows, columns = (
        np.linalg.pinv(half_pixel_linear(n, m).T)
        for n, m in zip(kernel.shape[:2], new_size, strict=True)
    )
    return _apply_grid(kernel, rows, columns)


def adapt_input_channels(kernel: Array, channels: int, *, axis: int = -2) -> Array:
    """Converts a first convolution to another number of input channels.

    One channel gets the sum over the old ones (a gray image is a color image with equal channels).
    Otherwise the old channels are repeated in turn, cut to length and multiplied by `old / new`,
    so equal channels give the same output as before. timm's rule, for any number of old channels.

    Args:
      kernel: any rank; `[h, w, in, out]` for a convolution.
      channels: the new number, >= 1.
      axis: the input axis.

    Returns:
      The kernel with `channels` entries along `axis`, same dtype.
    """
    _checks.floating(kernel=kernel)
    _checks.count(1, channels=channels)
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(
            f"axis must be the kernel's, got axis={axis}, {_checks.described(kernel=kernel)}."
        )
    old_channels = kernel.shape[axis]
    upcast = _numerics.upcast(kernel)
    if channels == 1:
        return jnp.sum(upcast, axis=axis, keepdims=True).astype(kernel.dtype)
    index = np.arange(channels) % old_channels
    return (jnp.take(upcast, index, axis=axis) * (old_channels / channels)).astype(kernel.dtype)


def _resize_grid(
    embeddings: Array,
    new_grid: Grid,
    old_grid: Grid | None,
    prefix: int,
    matrix: Callable[[int, int], np.ndarray],
) -> Array:
    _checks.rank(2, embeddings=embeddings)
    _checks.floating(embeddings=embeddings)
    _check_grid(new_grid)
    *batch, tokens, dim = embeddings.shape
    if old_grid is None:
        side = math.isqrt(max(tokens - prefix, 0))
        old_grid = (side, side)
    if prefix < 0 or old_grid[0] * old_grid[1] != tokens - prefix or tokens <= prefix:
        raise ValueError(
            f"the tokens must be prefix + h * w, got {tokens} tokens, prefix={prefix}, "
            f"old_grid={old_grid}. Pass old_grid= for a grid that is not square, prefix= for "
            "class and register tokens."
        )
    if tuple(old_grid) == tuple(new_grid):
        return embeddings
    head, grid = embeddings[..., :prefix, :], embeddings[..., prefix:, :]
    images = jnp.moveaxis(grid.reshape(*batch, *old_grid, dim), (-3, -2), (0, 1))
    rows, columns = (matrix(n, m) for n, m in zip(old_grid, new_grid, strict=True))
    resized = jnp.moveaxis(_apply_grid(images, rows, columns), (0, 1), (-3, -2))
    return jnp.concatenate([head, resized.reshape(*batch, -1, dim)], axis=-2)


def _apply_grid(images: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Applies one matrix to each of the two leading axes, in float32 or wider."""
    upcast = _numerics.upcast(images)
    out = jnp.einsum(
        "ij,kl,jl...->ik...",
        jnp.asarray(rows, upcast.dtype),
        jnp.asarray(columns, upcast.dtype),
        upcast,
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.astype(images.dtype)


def _check_grid(grid: Grid) -> None:
    if len(grid) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in grid):
        raise ValueError(f"the new size must be two positive integers, got {grid!r}.")
