"""Mean teachers: the teacher is the moving average of its own student.

    >>> import jax, jax.numpy as jnp, optax
    >>> from kdtl_jax import losses, train
    >>> from kdtl_jax.train import mean_teachers
    >>> def model(params, model_state, inputs, *, key=None, train=False):
    ...     return {"logits": inputs @ params["w"]}, model_state
    >>> def terms(x):
    ...     return {"mean": losses.mse(x.student["logits"], x.teacher["logits"])}
    >>> tx = optax.sgd(0.1)
    >>> step = train.make_step(model, terms, {"mean": 1.0}, tx, teacher=model)
    >>> step = mean_teachers.follow(step, decay=mean_teachers.ema_decay(0.99))
    >>> state = train.init_state({"w": jnp.eye(2)}, tx, key=jax.random.key(0))
    >>> state, _ = step(mean_teachers.begin(state), {"inputs": jnp.eye(2)})
    >>> state.memory.teacher.params["w"].shape
    (2, 2)

The average is kept in the state's memory, so the loop logs, saves and resumes such a run like any
other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, transforms, trees
from kdtl_jax._types import Params, PyTree, Scalar, Schedule, Variables
from kdtl_jax.objective import Metrics
from kdtl_jax.train import precision
from kdtl_jax.train._state import Batch, Step, TrainState, check_state, own


class MeanTeacher(NamedTuple):
    """A state's memory, with the average of its student."""

    teacher: Variables
    memory: PyTree  # what the terms carry


def begin(state: TrainState) -> TrainState:
    """`state` with a copy of its student as the teacher, including batch statistics.

    Half-precision values are averaged in float32, where small steps are not rounded away; the
    teacher runs in its student's dtypes.
    """
    check_state(state)
    teacher = jax.tree.map(
        lambda x: _numerics.upcast(x) if trees.is_inexact(x) else x,
        Variables(state.params, state.model_state),
    )
    return state._replace(memory=MeanTeacher(jax.tree.map(own, teacher), state.memory))


def follow(step: Step, *, decay: Scalar | Schedule = 0.999) -> Step:
    """`step` with a teacher that follows its student, `d teacher + (1 - d) student` at each step.

    Batch statistics are averaged like parameters; counters and keys are copied. In a step that the
    optimizer skips (`precision.loss_scaling`, `optax.apply_if_finite`), the teacher stays too.

    Args:
      step: from `train.make_step(model, ..., teacher=model)`.
      decay: a number, or a schedule of the step such as `ema_decay()`.

    Returns:
      A step for states from `begin`. It takes no `teacher_params`.

    Raises:
      ValueError: if decay is a number outside [0, 1]; when called, if the state is not from `begin`
        or `teacher_params` are given.

    References:
      Tarvainen and Valpola, Mean teachers are better role models, 2017 (1703.01780).
    """
    if not callable(decay):
        _checks.scalar(decay=decay)
        _checks.within(0, 1, decay=decay)

    def following(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        held = state.memory
        if not isinstance(held, MeanTeacher):
            raise ValueError("the state holds no mean teacher. Start from begin(init_state(...)).")
        if teacher_params is not None:
            raise ValueError("a mean teacher is part of the state: leave teacher_params out.")
        runs = jax.tree.map(
            lambda mean, now: mean.astype(now.dtype) if trees.is_inexact(now) else mean,
            held.teacher,
            Variables(state.params, state.model_state),
        )
        new, metrics = step(state._replace(memory=held.memory), batch, runs)
        student = Variables(new.params, new.model_state)
        teacher = _averaged(held.teacher, student, _at(decay, state.step))
        teacher = precision.unless_skipped(teacher, held.teacher, new.opt_state, state.opt_state)
        return new._replace(memory=MeanTeacher(teacher, new.memory)), metrics

    return following


def ema_decay(decay: float = 0.999) -> Schedule:
    """`min(decay, 1 - 1 / (step + 1))`: the average starts as a plain mean, then forgets.

    Without the ramp, the random initial weights stay in the average for `1 / (1 - decay)` steps.

    Raises:
      ValueError: if decay is not one number in [0, 1].

    References:
      Tarvainen and Valpola, 2017 (1703.01780). KD-Lib uses min(1e-3, ...) once per epoch.
    """
    _checks.scalar(decay=decay)
    _checks.within(0, 1, decay=decay)

    def schedule(step: Array) -> Array:
        return jnp.minimum(decay, 1 - 1 / (jnp.asarray(step).astype(jnp.float32) + 1))

    return schedule


def ema_update(
    teacher: Params, student: Params, step: Array, *, decay: Scalar | Schedule = 0.999
) -> Params:
    """`d teacher + (1 - d) student` with `d = decay(step)`, for use in your own loop.

    Args:
      teacher: the average so far, in the dtype to average in (float32 for half-precision students).
      student: parameters of the same structure, after the optimizer's step.
      step: the number of previous updates.
      decay: a number, or a schedule such as `ema_decay()`.

    Raises:
      ValueError: if names or shapes differ.

    References:
      Tarvainen and Valpola, 2017 (1703.01780).
    """
    return transforms.ema(teacher, student, decay=_at(decay, step))


def _averaged(teacher: Variables, student: Variables, decay: Scalar) -> Variables:
    params = transforms.ema(teacher.params, student.params, decay=decay)
    if not any(trees.is_inexact(leaf) for leaf in jax.tree.leaves(student.model_state)):
        return Variables(params, student.model_state)
    averaged = transforms.ema(teacher.model_state, student.model_state, decay=decay)
    state = jax.tree.map(
        lambda mean, new: mean if trees.is_inexact(new) else new, averaged, student.model_state
    )
    return Variables(params, state)


def _at(decay: Scalar | Schedule, step: Array) -> Scalar:
    return decay(step) if callable(decay) else decay
