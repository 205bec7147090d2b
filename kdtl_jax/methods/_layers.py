"""Matched layers, and the views that bring their features to corresponding shapes.

A vector `[B, C]` is a map of one position. Anything that normalizes or compares *over* positions
would be constant on it, so methods that do so require more than one position.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors
from kdtl_jax._types import Outputs, Params
from kdtl_jax.connectors import Connector
from kdtl_jax.methods._method import Method, Weight, method
from kdtl_jax.methods._setup import Pair, Setup, check_setup
from kdtl_jax.objective import Inputs

View = Callable[[Array, Array], tuple[Array, Array]]
Features = list[tuple[Array, Array]]  # of the student and the teacher, layer by layer
# (student features, teacher features, *, where=real examples or None for all) -> [B]
PairLoss = Callable[..., Array]


class Layers(NamedTuple):
    """Matched layers under one view."""

    read: Callable[[Outputs, Outputs], Features]  # of the student's and the teacher's outputs
    student: list[jax.ShapeDtypeStruct]  # the student's part of what `read` returns
    teacher: list[jax.ShapeDtypeStruct]


def as_map(x: Array) -> Array:
    """`[B, C]` as `[B, 1, 1, C]`, tokens `[B, L, C]` as `[B, 1, L, C]`, maps unchanged."""
    middle = {2: (1, 1), 3: (1, x.shape[1])}.get(x.ndim, x.shape[1:-1])
    return x.reshape(x.shape[0], *middle, x.shape[-1])


def as_vector(x: Array) -> Array:
    """`[B, ..., C]` averaged over positions."""
    return jnp.mean(x.reshape(x.shape[0], -1, x.shape[-1]), axis=1)


def unchanged(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Returns both unchanged, for losses that flatten each side."""
    return student, teacher


