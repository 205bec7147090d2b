"""Two shapes that most methods have: a loss of logits, and a loss summed over pairs of layers."""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from kdtl_jax._types import Params, Scalar, Schedule
from kdtl_jax.connectors import Connector
from kdtl_jax.methods import _views
from kdtl_jax.methods._method import TASK, Built, Options, Setup, Weight, no_connectors, no_memory
from kdtl_jax.objective import Inputs

Build = Callable[[Setup, Options], Built]
# (student logits, teacher logits, labels, temperature) -> [B]
LogitLoss = Callable[[Array, Array, Array, Scalar], Array]
PairLoss = Callable[[Array, Array], Array]
Layers = Callable[[Setup], _views.Pairs]


def logits_of(inputs: Inputs) -> tuple[Array, Array, Array]:
    """Student's and teacher's logits, and the labels."""
    return inputs.student["logits"], inputs.teacher["logits"], inputs.batch["labels"]


def clock(inputs: Inputs) -> tuple[Array, Array]:
    """The step's random key and its number, which every step of `train` hands to its terms."""
    assert inputs.key is not None and inputs.step is not None
    return inputs.key, inputs.step


def chosen(options: Options, default: float) -> float:
    """The user's temperature, or the method's."""
    return default if options.temperature is None else options.temperature


def of_logits(
    term: str,
    loss: LogitLoss,
    *,
    temperature: float = 1.0,
    task: Weight = 1.0,
    weight: Weight = 1.0,
) -> Build:
    """One term of the outputs and the labels, nothing to train beside the student."""

    def build(setup: Setup, options: Options) -> Built:
        at = chosen(options, temperature)

        def terms(inputs: Inputs) -> dict[str, Array]:
            return {term: loss(*logits_of(inputs), at)}

        return Built(terms, {TASK: task, term: weight}, no_connectors, no_memory)

    return build


def over_pairs(
    term: str,
    loss: PairLoss,
    weights: Callable[[Setup], Mapping[str, Weight]],
    *,
    pairs: Layers = _views.every_pair,
    view: _views.View = _views.matched,
    connector: Callable[[int], Connector] | None = None,
    layer_weight: Callable[[int, int], float] = lambda layer, count: 1.0,
) -> Build:
    """`sum over pairs of loss(connector(f_S), f_T)`, as one term.

    Args:
      term: its name.
      loss: of the features of one pair.
      weights: of the term and the task, which may depend on the number of steps.
      pairs: the layers that take part.
      view: brings two features to shapes that correspond, before the connector.
      connector: from the teacher's number of channels; None compares features as they are.
      layer_weight: of layer i of n.
    """

    def build(setup: Setup, options: Options) -> Built:
        layers = pairs(setup)
        sides = _views.shapes(view, layers, setup)
        glue = None if connector is None else [connector(t.shape[-1]) for _, t in sides]

        def init(key: Array) -> Params:
            return _views.init_each(glue or (), [s for s, _ in sides][: len(glue or ())], key)

        def terms(inputs: Inputs) -> dict[str, Array]:
            features = _views.viewed(view, layers, inputs.student, inputs.teacher)
            if glue is not None:
                features = connected(glue, inputs.connectors, features)
            return {term: summed(loss, features, layer_weight)}

        return Built(terms, weights(setup), init, no_memory)

    return build


def connected(
    glue: Sequence[Connector], params: Params, features: Sequence[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    """The students' features through their connectors, the teachers' as they are."""
    return [
        (connector.apply(params[f"pair_{i}"], student), teacher)
        for i, (connector, (student, teacher)) in enumerate(zip(glue, features, strict=True))
    ]


def summed(
    loss: PairLoss,
    features: Sequence[tuple[Array, Array]],
    layer_weight: Callable[[int, int], float] = lambda layer, count: 1.0,
) -> Array:
    """`sum_i w_i loss(student_i, teacher_i)`, `[B]`."""
    values = [
        layer_weight(i, len(features)) * loss(student, teacher)
        for i, (student, teacher) in enumerate(features)
    ]
    return sum(values[1:], values[0])


def constant(weights: Mapping[str, Weight]) -> Callable[[Setup], Mapping[str, Weight]]:
    """The same weights for every run; "task" is 1 unless given."""
    return lambda setup: {TASK: 1.0, **weights}


def warmed_up(weight: float, steps: int, *, share: float = 20 / 240) -> Schedule:
    """0 to `weight` linearly over the first share of the run: 20 of 240 epochs in mdistiller."""
    return lambda step: weight * _done(step, 0, share * steps)


def let_go(weight: float, steps: int, *, hold: float = 150 / 240) -> Schedule:
    """`weight`, and after the share `hold` of the run down to 0 along a half cosine."""
    return lambda step: weight * 0.5 * (1 + jnp.cos(jnp.pi * _done(step, hold * steps, steps)))


def two_stages(
    first: str, weight: float, steps: int, *, share: float = 30 / 270
) -> dict[str, Weight]:
    """Weights of a term that is trained alone at first, and of the task that follows it.

    RepDistiller's two-stage methods train 30 epochs on features, then 240 on the labels.
    """
    end = max(round(share * steps), 1)
    return {
        first: lambda step: jnp.where(step < end, jnp.float32(weight), jnp.float32(0)),
        TASK: lambda step: jnp.where(step < end, jnp.float32(0), jnp.float32(1)),
    }


def _done(step: Array, start: float, stop: float) -> Array:
    """The share of the way from `start` to `stop` that is behind, in [0, 1]."""
    return jnp.clip((jnp.asarray(step).astype(jnp.float32) - start) / max(stop - start, 1), 0, 1)
