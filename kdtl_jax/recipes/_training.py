"""Training of students, for every recipe: many in one program, or all seeds of a method in a loop.

An `Experiment` is one student's training as pure functions of a *point*, which distinguishes it
from the others (its seed, rates, weights), and of what they all share. `fit` runs an experiment
from start to scores in one program, which `train.sweep` maps over points, without a log or
resuming. `_seeds.train_seeds` runs one point per seed, logged, saved and resumable, on any mesh.
Both shuffle alike: a seed's batches are those of its `Keys.order`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from kdtl_jax import augment, objective, train
from kdtl_jax._types import PyTree, Variables
from kdtl_jax.interop.networks import Network
from kdtl_jax.recipes._optimizers import used
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import scores
from kdtl_jax.train import Batch, TrainState

Point = Mapping[str, Any]  # "seed", and whatever else distinguishes a student
CHECKS = 10  # validations during training
BATCH, FEWEST_BATCHES = 64, 5  # examples per step, steps per epoch, by default


class Keys(NamedTuple):
    """The independent sources of randomness in a student's training."""

    model: Array
    order: Array
    steps: Array
    connectors: Array
    memory: Array
    views: Array


def judged(logits: Array, labels: Array) -> tuple[Array, Array]:
    """`scores.predicted` and `scores.accuracy` within a program: classes, and the accuracy."""
    named = scores.predicted(logits)
    share = jnp.mean((named == labels).astype(jnp.float32), axis=-1)
    return named, jnp.where(jnp.any(named == scores.WRONG, axis=-1), jnp.nan, share)


class Experiment(NamedTuple):
    """One student's training as pure functions; none of them is jitted."""

    start: Callable[[Point, Any], TrainState]
    step: Callable[[TrainState, Batch, Point, Any], tuple[TrainState, objective.Metrics]]
    logits: Callable[[TrainState, Array, Any], Array]  # of inputs [B, ...], in evaluation mode
    # The arrays [N, ...] that a point trains on, for `fit`.
    data: Callable[[Point, Any], Batch] = lambda point, shared: shared
    # (logits, targets) -> what is kept for every example, and the score.
    judged: Callable[[Array, Array], tuple[Array, Array]] = judged


class Fitting(NamedTuple):
    """How long a point is trained, and what is kept of it."""

    epochs: int  # passes over its examples; a multiple of `checks`
    batch_size: int  # examples per step; at most all of them
    checks: int = 1  # how often the validation score is recorded
    keep: Callable[[TrainState], Any] = lambda state: None  # what of the final state is returned
    steps: int | None = None  # stop each epoch after this many, for a measurement
    # Stop after this many checks in a row without a better validation score, and return the state
    # of the best check; None returns the final state.
    patience: int | None = None


class Fitted(NamedTuple):
    """The result of one point's training."""

    kept: Any  # what the recipe keeps of the state
    curve: Array  # [checks], validation scores during training
    validation: Array  # scores at the end
    test: Array
    named: Array  # [test examples, ...], predicted classes, -1 where logits were not finite
    losses: Array  # [epochs], their means
    epoch: Array | None = None  # of what is kept, if training can stop early


# From a seed to a student.


def keys(seed: Any) -> Keys:
    """The keys of one seed, whose start and order are the same under every method."""
    return Keys(*jax.random.split(jax.random.key(jnp.asarray(seed, jnp.uint32)), len(Keys._fields)))


def points(seeds: int) -> dict[str, Array]:
    """One point per seed."""
    return {"seed": jnp.asarray(np.arange(seeds, dtype=np.int32))}


