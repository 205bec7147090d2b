"""Features as the losses want them: matched positions, maps of vectors; and reasons in words.

A vector `[B, C]` is a map of one position. Losses of single positions and of channels mean the
same on it; those that normalize or compare *over* positions would be constant, and say so through
`applies`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors
from kdtl_jax._types import Params
from kdtl_jax.connectors import Connector
from kdtl_jax.methods._method import Setup

Pairs = Sequence[tuple[str, str]]
View = Callable[[Array, Array], tuple[Array, Array]]
Applies = Callable[[Setup], str | None]


def every_pair(setup: Setup) -> Pairs:
    """All matched layers."""
    return setup.pairs


def deepest_pair(setup: Setup) -> Pairs:
    """The last matched layer: the last feature map, or the last hidden vector."""
    return setup.pairs[-1:]


def middle_pair(setup: Setup) -> Pairs:
    """The matched layer half way, where FitNets takes its hint."""
    return setup.pairs[len(setup.pairs) // 2 :][:1]


def last_pair(setup: Setup) -> Pairs:
    """What the heads read."""
    return (setup.last,)


def as_map(x: Array) -> Array:
    """`[B, C]` as `[B, 1, 1, C]`, tokens `[B, L, C]` as `[B, 1, L, C]`, maps as they are."""
    middle = {2: (1, 1), 3: (1, x.shape[1])}.get(x.ndim, x.shape[1:-1])
    return x.reshape(x.shape[0], *middle, x.shape[-1])


def as_vector(x: Array) -> Array:
    """`[B, ..., C]` averaged over positions."""
    return jnp.mean(x.reshape(x.shape[0], -1, x.shape[-1]), axis=1)


def unmatched(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both as they are, for losses that flatten each side."""
    return student, teacher


def matched(student: Array, teacher: Array) -> tuple[Array, Array]:
    """The same positions on both sides: the larger map averaged over adaptive cells.

    Between different kinds of features (a map and a vector) only averages over all positions
    correspond.
    """
    if student.ndim != teacher.ndim:
        return as_vector(student), as_vector(teacher)
    if student.ndim == 4:
        size = [min(*sides) for sides in zip(student.shape[1:3], teacher.shape[1:3], strict=True)]
        pool = connectors.pool(size)
        return pool.apply({}, student), pool.apply({}, teacher)
    return student, teacher


def matched_maps(student: Array, teacher: Array) -> tuple[Array, Array]:
    """`matched`, both as maps `[B, h, w, C]`."""
    student, teacher = matched(student, teacher)
    return as_map(student), as_map(teacher)


def viewed(view: View, pairs: Pairs, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Any:
    """`[(student features, teacher features)]` of the pairs."""
    return [view(student[of_student], teacher[of_teacher]) for of_student, of_teacher in pairs]


def shapes(view: View, pairs: Pairs, setup: Setup) -> list[tuple[Any, Any]]:
    """`viewed` on shapes alone."""
    return jax.eval_shape(
        lambda student, teacher: viewed(view, pairs, student, teacher),
        dict(setup.student),
        dict(setup.teacher),
    )


def init_each(
    glue: Sequence[Connector], shaped: Sequence[Any], key: Array, *, prefix: str = "pair"
) -> Params:
    """Parameters of one connector per entry: `{"pair_0": ..., "pair_1": ...}`."""
    return {
        f"{prefix}_{i}": connector.init(jax.random.fold_in(key, i), x)
        for i, (connector, x) in enumerate(zip(glue, shaped, strict=True))
    }


def always(setup: Setup) -> str | None:
    """Outputs of any classifier do."""
    return None


def needs_pairs(count: int = 1, pairs: Callable[[Setup], Pairs] = every_pair) -> Applies:
    """At least `count` matched layers, tokens of equal number."""

    def applies(setup: Setup) -> str | None:
        if len(setup.pairs) < count:
            return f"needs {count} matched layers, this pair of models has {len(setup.pairs)}"
        for of_student, of_teacher in pairs(setup):
            student, teacher = setup.student[of_student].shape, setup.teacher[of_teacher].shape
            if len(student) == len(teacher) == 3 and student[1] != teacher[1]:
                return (
                    f"needs as many tokens on both sides, {of_student!r} has {student[1]} and "
                    f"{of_teacher!r} {teacher[1]}"
                )
        return None

    return applies


matched_layers = needs_pairs()


def needs_positions(why: str, pairs: Callable[[Setup], Pairs] = every_pair) -> Applies:
    """Matched layers with more than one position, because of `why`."""
    layers = needs_pairs(1, pairs)

    def applies(setup: Setup) -> str | None:
        reason = layers(setup)
        if reason is not None:
            return reason
        for student, _ in shapes(matched_maps, pairs(setup), setup):
            if student.shape[1] * student.shape[2] < 2:
                return f"needs feature maps with positions: {why}"
        return None

    return applies


def both(*conditions: Applies) -> Applies:
    """The first reason of any."""

    def applies(setup: Setup) -> str | None:
        reasons = (condition(setup) for condition in conditions)
        return next((reason for reason in reasons if reason is not None), None)

    return applies


def needs_teacher_head(setup: Setup) -> str | None:
    """The teacher's linear classifier, for methods that reuse it."""
    if setup.teacher_head is None:
        return "needs the teacher's classifier (a linear head), which this teacher does not show"
    return None
