"""Sparsifying task vectors: trim by magnitude, DARE, DELLA, breadcrumbs, and Mixout.

Random draws use a key folded with each leaf's path, so a leaf's draw does not depend on the rest of
the tree, and with the number of each block of its rows (`block_rows`), so a leaf may come in
pieces: `dare` and `della` take the number of the first block in the leaves they are given.

Other conventions are built from `keep` and the two rescalings: mergekit's DARE, for example, is
`rescale_l1(keep(tau, mask), tau)`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _blocks, _codes, _leaves, _ranking
from kdtl_jax.transforms._leaves import Coefficient


def trim(task_vector: PyTree, *, density: Coefficient) -> PyTree:
    """Keeps the `floor(density n)` entries of largest magnitude of every leaf; zeroes the rest.

    Equal magnitudes are kept in storage order, so the count is exact; NaN counts as smallest. A
    bias of 3 entries at density 0.2 keeps none; `trim_global` ranks all leaves together instead.

    Args:
      density: share to keep, in `[0, 1]`; leaves that match no rule are kept whole.

    References:
      PEFT's `magnitude_prune`, which is the first step of PEFT's and mergekit's TIES.
    """
    values = _leaves.coefficients(density, task_vector, name="density")

    def formula(i: int, path: str, leaf: Array) -> Array:
        if values[i] is None:
            return leaf
        count = floor_share(leaf.size, density=values[i])
        return jnp.where(_ranking.top(jnp.abs(leaf), count), leaf, 0)

    return _leaves.combine_leaves(formula, {"task_vector": task_vector}, [values])


def trim_global(task_vector: PyTree, *, density: Scalar = 0.2) -> PyTree:
    """Keeps the `floor(density n)` entries of largest magnitude of the whole parameter vector.

    `trim_to_cut` does the same leaf by leaf, for vectors larger than memory.

    Args:
      task_vector: any pytree; its inexact leaves are ranked as one vector, with tied leaves (one
        array, or equal arrays that are not all zero) counted once.
      density: share to keep, in `[0, 1]`; the paper's top-k percent.

    References:
      Yadav et al., TIES-Merging, 2023 (2306.01708), step 1.
    """
    _codes.refuse_codes(trees.flatten(task_vector))
    inexact, others = trees.partition(task_vector, trees.everything)
    leaves, treedef = jax.tree.flatten(inexact)
    if not leaves:
        return task_vector
    leaves = _merge_ties(inexact, leaves)
    upcast = {id(x): y for x, y in zip(leaves, _leaves.one_dtype(leaves), strict=True)}
    size = sum(leaf.size for leaf in upcast.values())
    cut = magnitude_cut(
        upcast.values, floor_share(size, density=density), next(iter(upcast.values())).real.dtype
    )
    trimmed, ties_before = {}, 0
    for leaf in leaves:
        if id(leaf) not in trimmed:
            trimmed[id(leaf)], ties_before = trim_to_cut(leaf, cut, ties_before)
    result = [trimmed[id(leaf)] for leaf in leaves]
    return trees.combine(jax.tree.unflatten(treedef, result), others)


def _merge_ties(tree: PyTree, leaves: Sequence[Any]) -> list[Any]:
    """The leaves, with those stored twice as one array; zeros mean no change and are not tied."""
    flat, first = trees.flatten(tree), _leaves.equal_paths(tree)
    paths = zip(flat, leaves, strict=True)
    return [flat[first[p]] if p in first and np.any(np.asarray(x)) else x for p, x in paths]


def magnitude_cut(
    read: Callable[[], Iterable[Array]], count: Any, dtype: Any = jnp.float32
) -> _ranking.Cut:
    """The cut that keeps the `count` entries of largest magnitude among all leaves `read()` yields.

    Leaves may have any shape. `count` is at most the number of their entries.

    Args:
      read: called once per 16 bits of `dtype`; must yield the same leaves every time, which may be
        read from a file one after another.
      dtype: float32 or float64, in which magnitudes are ranked. NaN comes last.
    """
    return _ranking.largest(lambda: map(jnp.abs, read()), count, dtype)


def trim_to_cut(leaf: Array, cut: _ranking.Cut, before: Any = 0) -> tuple[Array, Array]:
    """Zeroes the entries of a leaf that a cut does not keep.

    Args:
      leaf: one of the leaves the cut was made for, of any shape.
      before: how many entries equal to the threshold came in earlier leaves.

    Returns:
      `(trimmed, before)`: the leaf, and `before` for the next one.
    """
    mask, before = _ranking.select(jnp.abs(leaf), cut, before)
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)), before


def breadcrumbs(task_vector: PyTree, *, density: Coefficient, outliers: Coefficient) -> PyTree:
    """Drops the largest `floor(outliers n)` entries of every leaf and the smallest of the rest.

    `floor(density n)` entries remain; if that leaves no room, fewer outliers are dropped.

    Args:
      density: share to keep, in `[0, 1]`; leaves that match no rule are kept whole.
      outliers: share of largest entries to drop, likewise (the paper's 1 - gamma; its mask keeps
        the entries between the beta and gamma percentiles, density = gamma - beta).

    References:
      Davari and Belilovsky, Model Breadcrumbs, 2023 (2312.06795). mergekit before 0.1.5
      dropped *every* entry of a leaf where `outliers n < 1`.
    """
    densities = _leaves.coefficients(density, task_vector, name="density")
    outlier_shares = _leaves.coefficients(outliers, task_vector, name="outliers")

    def formula(i: int, path: str, leaf: Array) -> Array:
        if densities[i] is None or outlier_shares[i] is None:
            return leaf
        largest = floor_share(leaf.size, outliers=outlier_shares[i])
        count = floor_share(leaf.size, density=densities[i])
        largest = jnp.minimum(largest, leaf.size - count)
        magnitude = jnp.abs(leaf)
        is_kept = _ranking.top(magnitude, largest + count) & ~_ranking.top(magnitude, largest)
        return jnp.where(is_kept, leaf, 0)

    return _leaves.combine_leaves(
        formula, {"task_vector": task_vector}, [densities, outlier_shares]
    )


def dare(
    key: Array, task_vector: PyTree, *, density: Coefficient, block: int | Array = 0
) -> PyTree:
    """Drops entries at random and divides the kept ones by `density`: unbiased over keys.

    Tied leaves share their draws, even if they are stored twice: leaves of one shape are compared,
    and those with equal values count as tied. Under `jit` and `grad`, values cannot be compared, so
    tie leaves inside the traced function, as in `tree | {"head": tree["embed"]}`; otherwise they
    are drawn independently. So are leaves that are partly in other processes, even outside `jit`.

    Args:
      density: probability of keeping an entry, in (0, 1], the paper's 1 - p; leaves that match no
        rule are kept whole.
      block: number of the leaves' first block of rows (`block_rows`); 0 for whole leaves.

    References:
      Yu et al., Language models are super Mario, 2023 (2311.03099). PEFT rescales like this;
      mergekit by L1 norms: `rescale_l1(keep(task_vector, mask), task_vector)`.
    """
    values = _leaves.coefficients(density, task_vector, name="density")
    first_paths = _leaves.equal_paths(task_vector)
    _checks.scalar(block=block)
    _checks.integers(block=block)

    def formula(i: int, path: str, leaf: Array) -> Array:
        if values[i] is None:
            return leaf
        _checks.positive(density=values[i])
        _checks.within(0, 1, density=values[i])
        share, path = _numerics.scalar(values[i], leaf), first_paths.get(path, path)
        is_kept = _blocks.uniform(key, path, leaf.shape, share.real.dtype, block) < share.real
        return jnp.where(is_kept, leaf / share, 0)

    return _leaves.combine_leaves(formula, {"task_vector": task_vector}, [values])


def della_probabilities(
    task_vector: PyTree, *, density: Coefficient, epsilon: Scalar = 0.15
) -> PyTree:
    """Keep probabilities that rise with magnitude: `density - epsilon` to `density + epsilon`.

    Entries are ranked within each row (the last axis); a row of one entry gets `density`. Their
    mean is always the density: near 0 and 1 the spread is cut equally on both sides.

    Args:
      task_vector: any pytree; a leaf without axes gets `density`.
      density: mean probability, in `[0, 1]`; leaves that match no rule get 1.
      epsilon: half the spread, >= 0; reduced if `density -+ epsilon` would leave `[0, 1]`.

    Returns:
      A tree of the same structure, float32 or wider.

    References:
      Deep et al., DELLA-Merging, 2024 (2406.11617), MagPrune.
    """
    values = _leaves.coefficients(density, task_vector, name="density")
    _checks.scalar(epsilon=epsilon)
    _checks.non_negative(epsilon=epsilon)

    def formula(i: int, path: str, leaf: Array) -> Array:
        if values[i] is None:
            return jnp.ones_like(leaf)
        _checks.within(0, 1, density=values[i])
        mean = jnp.broadcast_to(_numerics.scalar(values[i], leaf), leaf.shape)
        if leaf.ndim == 0 or leaf.shape[-1] == 1:
            return mean
        order = jnp.argsort(jnp.abs(leaf), axis=-1, stable=True)
        ranks = jnp.broadcast_to(jnp.arange(leaf.shape[-1], dtype=leaf.dtype), leaf.shape)
        rank = jnp.put_along_axis(jnp.zeros_like(leaf), order, ranks, axis=-1, inplace=False)
        offset = 2 * rank / (leaf.shape[-1] - 1) - 1
        # Clipped at 0 or 1, the probabilities would no longer have the density as their mean.
        half_width = jnp.minimum(
            jnp.minimum(mean, 1 - mean), _numerics.scalar(epsilon, leaf, "epsilon")
        )
        return mean + half_width * offset

    return _leaves.combine_leaves(formula, {"task_vector": task_vector}, [values], keep_dtype=False)


def della(
    key: Array,
    task_vector: PyTree,
    *,
    density: Coefficient,
    epsilon: Scalar = 0.15,
    block: int | Array = 0,
) -> PyTree:
    """Drops entries at random, small ones more often; divides those kept by their probability.

    Unbiased over keys where probabilities are > 0. Tied leaves share their draws, as in `dare`.

    Args:
      density: mean probability of keeping an entry, as in `della_probabilities`.
      epsilon: half the spread of the probabilities, likewise.
      block: as in `dare`.

    References:
      Deep et al., DELLA-Merging, 2024 (2406.11617). mergekit rescales by L1 norms instead:
      `rescale_l1(keep(task_vector, mask), task_vector)`.
    """
    probabilities = della_probabilities(task_vector, density=density, epsilon=epsilon)
    first_paths = _leaves.equal_paths(task_vector)

    def formula(i: int, path: str, leaf: Array, probability: Array) -> Array:
        draw = _blocks.uniform(key, first_paths.get(path, path), leaf.shape, leaf.dtype, block)
        is_kept = draw < probability
        return jnp.where(is_kept, leaf / jnp.where(is_kept, probability, 1), 0)

    trees_by_name = {"task_vector": task_vector, "probabilities": probabilities}
    return _leaves.combine_leaves(formula, trees_by_name, [])


def keep(task_vector: PyTree, mask: PyTree) -> PyTree:
    """Zeroes the entries where `mask` (a tree of bool arrays of the same shapes) is false."""
    flags = jax.tree.map(lambda m: m.astype(bool) if hasattr(m, "dtype") else m, mask)
    return _leaves.combine_leaves(
        lambda i, path, leaf, kept: jnp.where(kept != 0, leaf, 0),
        {"task_vector": task_vector, "mask": flags},
        [],
    )


def rescale_l1(sparse: PyTree, original: PyTree, *, floor: float = 0.0) -> PyTree:
    """`sparse ||original||_1 / ||sparse||_1`, by leaf; unchanged if a norm is at most `floor`.

    mergekit's convention for DARE and DELLA, with a floor of 1e-7 (in units of the weights, >= 0),
    which does not rescale very small task vectors. It restores the mean magnitude exactly but is
    not unbiased: a leaf whose kept entries happen to be small is scaled up too much.
    """
    _checks.scalar(floor=floor)
    _checks.non_negative(floor=floor)

    def formula(i: int, path: str, pruned: Array, dense: Array) -> Array:
        norms = [l1_norms(*pieces) for pieces in _blocks.row_blocks([dense, pruned])]
        return pruned * l1_ratio(norms, floor=floor)

    return _leaves.combine_leaves(formula, {"sparse": sparse, "original": original}, [])


def l1_ratio(norms: Iterable[Sequence[Array]], *, floor: float = 0.0) -> Array:
    """The factor `[]` of `rescale_l1` for a leaf, from the `l1_norms` of its pieces."""
    original, sparse = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), norms)
    usable = (original > floor) & (sparse > floor)
    return jnp.where(usable, original / jnp.where(usable, sparse, 1), 1)


@jax.jit
def l1_norms(original: Array, sparse: Array) -> list[Array]:
    """The L1 norms, `[]` each, of a piece of a leaf before and after entries were dropped."""
    return [jnp.sum(jnp.abs(original)), jnp.sum(jnp.abs(sparse))]


def mixout(key: Array, params: Params, source: Params, *, rate: Scalar) -> Params:
    """`(M source + (1 - M) params - rate source) / (1 - rate)`, `M ~ Bernoulli(rate)` per entry.

    Dropout toward the pretrained weights instead of toward zero: the mean over keys is `params`.
    Call it inside the loss, on the selected leaves, with the step's key. Tied leaves share their
    draws as in `dare`; inside a loss, only ties made there are recognized.

    Args:
      rate: probability of taking the source's entry, in `[0, 1)`; 0 returns `params`.

    References:
      Lee, Cho and Kang, Mixout, 2019 (1909.11299).
    """
    _checks.within(0, 1, rate=rate)
    concrete_rate = _checks.concrete(rate)
    if concrete_rate is not None and bool((concrete_rate >= 1).any()):
        raise ValueError(f"rate must be below 1, got {concrete_rate}: nothing would be trained.")

    first_paths = _leaves.equal_paths(params)

    def formula(i: int, path: str, leaf: Array, anchor: Array) -> Array:
        p = _numerics.scalar(rate, leaf, "rate")
        path = first_paths.get(path, path)
        is_source = _blocks.uniform(key, path, leaf.shape, p.real.dtype) < p.real
        # The formula's two cases, written so that rate 0 gives `params` bit for bit.
        return jnp.where(is_source, anchor, leaf + p / (1 - p) * (leaf - anchor))

    return _leaves.combine_leaves(formula, {"params": params, "source": source}, [])


def floor_share(size: int, **named: Scalar) -> Scalar:
    """`floor(share size)`; in the share's own precision if it is known, so that 0.7 of 10 is 7."""
    _checks.within(0, 1, **named)
    (share,) = named.values()
    concrete_share = _checks.concrete(share)
    if concrete_share is None:
        return jnp.floor(jnp.asarray(share) * size).astype(jnp.int32)
    is_float32 = concrete_share.dtype.itemsize == 4 and concrete_share.dtype.kind == "f"
    return math.floor(
        concrete_share * np.float32(size) if is_float32 else float(concrete_share) * size
    )
