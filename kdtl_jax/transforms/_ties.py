"""TIES: merging task vectors whose entries disagree in sign.

"TIES" is the name of three algorithms. The paper's is `ties`: trim over the whole parameter vector,
zeros take the global majority sign, mean over the models that agree. PEFT's and mergekit's are
compositions of the same functions, leaf by leaf:

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

Divisor = Callable[[Array], Array]  # which members agree, bool [N, ...] -> [...]


def ties(
    task_vectors: Sequence[PyTree], weights: Weights | None = None, *, density: Scalar = 0.2
) -> PyTree:
    """TIES as published: trims globally, elects a sign per entry, averages the agreeing entries.

    Args:
      weights: None for 1 each, as in the paper; they multiply the vectors after the election.
      density: share of entries to keep, in `[0, 1]`, over all parameters of a model together.

    Returns:
      The merged task vector; apply it with `scale=lambda` (the paper's default is 1).

    References:
      Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023 (2306.01708).
    """
    _leaves.name_members("task_vectors", task_vectors)
    _checks.within(0, 1, density=density)
    trimmed = [trim_global(task_vector, density=density) for task_vector in task_vectors]
    return disjoint_merge(trimmed, elect_sign_global(trimmed), weights)


def ties_per_leaf(
    task_vectors: Sequence[PyTree], weights: Weights | None = None, *, density: Coefficient = 0.2
) -> PyTree:
    """TIES leaf by leaf: every leaf keeps its own share, and an undecided sign is +.

    As `ties`, with `density` a number or one number per leaf. This gives the same numbers as PEFT
    (`majority_sign_method="total"`).
    """
    _leaves.name_members("task_vectors", task_vectors)
    trimmed = [trim(task_vector, density=density) for task_vector in task_vectors]
    return disjoint_merge(trimmed, elect_sign(trimmed), weights)


def elect_sign(task_vectors: Sequence[PyTree]) -> PyTree:
    """+1 where the sum of the task vectors is >= 0, else -1, entry by entry."""
    return _elect(task_vectors, lambda leaf: leaf)


def elect_sign_by_count(task_vectors: Sequence[PyTree]) -> PyTree:
    """+1 where at least as many task vectors are positive as negative, else -1."""
    return _elect(task_vectors, jnp.sign)


def elect_sign_global(task_vectors: Sequence[PyTree], *, majority: Scalar | None = None) -> PyTree:
    """The sign of the sum; entries whose sum is 0 take the sign of most other entries.

    Args:
      majority: that sign, +1 or -1; None computes it from these trees (`sign_balance`).

    Returns:
      A tree of +1 and -1, float32 or wider.
    """
    if majority is None:
        majority = jnp.where(jnp.asarray(sign_balance(task_vectors)) >= 0, 1, -1)
    _checks.scalar(majority=majority)
    _checks.finite(majority=majority)
    fallback = majority

    def formula(i: int, path: str, *leaves: Array) -> Array:
        sign = jnp.sign(_leaves.total(leaves))
        return jnp.where(sign == 0, _numerics.scalar(fallback, sign), sign)

    trees_by_name = _leaves.name_members("task_vectors", task_vectors)
    return _leaves.combine_leaves(formula, trees_by_name, [], keep_dtype=False)


def sign_balance(task_vectors: Sequence[PyTree]) -> Scalar:
    """The number of positive entries of the task vectors' sum, minus that of negative ones.

    Tied leaves count once.
    """

    def formula(i: int, path: str, *leaves: Array) -> Array:
        total = _leaves.total(leaves)
        balance = jnp.sum(total > 0, dtype=jnp.int32) - jnp.sum(total < 0, dtype=jnp.int32)
        return balance.astype(total.dtype)

    trees_by_name = _leaves.name_members("task_vectors", task_vectors)
    counts = _leaves.combine_leaves(formula, trees_by_name, [], keep_dtype=False)
    inexact, _ = trees.partition(counts, trees.everything)
    distinct = {id(leaf): leaf for leaf in jax.tree.leaves(inexact)}
    return sum((leaf.astype(float) for leaf in distinct.values()), jnp.zeros((), float))


def disjoint_merge(
    task_vectors: Sequence[PyTree],
    signs: PyTree,
    weights: Weights | None = None,
    *,
    divisor: Divisor | None = None,
) -> PyTree:
    """`sum_i m_i w_i tau_i / divisor(m)`, `m_i` = where `tau_i` has the elected sign.

    An entry of 0 agrees with neither sign.

    Args:
      task_vectors: a list of trees of one structure.
      signs: the elected signs, +1 and -1.
      weights: one per task vector; None for 1 each.
      divisor: `m -> [...]`, from bools `[N, ...]`; `agreeing_count` when None (the paper's mean),
        `agreeing_weight(w)`, or `undivided`. Where it is 0, the sum is not divided.

    Returns:
      The merged task vector, float32 or wider.
    """
    trees_by_name = {"signs": signs} | _leaves.name_members("task_vectors", task_vectors)
    by_leaf = _leaves.weights_by_leaf(weights, len(task_vectors), task_vectors[0])

    def formula(i: int, path: str, elected: Array, *leaves: Array) -> Array:
        # NaN agrees, so that it stays visible: it also spoils the election.
        agreement = [((jnp.sign(x) == elected) & (x != 0)) | jnp.isnan(x) for x in leaves]
        terms = zip(by_leaf[i], leaves, agreement, strict=True)
        total = _leaves.total([jnp.where(agree, _leaves.scaled(w, x), 0) for w, x, agree in terms])
        count = (divisor or agreeing_count)(jnp.stack(agreement)).astype(total.dtype)
        return total / jnp.where(count == 0, 1, count)

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf], keep_dtype=False)


def agreeing_count(agrees: Array) -> Array:
    """The number of members that agree, bool `[N, ...]` -> `[...]`: the paper's and PEFT's mean."""
    return jnp.sum(agrees, axis=0)


def agreeing_weight(weights: Sequence[Scalar] | Array) -> Divisor:
    """The total weight of the members that agree: mergekit's `normalize`."""

    def divisor(agrees: Array) -> Array:
        zero = jnp.zeros((), float)
        pairs = zip(weights, agrees, strict=True)
        shares = [jnp.where(agree, _numerics.scalar(w, zero), 0) for w, agree in pairs]
        total, size = _leaves.total(shares), _leaves.total([jnp.abs(share) for share in shares])
        # Weights of both signs may cancel up to rounding, which must not divide.
        return jnp.where(jnp.abs(total) > 2 * jnp.finfo(zero.dtype).eps * size, total, 0)

    return divisor


def undivided(agrees: Array) -> Array:
    """A divisor of 1, bool `[N, ...]` -> `[...]`, for a sum instead of a mean."""
    return jnp.ones_like(agrees[0])


def _elect(task_vectors: Sequence[PyTree], vote: Callable[[Array], Array]) -> PyTree:
    def formula(i: int, path: str, *leaves: Array) -> Array:
        total = _leaves.total([vote(leaf) for leaf in leaves])
        return jnp.where(total >= 0, 1, -1).astype(total.dtype)

    trees_by_name = _leaves.name_members("task_vectors", task_vectors)
    return _leaves.combine_leaves(formula, trees_by_name, [], keep_dtype=False)
