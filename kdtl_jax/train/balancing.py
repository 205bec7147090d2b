"""Individual terms: the gradient of each, and scales that balance them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, objective, trees
from kdtl_jax._types import PyTree
from kdtl_jax.objective import Masked, Mean, Terms


def term_gradients(
    loss: Callable[[PyTree], tuple[Mapping[str, Array], Any]], params: PyTree
) -> tuple[dict[str, Array], dict[str, PyTree], Any]:
    """Values and gradients of all scalar terms: one forward pass, one backward pass per term.

    A backward pass is that of its term alone: a term that is NaN leaves the others' gradients as
    they are.

    Args:
      loss: `params -> ({name: []}, auxiliary)`.
      params: the parameters to differentiate.

    Returns:
      `({name: []}, {name: gradient}, auxiliary)`. The gradient of a weighted sum is the weighted
      sum of these; their cosines show where terms conflict.

    Raises:
      TypeError: if a parameter is not floating point.
    """
    for path, leaf in trees.flatten(params).items():
        if not trees.is_inexact(leaf):
            raise TypeError(
                f"params must be floating point, but {path!r} is {jnp.result_type(leaf)}. "
                "Differentiate the others alone: trees.partition(params, '.*')[0]."
            )
    values, tangents, auxiliary = jax.linearize(loss, params, has_aux=True)

    def gradient(name: str, value: Array) -> PyTree:
        # Not a pullback of all terms with zeros for the others: 0 times a NaN is NaN.
        transposed = jax.linear_transpose(lambda tangent: tangents(tangent)[name], params)
        return transposed(jnp.ones_like(value))[0]

    values = dict(values)
    return values, {name: gradient(name, value) for name, value in values.items()}, auxiliary


def balanced(terms: Terms, *, reference: str, example_weights: Array | None = None) -> Terms:
    """Scales all terms to the size of one of them: `x * stop_gradient(mean ref / mean x)`.

    The weights then state how much each term matters, independent of its units. Gradients keep
    their directions, but their sizes change from step to step.

    Args:
      terms: `{name: values}`, as for the objective; no negative values.
      reference: the name of the term that is not scaled.
      example_weights: `[B]`, the batch's weights, so that padding does not count.

    Raises:
      ValueError: if there is no such term.

    References:
      Model-Optimizer's Megatron loss balancer scales intermediate losses to the logit loss.
    """
    if reference not in terms:
        raise ValueError(f"no term {reference!r}, there are {sorted(terms)}.")
    means = objective.reduce_all(terms, example_weights)
    target = jax.lax.stop_gradient(means[reference].value())

    def scaled(name: str, term: objective.Term) -> objective.Term:
        if name == reference:
            return term
        mean = jax.lax.stop_gradient(means[name].value())
        # A term at 0 stays 0.
        ratio = jnp.where(mean != 0, target.astype(mean.dtype) / jnp.where(mean != 0, mean, 1), 0)
        if isinstance(term, Mean):
            return Mean(ratio * _numerics.upcast(term.total), term.weight)
        if isinstance(term, Masked):
            return Masked(ratio * _numerics.upcast(term.values), term.where)
        return ratio * _numerics.upcast(term)

    return {name: scaled(name, term) for name, term in terms.items()}


def remainder(weights: Mapping[str, float], *, to: str) -> dict[str, float]:
    """Weights that sum to 1: the remainder of the given ones goes to the term `to`.

    Raises:
      ValueError: if a weight is negative or not finite, they exceed 1, or `to` has one already.
      TypeError: if a weight is not a number.

    References:
      Model-Optimizer's `StaticLossBalancer`.
    """
    _checks.mappings(weights=weights)
    weights_by_name = {f"the weight of {name!r}": weight for name, weight in weights.items()}
    _checks.scalar(**weights_by_name)
    _checks.finite(**weights_by_name)
    unassigned = 1 - sum(weights.values())
    if to in weights or unassigned < -1e-6 or any(weight < 0 for weight in weights.values()):
        raise ValueError(
            f"expected non-negative weights of other terms than {to!r} that sum to at "
            f"most 1, got {dict(weights)}."
        )
    return {**weights, to: max(unassigned, 0.0)}
