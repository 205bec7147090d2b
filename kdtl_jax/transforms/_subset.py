"""Which entries of an axis to keep: evenly spaced, first, random, or the most important."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks
from kdtl_jax._types import Array


def uniform_indices(size: int, n: int) -> np.ndarray:
    """`n` evenly spaced indices of an axis of length `size`, as in weight selection.

    Every `size / n`-th from 0 if `n` divides `size`, else `round(i (size - 1) / (n - 1))`, halves
    to even, which keeps the first and the last.

    Args:
      size: length of the axis, >= n.
      n: how many to keep, >= 1.

    Returns:
      `[n]` strictly increasing int64.

    Raises:
      ValueError: unless `1 <= n <= size`.

    References:
      Xu et al., Initializing Models with Larger Ones, 2023 (2311.18823).
    """
    _check_count("uniform_indices", size, n)
    steps = np.arange(n, dtype=np.int64)
    if size % n == 0:
        return steps * (size // n)
    return np.rint(steps * (size - 1) / (n - 1)).astype(np.int64)


def first_indices(size: int, n: int) -> np.ndarray:
    """The first `n` indices of an axis of length `size`: `[n]` int64.

    Raises:
      ValueError: unless `1 <= n <= size`.
    """
    _check_count("first_indices", size, n)
    return np.arange(n, dtype=np.int64)


def random_indices(key: Array, size: int, n: int) -> Array:
    """`n` indices of an axis of length `size`, drawn without replacement, in order: `[n]` int32.

    Raises:
      ValueError: unless `1 <= n <= size`.
    """
    _check_count("random_indices", size, n)
    return jnp.sort(jax.random.permutation(key, size)[:n].astype(jnp.int32))


def top_indices(scores: Array, n: int, *, groups: int = 1) -> Array:
    """The indices of the `n` largest scores, in order; equal scores prefer the earlier.

    Args:
      scores: `[size]`, one importance per entry of the axis.
      n: how many to keep.
      groups: equal consecutive groups, of each of which `n / groups` are kept. Grouped-query
        attention needs it: query heads are ranked inside their key-value group.

    Returns:
      `[n]` int32.

    Raises:
      ValueError: unless `1 <= n <= size` and `groups` divides both.
      TypeError: if the scores are not floating point.

    References:
      Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024
      (2407.14679), for the grouped form.
    """
    _checks.rank(1, 1, scores=scores)
    _checks.floating(scores=scores)
    size = scores.shape[0]
    _check_count("top_indices", size, n)
    if groups < 1 or size % groups or n % groups:
        raise ValueError(
            f"groups must divide the axis and n, got groups={groups}, n={n}, scores[{size}]."
        )
    by_group = scores.reshape(groups, size // groups)
    best = jnp.argsort(-by_group, axis=1, stable=True)[:, : n // groups]
    start = jnp.arange(groups, dtype=best.dtype)[:, None] * (size // groups)
    return jnp.sort((best + start).reshape(-1)).astype(jnp.int32)


def complement(size: int, dropped: Sequence[int] | np.ndarray) -> np.ndarray:
    """The indices of an axis of length `size` that are not in `dropped`: int64, in order.

    Raises:
      ValueError: if an index is out of range or repeated, or nothing is left.
    """
    gone = np.asarray(dropped, np.int64).reshape(-1)
    outside = gone[(gone < 0) | (gone >= size)]
    if outside.size or len(set(gone.tolist())) != gone.size or gone.size >= size:
        raise ValueError(
            f"the dropped indices must be distinct, lie in 0..{size - 1} and leave "
            f"something, got {gone.tolist()}."
        )
    return np.setdiff1d(np.arange(size, dtype=np.int64), gone)


def _check_count(fn: str, size: int, n: int) -> None:
    if not 1 <= n <= size:
        raise ValueError(f"n must lie in 1..{size}, the length of the axis, got {n}.")
