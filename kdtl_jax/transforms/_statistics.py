"""Merging by what the models' data say: Fisher and RegMean."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _blocks, _leaves
from kdtl_jax.transforms._leaves import Weights

Rows = Callable[[], Iterable[Array]]  # a matrix in blocks of rows

_HIGHEST = jax.lax.Precision.HIGHEST


def fisher_merge(
    models: Sequence[Params],
    fishers: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    floor: Scalar = 0.0,
) -> Params:
    """`sum_i w_i F_i theta_i / sum_i w_i F_i`, entry by entry, with every `F_i >= floor`.

    Where no model cares about an entry (every `F_i` is 0), it is the weighted average.

    Args:
      models: a list of trees of one structure.
      fishers: their diagonal Fisher informations (`fisher.true_fisher`), equal shapes.
      weights: 1 each when None, else one per model.
      floor: smallest Fisher information, in its own unit (squared loss per squared weight), so that
        entries of all models below it are averaged; the paper's code has 1e-6.

    Returns:
      A tree with the first model's structure, dtypes and leaves that are not inexact.

    Raises:
      ValueError: if names, shapes or numbers of trees and weights differ, or the weights sum to 0.

    References:
      Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2021 (2111.09832). Their
      code floors the target model's Fisher only and divides each `w_i` by `||F_i||`.
    """
    if len(fishers) != len(models):
        raise ValueError(f"expected {len(models)} Fisher trees, one per model, got {len(fishers)}.")
    named = _leaves.numbered("models", models)
    named |= _leaves.numbered("fishers", fishers)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])
    count = len(models)

    def formula(i: int, path: str, *leaves: Array) -> Array:
        _leaves.nonzero_total(path, by_leaf[i])
        least = _numerics.scalar(floor, leaves[0])
        informations = [
            _leaves.scaled(w, jnp.maximum(fisher, least))
            for w, fisher in zip(by_leaf[i], leaves[count:], strict=True)
        ]
        total = sum(informations[1:], informations[0])
        cared = total != 0
        plain = [_leaves.scaled(w, jnp.ones_like(total)) for w in by_leaf[i]]
        shares = [jnp.where(cared, f, w) for f, w in zip(informations, plain, strict=True)]
        terms = [f * x for f, x in zip(shares, leaves[:count], strict=True)]
        return sum(terms[1:], terms[0]) / jnp.where(cared, total, sum(plain[1:], plain[0]))

    return _leaves.combine_leaves(formula, named, [by_leaf])


def regmean(
    models: Sequence[Params],
    grams: Sequence[Mapping[str, Array]],
    *,
    shrink: Scalar = 0.9,
    ridge: Scalar = 1e-6,
) -> Params:
    """`(sum_i G_i)^-1 sum_i G_i W_i`: the least-squares fit to all models' linear outputs.

    `G_i = X_i^T X_i` of the inputs a kernel `[..., in, out]` saw under model i, its off-diagonal
    entries times `shrink`. Every other leaf is averaged.

    Args:
      models: a list of trees of one structure.
      grams: for every model `{path of a kernel: G [..., in, in]}`; all with the same paths.
      shrink: the paper's alpha; 1 is the exact least squares, 0 weighs by input power alone.
      ridge: times the mean diagonal of all `G_i`, added to each; inputs that no model ever saw
        fall back to the average instead of dividing by zero.

    Returns:
      A tree with the first model's structure, dtypes and leaves that are not inexact.

    Raises:
      ValueError: if names, shapes or paths differ, or a Gram matrix does not fit its kernel.

    References:
      Jin et al., Dataless Knowledge Fusion by Merging Weights, 2022 (2212.09849), eq. 2 and 3.
    """
    if len(grams) != len(models):
        raise ValueError(f"expected {len(models)} sets of Grams, got {len(grams)}.")
    check_grams(grams, trees.flatten(models[0]))

    def formula(i: int, path: str, *leaves: Array) -> Array:
        if path not in grams[0]:
            return sum(leaves[1:], leaves[0]) / len(leaves)
        own = [jnp.asarray(gram[path], leaves[0].dtype) for gram in grams]
        reads = [[functools.partial(_rows, x) for x in matrices] for matrices in (leaves, own)]
        return regmean_kernel(*reads, shrink=shrink, ridge=ridge)

    # The Grams of tied leaves differ.
    by_path = [list(trees.flatten(models[0]))]
    return _leaves.combine_leaves(formula, _leaves.numbered("models", models), by_path)


def regmean_kernel(
    kernels: Sequence[Rows],
    grams: Sequence[Rows],
    *,
    shrink: Scalar = 0.9,
    ridge: Scalar = 1e-6,
) -> Array:
    """`regmean` of one kernel, read in blocks of rows: holds about three matrices, not two a model.

    Args:
      kernels: per model, a function that yields the blocks of its kernel `[..., in, out]`, rows
        along the axis `in`, all in one dtype.
      grams: per model, the same for its Gram matrix `[..., in, in]`.
      shrink: see `regmean`.
      ridge: see `regmean`.

    Returns:
      The merged kernel.
    """
    diagonals = [_diagonal(gram) for gram in grams]
    soft, added = (_numerics.scalar(value, diagonals[0]) for value in (shrink, ridge))
    means = [jnp.mean(diagonal, axis=-1, keepdims=True) for diagonal in diagonals]
    constant = added * (sum(means[1:], means[0]) / len(means))
    left: list[Any] = []
    right: list[Any] = []
    for kernel, gram, diagonal in zip(kernels, grams, diagonals, strict=True):
        own, start = list(kernel()), 0
        for number, rows in enumerate(gram()):
            on, place = (1 - soft) * diagonal + constant, start + jnp.arange(rows.shape[-2])
            eye = place[:, None] == jnp.arange(rows.shape[-1])[None]
            eye = jnp.broadcast_to(eye, rows.shape)
            shrunk = soft * rows + jnp.where(eye, on[..., None, :], 0)
            start += rows.shape[-2]
            product = _product(shrunk, own)
            if number == len(left):
                left.append(shrunk)
                right.append(product)
            else:
                left[number], right[number] = left[number] + shrunk, right[number] + product
        del own
    matrix = jnp.concatenate(left, axis=-2)
    left.clear()
    factors = jax.scipy.linalg.lu_factor(matrix)
    del matrix
    step, width = max(1, _blocks.BLOCK // diagonals[0].size), right[0].shape[-1]
    columns = []
    for first in range(0, width, step):
        some = jnp.concatenate([rows[..., first : first + step] for rows in right], axis=-2)
        columns.append(jax.scipy.linalg.lu_solve(factors, some))
    del factors
    right.clear()
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)


def check_grams(grams: Sequence[Mapping[str, Any]], flat: Mapping[str, Any]) -> None:
    """Raises ValueError unless the Gram matrices have the same paths and fit kernels of `flat`.

    Of each only the shape is read.
    """
    _checks.same_leaves(**{f"grams[{i}]": gram for i, gram in enumerate(grams)})
    for path, gram in grams[0].items():
        _check_gram(path, gram, flat)


def _rows(matrix: Array) -> Iterator[Array]:
    """The matrix in blocks of rows; several matrices whole."""
    blocks = _blocks.row_blocks([matrix]) if matrix.ndim == 2 else [[matrix]]
    return (block for (block,) in blocks)


def _diagonal(gram: Rows) -> Array:
    """`[..., in]`"""
    found, start = [], 0
    for rows in gram():
        found.append(jnp.diagonal(rows, offset=start, axis1=-2, axis2=-1))
        start += rows.shape[-2]
    return jnp.concatenate(found, axis=-1)


def _product(rows: Array, own: Sequence[Array]) -> Array:
    """Some rows of a matrix times a kernel in blocks of rows."""
    total, start = None, 0
    for block in own:
        some = rows[..., start : start + block.shape[-2]]
        found = jnp.matmul(some, block, precision=_HIGHEST)
        total, start = found if total is None else total + found, start + block.shape[-2]
    assert total is not None
    return total


def _check_gram(path: str, gram: Any, flat: Mapping[str, Any]) -> None:
    if path not in flat:
        near = trees.nearest(path, list(flat))
        raise ValueError(f"the models have no leaf {path!r}; nearest paths: {near}.")
    kernel = flat[path]
    wanted = (*kernel.shape[:-2], kernel.shape[-2], kernel.shape[-2]) if kernel.ndim > 1 else None
    if gram.shape != wanted:
        raise ValueError(
            f"{path!r} must be a kernel [..., in, out] with a Gram matrix [..., in, in], "
            f"got {_checks.described(kernel=kernel, gram=gram)}."
        )
