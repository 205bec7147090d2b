"""Penalties: functions of parameters that return one scalar, counted once per batch.

In `terms`, a penalty is an entry like any other; its shape `[]` tells the objective not to average
it over examples:

    penalty = l2_sp(inputs.params, inputs.teacher_params, where="backbone/.*")
    {"task": cross_entropy, "l2_sp": penalty}

`where` selects the leaves that a penalty covers, so a pretrained backbone and a new head can have
separate penalties and weights. Only inexact leaves count. Penalties are `[]`, float32 or wider, and
unweighted: the objective applies the weights. They raise ValueError if the selector matches
nothing, or if names or shapes of the trees differ (all differences are listed).
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

    With weight `w` its gradient is `w p`: weight decay in SGD. Returns `[]`.

    Args:
      where: selector of the leaves to penalize, usually the new head.

    References:
      Li et al., Explicit Inductive Bias for Transfer Learning with Convolutional Networks, 2018
      (1802.01483), the term of weight `beta`; TLL's `L2Regularization` is the same number.
    """
    return _half_sum(jnp.square(upcast(leaf)) for leaf in _selected_leaves(params, where).values())


def l2_sp(params: Params, source: Params, *, where: Selector = everything) -> Array:
    """`1/2 sum ||p - p0||^2`: distance from the pretrained starting point (a sum, not a mean).

    Args:
      source: the pretrained parameters. Leaves that `where` does not select may differ (e.g. an old
        head); for selected leaves, names and shapes must be those of `params`.
      where: selector of the leaves to penalize, usually the backbone.

    Returns:
      `[]`, float32 or wider. No gradient is stopped: `source` is a constant because nothing
      differentiates with respect to it.

    References:
      Li et al., Explicit Inductive Bias for Transfer Learning with Convolutional Networks, 2018
      (1802.01483), the term of weight `alpha`; TLL's `SPRegularization` is the same number.
    """
    pairs = _matching_leaves(where, params=params, source=source)
    return _half_sum(jnp.square(leaf - anchor) for leaf, anchor in pairs)


def ewc(params: Params, anchor: Params, fisher: PyTree, *, where: Selector = everything) -> Array:
    """`1/2 sum F (p - p*)^2`: distance from `anchor`, weighted by importance for the old task.

    Args:
      anchor: parameters after the old task.
      fisher: their diagonal Fisher information (`fisher.true_fisher`), of equal shapes.

    Returns:
      `[]`, float32 or wider. Avalanche omits the 1/2, so its number is twice this one; also, its
      Fisher is the squared gradient of a batch mean (`fisher.batch_fisher`).

    References:
      Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017
      (1612.00796), eq. 3.
    """
    triples = _matching_leaves(where, params=params, anchor=anchor, fisher=fisher)
    return _half_sum(weight * jnp.square(leaf - start) for leaf, start, weight in triples)


def _selected_leaves(tree: PyTree, where: Selector) -> dict[str, Array]:
    selected, _ = trees.partition(tree, where)
    return trees.flatten(selected)


def _matching_flat(tree: PyTree, where: Selector, paths: Iterable[str]) -> dict[str, Array]:
    """The leaves of another tree that the selector matches, including extra ones."""
    flat = trees.flatten(tree)
    if not trees.is_bool_tree(where):
        is_selected = trees.flatten(trees.mask(tree, where, expect=None))
        return {path: leaf for path, leaf in flat.items() if is_selected[path] and is_inexact(leaf)}
    # A tree of bools has the structure of `params`: in other trees, it selects the same paths.
    return {path: flat[path] for path in paths if path in flat}


def _matching_leaves(where: Selector, **named_trees: PyTree) -> list[tuple[Array, ...]]:
    """The selected leaves of all trees, zipped and in one dtype; checks names and shapes."""
    (first, params), *rest = named_trees.items()
    flats = {first: _selected_leaves(params, where)}
    flats |= {name: _matching_flat(tree, where, flats[first]) for name, tree in rest}
    _checks.same_leaves(**flats)
    return [_promote([flat[path] for flat in flats.values()]) for path in flats[first]]


def _promote(leaves: Iterable[Array]) -> tuple[Array, ...]:
    upcast_leaves = [upcast(leaf) for leaf in leaves]
    dtype = np.result_type(*[leaf.dtype for leaf in upcast_leaves])
    return tuple(leaf.astype(dtype) for leaf in upcast_leaves)


def _half_sum(leaves: Iterable[Array]) -> Array:
    """`1/2 sum` over all entries; each leaf is summed separately, so the error does not grow."""
    return jnp.sum(jnp.stack(_promote([jnp.sum(leaf) for leaf in leaves]))) / 2
