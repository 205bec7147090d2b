"""One method's part of a sweep: a point's training as pure functions, and the ways to run many.

A point is a dict of scalars: `seed`, and whatever else is swept. All of them are traced, so that
one compiled program serves every point of a method.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import train, transforms
from kdtl_jax._types import Params, Scalar, Schedule, Variables
from kdtl_jax.methods import Entry, Setup
from kdtl_jax.objective import Inputs, Terms
from kdtl_jax.recipes import _options, _seeds
from kdtl_jax.recipes._networks import Network
from kdtl_jax.recipes._options import Options
from kdtl_jax.train import TrainState, sweep

Point = Mapping[str, Any]
# (learning rate, weight decay, steps of the run) -> optimizer; the first two may be traced.
Optimizer = Callable[[Any, Any, int], optax.GradientTransformation]
# Axes that are no term's name. "weight" multiplies a method's own weights of its terms.
AXES = ("temperature", "weight", "rate", "weight_decay", "alpha")


class Shared(NamedTuple):
    """Arrays that every point reads."""

    arrays: dict[str, Any]  # [N, ...]: "inputs", "labels", "index", "teacher"
    teacher: Variables
    validation: tuple[Array, Array]  # inputs, labels
    test: tuple[Array, Array]


class Scores(NamedTuple):
    """What is read off a trained student."""

    validation: Array  # accuracies
    test: Array
    loss: Array  # mean over the last epoch


class Program(NamedTuple):
    """A method on one pair of models, for points of given axes."""

    start: Callable[[Point, Shared], TrainState]
    step: Callable[[Point], train.Step]
    scores: Callable[[TrainState, Shared], tuple[Array, Array]]
    rows: Callable[[Point, Any], Array]  # (point, epoch) -> the epoch's batches [steps, B]


def program(
    method: Entry,
    setup: Setup,
    net: Network,
    optimizer: Optimizer,
    fixed: Mapping[str, float],
    batch_size: int,
    example: Any,
) -> Program:
    """The functions of one method.

    Args:
      method: one without connectors and memory.
      setup: of the pair.
      net: the student.
      optimizer: of every point.
      fixed: `rate` and `weight_decay` where no axis says otherwise.
      batch_size: examples per step.
      example: inputs `[1, ...]`.
    """

    def start(point: Point, shared: Shared) -> TrainState:
        keys = _keys(point["seed"])
        fresh = net.init(keys.model, example)
        params = fresh.params
        if "alpha" in point:
            params = scaled_start(shared.teacher.params, params, point["alpha"])
        return train.init_state(
            params,
            _tx(point),
            key=keys.steps,
            model_state=fresh.model_state,
        )

    def step(point: Point) -> train.Step:
        options, factor = _asked(method, setup, point)
        built = _options.build(method, setup, options)

        def terms(inputs: Inputs) -> Terms:
            found = built.terms(inputs)
            named = found[0] if isinstance(found, tuple) else found
            return named

        weights = {
            name: weight if name == "task" or factor is None else times(weight, factor)
            for name, weight in built.weights.items()
        }
        return train.make_step(net.apply, terms, weights, _tx(point))

    def _tx(point: Point) -> optax.GradientTransformation:
        decay = point.get("weight_decay", fixed["weight_decay"])
        return optimizer(point.get("rate", fixed["rate"]), decay, setup.steps)

    def scores(state: TrainState, shared: Shared) -> tuple[Array, Array]:
        def accuracy(split: tuple[Array, Array]) -> Array:
            outputs, _ = net.apply(state.params, state.model_state, split[0])
            named = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)
            return jnp.mean((named == split[1]).astype(jnp.float32))

        return accuracy(shared.validation), accuracy(shared.test)

    def rows(point: Point, epoch: Any) -> Array:
        return train.epoch_index(_keys(point["seed"]).order, epoch, setup.examples, batch_size)

    return Program(start, step, scores, rows)


def trained(made: Program, epochs: int, *, steps: int | None = None) -> sweep.Experiment:
    """`experiment(point, shared) -> (state, Scores)`: `epochs` more epochs.

    A point may bring its `state` and the number of its first `epoch`; without them it starts anew.

    Args:
      made: from `program`.
      epochs: how many.
      steps: only so many steps of each epoch, for a measurement.
    """

    def experiment(point: Point, shared: Shared) -> tuple[TrainState, Scores]:
        state = point["state"] if "state" in point else made.start(point, shared)
        first = point["epoch"] if "epoch" in point else jnp.zeros((), jnp.int32)
        epoch = train.scan_epoch(made.step(point))

        def body(state: TrainState, number: Array) -> tuple[TrainState, Array]:
            index = made.rows(point, number)[:steps]
            state, metrics = epoch(state, shared.arrays, index)
            return state, jnp.mean(metrics["loss"].value())

        state, losses = jax.lax.scan(body, state, first + jnp.arange(epochs, dtype=jnp.int32))
        on_validation, on_test = made.scores(state, shared)
        return state, Scores(on_validation, on_test, losses[-1])

    return experiment


def step_by_step(made: Program, epochs: int, *, steps: int | None = None) -> sweep.Runner:
    """A runner that calls one compiled step per batch, one point after another.

    As `train.jit_epoch` does where a step's convolutions lose their threads within a loop. It runs
    what `trained` with the same arguments describes.
    """
    start, rows, scores = jax.jit(made.start), jax.jit(made.rows), jax.jit(made.scores)
    one = jax.jit(
        lambda state, point, shared, at: made.step(point)(state, train.take(shared.arrays, at)),
        donate_argnums=0,
    )
    own = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def run_point(point: dict[str, Any], shared: Shared) -> tuple[TrainState, Scores]:
        state = own(point.pop("state")) if "state" in point else start(point, shared)
        first = int(point.pop("epoch", 0))
        losses: list[Array] = []
        for epoch in range(first, first + epochs):
            losses = []
            for at in np.asarray(rows(point, np.int32(epoch)))[:steps]:
                state, metrics = one(state, point, shared, at)
                losses.append(metrics["loss"].value())
        on_validation, on_test = scores(state, shared)
        return state, Scores(on_validation, on_test, jnp.mean(jnp.stack(losses)))

    def runner(experiment: sweep.Experiment) -> Callable[..., Any]:
        del experiment  # the same, as one program

        def every(points: sweep.Points, shared: Shared) -> Any:
            found = [
                run_point(jax.tree.map(lambda x, i=i: x[i], dict(points)), shared)
                for i in range(sweep.size(points))
            ]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

        return every

    runner.__name__ = "step_by_step"
    return runner


def scaled_start(teacher: Params, student: Params, alpha: Any) -> Params:
    """`alpha` times the teacher's evenly spaced units, in the student's shapes.

    Raises:
      ValueError: if teacher and student do not have the same layers.
    """
    selected, _ = transforms.transfer(
        teacher, student, on_mismatch=transforms.select_uniform, check_finite=False
    )
    return transforms.scale(selected, alpha)


def times(weight: Scalar | Schedule, factor: Any) -> Scalar | Schedule:
    """A weight or schedule, multiplied."""
    if not callable(weight):
        return weight * factor
    schedule = weight
    return lambda step: schedule(step) * factor


def terms_of(method: Entry, setup: Setup) -> tuple[str, ...]:
    """Names of the method's terms, "task" among them."""
    return tuple(method.build(setup).weights)


def _asked(method: Entry, setup: Setup, point: Point) -> tuple[Options, Any]:
    terms = terms_of(method, setup)
    weights = {name: point[name] for name in terms if name in point}
    return Options(point.get("temperature"), weights), point.get("weight")


def _keys(seed: Array) -> _seeds.Keys:
    """As `_seeds.keys`, of one seed: the same start and order as in `kdtl distill`."""
    parts = jax.random.split(jax.random.key(seed), len(_seeds.Keys._fields))
    return _seeds.Keys(*(parts[i] for i in range(len(_seeds.Keys._fields))))
