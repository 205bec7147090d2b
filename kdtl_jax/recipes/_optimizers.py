"""Optimizers by name, learning-rate schedules, weight averages, and their settings."""

import functools
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
from kdtl_jax.train import TrainState, precision

# Default learning rates.
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
class OptimizerSettings:
    """The optimizer's settings, except batch size and learning rate."""

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
class TrainingSettings(OptimizerSettings):
    """The optimizer's settings."""

    batch_size: int | None = setting(
        None, "examples per step; default: 64, or fewer if that would give fewer than 5 steps per "
        "epoch", metavar="N", least=1, group="training",
    )  # fmt: skip
    learning_rate: float | None = positive_rate(
        None, "peak learning rate; default: 0.003, but sgd 0.05, lion 0.0003, muon 0.02, "
        "rmsprop 0.001, adafactor 0.01", group="training", short="--lr",
    )  # fmt: skip


@dataclass(frozen=True)
class SelectionSettings:
    """Which weights of a student are kept."""

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
    settings: OptimizerSettings,
    steps: int,
    *transforms: optax.GradientTransformation,
    rate: Any = None,
    weight_decay: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the settings; rate and weight decay may be traced.

    Args:
      settings: `optimizer`, `schedule`, `warmup`, `clip`, and `ema` and `precision` if the recipe
        has them; float16 gets loss scaling.
      steps: in the whole run.
      *transforms: applied to the updates after the optimizer, before averaging.
      rate: peak learning rate, if not the settings'.
      weight_decay: if not the settings'; decoupled in adamw, nadamw, lion, lamb and muon, elsewhere
        added to the gradient.
    """
    relative = schedule_shape(settings.schedule, settings.warmup, steps)
    peak = peak_rate(settings) if rate is None else rate

    def schedule(count: Any) -> Any:
        return peak * relative(count)

    weight_decay = settings.weight_decay if weight_decay is None else weight_decay
    tx = _base_optimizer(settings.optimizer, schedule, weight_decay)
    if settings.clip is not None:
        tx = optax.chain(optax.clip_by_global_norm(settings.clip), tx)
    if transforms:
        tx = optax.chain(tx, *transforms)
    if (decay := getattr(settings, "ema", None)) is not None:
        tx = keep_average(tx, decay)
    if getattr(settings, "precision", None) == "float16":
        tx = precision.loss_scaling(tx)
    return optax.with_extra_args_support(tx)


def default_rates(settings: OptimizerSettings) -> tuple[float, ...]:
    """The default learning rates to choose from: 1/3, 1 and 10/3 of the optimizer's default."""
    default = RATES[settings.optimizer]
    return tuple(round(default * factor, 9) for factor in (1 / 3, 1, 10 / 3))


def peak_rate(settings: OptimizerSettings) -> float:
    """The peak learning rate: that of the settings, or the optimizer's default."""
    return getattr(settings, "learning_rate", None) or RATES[settings.optimizer]


def rate_by_step(settings: TrainingSettings, steps: int) -> Callable[[int], float]:
    """The learning rate by step, for the log."""
    relative = schedule_shape(settings.schedule, settings.warmup, steps)
    peak = peak_rate(settings)
    return lambda step: round(peak * float(jnp.asarray(relative(step))), 12)


def schedule_shape(name: str, warmup: float, steps: int) -> optax.Schedule:
    """The learning rate relative to its peak, by step: linear warmup, then the named decay."""
    steps = max(steps, 1)
    warmup_steps = min(round(warmup * steps), steps - 1)
    decay_steps = steps - warmup_steps
    decays = {
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps),
        "linear": optax.linear_schedule(1.0, 0.0, decay_steps),
        "constant": optax.constant_schedule(1.0),
    }
    if not warmup_steps:
        return decays[name]
    # The first step is taken at 1 / warmup_steps of the peak, not at 0.
    warmup_ = optax.linear_schedule(1 / warmup_steps, 1.0, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup_, decays[name]], [warmup_steps])


def _base_optimizer(
    name: str, schedule: optax.Schedule, weight_decay: Any
) -> optax.GradientTransformation:
    decoupled = {
        "adamw": optax.adamw,
        "nadamw": optax.nadamw,
        "lion": optax.lion,
        "lamb": optax.lamb,
        "muon": optax.contrib.muon,
    }
    if name in decoupled:
        return decoupled[name](schedule, weight_decay=weight_decay)
    coupled = {
        "sgd": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        "adam": optax.adam,
        "rmsprop": optax.rmsprop,
        "adafactor": optax.adafactor,
    }
    tx = coupled[name](schedule)
    if isinstance(weight_decay, (int, float)) and not weight_decay:
        return tx
    return optax.chain(optax.add_decayed_weights(weight_decay), tx)


class Averaged(NamedTuple):
    """An optimizer's state and the average of the parameters."""

    inner: PyTree
    mean: PyTree
    steps: Array


def keep_average(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
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
        new_params = optax.apply_updates(params, updates)
        mean = jax.tree.map(
            lambda m, p: m + share.astype(m.dtype) * (p - m), state.mean, new_params
        )
        return updates, Averaged(new, mean, state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def with_averages(state: TrainState) -> TrainState:
    """The state with averaged parameters in place of the last ones, if there is an average."""
    states = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, Averaged))
    means = [x.mean for x in states if isinstance(x, Averaged)]
    if not means:
        return state
    glue = jax.tree.leaves(state.connectors)
    params, connectors = (means[0]["params"], means[0]["connectors"]) if glue else (means[0], None)
    return state._replace(
        params=trees.combine(params, state.params),  # frozen leaves have no average
        connectors=trees.combine(connectors, state.connectors) if glue else state.connectors,
    )
