"""Leaves with a geometry: position embeddings, patch kernels, input channels.

Each function takes one array; as a policy of `transfer` it is a lambda,
`[("pos_embed", lambda leaf, shape, path: resize_positions_bicubic(leaf, (16, 16), prefix=1))]`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array
from kdtl_jax.transforms import _resample

Grid = tuple[int, int]


def resize_positions(
    embeddings: Array, new_grid: Grid, *, old_grid: Grid | None = None, prefix: int = 0
) -> Array:
    """Position embeddings of a grid at another resolution, bilinear with the corners kept.

    big_vision's resampling. Positions that code absolute places should keep their extremes;
    `resize_positions_bicubic` is timm's and differs from this by design.

    Args:
      embeddings: `[..., prefix + h * w, dim]`, the grid row by row.
      new_grid: `(h', w')`.
      old_grid: `(h, w)`; a square if None.
      prefix: leading tokens (class token, registers) that are copied.

    Returns:
      `[..., prefix + h' * w', dim]` in the dtype of `embeddings`.

    Raises:
      ValueError: if the tokens are not `prefix` plus a grid.
      TypeError: if the embeddings are not floating point.
    """
    matrix = _resample.corner_aligned
    return _resize_grid("resize_positions", embeddings, new_grid, old_grid, prefix, matrix)


def resize_positions_bicubic(
    embeddings: Array,
    new_grid: Grid,
    *,
    old_grid: Grid | None = None,
    prefix: int = 1,
    antialias: bool = True,
) -> Array:
    """Position embeddings of a grid at another resolution, bicubic between pixel centers.

    timm's resampling: cubic convolution, with antialiasing A = -0.5 and a kernel that widens
    when shrinking, without A = -0.75 and four taps.

    Args:
      embeddings: `[..., prefix + h * w, dim]`, the grid row by row.
      new_grid: `(h', w')`.
      old_grid: `(h, w)`; a square if None.
      prefix: leading tokens (class token, registers) that are copied.
      antialias: whether the kernel widens when shrinking.

    Returns:
      `[..., prefix + h' * w', dim]` in the dtype of `embeddings`.

    Raises:
      ValueError: if the tokens are not `prefix` plus a grid.
      TypeError: if the embeddings are not floating point.
    """
    matrix = _resample.antialiased_cubic if antialias else _resample.half_pixel_cubic
    return _resize_grid("resize_positions_bicubic", embeddings, new_grid, old_grid, prefix, matrix)


def resize_patch_kernel(kernel: Array, new_size: Grid) -> Array:
    """A patch-embedding kernel for another patch size, by the pseudo-inverse of resizing.

    `w' = pinv(R^T) vec(w)` with `R` the bilinear resize of a patch: the embedding of an enlarged
    patch under `w'` is exactly that of the patch under `w` (in least squares when shrinking).
    Plain interpolation of the kernel would change its norm and its outputs.

    Args:
      kernel: `[h, w, in, out]`.
      new_size: `(h', w')`.

    Returns:
      `[h', w', in, out]` in the dtype of `kernel`.

    Raises:
      ValueError: if the kernel is not of rank 4, or a size is not positive.
      TypeError: if it is not floating point.

    References:
      Beyer et al., FlexiViT, 2022 (2212.08013).
    """
    fn = "resize_patch_kernel"
    _checks.rank(4, 4, kernel=kernel)
    _checks.floating(kernel=kernel)
    _check_grid(fn, new_size)
    # The resize is separable, and the pseudo-inverse of a Kronecker product is that of its parts.
    rows, columns = (
        np.linalg.pinv(_resample.half_pixel_linear(n, m).T)
        for n, m in zip(kernel.shape[:2], new_size, strict=True)
    )
    return _apply_grid(kernel, rows, columns)


def adapt_input_channels(kernel: Array, channels: int, *, axis: int = -2) -> Array:
    """A first convolution for another number of input channels.

    One channel: the sum over the old ones (a gray image is the color image with equal channels).
    Otherwise the old channels repeated in turn and cut, times `old / new`, so that equal channels
    give the output they gave. timm's rule, for any number of old channels.

    Args:
      kernel: any rank; `[h, w, in, out]` for a convolution.
      channels: the new number, >= 1.
      axis: the input axis.

    Returns:
      The kernel with `channels` entries along `axis`, same dtype.

    Raises:
      ValueError: if `channels` is not positive or `axis` is out of range.
      TypeError: if the kernel is not floating point.
    """
    _checks.floating(kernel=kernel)
    if channels < 1 or not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(
            f"channels must be >= 1 and axis within the kernel, got channels={channels}, "
            f"axis={axis}, {_checks.described(kernel=kernel)}."
        )
    old = kernel.shape[axis]
    wide = _numerics.upcast(kernel)
    if channels == 1:
        return jnp.sum(wide, axis=axis, keepdims=True).astype(kernel.dtype)
    index = np.arange(channels) % old
    return (jnp.take(wide, index, axis=axis) * (old / channels)).astype(kernel.dtype)


def _resize_grid(
    fn: str,
    embeddings: Array,
    new_grid: Grid,
    old_grid: Grid | None,
    prefix: int,
    matrix: Callable[[int, int], np.ndarray],
) -> Array:
    _checks.rank(2, embeddings=embeddings)
    _checks.floating(embeddings=embeddings)
    _check_grid(fn, new_grid)
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
    wide = _numerics.upcast(images)
    out = jnp.einsum(
        "ij,kl,jl...->ik...",
        jnp.asarray(rows, wide.dtype),
        jnp.asarray(columns, wide.dtype),
        wide,
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.astype(images.dtype)


def _check_grid(fn: str, grid: Grid) -> None:
    if len(grid) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in grid):
        raise ValueError(f"the new size must be two positive integers, got {grid!r}.")
