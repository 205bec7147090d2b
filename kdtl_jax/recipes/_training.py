"""Training of students: many in one program, or all seeds of a method in a loop.

An `Experiment` is one student's training as pure functions of its *point* (seed, rates, weights)
and of the data shared by all points. `fit` runs an experiment from start to scores in one program,
which `train.sweep` maps over points, without a log or resuming. `_seeds.train_seeds` runs one point
per seed, logged, saved and resumable, on any mesh. Both shuffle by the seed's `Keys.order`.
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
from kdtl_jax.recipes._optimizers import with_averages
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import scores
from kdtl_jax.train import Batch, TrainState

Point = Mapping[str, Any]  # "seed", and any other settings of one student
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


def judge_classes(logits: Array, labels: Array) -> tuple[Array, Array]:
    """`scores.predicted` and `scores.accuracy` within a program: classes, and the accuracy."""
    classes = scores.predicted(logits)
    share = jnp.mean((classes == labels).astype(jnp.float32), axis=-1)
    return classes, jnp.where(jnp.any(classes == scores.WRONG, axis=-1), jnp.nan, share)


class Experiment(NamedTuple):
    """One student's training as pure functions; none of them is jitted."""

    start: Callable[[Point, Any], TrainState]
    step: Callable[[TrainState, Batch, Point, Any], tuple[TrainState, objective.Metrics]]
    logits: Callable[[TrainState, Array, Any], Array]  # of inputs [B, ...], in evaluation mode
    # The arrays [N, ...] that a point trains on, for `fit`.
    data: Callable[[Point, Any], Batch] = lambda point, shared: shared
    # (logits, targets) -> answers per example, and the score.
    judge: Callable[[Array, Array], tuple[Array, Array]] = judge_classes


class FitOptions(NamedTuple):
    """How long to train a point, and what to keep of its state."""

    epochs: int  # passes over the examples; a multiple of `checks`
    batch_size: int  # examples per step; at most all of them
    checks: int = 1  # number of validations
    keep: Callable[[TrainState], Any] = lambda state: None  # from the final state to the result
    steps: int | None = None  # stop each epoch after this many, for a measurement
    # Stop after this many checks in a row without a better validation score, and return the state
    # of the best check; None returns the final state.
    patience: int | None = None


class Fitted(NamedTuple):
    """The result of one point's training."""

    variables: Any  # `FitOptions.keep` of the state
    curve: Array  # [checks], validation scores during training
    validation: Array  # scores at the end
    test: Array
    answers: Array  # [test examples, ...], predicted classes, -1 where logits were not finite
    losses: Array  # [epochs], mean losses
    epoch: Array | None = None  # of the best check, if training can stop early


# From a seed to a student.


def keys(seed: Any) -> Keys:
    """The keys of one seed; its start and order are the same under every method."""
    return Keys(*jax.random.split(jax.random.key(jnp.asarray(seed, jnp.uint32)), len(Keys._fields)))


def points(seeds: int) -> dict[str, Array]:
    """One point per seed."""
    return {"seed": jnp.asarray(np.arange(seeds, dtype=np.int32))}