def same_positions(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Averages the larger map over adaptive cells.

    Features of different kinds (a map and a vector) are averaged over all positions.
    """
    if student.ndim != teacher.ndim:
        return as_vector(student), as_vector(teacher)
    if student.ndim == 4:
        size = [min(*sides) for sides in zip(student.shape[1:3], teacher.shape[1:3], strict=True)]
        pool = connectors.pool(size)
        return pool.apply({}, student), pool.apply({}, teacher)
    return student, teacher


def maps(student: Array, teacher: Array) -> tuple[Array, Array]:
    """`same_positions`, both as maps `[B, h, w, C]`."""
    student, teacher = same_positions(student, teacher)
    return as_map(student), as_map(teacher)


def first_tokens(student: Array, teacher: Array) -> tuple[Array, Array]:
    """The first of the tokens `[B, L, D]`."""
    return student[:, 0], teacher[:, 0]


def every(setup: Setup, *, at_least: int = 1) -> Sequence[Pair]:
    """All matched layers; ValueError if there are fewer than `at_least`."""
    check_setup(setup)
    if len(setup.pairs) < at_least:
        message = f"needs {at_least} matched layers, but this pair of models has {len(setup.pairs)}"
        models = {"student": setup.student, "teacher": setup.teacher}
        if bare := [name for name, outputs in models.items() if {*outputs} <= {"logits"}]:
            message += (
                f" (the {' and the '.join(bare)} "
                f"{'returns' if len(bare) == 1 else 'return'} "
                "logits alone: let it return features too, in a dict or a tuple)"
            )
        raise ValueError(message)
    return setup.pairs


def deepest(setup: Setup) -> Sequence[Pair]:
    """The last matched layer: the last feature map, or the last hidden vector."""
    return every(setup)[-1:]


def middle(setup: Setup) -> Sequence[Pair]:
    """The matched layer halfway through the network, which FitNets uses for its hint."""
    return every(setup)[len(setup.pairs) // 2 :][:1]


def layers(setup: Setup, pairs: Sequence[Pair], view: View = same_positions) -> Layers:
    """The features of pairs of layers under a view."""
    for student_tap, teacher_tap in pairs:
        student, teacher = setup.student[student_tap].shape, setup.teacher[teacher_tap].shape
        if len(student) == len(teacher) == 3 and student[1] != teacher[1]:
            raise ValueError(
                f"needs equally many tokens on both sides, but {student_tap!r} has {student[1]} "
                f"and {teacher_tap!r} {teacher[1]}"
            )

    def read(student: Outputs, teacher: Outputs) -> Features:
        return [
            view(student[student_tap], teacher[teacher_tap]) for student_tap, teacher_tap in pairs
        ]

    shapes = jax.eval_shape(read, dict(setup.student), dict(setup.teacher))
    return Layers(read, [s for s, _ in shapes], [t for _, t in shapes])


def layers_of_maps(setup: Setup, pairs: Sequence[Pair], *, because: str) -> Layers:
    """`layers` as maps with more than one position; `because` tells why more are needed."""
    matched = layers(setup, pairs, maps)
    if any(x.shape[1] * x.shape[2] < 2 for x in matched.student):
        raise ValueError(f"needs feature maps with positions: {because}")
    return matched


def pairwise(
    setup: Setup,
    term: str,
    loss: PairLoss,
    layers: Layers,
    weights: Mapping[str, Weight],
    *,
    connector: Callable[[int], Connector] | None = None,
    layer_weights: Sequence[float] | None = None,
) -> Method:
    """The method `sum_i w_i loss(connector_i(f_S), f_T)` over layers, as one term.

    Args:
      setup: the pair of models.
      term: its name.
      loss: of the features of one pair, `[B]`; `by_example` makes one from a loss that needs no
        mask.
      layers: the layers.
      weights: of the task and the term.
      connector: made from the teacher's number of channels; None compares the features directly.
      layer_weights: w; 1 each by default.
    """
    glue = [] if connector is None else [connector(x.shape[-1]) for x in layers.teacher]

    def terms(inputs: Inputs) -> dict[str, Array]:
        where, features = inputs.real, layers.read(inputs.student, inputs.teacher)
        if glue:
            features = connect(glue, inputs.connectors, features, where)
        return {term: total(loss, features, where, layer_weights)}

    def init(key: Array) -> Params:
        return init_each(glue, layers.student, key) if glue else {}

    return method(setup, terms, weights, connectors=init)


def connect(
    layer_connectors: Sequence[Connector], params: Params, features: Features, where: Array | None
) -> Features:
    """Applies the connectors to the student's features; the teacher's are unchanged."""
    return [
        (connector.apply(params[f"pair_{i}"], student, where=where), teacher)
        for i, (connector, (student, teacher)) in enumerate(
            zip(layer_connectors, features, strict=True)
        )
    ]


def by_example(loss: Callable[[Array, Array], Array]) -> PairLoss:
    """Adapts a loss whose values depend on one example each; the objective applies the mask."""
    return lambda student, teacher, *, where: loss(student, teacher)


def total(
    loss: PairLoss,
    features: Features,
    where: Array | None,
    weights: Sequence[float] | None = None,
) -> Array:
    """`sum_i w_i loss(student_i, teacher_i)`, `[B]`."""
    values = [loss(student, teacher, where=where) for student, teacher in features]
    if weights is not None:
        values = [weight * value for weight, value in zip(weights, values, strict=True)]
    return sum(values[1:], values[0])


def init_each(
    layer_connectors: Sequence[Connector],
    shapes: Sequence[jax.ShapeDtypeStruct],
    key: Array,
    *,
    prefix: str = "pair",
) -> Params:
    """Parameters of one connector per shape: `{"pair_0": ..., "pair_1": ...}`."""
    return {
        f"{prefix}_{i}": connector.init(jax.random.fold_in(key, i), x)
        for i, (connector, x) in enumerate(zip(layer_connectors, shapes, strict=True))
    }


def projection(channels: int) -> Connector:
    """A 1x1 convolution and batch normalization."""
    return connectors.chain(connectors.conv1x1(channels), connectors.batch_norm())


def regressor(channels: int) -> Connector:
    """RepDistiller's regressor: `projection` and a ReLU."""
    return connectors.chain(projection(channels), connectors.activation(jax.nn.relu))
