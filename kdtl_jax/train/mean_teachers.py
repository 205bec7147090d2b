"""Mean teachers: the teacher is a moving average of its student.

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
from kdtl_jax.train._state import Batch, Step, TrainState, check_state, copy_leaf


class MeanTeacher(NamedTuple):
    """A state's memory, with the average of its student."""

    teacher: Variables
    memory: PyTree  # what the terms carry


def begin(state: TrainState) -> TrainState:
    """Adds a copy of the student, including batch statistics, to `state` as its teacher.

    Half-precision values are averaged in float32, where small steps are not rounded away; the
    teacher runs in its student's dtypes.
    """
    check_state(state)
    teacher = jax.tree.map(
        lambda x: copy_leaf(_numerics.upcast(x) if trees.is_inexact(x) else x),
        Variables(state.params, state.model_state),
    )
    return state._replace(memory=MeanTeacher(teacher, state.memory))


def follow(step: Step, *, decay: Scalar | Schedule = 0.999) -> Step:
    """Adds a teacher that follows its student to `step`: `d teacher + (1 - d) student`.

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

    def step_with_teacher(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        memory = state.memory
        if not isinstance(memory, MeanTeacher):
            raise ValueError("the state holds no mean teacher. Start from begin(init_state(...)).")
        if teacher_params is not None:
            raise ValueError("a mean teacher is part of the state: leave teacher_params out.")
        teacher_variables = jax.tree.map(
            lambda mean, new: mean.astype(new.dtype) if trees.is_inexact(new) else mean,
            memory.teacher,
            Variables(state.params, state.model_state),
        )
        new_state, metrics = step(state._replace(memory=memory.memory), batch, teacher_variables)
        student = Variables(new_state.params, new_state.model_state)
        teacher = _average(memory.teacher, student, _decay_at(decay, state.step))
        teacher = precision.unless_skipped(
            teacher, memory.teacher, new_state.opt_state, state.opt_state
        )
        return new_state._replace(memory=MeanTeacher(teacher, new_state.memory)), metrics

    return step_with_teacher


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
    return transforms.ema(teacher, student, decay=_decay_at(decay, step))


def _average(teacher: Variables, student: Variables, decay: Scalar) -> Variables:
    params = transforms.ema(teacher.params, student.params, decay=decay)
    state = student.model_state
    if any(map(trees.is_inexact, jax.tree.leaves(state))):
        averaged = transforms.ema(teacher.model_state, state, decay=decay)
        state = jax.tree.map(
            lambda mean, new: mean if trees.is_inexact(new) else new, averaged, state
        )
    return Variables(params, state)


def _decay_at(decay: Scalar | Schedule, step: Array) -> Scalar:
    return decay(step) if callable(decay) else decay
