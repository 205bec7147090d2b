"""Training over seeds, and the intervals of the results."""

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import language, train
from kdtl_jax.run import report

Learn = Callable[[Any, Any, Any, jax.Array], Any]


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW; the rate rises for a twentieth of the steps and falls along a cosine."""
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps))


def learning(
    learner: language.Learner, tx: optax.GradientTransformation, steps: int, batch: int
) -> Learn:
    """`learn(params, data, teacher_params, key) -> params`, compiled once for all seeds."""
    epoch = train.jit_epoch(learner.step)

    def learn(params: Any, data: Any, teacher_params: Any, key: jax.Array) -> Any:
        params = jax.tree.map(jnp.copy, params)  # the state is given away
        state = learner.begin(train.init_state(params, tx, key=key))
        rows = len(data["inputs"]["tokens"])
        epochs = range(-(-steps // (rows // batch)))
        order = [train.epoch_index(key, i, rows, batch) for i in epochs]
        state, _ = epoch(state, data, jnp.concatenate(order)[:steps], teacher_params)
        return state.params

    return learn


def texts() -> tuple[bytes, bytes]:
    """The text that the package carries: what is learned from, and its last twentieth."""
    text = resources.files("kdtl_jax.datasets").joinpath("shakespeare.txt").read_bytes()
    at = len(text) * 19 // 20
    return text[:at], text[at:]


def show(found: Mapping[str, Sequence[float]], digits: int) -> None:
    """A line per number: its mean over seeds, and half of the 95% interval."""
    for name, values in found.items():
        interval = report.interval(np.asarray(values))
        half = "" if interval.high is None else f" ± {interval.high - interval.mean:.{digits}f}"
        print(f"{name}: {interval.mean:.{digits}f}{half}", flush=True)
