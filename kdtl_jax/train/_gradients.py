"""The gradient of an objective over a batch, at once or in parts.

Through its state, an optimizer may request the gradient of some terms separately from the others;
both gradients then come from one forward pass.
"""

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import objective
from kdtl_jax._types import Params, PyTree
from kdtl_jax.objective import Mean
from kdtl_jax.train._state import cast_like

Means = dict[str, Mean]
Carried = tuple[PyTree, PyTree]  # the model's state and the terms' memory
Forward = Callable[[Params, Carried, Any, Array], tuple[Means, Carried]]


class Objective(NamedTuple):
    """The weighted sum of `forward(trained, carried, batch, part)`, to be differentiated."""

    forward: Forward
    weights: dict[str, Array]
    scale: Array | None = None  # multiplies the loss before it is differentiated
    separate: frozenset[str] = frozenset()  # terms with a gradient of their own


class GradientResult(NamedTuple):
    """Gradients of the scaled loss, the loss, its terms, and the carried state after the pass.

    `gradients` is `(all terms,)`, or `(the other terms, the separate terms)`.
    """

    gradients: tuple[Params, ...]
    loss: Array
    means: Means
    carried: Carried


def full_batch(spec: Objective, trained: Params, carried: Carried, batch: Any) -> GradientResult:
    """The gradient over the whole batch."""
    return _part_gradient(spec, trained, carried, batch, _first(), None)


def microbatched(spec: Objective, trained: Params, carried: Carried, parts: Any) -> GradientResult:
    """The gradient over parts `[parts, B / parts, ...]`, one after another.

    Sums and counts are accumulated separately, gradients in float32 or wider.
    """

    # Only the counts are used, and they rarely depend on the model, so XLA drops its forward pass.
    # Carried values are passed along: a mask may depend on which rows of a memory are filled.
    def counts(carried: Carried, part: tuple[Any, Array]) -> tuple[Carried, dict[str, Array]]:
        means, new_carried = spec.forward(trained, carried, *part)
        return cast_like(new_carried, carried), {name: mean.weight for name, mean in means.items()}

    _, per_part = jax.lax.scan(counts, carried, _with_index(parts))
    total_weights = jax.tree.map(lambda weight: jnp.sum(weight, axis=0), per_part)

    def body(carry: Any, part: tuple[Any, Array]) -> tuple[Any, Any]:
        sums, carried = carry
        result = _part_gradient(spec, trained, carried, *part, total_weights)
        sums = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, result.gradients)
        return (sums, cast_like(result.carried, carried)), (result.loss, result.means)

    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), trained
    )
    start = (zeros, zeros) if spec.separate else (zeros,)
    (sums, carried), (losses, means) = jax.lax.scan(body, (start, carried), _with_index(parts))
    return GradientResult(
        tuple(cast_like(gradient, trained) for gradient in sums),
        jnp.sum(losses),
        _sum_parts(means),
        carried,
    )


def full_batch_loss(spec: Objective, carried: Carried, batch: Any, trained: Params) -> Array:
    """The loss of the whole batch."""
    means, _ = spec.forward(trained, carried, batch, _first())
    return objective.weighted_sum(means, spec.weights)


def microbatched_loss(spec: Objective, carried: Carried, parts: Any, trained: Params) -> Array:
    """The loss of parts, as in `microbatched`."""

    def body(carried: Carried, part: tuple[Any, Array]) -> tuple[Carried, Means]:
        means, new_carried = spec.forward(trained, carried, *part)
        return cast_like(new_carried, carried), means

    _, means = jax.lax.scan(body, carried, _with_index(parts))
    return objective.weighted_sum(_sum_parts(means), spec.weights)


def _part_gradient(
    spec: Objective,
    trained: Params,
    carried: Carried,
    batch: Any,
    part: Array,
    total_weights: dict[str, Array] | None,
) -> GradientResult:
    """The gradient of a part's share of the loss; `total_weights` are the whole batch's counts."""

    def scaled(trained: Params) -> tuple[tuple[Array, ...], Any]:
        means, new_carried = spec.forward(trained, carried, batch, part)
        shares = {
            k: Mean(m.total, total_weights[k] if total_weights else m.weight)
            for k, m in means.items()
        }
        loss = objective.weighted_sum(shares, spec.weights)
        groups = (loss,) if not spec.separate else _split_loss(spec, shares)
        if spec.scale is not None:
            groups = tuple(group * spec.scale.astype(group.dtype) for group in groups)
        return groups, (loss, means, new_carried)

    groups, pull, (loss, means, new_carried) = jax.vjp(scaled, trained, has_aux=True)
    gradients = tuple(
        pull(tuple(jnp.ones_like(g) if i == k else jnp.zeros_like(g) for i, g in enumerate(groups)))
        for k in range(len(groups))
    )
    return GradientResult(
        tuple(gradient for (gradient,) in gradients),
        loss,
        means,
        jax.lax.stop_gradient(new_carried),
    )


def _split_loss(spec: Objective, means: Means) -> tuple[Array, Array]:
    if not spec.separate < means.keys():
        raise ValueError(
            f"scale_by_dot's distill must name some of the terms {sorted(means)} and leave the "
            f"task's, got {sorted(spec.separate)}."
        )

    def total(names: Set[str]) -> Array:
        return objective.weighted_sum(
            {name: means[name] for name in means if name in names},
            {name: spec.weights[name] for name in spec.weights if name in names},
        )

    return total(means.keys() - spec.separate), total(spec.separate)


def _with_index(parts: Any) -> tuple[Any, Array]:
    count = jnp.shape(jax.tree.leaves(parts)[0])[0]
    return parts, jnp.arange(count, dtype=jnp.int32)


def _first() -> Array:
    return jnp.zeros((), jnp.int32)


def _sum_parts(means: Means) -> Means:
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), means)
