"""Early stopping of whole sweeps: successive halving over one vmapped population."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import _checks
from kdtl_jax._types import PyTree
from kdtl_jax.train.sweep._points import Points, size
from kdtl_jax.train.sweep._programs import select_rows, vmap


class Halving(NamedTuple):
    """The surviving points and their scores at every rung."""

    survivors: np.ndarray  # indices of the points that reached the last rung, best first
    state: PyTree  # their states, [survivors, ...]
    scores: np.ndarray  # [rungs, N, ...], NaN where a point had been stopped


# (rung, function that returns the survivors after it) -> the survivors after it
Kept = Callable[[int, Callable[[], Halving]], Halving]


def successive_halving(
    start: Callable[..., PyTree],
    advance: Callable[..., PyTree],
    score: Callable[..., Any],
    points: Points,
    *shared: Any,
    rungs: int,
    keep: float = 0.5,
    chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    kept: Kept = lambda rung, make: make(),
) -> Halving:
    """Trains all points briefly, keeps the best share, trains those further, and so on.

    All survivors advance together, using `sweep.vmap`. Each rung has its own number of points and
    therefore its own compilation; with `chunk` they share one.

    Args:
      start: `start(point, *shared) -> state`.
      advance: `advance(state, point, *shared) -> state`, one rung's worth of training.
      score: `score(state, point, *shared) -> [...]`; its mean is compared. Higher is better, and a
        score that is not finite ranks last.
      points: `{name: [N]}`.
      *shared: arrays that all points read.
      rungs: how many times survivors advance.
      keep: share kept after every rung but the last; at least one point is always kept.
      chunk: as in `sweep.vmap`.
      devices: as in `sweep.vmap`.
      kept: `kept(rung, make)` returns `make()`, the survivors after a rung. To make the sweep
        resumable, pass a function that stores this result and returns what an earlier call stored.

    Raises:
      ValueError: if `rungs < 1` or `keep` is not in (0, 1].

    References:
      Jamieson and Talwalkar, Non-stochastic best arm identification, 2016; Li et al., A system
      for massively parallel hyperparameter tuning (ASHA), 2020.
    """
    _checks.count(1, rungs=rungs)
    _checks.scalar(keep=keep)
    if not 0 < keep <= 1:
        raise ValueError(f"expected keep in (0, 1], got {keep}.")
    begin = vmap(start, chunk=chunk, devices=devices)

    def advance_and_score(candidate: Any, *shared: Any) -> tuple[PyTree, Any]:
        state = advance(candidate["state"], candidate["point"], *shared)
        return state, score(state, candidate["point"], *shared)

    advance_all = vmap(advance_and_score, chunk=chunk, devices=devices)
    total = size(points)

    def halving_after(rung: int) -> Halving:
        """The survivors after a rung; trains earlier rungs only if `kept` did not store them."""
        return kept(rung, lambda: compute_rung(rung))

    def compute_rung(rung: int) -> Halving:
        if rung:
            survivors, state, scores = halving_after(rung - 1)
        else:
            survivors, state, scores = np.arange(total), begin(dict(points), *shared), None
        remaining_points = select_rows(dict(points), survivors)
        state, new_scores = advance_all({"state": state, "point": remaining_points}, *shared)
        new_scores = np.asarray(new_scores, float)
        if scores is None:
            scores = np.full((rungs, total, *new_scores.shape[1:]), np.nan)
        scores = scores.copy()  # the previous rung's array may be stored
        scores[rung, survivors] = new_scores
        mean = new_scores.reshape(len(survivors), -1).mean(axis=1)
        order = np.argsort(-np.where(np.isfinite(mean), mean, -np.inf), kind="stable")
        if rung < rungs - 1:
            order = order[: max(1, int(np.ceil(keep * len(survivors))))]
        state = jax.tree.map(lambda leaf: leaf[order], state)
        return Halving(survivors[order], state, scores)

    return halving_after(rungs - 1)