def views(chosen: tuple[str, ...], classes: int, side: int) -> Callable[[Array, Array, Any], Batch]:
    """`view(key, epoch, batch) -> batch` by names of augmentations; mixed labels as "targets"."""

    def view(key: Array, epoch: Array, batch: Batch) -> Batch:
        of_examples = augment.example_keys(key, epoch, batch["index"])
        out, x = dict(batch), batch["inputs"]
        real = batch["weights"] != 0 if "weights" in batch else None
        for place, (name, _, value) in enumerate(part.partition("=") for part in chosen):
            own = jax.vmap(lambda k, at=place: jax.random.fold_in(k, at))(of_examples)
            if name == "crop":
                x = augment.crop(own, x, padding=int(float(value)) if value else max(1, side // 8))
            elif name == "flip":
                x = augment.flip(own, x)
            else:
                mix = augment.mixup if name == "mixup" else augment.cutmix
                targets = out.get("targets", jax.nn.one_hot(batch["labels"], classes))
                x, out["targets"] = mix(own[0], x, targets, alpha=float(value or 1), where=real)
        return {**out, "inputs": x}

    return view


def pick(tree: PyTree, at: Any) -> PyTree:
    """One or more parts of a stacked tree; one program if it is on the device."""
    leaves = jax.tree.leaves(tree)
    traced = any(isinstance(leaf, Tracer) for leaf in [*leaves, at])
    if traced or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.tree.map(lambda leaf: leaf[at], tree)
    return _picked(tree, at)


@jax.jit
def _picked(tree: PyTree, at: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[at], tree)


def in_chunks(fn: Callable[[Any], PyTree], inputs: PyTree, size: int) -> PyTree:
    """`fn` over arrays `[N, ...]` on the host, as many rows at a time: `[N, ...]` on the host.

    All calls have one shape: the last is padded with the last row.
    """
    count, parts = len(jax.tree.leaves(inputs)[0]), []
    size = min(size, 1 << (count - 1).bit_length())  # data of a similar size share a program
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        found = jax.device_get(fn(pick(inputs, rows)))
        parts.append(jax.tree.map(lambda x, n=count - start: x[:n], found))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def outputs(net: Network, variables: Variables, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a frozen network, `[N, ...]` on the host."""

    @jax.jit
    def teacher_outputs(variables: Variables, inputs: Any) -> dict[str, Any]:
        return dict(net.apply(variables.params, variables.model_state, inputs)[0])

    return in_chunks(lambda x: teacher_outputs(variables, x), inputs, 512)


def variables(state: TrainState) -> Variables:
    """What is kept for a plain student."""
    return Variables(state.params, state.model_state)


# Many points in one program.


def fit(experiment: Experiment, how: Fitting) -> Callable[..., Fitted]:
    """`run(point, shared, validation, test) -> Fitted`, one point from start to scores."""
    patience, every = how.patience, how.epochs // how.checks

    def run(point: Point, shared: Any, validation: Any, test: Any) -> Fitted:
        arrays, state = experiment.data(point, shared), experiment.start(point, shared)
        if patience is not None:
            return run_until(arrays, state, point, shared, validation, test)
        state, curve, losses = advance(experiment, state, point, shared, arrays, validation, how)
        return ended(used(state), curve, curve[-1], losses, shared, test)

    def ended(
        state: TrainState, curve: Array, score: Array, losses: Array, shared: Any, test: Any
    ) -> Fitted:
        logits = experiment.logits(state, test["inputs"], shared)
        named, on_test = experiment.judged(logits, test["labels"])
        return Fitted(how.keep(state), curve, score, on_test, named, losses)

    def run_until(
        arrays: Batch, state: TrainState, point: Point, shared: Any, validation: Any, test: Any
    ) -> Fitted:
        """Continues after the end, as points share a program, but no longer replaces the best."""
        one_check = how._replace(epochs=every, checks=1)

        def check(carry: Any, number: Array) -> Any:
            state, best, waited = carry
            state, curve, losses = advance(
                experiment, state, point, shared, arrays, validation, one_check
            )
            found = used(state)._replace(opt_state=None), curve[-1], number
            running = waited < patience
            better = running & ((curve[-1] > best[1]) | ~jnp.isfinite(best[1]))
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)
            waited = jnp.where(running, jnp.where(better, 0, waited + 1), waited)
            return (state, best, waited), (jnp.where(running, curve[-1], best[1]), losses)

        first = used(state)._replace(opt_state=None), jnp.float32(-jnp.inf), jnp.int32(0)
        carry = state, first, jnp.int32(0)
        numbers = jnp.arange(how.checks, dtype=jnp.int32)
        (_, best, _), (curve, losses) = jax.lax.scan(check, carry, numbers)
        found = ended(best[0], curve, best[1], losses.reshape(-1), shared, test)
        return found._replace(epoch=(best[2] + 1) * every)

    return run


def advance(
    experiment: Experiment,
    state: TrainState,
    point: Point,
    shared: Any,
    arrays: Batch,
    validation: Any,
    how: Fitting,
) -> tuple[TrainState, Array, Array]:
    """`how.epochs` more epochs of one point: state, accuracies `[checks]`, losses `[epochs]`."""
    order, size = keys(point["seed"]).order, arrays["labels"].shape[0]
    batch_size = min(how.batch_size, size)

    def step(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        return experiment.step(state, batch, point, shared)

    epoch = train.scan_epoch(step)

    def one_epoch(state: TrainState, number: Array) -> tuple[TrainState, Array]:
        index = train.epoch_index(order, number, size, batch_size)[: how.steps]
        state, metrics = epoch(state, arrays, index)
        return state, jnp.mean(metrics["loss"].value())

    def between_checks(state: TrainState, numbers: Array) -> tuple[TrainState, Any]:
        state, losses = jax.lax.scan(one_epoch, state, numbers)
        logits = experiment.logits(used(state), validation["inputs"], shared)
        return state, (experiment.judged(logits, validation["labels"])[1], losses)

    first = state.step // (size // batch_size)
    numbers = first + jnp.arange(how.epochs, dtype=jnp.int32).reshape(how.checks, -1)
    state, (curve, losses) = jax.lax.scan(between_checks, state, numbers)
    return state, curve, losses.reshape(-1)


def one_by_one(experiment: Experiment, how: Fitting) -> Callable[..., Fitted]:
    """`run(points, shared, validation, test) -> Fitted` as `fit`, one point after another.

    Each epoch is `train.jit_epoch`'s: a call per step if convolutions would lose their threads in
    a loop. A point that stops early trains no further; its curve repeats the best score.
    """
    epochs, patience = how.epochs, how.patience
    every = epochs // how.checks

    def step(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        return experiment.step(state, batch, *teacher_params)

    epoch, start = train.jit_epoch(step), jax.jit(experiment.start)

    @jax.jit
    def judge(state: TrainState, part: Any, shared: Any) -> tuple[Any, Any]:
        return experiment.judged(experiment.logits(state, part["inputs"], shared), part["labels"])

    @partial(jax.jit, static_argnums=2)
    def rows_of(seed: Array, epoch: Any, size: int) -> Array:
        order = keys(seed).order
        return train.epoch_index(order, epoch, size, min(how.batch_size, size))[: how.steps]

    @jax.jit
    def mean_loss(metrics: train.Metrics) -> Array:
        return jnp.mean(metrics["loss"].value())

    def of_one(point: Point, shared: Any, validation: Any, test: Any) -> Fitted:
        arrays, state = experiment.data(point, shared), start(point, shared)
        size = arrays["labels"].shape[0]
        losses, curve, waited = [], [], 0
        best, score, at = state, jnp.float32(-jnp.inf), 0
        for number in range(epochs):
            index = rows_of(point["seed"], number, size)
            state, metrics = epoch(state, arrays, index, (point, shared))
            losses.append(mean_loss(metrics))
            if (number + 1) % every:
                continue
            now = used(state)._replace(opt_state=None)
            curve.append(judge(now, validation, shared)[1])
            if patience is None or curve[-1] > score or not jnp.isfinite(score):
                # The next epoch reuses the state's memory.
                best = now if patience is None else jax.tree.map(lambda x: x.copy(), now)
                score, at, waited = curve[-1], number + 1, 0
            else:
                waited += 1
            if waited == patience:
                break
        losses += losses[-1:] * (epochs - len(losses))
        curve += [score] * (how.checks - len(curve))
        named, on_test = judge(best, test, shared)
        epoch_kept = None if patience is None else jnp.int32(at)
        return Fitted(
            how.keep(best), jnp.stack(curve), score, on_test, named, jnp.stack(losses), epoch_kept
        )

    def run(points: Point, *shared: Any) -> Fitted:
        found = [of_one(pick(dict(points), i), *shared) for i in range(len(points["seed"]))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return run


def even_checks(epochs: int) -> int:
    """The largest number of evenly spaced validations, at most `CHECKS`."""
    return next(n for n in range(min(CHECKS, epochs), 0, -1) if not epochs % n)


def usual_batch(examples: int, divisor: int = 1) -> int:
    """64, or fewer if an epoch would otherwise have fewer than five steps.

    Args:
      examples: that a student sees.
      divisor: of the result: devices times microbatches.
    """
    most = min(BATCH, examples // FEWEST_BATCHES)
    return max(divisor, most // divisor * divisor)


def check_batch(batch_size: int, size: int, microbatches: int = 1, devices: int = 1) -> None:
    """Raises ValueError if no batch of that size is possible, UsageError if it is not divisible."""
    if batch_size > size:
        raise ValueError(
            f"a batch of {batch_size} is larger than the {size} training examples. Choose a "
            "smaller --batch-size."
        )
    if batch_size % (microbatches * devices):
        raise UsageError(
            f"a batch of {batch_size} does not divide into {microbatches} microbatches on "
            f"{devices} devices. Choose a multiple of {microbatches * devices}."
        )


def warmed_up(rate: float, steps: int, warmup: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients; its rate rises over `warmup` steps, then decays to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
