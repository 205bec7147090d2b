"""Successive halving of the settings of one method in `kdtl sweep`, resumed rung by rung."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import train
from kdtl_jax.recipes import _finished, _training
from kdtl_jax.recipes._training import Experiment, Point
from kdtl_jax.train import sweep as sweeps


def halved(
    name: str,
    learner: Experiment,
    columns: dict[str, np.ndarray],
    shared: Any,
    held: Sequence[Any],
    settings: Any,  # `sweep.Settings`
    chunk: int | None,
    devices: Sequence[Any] | None,
    finished: _finished.Finished,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Validation, test and loss `[K, S]`, epochs `[K]`, the best setting's classes `[S, N]`.

    A point is a setting with all its seeds: they stay or go together.
    """
    seeds, count = settings.seeds, len(next(iter(columns.values()), [0]))
    epochs = settings.epochs // settings.halving
    own = jnp.arange(seeds, dtype=jnp.int32)

    def start(point: Point, shared: Any, *held: Any) -> Any:
        states = jax.vmap(lambda seed: learner.start({**point, "seed": seed}, shared))(own)
        return states, jnp.zeros((seeds,)), jnp.zeros((seeds,))

    def advance(state: Any, point: Point, shared: Any, validation: Any, test: Any) -> Any:
        def of_seed(state: train.TrainState, seed: Any) -> Any:
            mine = {**point, "seed": seed}
            state, curve, losses = _training.advance(
                learner, state, mine, shared, shared.arrays, validation,
                epochs=epochs, batch_size=settings.batch_size,
            )  # fmt: skip
            return state, curve[-1], losses[-1]

        return jax.vmap(of_seed)(state[0], own)

    def score(state: Any, point: Point, *_: Any) -> Any:
        return jnp.where(jnp.isnan(state[1]), -jnp.inf, state[1])  # NaN is "not trained so far"

    first = {axis: column[0] for axis, column in columns.items()}
    shapes = jax.eval_shape(lambda point: start(point, shared), first)
    done = sweeps.successive_halving(
        start, advance, score, columns, shared, *held, rungs=settings.halving,
        chunk=None if chunk is None else max(1, chunk // seeds), devices=devices,
        kept=_finished.rungs(finished, name, shapes, settings.halving - 1),
    )  # fmt: skip
    rungs = (~np.isnan(done.scores.reshape(settings.halving, count, -1))).any(axis=-1).sum(axis=0)
    validation = done.scores[rungs - 1, np.arange(count)].reshape(count, seeds)
    validation = np.where(np.isfinite(validation), validation, np.nan)
    test, loss = (np.full((count, seeds), np.nan) for _ in range(2))
    states, _, losses = done.state

    def on_test(state: train.TrainState) -> Any:
        logits = learner.logits(state, held[1]["inputs"], shared)
        return learner.judged(logits, held[1]["labels"])

    named, found = jax.jit(jax.vmap(jax.vmap(on_test)))(states)
    test[done.survivors] = np.asarray(found)
    loss[done.survivors] = np.asarray(losses)
    return validation, test, loss, rungs * epochs, np.asarray(named[0])
