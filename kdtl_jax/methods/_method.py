"""`Method`, and what methods share: masks, keys, schedules, requirements."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax._types import Outputs, Params, PyTree, Scalar, Schedule
from kdtl_jax.methods._setup import Head, Setup, check_setup
from kdtl_jax.objective import Inputs, TermsFn

Weight = Scalar | Schedule
Predict = Callable[[Params, PyTree, Outputs], Array]  # (params, model_state, outputs) -> logits


class Method(NamedTuple):
    """A method for one pair of models.

    Pass `terms` and `weights` to `train.make_step`, and `connectors(key)` and `memory(key)` to
    `train.init_state`.
    """

    terms: TermsFn  # {"task": ..., and the method's own}
    weights: Mapping[str, Weight]  # the paper's, or its authors' code's
    connectors: Callable[[Array], Params]  # key -> parameters, {} without connectors
    memory: Callable[[Array], PyTree]  # key -> memory, None without one
    # (connectors, memory, the student's outputs) -> logits at inference, if connectors take part in
    # the prediction. None: the student's own logits.
    predict: Predict | None = None


def no_connectors(key: Array) -> Params:
    """`Method.connectors` of a method that only trains the student."""
    return {}


def no_memory(key: Array) -> PyTree:
    """`Method.memory` of a method without memory."""
    return None


def method(
    setup: Setup,
    terms: TermsFn,
    weights: Mapping[str, Weight],
    *,
    connectors: Callable[[Array], Params] = no_connectors,
    memory: Callable[[Array], PyTree] = no_memory,
    predict: Predict | None = None,
) -> Method:
    """A `Method` with the given distillation terms; the setup's task is added to them.

    For methods of your own: the result is used like any published method.
    """
    check_setup(setup)

    def with_task(inputs: Inputs) -> Any:
        distillation, task = terms(inputs), setup.task(inputs)
        assert not isinstance(task, tuple), "a task keeps no memory"
        if isinstance(distillation, tuple):
            return {**task, **distillation[0]}, distillation[1]
        return {**task, **distillation}

    return Method(with_task, weights, connectors, memory, predict)


def alone(setup: Setup) -> Method:
    """Trains on the task without a teacher: the baseline of every comparison."""
    return method(setup, lambda inputs: {}, {"task": 1.0})


def count(x: Array, where: Array | None) -> Array | int:
    """The number of real examples, at least 1, in x's dtype."""
    return len(x) if where is None else jnp.maximum(jnp.sum(where, dtype=x.dtype), 1)


def key_and_step(inputs: Inputs) -> tuple[Array, Array]:
    """The step's random key and number, which every step of `train` passes to its terms."""
    assert inputs.key is not None and inputs.step is not None
    return inputs.key, inputs.step


def exclusive_classes(setup: Setup) -> None:
    """Refuses sigmoid heads, whose logits are not a distribution over classes."""
    check_setup(setup)
    if not setup.exclusive:
        raise ValueError(
            "needs two or more classes that exclude each other (softmax); for sigmoid heads use "
            "binary_kd"
        )


def needs_teacher_head(setup: Setup) -> Head:
    """The teacher's linear classifier; ValueError if it is unknown."""
    check_setup(setup)
    if setup.teacher_head is None:
        raise ValueError(no_head("teacher"))
    return setup.teacher_head


def no_head(side: str) -> str:
    """The message for a "teacher" or a "student" whose classifier is unknown."""
    return (
        f"needs the {side}'s classifier and its input, weights called 'head' and the output "
        f"'pooled': give setup a {side}_layout with head= and last= if they have other names"
    )


def schedule(values: optax.Schedule, description: str) -> Schedule:
    """An optax schedule of a float step (its divisions need one under strict promotion).

    `description` describes it where a method's weights are printed.
    """

    def run(step: Array) -> Array:
        return jnp.asarray(values(jnp.asarray(step, jnp.float32)))

    run.__qualname__ = description
    return run


def warmed_up(weight: float, setup: Setup) -> Schedule:
    """Warms up from 0 to `weight` over the first 20/240 of the run (epochs in mdistiller)."""
    check_setup(setup)
    steps = max(round(20 / 240 * setup.steps), 1)
    description = f"0 to {weight:g} over {steps} steps"
    return schedule(optax.linear_schedule(0.0, weight, steps), description)


def cooled_down(weight: float, setup: Setup) -> Schedule:
    """`weight`, decaying to 0 along a half cosine over the last 90/240 of the run."""
    start = round(150 / 240 * setup.steps)
    decay = optax.cosine_decay_schedule(weight, max(setup.steps - start, 1))
    values = optax.join_schedules([optax.constant_schedule(weight), decay], [start])
    return schedule(values, f"{weight:g}, after {start} steps down to 0 at {setup.steps}")
