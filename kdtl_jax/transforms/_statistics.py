"""Merging with statistics of the models' data: Fisher merging and RegMean."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _blocks, _leaves
from kdtl_jax.transforms._leaves import Weights

Rows = Callable[[], Iterable[Array]]  # a matrix in blocks of rows

_PARTS = 8  # a kernel's columns are solved for in about this many parts at most
_HIGHEST = jax.lax.Precision.HIGHEST


def fisher_merge(
    models: Sequence[Params],
    fishers: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    floor: Scalar = 0.0,
) -> Params:
    """`sum_i w_i F_i theta_i / sum_i w_i F_i`, entry by entry, with every `F_i >= floor`.

    An entry whose `F_i` are all 0 is the weighted average.

    Args:
      fishers: their diagonal Fisher information (`fisher.true_fisher`), of equal shapes.
      floor: smallest Fisher information, >= 0, in its own unit (squared loss per squared weight):
        an entry below it in all models is averaged; the paper's code uses 1e-6.

    References:
      Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2021 (2111.09832). Their
      code floors only the target model's Fisher, and divides each `w_i` by `||F_i||`.
    """
    if len(fishers) != len(models):
        raise ValueError(f"expected {len(models)} Fisher trees, one per model, got {len(fishers)}.")
    _checks.non_negative(floor=floor)
    trees_by_name = _leaves.name_members("models", models)
    trees_by_name |= _leaves.name_members("fishers", fishers)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])
    count = len(models)

    def formula(i: int, path: str, *leaves: Array) -> Array:
        _leaves.nonzero_total(path, by_leaf[i])
        least = _numerics.scalar(floor, leaves[0], "floor")
        informations = [
            _leaves.scaled(w, jnp.maximum(fisher, least))
            for w, fisher in zip(by_leaf[i], leaves[count:], strict=True)
        ]
        total = _leaves.total(informations)
        has_information = total != 0
        plain_weights = [_leaves.scaled(w, jnp.ones_like(total)) for w in by_leaf[i]]
        shares = [
            jnp.where(has_information, f, w)
            for f, w in zip(informations, plain_weights, strict=True)
        ]
        terms = [f * x for f, x in zip(shares, leaves[:count], strict=True)]
        divisor = jnp.where(has_information, total, _leaves.total(plain_weights))
        return _leaves.total(terms) / divisor

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf])


def regmean(
    models: Sequence[Params],
    grams: Sequence[Mapping[str, Array]],
    *,
    shrink: Scalar = 0.9,
    ridge: Scalar = 1e-6,
) -> Params:
    """`(sum_i G_i)^-1 sum_i G_i W_i`: the least-squares fit to all models' linear outputs.

    `G_i = X_i^T X_i` of the inputs to a kernel `[..., in, out]` in model i, with off-diagonal
    entries multiplied by `shrink`. Every other leaf is averaged.

    Args:
      grams: for every model `{path of a kernel: G [..., in, in]}`; all with the same paths.
      shrink: the paper's alpha, in [0, 1]; 1 is exact least squares, 0 weights by input power
        alone.
      ridge: this, >= 0, times the mean diagonal of all `G_i` is added to each diagonal, so inputs
        that are 0 in every model fall back to the average instead of dividing by zero.

    Raises:
      ValueError: if names, shapes or paths differ, or a Gram matrix does not fit its kernel.

    References:
      Jin et al., Dataless Knowledge Fusion by Merging Weights, 2022 (2212.09849).
    """
    if len(grams) != len(models):
        raise ValueError(f"expected {len(models)} sets of Grams, got {len(grams)}.")
    check_grams(grams, trees.flatten(models[0]))
    _checks.scalar(shrink=shrink, ridge=ridge)
    _checks.within(0, 1, shrink=shrink)
    _checks.non_negative(ridge=ridge)

    def formula(i: int, path: str, *leaves: Array) -> Array:
        if path not in grams[0]:
            return _leaves.total(leaves) / len(leaves)
        leaf_grams = [jnp.asarray(gram[path], leaves[0].dtype) for gram in grams]
        reads = [
            [functools.partial(_rows, x) for x in matrices] for matrices in (leaves, leaf_grams)
        ]
        return regmean_kernel(*reads, shrink=shrink, ridge=ridge)

    # The Grams of tied leaves differ.
    by_path = [list(trees.flatten(models[0]))]
    return _leaves.combine_leaves(formula, _leaves.name_members("models", models), by_path)


def regmean_kernel(
    kernels: Sequence[Rows],
    grams: Sequence[Rows],
    *,
    shrink: Scalar = 0.9,
    ridge: Scalar = 1e-6,
) -> Array:
    """`regmean` of one kernel `[..., in, out]`, read in blocks of rows.

    At most three matrices are held in memory.

    Args:
      kernels: per model, a function that yields the blocks of its kernel `[..., in, out]`, rows
        along the axis `in`, all in one dtype.
      grams: per model, the same for its Gram matrix `[..., in, in]`.
      shrink, ridge: as in `regmean`.
    """
    diagonals = [_diagonal(gram) for gram in grams]
    shrinkage = _numerics.scalar(shrink, diagonals[0], "shrink")
    ridge_scale = _numerics.scalar(ridge, diagonals[0], "ridge")
    means = [jnp.mean(diagonal, axis=-1, keepdims=True) for diagonal in diagonals]
    constant = ridge_scale * (_leaves.total(means) / len(means))
    diagonal_terms = [(1 - shrinkage) * diagonal + constant for diagonal in diagonals]
    shape = diagonals[0].shape
    is_on_host = not isinstance(diagonals[0], Tracer) and jax.default_backend() == "cpu"
    zeros = np.zeros if is_on_host else jnp.zeros
    # Transposed, as LAPACK reads it.
    total_gram: Any = zeros((*shape, shape[-1]), diagonals[0].dtype)
    for gram, diagonal_term in zip(grams, diagonal_terms, strict=True):
        for start, rows in _with_start(gram):
            rows = _shrink(rows, diagonal_term, shrinkage, start)
            total_gram = _add(total_gram, rows.mT, start, -1)
    factors, swaps = _factor(total_gram)
    del total_gram
    width = next(iter(kernels[0]())).shape[-1]
    step = max(1, _blocks.BLOCK // max(1, diagonals[0].size), width // _PARTS)
    merged = jnp.zeros((*shape, width), factors.dtype)
    for first_column in range(0, width, step):
        target = jnp.zeros_like(merged[..., first_column : first_column + step])
        for kernel, gram, diagonal_term in zip(kernels, grams, diagonal_terms, strict=True):
            columns = _columns(kernel, jnp.zeros_like(target), first_column)
            for start, rows in _with_start(gram):
                rows = _shrink(rows, diagonal_term, shrinkage, start)
                product = jnp.matmul(rows, columns, precision=_HIGHEST)
                target = _add(target, product, start, -2)
        solution = _solve(factors, swaps, target)
        merged = jax.block_until_ready(_overwrite(merged, solution, first_column, -1))
    return merged


def check_grams(grams: Sequence[Mapping[str, Any]], flat: Mapping[str, Any]) -> None:
    """Raises ValueError unless the Gram matrices have the same paths and fit kernels of `flat`.

    Only the shapes are read.
    """
    _checks.same_leaves(**{f"grams[{i}]": gram for i, gram in enumerate(grams)})
    for path, gram in grams[0].items():
        if path not in flat:
            nearest = trees.nearest(path, list(flat))
            raise ValueError(f"the models have no leaf {path!r}; nearest paths: {nearest}.")
        kernel = flat[path]
        if kernel.ndim < 2 or gram.shape != (*kernel.shape[:-1], kernel.shape[-2]):
            raise ValueError(
                f"{path!r} must be a kernel [..., in, out] with a Gram matrix [..., in, in], "
                f"got {_checks.described(kernel=kernel, gram=gram)}."
            )


def _rows(matrix: Array) -> Iterator[Array]:
    """The matrix in blocks of rows; a stack of matrices is not split."""
    blocks = _blocks.row_blocks([matrix]) if matrix.ndim == 2 else [[matrix]]
    return (block for (block,) in blocks)


@jax.jit
def _shrink(rows: Array, diagonal: Array, shrink: Scalar, start: int) -> Array:
    """Shrinks rows of a Gram matrix from `start` on, and adds `diagonal` to its diagonal."""
    row_index = start + jnp.arange(rows.shape[-2])
    eye = row_index[:, None] == jnp.arange(rows.shape[-1])[None]
    return shrink * rows + jnp.where(jnp.broadcast_to(eye, rows.shape), diagonal[..., None, :], 0)


def _add(total: Any, piece: Array, start: int, axis: int) -> Any:
    if isinstance(total, np.ndarray):
        total[..., start : start + piece.shape[axis]] += np.asarray(piece)
        return total
    current = _slice(total, start, piece.shape[axis], axis)
    # Without this wait, later blocks would pile up in memory.
    return jax.block_until_ready(_overwrite(total, current + piece, start, axis))


def _with_start(read: Rows) -> Iterator[tuple[int, Array]]:
    """Yields each block of rows with the number of its first row."""
    start = 0
    for rows in read():
        yield start, rows
        start += rows.shape[-2]


def _columns(read: Rows, out: Array, first_column: int) -> Array:
    """Fills `out` with a matrix's columns from `first_column` on, from its blocks of rows."""
    for start, rows in _with_start(read):
        part = _slice(rows, first_column, out.shape[-1], -1)
        out = jax.block_until_ready(_overwrite(out, part, start, -2))
    return out


