"""Low-rank factoring of matrices by the singular value decomposition.

TypeError: a matrix is not floating point. ValueError: it has fewer than two axes, it is traced
where values are needed, or a rank or an energy is out of its range.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import _leaves


class LowRank(NamedTuple):
    """A matrix `a @ b`: `a` is `[..., in, rank]`, `b` is `[..., rank, out]`."""

    a: Array
    b: Array

    def product(self) -> Array:
        """`a @ b`, `[..., in, out]`, in full precision and the factors' dtype."""
        upcast = jnp.matmul(
            _numerics.upcast(self.a), _numerics.upcast(self.b), precision=jax.lax.Precision.HIGHEST
        )
        return upcast.astype(self.a.dtype)


def factor_low_rank(matrix: Array, rank: int) -> LowRank:
    """The best rank-`r` factors in the Frobenius norm: `a = U sqrt(S)`, `b = sqrt(S) V^T`.

    Args:
      matrix: `[..., in, out]`; leading axes (layers, kernel positions) are factored separately.
      rank: 1 to `min(in, out)`.

    Returns:
      The factors, in the dtype of `matrix`.

    References:
      Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    _checks.rank(2, matrix=matrix)
    _checks.floating(matrix=matrix)
    _checks.integer(rank=rank)
    if not 1 <= rank <= min(matrix.shape[-2:]):
        raise ValueError(
            f"rank must lie in 1..{min(matrix.shape[-2:])}, got {rank} for "
            f"{_checks.described(matrix=matrix)}."
        )
    u, s, vt = jnp.linalg.svd(_numerics.upcast(matrix), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a = u[..., :, :rank] * root[..., None, :]
    b = root[..., :, None] * vt[..., :rank, :]
    return LowRank(a.astype(matrix.dtype), b.astype(matrix.dtype))


def rank_for_energy(matrix: Array, energy: float) -> int:
    """The smallest rank that keeps the fraction `energy` of `sum of squared singular values`.

    For a stack of matrices, the smallest rank that does so for each. It reads values and ranks
    decide shapes, so it cannot be used inside `jit`.

    Args:
      matrix: `[..., in, out]`, concrete.
      energy: in `(0, 1]`.
    """
    _checks.rank(2, matrix=matrix)
    _checks.floating(matrix=matrix)
    _checks.scalar(energy=energy)
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}.")
    if _checks.concrete(matrix) is None:
        raise ValueError("the matrix is traced, but a rank decides shapes. Call it outside jit.")
    upcast = _numerics.rescaled(_numerics.upcast(matrix), axis=(-2, -1))
    squares = jnp.square(jnp.linalg.svd(upcast, compute_uv=False))
    # The energy that truncation would drop, summed from the tail: exact where it is small.
    tail_energy = jnp.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    is_needed = tail_energy > (1 - energy) * jnp.sum(squares, axis=-1, keepdims=True)
    return max(1, int(jnp.max(jnp.sum(is_needed, axis=-1))))


def truncate_rank(params: Params, rank: int, *, where: trees.Selector) -> Params:
    """Replaces the selected matrices by their best approximation of rank `r`; shapes are kept.

    Matrices whose smaller side is at most `r` are not changed.

    Raises:
      ValueError: if `where` matches nothing, a selected leaf is not a matrix, or `rank < 1`.
    """

    def truncate(path: str, is_selected: bool, leaf: Array) -> Array:
        if not is_selected:
            return leaf
        if jnp.ndim(leaf) < 2:
            raise ValueError(f"{path!r} {list(jnp.shape(leaf))} is not a matrix. Narrow where.")
        if 1 <= rank and min(leaf.shape[-2:]) <= rank:
            return leaf
        return factor_low_rank(jnp.asarray(leaf), rank).product()

    return trees.map_with_path(truncate, _leaves.select_inexact(params, where), params)
