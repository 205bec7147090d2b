"""Evaluation over padded batches, and stopping when it improves no more."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kdtl_jax import train
from kdtl_jax.objective import Metrics
from kdtl_jax.run import data
from kdtl_jax.run.loop import _metrics
from kdtl_jax.train import Batch, TrainState

Evaluate = Callable[[TrainState], Mapping[str, Any]]
Stop = Callable[[list[dict[str, Any]]], bool]


def no_improvement(name: str, patience: int, *, minimize: bool = True) -> Stop:
    """Early stopping: true once `patience` evaluations in a row have not improved on the best.

    Args:
      name: an entry of what `evaluate` returns.
      patience: how many evaluations without a new best are allowed.
      minimize: whether smaller is better.
    """

    def stop(evaluations: list[dict[str, Any]]) -> bool:
        values = np.array([line[f"eval/{name}"] for line in evaluations], float)
        best = int(np.nanargmin(values if minimize else -values)) if len(values) else 0
        return len(values) - 1 - best >= patience

    return stop


def evaluation(
    eval_step: Callable[[Any, Batch], Metrics],
    batches: Callable[[], Iterator[Batch]],
    *,
    variables: Callable[[TrainState], Any],
    prefetch: int = 2,
    place: Callable[[Any], Any] = jax.device_put,
) -> Evaluate:
    """`evaluate(state)` over batches that may be filled up: exact means, one wait at the end.

    Args:
      eval_step: from `train.make_eval_step`, not jitted.
      batches: starts a pass over the evaluation data, for example
        `lambda: data.in_order(arrays, 256)`.
      variables: what the model needs, from the state:
        `lambda s: Variables(s.params["student"], s.model_state)`.
    """
    jitted = jax.jit(eval_step)
    add = jax.jit(train.add_metrics)

    def evaluate(state: TrainState) -> dict[str, Any]:
        chosen = variables(state)
        total: Metrics | None = None
        for batch in data.prefetch(batches(), prefetch, place):
            metrics = jitted(chosen, batch)
            total = metrics if total is None else add(total, metrics)
        if total is None:
            raise ValueError("batches() yielded nothing.")
        line = _metrics.line_of(0, total)
        return {name: value for name, value in line.items() if name != "step"}

    return evaluate
