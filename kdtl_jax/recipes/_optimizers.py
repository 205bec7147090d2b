"""How students are trained: the settings, optimizers by name, schedules, averages of weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import PyTree
from kdtl_jax.recipes.settings import positive_rate, setting
from kdtl_jax.train import TrainState

# Learning rates if none is given.
RATES = {
    "sgd": 0.05,
    "adam": 3e-3,
    "adamw": 3e-3,
    "nadamw": 3e-3,
    "lion": 3e-4,
    "lamb": 3e-3,
    "muon": 0.02,
    "rmsprop": 1e-3,
    "adafactor": 1e-2,
}


@dataclass(frozen=True)
class Optimizing:
    """How weights are trained, apart from the batches and the learning rate."""

    optimizer: Literal[
        "sgd", "adam", "adamw", "nadamw", "lion", "lamb", "muon", "rmsprop", "adafactor"
    ] = setting("adam", "optimizer", group="training")
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "how the learning rate decays to 0; constant: not at all", group="training"
    )
    warmup: float = setting(
        0.0, "share of the steps that first raise the learning rate from 0", metavar="SHARE",
        least=0, below=1, group="training",
    )  # fmt: skip
    clip: float | None = positive_rate(
        None, "scale down gradients whose norm exceeds this", group="training"
    )
    class_weights: Literal["none", "balanced"] = setting(
        "none", "balanced: all classes count equally in the cross-entropy, however rare",
        group="training",
    )  # fmt: skip
    label_smoothing: float = setting(
        0.0, "weight of the uniform distribution in the cross-entropy's labels",
        metavar="SHARE", least=0, below=1, group="training",
    )  # fmt: skip
    weight_decay: float = setting(
        0.0, "weight decay", metavar="X", least=0, most=1e30, group="training"
    )


@dataclass(frozen=True)
class Training(Optimizing):
    """How a student is trained."""

    batch_size: int | None = setting(
        None, "examples per step; default: 64, or fewer if that would give fewer than 5 steps per "
        "epoch", metavar="N", least=1, group="training",
    )  # fmt: skip
    learning_rate: float | None = positive_rate(
        None, "peak learning rate; default: 0.003, but sgd 0.05, lion 0.0003, muon 0.02, "
        "rmsprop 0.001, adafactor 0.01", group="training", short="--lr",
    )  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Which weights a student keeps."""

    ema: float | None = setting(
        None, "keep an average of the weights with this decay, as in 0.999, for validation, test "
        "and files; default: the last weights", metavar="DECAY", above=0, below=1,
        group="training",
    )  # fmt: skip
    early_stopping: int | None = setting(
        None, "stop after this many epochs without a better validation score (in kdtl distill, "
        "the mean over seeds) and keep the best epoch's weights", metavar="PATIENCE", least=1,
        group="training",
    )  # fmt: skip


def optimizer(
    settings: Optimizing,
    rate: Any,
    weight_decay: Any,
    steps: int,
    *then: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the settings; rate and weight decay may be traced.

    Args:
      settings: `optimizer`, `schedule`, `warmup`, `clip`, and `ema` if the recipe has it.
      rate: peak learning rate.
      weight_decay: decoupled in adamw, nadamw, lion, lamb and muon; elsewhere added to the
        gradient.
      steps: in the whole run.
      *then: transformations of the updates afterwards, before they enter an average.
    """
    of_step = shape(settings.schedule, settings.warmup, steps)

    def schedule(count: Any) -> Any:
        return rate * of_step(count)

    made = _named(settings.optimizer, schedule, weight_decay)
    if settings.clip is not None:
        made = optax.chain(optax.clip_by_global_norm(settings.clip), made)
    if then:
        made = optax.chain(made, *then)
    decay = getattr(settings, "ema", None)
    return optax.with_extra_args_support(made if decay is None else averaged(made, decay))


def to_try(settings: Optimizing) -> tuple[float, ...]:
    """Learning rates to choose from by default: the usual one, a third of it and 10/3 of it."""
    usual = RATES[settings.optimizer]
    return tuple(round(usual * factor, 9) for factor in (1 / 3, 1, 10 / 3))


def peak_rate(settings: Training) -> float:
    """The largest learning rate: the one given, or the usual one of the optimizer."""
    return settings.learning_rate or RATES[settings.optimizer]


def rates(settings: Training, steps: int) -> Callable[[int], float]:
    """The learning rate by step, for the log."""
    of_step = shape(settings.schedule, settings.warmup, steps)
    largest = peak_rate(settings)
    return lambda step: round(largest * float(jnp.asarray(of_step(step))), 12)


def shape(name: str, warmup: float, steps: int) -> optax.Schedule:
    """The learning rate relative to its peak, by step: linear warmup, then as named."""
    steps = max(steps, 1)
    rising = min(round(warmup * steps), steps - 1)
    rest = steps - rising
    falls = {
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "constant": optax.constant_schedule(1.0),
    }
    if not rising:
        return falls[name]
    # The first step counts: 1 / rising, not 0.
    rise = optax.linear_schedule(1 / rising, 1.0, max(rising - 1, 1))
    return optax.join_schedules([rise, falls[name]], [rising])


def _named(name: str, schedule: optax.Schedule, weight_decay: Any) -> optax.GradientTransformation:
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=weight_decay)
    if name == "nadamw":
        return optax.nadamw(schedule, weight_decay=weight_decay)
    if name == "lion":
        return optax.lion(schedule, weight_decay=weight_decay)
    if name == "lamb":
        return optax.lamb(schedule, weight_decay=weight_decay)
    if name == "muon":
        return optax.contrib.muon(schedule, weight_decay=weight_decay)
    inner = {
        "adam": lambda: optax.adam(schedule),
        "sgd": lambda: optax.sgd(schedule, momentum=0.9, nesterov=True),
        "rmsprop": lambda: optax.rmsprop(schedule),
        "adafactor": lambda: optax.adafactor(schedule),
    }[name]()
    if isinstance(weight_decay, (int, float)) and not weight_decay:
        return inner
    return optax.chain(optax.add_decayed_weights(weight_decay), inner)


class Averaged(NamedTuple):
    """An optimizer's state, and the average of the parameters."""

    inner: PyTree
    mean: PyTree
    steps: Array


def averaged(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters beside an optimizer.

    `mean <- d mean + (1 - d) params` after every step, `d = min(decay, (1 + n) / (10 + n))` at step
    n, so that the start is soon forgotten.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Averaged:
        return Averaged(inner.init(params), params, jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, new = inner.update(updates, state.inner, params, **extra)
        n = state.steps.astype(jnp.float32)
        share = 1 - jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))
        after = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, p: m + share.astype(m.dtype) * (p - m), state.mean, after)
        return updates, Averaged(new, mean, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def used(state: TrainState) -> TrainState:
    """The state with the averaged parameters in place of the last ones, if an average is kept."""
    held = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, Averaged))
    means = [x.mean for x in held if isinstance(x, Averaged)]
    if not means:
        return state
    glue = jax.tree.leaves(state.connectors)
    params, connectors = (means[0]["params"], means[0]["connectors"]) if glue else (means[0], None)
    return state._replace(
        params=trees.combine(params, state.params),  # what is not trained stays
        connectors=trees.combine(connectors, state.connectors) if glue else state.connectors,
    )
