"""Fine-tuning in one call: a step, a state and the loop around them."""

from typing import Any

import jax
import optax
from jax import Array

from kdtl_jax import train, trees
from kdtl_jax._types import ModelFn, Params, PyTree
from kdtl_jax.objective import TermsFn, Weights
from kdtl_jax.run import data
from kdtl_jax.run.loop import _run


def fit(
    model: ModelFn,
    params: Params,
    tx: optax.GradientTransformation,
    *,
    terms: TermsFn,
    weights: Weights,
    source: data.Resident | data.Source,
    steps: int,
    trainable: trees.Selector = trees.everything,
    model_state: PyTree = None,
    teacher: Any = None,
    key: Array | None = None,
) -> train.TrainState:
    """`theta = argmin L` from `params`: `train.make_train_step`, `train.init_state` and `run`.

    Logging, evaluation, saving and resuming need those three by themselves.

    Args:
      model: the model function.
      params: where to start; they are copied, not donated.
      tx: an optax optimizer.
      terms: the objective, as for `train.make_train_step`; `objective.classification`, say.
      weights: one weight per term.
      source: batches, `data.resident(...)` or a `data.Source`.
      steps: how many updates.
      trainable: selector of what may change; the rest costs no gradient.
      model_state: what the model carries besides parameters.
      teacher: reaches the terms as `inputs.teacher`, for penalties such as L2-SP.
      key: of dropout and the like; None is `jax.random.key(0)`.

    Returns:
      The last state: `.params`, `.model_state`.

    Raises:
      FloatingPointError: if a parameter or the loss is no longer finite.
      ValueError: as `train.make_train_step`.
    """
    step = train.make_train_step(model, terms, weights, tx, trainable=trainable)
    key = jax.random.key(0) if key is None else key
    state = train.init_state(params, tx, key=key, model_state=model_state, trainable=trainable)
    return _run.run(step, state, teacher, source, steps=steps).state
