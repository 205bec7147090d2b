"""The gradient of an objective over a batch, at once or in parts.

Through its state, an optimizer may request the gradient of some terms separately from the others;
both gradients then come from one forward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import objective
from kdtl_jax._types import Params, PyTree
from kdtl_jax.objective import Mean
from kdtl_jax.train._state import like

Means = dict[str, Mean]
Carried = tuple[PyTree, PyTree]  # the model's state and the terms' memory
Forward = Callable[[Params, Carried, Any, Array], tuple[Means, Carried]]


class Objective(NamedTuple):
    """The weighted sum of `forward(trained, carried, batch, part)`, to be differentiated."""

    forward: Forward
    weights: dict[str, Array]
    scale: Array | None = None  # multiplies the loss before it is differentiated
    apart: frozenset[str] = frozenset()  # terms whose gradient is kept separate


class Found(NamedTuple):
    """Gradients of the scaled loss, the loss, its terms, and what the forward pass carries on.

    `gradients` is `(whole,)`, or `(of the other terms, of the separate terms)`.
    """

    gradients: tuple[Params, ...]
    loss: Array
    means: Means
    carried: Carried


def at_once(of: Objective, trained: Params, carried: Carried, batch: Any) -> Found:
    """The gradient over the whole batch."""
    return _share(of, trained, carried, batch, _first(), None)


def in_parts(of: Objective, trained: Params, carried: Carried, parts: Any) -> Found:
    """The gradient over parts `[parts, B / parts, ...]`, one after another.

    Sums and counts are accumulated separately, gradients in float32 or wider.
    """

    # Only the counts are used, and they rarely depend on the model, so XLA drops its forward pass.
    # Carried values are passed along: a mask may depend on which rows of a memory are filled.
    def counts(carried: Carried, part: tuple[Any, Array]) -> tuple[Carried, dict[str, Array]]:
        means, after = of.forward(trained, carried, *part)
        return like(after, carried), {name: mean.weight for name, mean in means.items()}

    _, per_part = jax.lax.scan(counts, carried, _numbered(parts))
    whole = jax.tree.map(lambda weight: jnp.sum(weight, axis=0), per_part)

    def body(carry: Any, part: tuple[Any, Array]) -> tuple[Any, Any]:
        sums, carried = carry
        found = _share(of, trained, carried, *part, whole)
        sums = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, found.gradients)
        return (sums, like(found.carried, carried)), (found.loss, found.means)

    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), trained
    )
    start = (zeros, zeros) if of.apart else (zeros,)
    (sums, carried), (losses, means) = jax.lax.scan(body, (start, carried), _numbered(parts))
    return Found(
        tuple(like(gradient, trained) for gradient in sums),
        jnp.sum(losses),
        _summed(means),
        carried,
    )


def loss_at_once(of: Objective, carried: Carried, batch: Any) -> Callable[[Params], Array]:
    """`trained -> loss` over the whole batch."""

    def loss(trained: Params) -> Array:
        means, _ = of.forward(trained, carried, batch, _first())
        return objective.weighted_sum(means, of.weights)

    return loss


def loss_in_parts(of: Objective, carried: Carried, parts: Any) -> Callable[[Params], Array]:
    """`trained -> loss` over parts, as in `in_parts`."""

    def loss(trained: Params) -> Array:
        def body(carried: Carried, part: tuple[Any, Array]) -> tuple[Carried, Means]:
            means, after = of.forward(trained, carried, *part)
            return like(after, carried), means

        _, means = jax.lax.scan(body, carried, _numbered(parts))
        return objective.weighted_sum(_summed(means), of.weights)

    return loss


def _share(
    of: Objective,
    trained: Params,
    carried: Carried,
    batch: Any,
    part: Array,
    whole: dict[str, Array] | None,
) -> Found:
    """The gradient of this part's share of the loss; `whole` holds the whole batch's counts."""

    def scaled(trained: Params) -> tuple[tuple[Array, ...], Any]:
        means, after = of.forward(trained, carried, batch, part)
        shares = {k: Mean(m.total, whole[k] if whole else m.weight) for k, m in means.items()}
        loss = objective.weighted_sum(shares, of.weights)
        groups = (loss,) if not of.apart else _grouped(of, shares)
        if of.scale is not None:
            groups = tuple(group * of.scale.astype(group.dtype) for group in groups)
        return groups, (loss, means, after)

    groups, pull, (loss, means, after) = jax.vjp(scaled, trained, has_aux=True)
    gradients = tuple(
        pull(tuple(jnp.ones_like(g) if i == k else jnp.zeros_like(g) for i, g in enumerate(groups)))
        for k in range(len(groups))
    )
    return Found(
        tuple(gradient for (gradient,) in gradients), loss, means, jax.lax.stop_gradient(after)
    )


def _grouped(of: Objective, means: Means) -> tuple[Array, Array]:
    if not of.apart < means.keys():
        raise ValueError(
            f"scale_by_dot's distill must name some of the terms {sorted(means)} and leave the "
            f"task's, got {sorted(of.apart)}."
        )

    def total(names: set[str]) -> Array:
        return objective.weighted_sum(
            {name: mean for name, mean in means.items() if name in names},
            {name: weight for name, weight in of.weights.items() if name in names},
        )

    return total(means.keys() - of.apart), total(set(of.apart))


def _numbered(parts: Any) -> tuple[Any, Array]:
    many = jnp.shape(jax.tree.leaves(parts)[0])[0]
    return parts, jnp.arange(many, dtype=jnp.int32)


def _first() -> Array:
    return jnp.zeros((), jnp.int32)


def _summed(means: Means) -> Means:
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), means)
