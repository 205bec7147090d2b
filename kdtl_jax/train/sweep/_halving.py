"""Early stopping of whole sweeps: successive halving over one vmapped population."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax._types import PyTree
from kdtl_jax.train.sweep._points import Points, size


class Halving(NamedTuple):
    """What is left, and the way there."""

    survivors: np.ndarray  # indices of the points that reached the last rung, best first
    state: PyTree  # their states, [survivors, ...]
    scores: np.ndarray  # [rungs, N, ...], NaN where a point had been stopped


def successive_halving(
    start: Callable[..., PyTree],
    advance: Callable[..., PyTree],
    score: Callable[..., Any],
    points: Points,
    *shared: Any,
    rungs: int,
    keep: float = 0.5,
) -> Halving:
    """Trains all points a little, keeps the best share, trains those further, and so on.

    All survivors advance together as one vmapped program; each rung compiles once.

    Args:
      start: `start(point, *shared) -> state`.
      advance: `advance(state, point, *shared) -> state`, one rung's worth of training.
      score: `score(state, point, *shared) -> [...]`, of which the mean counts; higher is better,
        NaN loses.
      points: `{name: [N]}`.
      *shared: what all points read.
      rungs: how many times survivors advance.
      keep: share kept after every rung but the last; at least one point always is.

    Raises:
      ValueError: if `rungs < 1` or `keep` is not in (0, 1].

    References:
      Jamieson and Talwalkar, Non-stochastic best arm identification, 2016; Li et al., A system
      for massively parallel hyperparameter tuning (ASHA), 2020.
    """
    if rungs < 1 or not 0 < keep <= 1:
        raise ValueError(f"rungs must be at least 1 and keep in (0, 1], got {rungs}, {keep}.")
    axes = (None,) * len(shared)
    begin = jax.jit(jax.vmap(start, in_axes=(0, *axes)))
    further = jax.jit(jax.vmap(advance, in_axes=(0, 0, *axes)))
    judged = jax.jit(jax.vmap(score, in_axes=(0, 0, *axes)))
    left = np.arange(size(points))
    here = {name: jnp.asarray(column) for name, column in points.items()}
    state = begin(here, *shared)
    total, scores = len(left), np.empty(0)
    for rung in range(rungs):
        state = further(state, here, *shared)
        found = np.asarray(judged(state, here, *shared), float)
        if not rung:
            scores = np.full((rungs, total, *found.shape[1:]), np.nan)
        scores[rung, left] = found
        mean = found.reshape(len(left), -1).mean(axis=1)
        order = np.argsort(-np.where(np.isnan(mean), -np.inf, mean), kind="stable")
        if rung < rungs - 1:
            order = order[: max(1, int(np.ceil(keep * len(left))))]
        left, state, here = left[order], *_take((state, here), order)
    return Halving(left, state, scores)


def _take(tree: PyTree, order: Sequence[int] | np.ndarray) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[order], tree)
