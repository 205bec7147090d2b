"""Penalties: functions of parameters that return one scalar, counted once for any batch.

In `terms`, a penalty is an entry like any other; its shape `[]` tells the objective not to average
it over examples:

    penalty = l2_sp(inputs.params, inputs.teacher_params, where="backbone/.*")
    {"task": cross_entropy, "l2_sp": penalty}

`where` selects the leaves that a penalty covers, so a pretrained backbone and a new head can have
separate penalties and weights. Only inexact leaves count. Penalties are unweighted: the objective
applies the weights.
"""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, trees
from kdtl_jax._numerics import upcast
from kdtl_jax._types import Params, PyTree
from kdtl_jax.trees import Selector, everything, is_inexact


def l2(params: Params, *, where: Selector = everything) -> Array:
    """`1/2 sum ||p||^2` over the selected leaves, including biases and norm scales.

    With weight `w` its gradient is `w p`: weight decay in SGD.

    Args:
      params: any pytree.
      where: selector of the leaves to penalize, usually the new head.

    Returns:
      `[]`, float32 or wider.

    Raises:
      ValueError: if the selector matches nothing.

    References:
      Li et al., Explicit Inductive Bias for Transfer Learning with Convolutional Networks, 2018
      (1802.01483), the term of weight `beta`; TLL's `L2Regularization` is the same number.
    """
    return _total(jnp.square(upcast(leaf)) for leaf in _selected(params, where).values())


def l2_sp(params: Params, source: Params, *, where: Selector = everything) -> Array:
    """`1/2 sum ||p - p0||^2`: distance from the pretrained starting point (a sum, not a mean).

    Args:
      params: any pytree.
      source: the pretrained parameters. Leaves that `where` does not select may differ (e.g. an old
        head); for selected leaves, names and shapes must be those of `params`.
      where: selector of the leaves to penalize, usually the backbone.

    Returns:
      `[]`, float32 or wider. No gradient is stopped: `source` is a constant because nothing
      differentiates with respect to it.

    Raises:
      ValueError: if the selector matches nothing, or names or shapes differ (all are listed).

    References:
      Li et al., Explicit Inductive Bias for Transfer Learning with Convolutional Networks, 2018
      (1802.01483), the term of weight `alpha`; TLL's `SPRegularization` is the same number.
    """
    pairs = _matched(where, params=params, source=source)
    return _total(jnp.square(leaf - anchor) for leaf, anchor in pairs)


def ewc(params: Params, anchor: Params, fisher: PyTree, *, where: Selector = everything) -> Array:
    """`1/2 sum F (p - p*)^2`: distance from `anchor`, weighted by importance for the old task.

    Args:
      params: any pytree.
      anchor: parameters after the old task.
      fisher: their diagonal Fisher information (`fisher.true_fisher`), of equal shapes.
      where: selector of the leaves that are penalized.

    Returns:
      `[]`, float32 or wider. Avalanche omits the 1/2, so its number is twice this one; also, its
      Fisher is the squared gradient of a batch mean (`fisher.batch_fisher`).

    Raises:
      ValueError: if the selector matches nothing, or names or shapes differ (all are listed).

    References:
      Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017
      (1612.00796), eq. 3.
    """
    triples = _matched(where, params=params, anchor=anchor, fisher=fisher)
    return _total(weight * jnp.square(leaf - start) for leaf, start, weight in triples)


def _selected(tree: PyTree, where: Selector) -> dict[str, Array]:
    chosen, _ = trees.partition(tree, where)
    return trees.flatten(chosen)


def _counterparts(tree: PyTree, where: Selector, paths: Iterable[str]) -> dict[str, Array]:
    """The leaves of another tree that correspond to the selected ones, including extra ones."""
    flat = trees.flatten(tree)
    if not trees.is_bool_tree(where):
        chosen = trees.flatten(trees.mask(tree, where, expect=None))
        return {path: leaf for path, leaf in flat.items() if chosen[path] and is_inexact(leaf)}
    # A tree of bools fits only `params`: in other trees, it selects the same paths.
    return {path: flat[path] for path in paths if path in flat}


def _matched(where: Selector, **named: PyTree) -> list[tuple[Array, ...]]:
    """The selected leaves of all trees side by side, in one dtype; names and shapes checked."""
    (first, params), *others = named.items()
    flats = {first: _selected(params, where)}
    flats |= {name: _counterparts(tree, where, flats[first]) for name, tree in others}
    _checks.same_leaves(**flats)
    return [_one_dtype([flat[path] for flat in flats.values()]) for path in flats[first]]


def _one_dtype(leaves: Iterable[Array]) -> tuple[Array, ...]:
    wide = [upcast(leaf) for leaf in leaves]
    dtype = np.result_type(*[leaf.dtype for leaf in wide])
    return tuple(leaf.astype(dtype) for leaf in wide)


def _total(leaves: Iterable[Array]) -> Array:
    """`1/2 sum` over all entries; each leaf is summed separately, so the error does not grow."""
    return jnp.sum(jnp.stack(_one_dtype([jnp.sum(leaf) for leaf in leaves]))) / 2
