"""Successive halving of the settings of one method in `kdtl sweep`, resumed rung by rung."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import train
from kdtl_jax.recipes import _stored_results, _training
from kdtl_jax.recipes._optimizers import used
from kdtl_jax.recipes._training import Experiment, Fitted, Point
from kdtl_jax.run import scores
from kdtl_jax.train import sweep as sweeps


def halved(
    name: str,
    learner: Experiment,
    columns: dict[str, np.ndarray],
    work: Any,  # `sweep.Work`
    chunk: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Fitted]:
    """The fields of `Swept`: validation, test, loss, epochs, complete, and the best students.

    A point is a setting with all its seeds, which continue or stop together.
    """
    settings, shared, held = work.settings, work.shared, work.held
    seeds, count = settings.seeds, len(next(iter(columns.values()), [0]))
    epochs = settings.epochs // settings.halving
    how = _training.Fitting(epochs, settings.batch_size)
    own = jnp.arange(seeds, dtype=jnp.int32)

    def start(point: Point, shared: Any, *held: Any) -> Any:
        states = jax.vmap(lambda seed: learner.start({**point, "seed": seed}, shared))(own)
        return states, jnp.zeros((seeds, settings.halving)), jnp.zeros((seeds, settings.epochs))

    def advance(state: Any, point: Point, shared: Any, validation: Any, test: Any) -> Any:
        def of_seed(state: train.TrainState, curve: Array, losses: Array, seed: Any) -> Any:
            mine = {**point, "seed": seed}
            state, *new = _training.advance(
                learner, state, mine, shared, shared.arrays, validation, how
            )
            # New values move in from the end: after the last rung both are full.
            old = curve[len(new[0]) :], losses[len(new[1]) :]
            curve, losses = (jnp.concatenate(parts) for parts in zip(old, new, strict=True))
            return state, curve, losses

        states, curves, losses = state
        return jax.vmap(of_seed)(states, curves, losses, own)

    def score(state: Any, point: Point, *_: Any) -> Any:
        now = state[1][:, -1]
        return jnp.where(jnp.isnan(now), -jnp.inf, now)  # NaN is "not trained so far"

    first = {axis: column[0] for axis, column in columns.items()}
    shapes = jax.eval_shape(lambda point: start(point, shared), first)
    done = sweeps.successive_halving(
        start, advance, score, columns, shared, *held, rungs=settings.halving,
        chunk=None if chunk is None else max(1, chunk // seeds), devices=work.devices,
        kept=_stored_results.rungs(work.finished, name, shapes, settings.halving - 1),
    )  # fmt: skip
    rungs = (~np.isnan(done.scores.reshape(settings.halving, count, -1))).any(axis=-1).sum(axis=0)
    validation = done.scores[rungs - 1, np.arange(count)].reshape(count, seeds)
    validation = np.where(np.isfinite(validation), validation, np.nan)
    test, loss = (np.full((count, seeds), np.nan) for _ in range(2))
    states, curves, losses = done.state

    def on_test(state: train.TrainState) -> Any:
        logits = learner.logits(state, held[1]["inputs"], shared)
        return learner.judged(logits, held[1]["labels"])

    kept = jax.vmap(jax.vmap(used))(states)
    named, found = jax.jit(jax.vmap(jax.vmap(on_test)))(kept)
    test[done.survivors] = np.asarray(found)
    loss[done.survivors] = np.asarray(losses[..., -1])
    complete = np.isin(np.arange(count), done.survivors)
    trained = np.repeat(rungs[:, None] * epochs, seeds, axis=1)
    order = np.sort(done.survivors)
    best = order[scores.ranked(list(validation[order]))[0]]
    of_all = Fitted(_training.variables(kept), curves, curves[..., -1], found, named, losses)
    of_best = _training.pick(of_all, int(np.flatnonzero(done.survivors == best)[0]))
    return validation, test, loss, trained, complete, of_best
