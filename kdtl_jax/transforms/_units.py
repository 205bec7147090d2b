"""Chooses units of an axis to keep: evenly spaced, first, random, or the most important.

Indices are returned in increasing order. Importance scores are `[units]`, float32 or wider; each is
a sum over everything that belongs to a unit, in every leaf that has the axis, so a unit's incoming
and outgoing weights count together.

Here `size` is the length of an axis and `n`, in `1..size`, how many to keep; `spec` names the axes
and `name` is one of them. All functions raise ValueError if a size is out of range, as `axis_sizes`
does, or if a second tree differs from the parameters in structure or shapes, and TypeError if
numbers are not floating point or a key is none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import _width
from kdtl_jax.transforms._width import AxisSpec


def uniform_indices(size: int, n: int) -> np.ndarray:
    """`n` evenly spaced indices of an axis of length `size`, as in weight selection.

    Every `size / n`-th index from 0 if `n` divides `size`; otherwise
    `round(i (size - 1) / (n - 1))`, halves to even, which keeps the first and the last.

    Returns:
      `[n]` strictly increasing int64.

    References:
      Xu et al., Initializing Models with Larger Ones, 2023 (2311.18823).
    """
    _check_count(size, n)
    steps = np.arange(n, dtype=np.int64)
    if size % n == 0:
        return steps * (size // n)
    return np.rint(steps * (size - 1) / (n - 1)).astype(np.int64)


def first_indices(size: int, n: int) -> np.ndarray:
    """The first `n` indices of an axis of length `size`: `[n]` int64."""
    _check_count(size, n)
    return np.arange(n, dtype=np.int64)


def random_indices(key: Array, size: int, n: int) -> Array:
    """`n` indices of an axis of length `size`, drawn without replacement, sorted: `[n]` int32."""
    _checks.key(key=key)
    _check_count(size, n)
    return jnp.sort(jax.random.permutation(key, size)[:n].astype(jnp.int32))


def top_indices(scores: Array, n: int, *, groups: int = 1) -> Array:
    """The indices of the `n` largest scores, sorted; among equal scores the earlier is preferred.

    Args:
      scores: `[size]`, one importance per entry of the axis.
      groups: number of equal consecutive groups, each of which keeps `n / groups`. Grouped-query
        attention needs it: query heads are ranked within their key-value group.

    Returns:
      `[n]` int32.

    References:
      Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024
      (2407.14679), for the grouped form.
    """
    _checks.rank(1, 1, scores=scores)
    _checks.floating(scores=scores)
    size = scores.shape[0]
    _check_count(size, n)
    _checks.count(1, groups=groups)
    if size % groups or n % groups:
        raise ValueError(
            f"groups must divide the axis and n, got groups={groups}, n={n}, scores[{size}]."
        )
    by_group = scores.reshape(groups, size // groups)
    best = jnp.argsort(-by_group, axis=1, stable=True)[:, : n // groups]
    start = jnp.arange(groups, dtype=best.dtype)[:, None] * (size // groups)
    return jnp.sort((best + start).reshape(-1)).astype(jnp.int32)


def _check_count(size: int, n: int) -> None:
    _checks.integer(n=n)
    if not 1 <= n <= size:
        raise ValueError(f"n must lie in 1..{size}, the length of the axis, got {n}.")


def importance_by_magnitude(params: Params, spec: AxisSpec, name: str) -> Array:
    """`sqrt(sum theta^2)` over all parameters of each unit: `[units]`, float32 or wider."""
    return _numerics.safe_sqrt(_sum_per_unit(params, spec, name, jnp.square))


def importance_by_taylor(params: Params, gradients: Params, spec: AxisSpec, name: str) -> Array:
    """`sum |theta * gradient|`: first-order estimate of how the loss changes without the unit.

    Returns `[units]`, float32 or wider.

    Args:
      gradients: gradients of the loss, averaged over data, with the structure of `params`.

    References:
      Molchanov et al., Importance Estimation for Neural Network Pruning, 2019 (1906.10771).
    """
    return _sum_per_unit(params, spec, name, lambda w, g: jnp.abs(w * g), gradients)


def importance_by_fisher(params: Params, fisher: Params, spec: AxisSpec, name: str) -> Array:
    """`1/2 sum F theta^2`: second-order estimate of the rise in loss, F the Fisher diagonal.

    Returns `[units]`, float32 or wider.

    Args:
      fisher: diagonal Fisher information with the structure of `params`.

    References:
      LeCun, Denker and Solla, Optimal Brain Damage, 1989, with the Fisher for the Hessian.
    """
    return _sum_per_unit(params, spec, name, lambda w, f: 0.5 * f * jnp.square(w), fisher)


def importance_by_activation(
    activations: Array,
    *,
    previous: Array | None = None,
    inner: int = 1,
    where: Array | None = None,
) -> Array:
    """Minitron's score `sqrt(sum_b (mean over positions |x|)^2)`, batch by batch.

    Scores of several batches, or of several layers that read one residual stream, combine as
    `sqrt(a^2 + b^2)`; pass the score so far as `previous`. Record hidden units at the input of the
    layer that sums over them. Rank query heads within their group:
    `top_indices(scores, n, groups=…)`. Returns `[units]`, float32 or wider.

    Args:
      activations: `[B, ..., units * inner]`; axes between batch and features are positions.
      previous: `[units]`, the score so far.
      inner: width of a unit (of a head); its features are combined by their Euclidean norm.
      where: bool `[B]`, or `[B, ...]` over positions too: the real ones; others have no effect.

    References:
      Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024
      (2407.14679).
    """
    _checks.rank(2, activations=activations)
    _checks.floating(activations=activations)
    _checks.nonempty(activations=activations)
    _checks.count(1, inner=inner)
    if activations.shape[-1] % inner:
        raise ValueError(
            f"the features must be units of width inner={inner}, got "
            f"{_checks.described(activations=activations)}."
        )
    rank = 1 if where is None else jnp.ndim(where)
    _checks.mask(where, activations.shape[: min(rank, activations.ndim - 1)])
    size = jnp.abs(_numerics.kept(_numerics.upcast(activations), where))
    previous_scores = () if previous is None else (previous.ravel().astype(size.dtype),)
    # In this unit, squares stay in range.
    unit = _numerics.largest(jnp.concatenate([size.ravel(), *previous_scores]))
    real = jnp.ones(size.shape[:1], jnp.bool_) if where is None else where
    real = jnp.broadcast_to(real.reshape(real.shape + (1,) * (size.ndim - real.ndim)), size.shape)
    per_example = _numerics.masked_mean(size / unit, real, axis=tuple(range(1, size.ndim - 1)))
    energy = jnp.sum(jnp.square(per_example), axis=0).reshape(-1, inner).sum(axis=1)
    if previous is not None:
        _checks.same_shape(previous=previous, scores=energy)
        energy = energy + jnp.square(previous.astype(energy.dtype) / unit)
    return unit * _numerics.safe_sqrt(energy)


def _sum_per_unit(
    params: Params,
    spec: AxisSpec,
    name: str,
    score: Callable[..., Array],
    *other_trees: Params,
) -> Array:
    axes, sizes = _width.axes_and_sizes(params, spec)
    _width.size_of_name(name, sizes)
    for other in other_trees:
        if jax.tree.structure(other) != jax.tree.structure(params):
            raise ValueError("both trees must have the structure of the parameters.")
    total: Array | None = None
    for leaves, leaf_axes in zip(
        zip(*map(jax.tree.leaves, (params, *other_trees)), strict=True), axes, strict=True
    ):
        for position, axis in enumerate(leaf_axes):
            if axis.name != name:
                continue
            _checks.same_shape(**{f"leaf_{i}": leaf for i, leaf in enumerate(leaves)})
            upcast = [_numerics.upcast(_width.split_axis(leaf, position, axis)) for leaf in leaves]
            values = score(upcast[0], *(w.astype(upcast[0].dtype) for w in upcast[1:]))
            other_axes = tuple(i for i in range(values.ndim) if i != position + 1)
            leaf_sum = jnp.sum(values, axis=other_axes)
            total = leaf_sum if total is None else total + leaf_sum.astype(total.dtype)
            # A leaf with the axis twice (a recurrent kernel) counts on both sides.
    assert total is not None, "a known name has at least one axis"
    return total
