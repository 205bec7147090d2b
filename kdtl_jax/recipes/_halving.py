"""Successive halving of one method's settings in `kdtl sweep`, resumable after every rung."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import train
from kdtl_jax.recipes import _stored_results, _training
from kdtl_jax.recipes._optimizers import with_averages
from kdtl_jax.recipes._training import Experiment, Fitted, Point
from kdtl_jax.run import scores
from kdtl_jax.train import sweep as sweeps


def run_halving(
    name: str,
    learner: Experiment,
    columns: dict[str, np.ndarray],
    work: Any,  # `sweep.SweepInputs`
    chunk: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Fitted]:
    """The fields of `Swept`: validation, test, loss, epochs, complete, and the best students.

    A point is a setting with all its seeds, which continue or stop together.
    """
    settings, shared, splits = work.settings, work.shared, work.held_out
    seeds, count = settings.seeds, len(next(iter(columns.values()), [0]))
    epochs = settings.epochs // settings.halving
    options = _training.FitOptions(epochs, settings.batch_size)
    all_seeds = jnp.arange(seeds, dtype=jnp.int32)

    def start(point: Point, shared: Any, *splits: Any) -> Any:
        states = jax.vmap(lambda seed: learner.start({**point, "seed": seed}, shared))(all_seeds)
        return states, jnp.zeros((seeds, settings.halving)), jnp.zeros((seeds, settings.epochs))

    def advance(state: Any, point: Point, shared: Any, validation: Any, test: Any) -> Any:
        def advance_seed(state: train.TrainState, curve: Array, losses: Array, seed: Any) -> Any:
            seed_point = {**point, "seed": seed}
            state, *new = _training.advance(
                learner, state, seed_point, shared, shared.arrays, validation, options
            )
            # New values move in from the end: after the last rung both are full.
            previous = curve[len(new[0]) :], losses[len(new[1]) :]
            curve, losses = (jnp.concatenate(parts) for parts in zip(previous, new, strict=True))
            return state, curve, losses

        states, curves, losses = state
        return jax.vmap(advance_seed)(states, curves, losses, all_seeds)

    def score(state: Any, point: Point, *_: Any) -> Any:
        latest = state[1][:, -1]
        return jnp.where(jnp.isnan(latest), -jnp.inf, latest)  # NaN would mean "not trained"

    first_point = {axis: column[0] for axis, column in columns.items()}
    shapes = jax.eval_shape(lambda point: start(point, shared), first_point)
    halving = sweeps.successive_halving(
        start, advance, score, columns, shared, *splits, rungs=settings.halving,
        chunk=None if chunk is None else max(1, chunk // seeds), devices=work.devices,
        kept=_stored_results.keep_rungs(work.store, name, shapes, settings.halving - 1),
    )  # fmt: skip
    rungs = (
        (~np.isnan(halving.scores.reshape(settings.halving, count, -1))).any(axis=-1).sum(axis=0)
    )
    validation = halving.scores[rungs - 1, np.arange(count)].reshape(count, seeds)
    validation = np.where(np.isfinite(validation), validation, np.nan)
    test, loss = (np.full((count, seeds), np.nan) for _ in range(2))
    states, curves, losses = halving.state

    def on_test(state: train.TrainState) -> Any:
        logits = learner.logits(state, splits[1]["inputs"], shared)
        return learner.judge(logits, splits[1]["labels"])

    final = jax.vmap(jax.vmap(with_averages))(states)
    answers, test_scores = jax.jit(jax.vmap(jax.vmap(on_test)))(final)
    test[halving.survivors] = np.asarray(test_scores)
    loss[halving.survivors] = np.asarray(losses[..., -1])
    complete = np.isin(np.arange(count), halving.survivors)
    epochs_trained = np.repeat(rungs[:, None] * epochs, seeds, axis=1)
    order = np.sort(halving.survivors)
    best = order[scores.ranked(list(validation[order]))[0]]
    survivors = Fitted(
        _training.variables(final), curves, curves[..., -1], test_scores, answers, losses
    )
    best_students = _training.pick(survivors, int(np.flatnonzero(halving.survivors == best)[0]))
    return validation, test, loss, epochs_trained, complete, best_students
