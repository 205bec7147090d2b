"""TIES: merging task vectors whose entries disagree in sign.

"TIES" names three algorithms. The paper's is `ties` (trim over the whole vector of parameters,
zeros take the global majority sign, mean over the agreeing). PEFT's and mergekit's are compositions
of the same pieces, leaf by leaf:

    PEFT       disjoint_merge(taus, elect_sign(taus), weights)             after trim
    mergekit   disjoint_merge(wt, elect_sign(wt), divisor=agreeing_weight(w)),  wt = w_i trim(tau_i)
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, PyTree, Scalar
from kdtl_jax.transforms import _leaves
from kdtl_jax.transforms._leaves import Coefficient, Weights
from kdtl_jax.transforms._sparsify import trim, trim_global

Divisor = Callable[[Array], Array]  # which members agree, [N, ...] in the leaf's dtype -> [...]


def ties(
    task_vectors: Sequence[PyTree], weights: Weights | None = None, *, density: Scalar = 0.2
) -> PyTree:
    """TIES as its paper: trim globally, elect a sign per entry, average what agrees.

    Args:
      task_vectors: a list of trees of one structure.
      weights: 1 each when None (the paper's); they multiply the vectors after the election.
      density: share of entries kept, over all parameters of a model together.

    Returns:
      The merged task vector; apply it with `scale=lambda` (the paper's default is 1).

    Raises:
      ValueError: if names or shapes differ, or the density lies outside `[0, 1]`.

    References:
      Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023 (2306.01708).
    """
    _leaves.numbered("task_vectors", task_vectors)
    _checks.within(0, 1, density=density)
    trimmed = [trim_global(each, density=density) for each in task_vectors]
    return disjoint_merge(trimmed, elect_sign_global(trimmed), weights)


def ties_per_leaf(
    task_vectors: Sequence[PyTree], weights: Weights | None = None, *, density: Coefficient = 0.2
) -> PyTree:
    """TIES leaf by leaf: every leaf keeps its own share, an undecided sign is +.

    As `ties`, with `density` a number or one number per leaf. This is PEFT's number
    (`majority_sign_method="total"`).
    """
    _leaves.numbered("task_vectors", task_vectors)
    trimmed = [trim(each, density=density) for each in task_vectors]
    return disjoint_merge(trimmed, elect_sign(trimmed), weights)


def elect_sign(task_vectors: Sequence[PyTree]) -> PyTree:
    """+1 where the sum of the task vectors is >= 0, else -1, entry by entry."""
    return _elect(task_vectors, lambda leaf: jnp.sum(leaf, axis=0))


def elect_sign_by_count(task_vectors: Sequence[PyTree]) -> PyTree:
    """+1 where at least as many task vectors are positive as negative, else -1."""
    return _elect(task_vectors, lambda leaf: jnp.sum(jnp.sign(leaf), axis=0))


def elect_sign_global(task_vectors: Sequence[PyTree]) -> PyTree:
    """The sign of the sum; entries whose sum is 0 take the sign that most other entries have."""
    named = _leaves.numbered("task_vectors", task_vectors)
    signs = _leaves.combine_leaves(
        lambda i, path, *leaves: jnp.sign(jnp.sum(jnp.stack(leaves), axis=0)),
        named,
        keep_dtype=False,
    )
    chosen, _ = trees.partition(signs, trees.everything)
    balance = sum(jnp.sum(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(chosen))
    majority = jnp.where(jnp.asarray(balance) >= 0, 1, -1)
    return _leaves.combine_leaves(
        lambda i, path, leaf: jnp.where(leaf == 0, _numerics.scalar(majority, leaf), leaf),
        {"signs": signs},
    )


def disjoint_merge(
    task_vectors: Sequence[PyTree],
    signs: PyTree,
    weights: Weights | None = None,
    *,
    divisor: Divisor | None = None,
) -> PyTree:
    """`sum_i m_i w_i tau_i / divisor(m)`, `m_i` = where `tau_i` has the elected sign.

    An entry of 0 agrees with nothing.

    Args:
      task_vectors: a list of trees of one structure.
      signs: the elected signs, +1 and -1.
      weights: 1 each when None, else one per task vector.
      divisor: `m [N, ...] -> [...]`; `agreeing_count` when None (a mean, as the paper),
        `agreeing_weight(w)`, or `undivided`. Where it is 0 nothing is divided.

    Returns:
      The merged task vector, float32 or wider.

    Raises:
      ValueError: if names, shapes or the number of weights differ.
    """
    named = {"signs": signs} | _leaves.numbered("task_vectors", task_vectors)
    by_leaf = _leaves.weights_by_leaf(weights, len(task_vectors), task_vectors[0])

    def formula(i: int, path: str, elected: Array, *leaves: Array) -> Array:
        stacked = jnp.stack(leaves)
        agrees = (jnp.sign(stacked) == elected[None]) & (stacked != 0)
        weighted = [_leaves.scaled(w, x) for w, x in zip(by_leaf[i], leaves, strict=True)]
        total = jnp.sum(jnp.where(agrees, jnp.stack(weighted), 0), axis=0)
        by = (divisor or agreeing_count)(agrees.astype(stacked.dtype))
        return total / jnp.where(by == 0, 1, by)

    return _leaves.combine_leaves(formula, named, keep_dtype=False)


def agreeing_count(agrees: Array) -> Array:
    """How many members agree: the mean of the paper and of PEFT."""
    return jnp.sum(agrees, axis=0)


def agreeing_weight(weights: Sequence[Scalar] | Array) -> Divisor:
    """The weight of the members that agree: mergekit's `normalize`."""

    def divisor(agrees: Array) -> Array:
        terms = [_numerics.scalar(w, m) * m for w, m in zip(weights, agrees, strict=True)]
        return jnp.sum(jnp.stack(terms), axis=0)

    return divisor


def undivided(agrees: Array) -> Array:
    """1 everywhere: a sum instead of a mean."""
    return jnp.ones_like(agrees[0])


def _elect(task_vectors: Sequence[PyTree], total: Callable[[Array], Array]) -> PyTree:
    return _leaves.combine_leaves(
        lambda i, path, *leaves: jnp.where(total(jnp.stack(leaves)) >= 0, 1, -1).astype(
            leaves[0].dtype
        ),
        _leaves.numbered("task_vectors", task_vectors),
        keep_dtype=False,
    )