# On concrete arrays, these work in place. Positions are traced, because one program per position
# would take more memory than the blocks. LAPACK is column-major, so a transposed matrix is passed
# to it without a copy.


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _overwrite(total: Array, piece: Array, start: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(total, piece, start, axis)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(total: Array, start: int, count: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(total, start, count, axis)


def _factor(transposed: Any) -> tuple[Array, Array]:
    """Factors a transposed matrix by LU; returns the transposed factors and the row swaps."""
    if not isinstance(transposed, np.ndarray):
        factors, swaps = jax.scipy.linalg.lu_factor(transposed.mT)
        return factors.mT, swaps
    # The same LAPACK routine, in place: XLA makes two copies for it. SciPy comes with JAX.
    from scipy.linalg import get_lapack_funcs

    (getrf,) = get_lapack_funcs(("getrf",), (transposed,))
    swaps = np.zeros(transposed.shape[:-1], np.int32)
    for place in np.ndindex(transposed.shape[:-2]):
        _, swaps[place], _ = getrf(transposed[place].T, overwrite_a=True)
    return jnp.asarray(transposed), jnp.asarray(swaps)


@jax.jit
def _solve(transposed: Array, swaps: Array, right: Array) -> Array:
    return jax.scipy.linalg.lu_solve((transposed.mT, swaps), right)


def _diagonal(gram: Rows) -> Array:
    """The diagonal `[..., in]` of a matrix in blocks of rows."""
    pieces = (_diagonal_from(rows, start) for start, rows in _with_start(gram))
    return jnp.concatenate([jax.block_until_ready(piece) for piece in pieces], axis=-1)


@jax.jit
def _diagonal_from(rows: Array, start: int) -> Array:
    """The part of the diagonal that is in rows of a matrix from `start` on."""
    row_index = start + jnp.arange(rows.shape[-2], dtype=jnp.int32)
    index = jnp.broadcast_to(row_index[:, None], (*rows.shape[:-1], 1))
    return jnp.take_along_axis(rows, index, axis=-1)[..., 0]