def views(chosen: tuple[str, ...], classes: int, side: int) -> Callable[[Array, Array, Any], Batch]:
    """`view(key, epoch, batch) -> batch` by names of augmentations; mixed labels as "targets"."""

    def view(key: Array, epoch: Array, batch: Batch) -> Batch:
        example_keys = augment.example_keys(key, epoch, batch["index"])
        out, x = dict(batch), batch["inputs"]
        real = batch["weights"] != 0 if "weights" in batch else None
        for i, (name, _, value) in enumerate(part.partition("=") for part in chosen):
            keys_ = jax.vmap(lambda k, at=i: jax.random.fold_in(k, at))(example_keys)
            if name == "crop":
                x = augment.crop(
                    keys_, x, padding=int(float(value)) if value else max(1, side // 8)
                )
            elif name == "flip":
                x = augment.flip(keys_, x)
            else:
                mix = augment.mixup if name == "mixup" else augment.cutmix
                targets = out.get("targets", jax.nn.one_hot(batch["labels"], classes))
                x, out["targets"] = mix(keys_[0], x, targets, alpha=float(value or 1), where=real)
        return {**out, "inputs": x}

    return view


def pick(tree: PyTree, index: Any) -> PyTree:
    """Indexes the leaves of a stacked tree; one program if they are on the device."""
    leaves = jax.tree.leaves(tree)
    traced = any(isinstance(leaf, Tracer) for leaf in [*leaves, index])
    if traced or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.tree.map(lambda leaf: leaf[index], tree)
    return _picked(tree, index)


@jax.jit
def _picked(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def in_chunks(fn: Callable[[Any], PyTree], inputs: PyTree, size: int) -> PyTree:
    """`fn` over arrays `[N, ...]`, at most `size` rows at a time; `[N, ...]` on the host.

    All calls have the same shape: the last one is padded with the last row.
    """
    count, parts = len(jax.tree.leaves(inputs)[0]), []
    size = min(size, 1 << (count - 1).bit_length())  # data of a similar size share a program
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        outputs = jax.device_get(fn(pick(inputs, rows)))
        parts.append(jax.tree.map(lambda x, n=count - start: x[:n], outputs))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def outputs(net: Network, variables: Variables, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a frozen network, `[N, ...]` on the host."""

    @jax.jit
    def teacher_outputs(variables: Variables, inputs: Any) -> dict[str, Any]:
        return dict(net.apply(variables.params, variables.model_state, inputs)[0])

    return in_chunks(lambda x: teacher_outputs(variables, x), inputs, 512)


def variables(state: TrainState) -> Variables:
    """The variables of a state."""
    return Variables(state.params, state.model_state)


def logits(net: Network, state: TrainState, inputs: Array) -> Array:
    """A network's logits in evaluation mode."""
    return net.apply(state.params, state.model_state, inputs)[0]["logits"]


# Many points in one program.


def fit(experiment: Experiment, options: FitOptions) -> Callable[..., Fitted]:
    """`run(point, shared, validation, test) -> Fitted`, one point from start to scores."""
    patience, every = options.patience, options.epochs // options.checks

    def run(point: Point, shared: Any, validation: Any, test: Any) -> Fitted:
        arrays, state = experiment.data(point, shared), experiment.start(point, shared)

        def train_on(state: TrainState, options: FitOptions) -> Any:
            return advance(experiment, state, point, shared, arrays, validation, options)

        epoch = None
        if patience is None:
            state, curve, losses = train_on(state, options)
            state, score = with_averages(state), curve[-1]
        else:
            one_check = partial(train_on, options=options._replace(epochs=every, checks=1))
            best, curve, losses = _until_stale(one_check, state, patience, options.checks)
            state, score, epoch = best[0], best[1], (best[2] + 1) * every
        logits = experiment.logits(state, test["inputs"], shared)
        answers, test_score = experiment.judge(logits, test["labels"])
        return Fitted(options.keep(state), curve, score, test_score, answers, losses, epoch)

    return run


def _until_stale(
    train_on: Callable[[TrainState], Any], state: TrainState, patience: int, checks: int
) -> tuple[Any, Array, Array]:
    """Early stopping: trains on, as points share a program, but no longer updates the best.

    Returns:
      The best state, its score and the number of its check; scores `[checks]`; losses `[epochs]`.
    """

    def check(carry: Any, number: Array) -> Any:
        state, best, stale = carry
        state, curve, losses = train_on(state)
        candidate = with_averages(state)._replace(opt_state=None), curve[-1], number
        running = stale < patience
        is_better = running & ((curve[-1] > best[1]) | ~jnp.isfinite(best[1]))
        best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), candidate, best)
        stale = jnp.where(running, jnp.where(is_better, 0, stale + 1), stale)
        return (state, best, stale), (jnp.where(running, curve[-1], best[1]), losses)

    first = with_averages(state)._replace(opt_state=None), jnp.float32(-jnp.inf), jnp.int32(0)
    numbers = jnp.arange(checks, dtype=jnp.int32)
    (_, best, _), (curve, losses) = jax.lax.scan(check, (state, first, jnp.int32(0)), numbers)
    return best, curve, losses.reshape(-1)


def advance(
    experiment: Experiment,
    state: TrainState,
    point: Point,
    shared: Any,
    arrays: Batch,
    validation: Any,
    options: FitOptions,
) -> tuple[TrainState, Array, Array]:
    """Trains one point for `options.epochs` more epochs.

    Returns:
      State, validation scores `[checks]`, losses `[epochs]`.
    """
    order, size = keys(point["seed"]).order, arrays["labels"].shape[0]
    batch_size = min(options.batch_size, size)

    def step(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        return experiment.step(state, batch, point, shared)

    epoch = train.scan_epoch(step)

    def one_epoch(state: TrainState, number: Array) -> tuple[TrainState, Array]:
        index = train.epoch_index(order, number, size, batch_size)[: options.steps]
        state, metrics = epoch(state, arrays, index)
        return state, jnp.mean(metrics["loss"].value())

    def between_checks(state: TrainState, numbers: Array) -> tuple[TrainState, Any]:
        state, losses = jax.lax.scan(one_epoch, state, numbers)
        logits = experiment.logits(with_averages(state), validation["inputs"], shared)
        return state, (experiment.judge(logits, validation["labels"])[1], losses)

    first = state.step // (size // batch_size)
    numbers = first + jnp.arange(options.epochs, dtype=jnp.int32).reshape(options.checks, -1)
    state, (curve, losses) = jax.lax.scan(between_checks, state, numbers)
    return state, curve, losses.reshape(-1)


def fit_one_by_one(experiment: Experiment, options: FitOptions) -> Callable[..., Fitted]:
    """`run(points, shared, validation, test) -> Fitted`, as `fit`, one point after another.

    Each epoch is `train.jit_epoch`'s: one call per step if convolutions would lose their threads in
    a loop. A point that stops early trains no further; its curve repeats the best score.
    """
    epochs, patience = options.epochs, options.patience
    every = epochs // options.checks

    def step(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        return experiment.step(state, batch, *teacher_params)

    epoch, start = train.jit_epoch(step), jax.jit(experiment.start)

    @jax.jit
    def judge(state: TrainState, part: Any, shared: Any) -> tuple[Any, Any]:
        return experiment.judge(experiment.logits(state, part["inputs"], shared), part["labels"])

    @partial(jax.jit, static_argnums=2)
    def rows_of(seed: Array, epoch: Any, size: int) -> Array:
        order = keys(seed).order
        return train.epoch_index(order, epoch, size, min(options.batch_size, size))[: options.steps]

    @jax.jit
    def mean_loss(metrics: train.Metrics) -> Array:
        return jnp.mean(metrics["loss"].value())

    def fit_one(point: Point, shared: Any, validation: Any, test: Any) -> Fitted:
        arrays, state = experiment.data(point, shared), start(point, shared)
        size = arrays["labels"].shape[0]
        losses, curve, stale = [], [], 0
        best, score, best_epoch = state, jnp.float32(-jnp.inf), 0
        for number in range(epochs):
            index = rows_of(point["seed"], number, size)
            state, metrics = epoch(state, arrays, index, (point, shared))
            losses.append(mean_loss(metrics))
            if (number + 1) % every:
                continue
            averaged = with_averages(state)._replace(opt_state=None)
            curve.append(judge(averaged, validation, shared)[1])
            if patience is None or curve[-1] > score or not jnp.isfinite(score):
                # The next epoch reuses the state's memory.
                best = averaged if patience is None else jax.tree.map(lambda x: x.copy(), averaged)
                score, best_epoch, stale = curve[-1], number + 1, 0
            else:
                stale += 1
            if stale == patience:
                break
        losses += losses[-1:] * (epochs - len(losses))
        curve += [score] * (options.checks - len(curve))
        answers, test_score = judge(best, test, shared)
        epoch_kept = None if patience is None else jnp.int32(best_epoch)
        curve, losses = jnp.stack(curve), jnp.stack(losses)
        return Fitted(options.keep(best), curve, score, test_score, answers, losses, epoch_kept)

    def run(points: Point, *shared: Any) -> Fitted:
        fits = [fit_one(pick(dict(points), i), *shared) for i in range(len(points["seed"]))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)

    return run


def even_checks(epochs: int) -> int:
    """The largest number of evenly spaced validations, at most `CHECKS`."""
    return next(n for n in range(min(CHECKS, epochs), 0, -1) if not epochs % n)


def default_batch(examples: int, divisor: int = 1) -> int:
    """64, or fewer if an epoch would otherwise have fewer than five steps.

    A multiple of `divisor`: devices times microbatches.
    """
    largest = min(BATCH, examples // FEWEST_BATCHES)
    return max(divisor, largest // divisor * divisor)


def check_batch(batch_size: int, size: int, microbatches: int = 1, devices: int = 1) -> None:
    """Raises ValueError if the batch exceeds the data, UsageError if it is not divisible."""
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


def warmup_adamw(rate: float, steps: int, warmup: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients; the rate warms up over `warmup` steps, then decays to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
