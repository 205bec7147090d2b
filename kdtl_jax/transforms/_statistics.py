"""Merging by what the models' data say: Fisher, RegMean, and SCE by the weights' own variance."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _leaves, _ranking
from kdtl_jax.transforms._leaves import Weights
from kdtl_jax.transforms._sparsify import floor_share

_HIGHEST = jax.lax.Precision.HIGHEST


def fisher_merge(
    models: Sequence[Params],
    fishers: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    floor: Scalar = 0.0,
) -> Params:
    """`sum_i w_i F_i theta_i / sum_i w_i F_i`, entry by entry, with every `F_i >= floor`.

    Where no model cares about an entry (every `F_i` is 0), it is the weighted average.

    Args:
      models: a list of trees of one structure.
      fishers: their diagonal Fisher informations (`fisher.true_fisher`), equal shapes.
      weights: 1 each when None, else one per model.
      floor: smallest Fisher information, in its own unit (squared loss per squared weight), so that
        entries of all models below it are averaged; the paper's code has 1e-6.

    Returns:
      A tree with the first model's structure, dtypes and leaves that are not inexact.

    Raises:
      ValueError: if names, shapes or numbers of trees and weights differ, or the weights sum to 0.

    References:
      Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2021 (2111.09832). Their
      code floors the target model's Fisher only and divides each `w_i` by `||F_i||`.
    """
    if len(fishers) != len(models):
        raise ValueError(f"expected {len(models)} Fisher trees, one per model, got {len(fishers)}.")
    named = _leaves.numbered("models", models)
    named |= _leaves.numbered("fishers", fishers)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])
    count = len(models)

    def formula(i: int, path: str, *leaves: Array) -> Array:
        _leaves.nonzero_total(path, by_leaf[i])
        least = _numerics.scalar(floor, leaves[0])
        informations = [
            _leaves.scaled(w, jnp.maximum(fisher, least))
            for w, fisher in zip(by_leaf[i], leaves[count:], strict=True)
        ]
        total = sum(informations[1:], informations[0])
        cared = total != 0
        plain = [_leaves.scaled(w, jnp.ones_like(total)) for w in by_leaf[i]]
        shares = [jnp.where(cared, f, w) for f, w in zip(informations, plain, strict=True)]
        terms = [f * x for f, x in zip(shares, leaves[:count], strict=True)]
        return sum(terms[1:], terms[0]) / jnp.where(cared, total, sum(plain[1:], plain[0]))

    return _leaves.combine_leaves(formula, named, [by_leaf])


def regmean(
    models: Sequence[Params],
    grams: Sequence[Mapping[str, Array]],
    *,
    shrink: Scalar = 0.9,
    ridge: Scalar = 1e-6,
) -> Params:
    """`(sum_i G_i)^-1 sum_i G_i W_i`: the least-squares fit to all models' linear outputs.

    `G_i = X_i^T X_i` of the inputs a kernel `[..., in, out]` saw under model i, its off-diagonal
    entries times `shrink`. Every other leaf is averaged.

    Args:
      models: a list of trees of one structure.
      grams: for every model `{path of a kernel: G [..., in, in]}`; all with the same paths.
      shrink: the paper's alpha; 1 is the exact least squares, 0 weighs by input power alone.
      ridge: times the mean diagonal of all `G_i`, added to each; inputs that no model ever saw
        fall back to the average instead of dividing by zero.

    Returns:
      A tree with the first model's structure, dtypes and leaves that are not inexact.

    Raises:
      ValueError: if names, shapes or paths differ, or a Gram matrix does not fit its kernel.

    References:
      Jin et al., Dataless Knowledge Fusion by Merging Weights, 2022 (2212.09849), eq. 2 and 3.
    """
    if len(grams) != len(models):
        raise ValueError(f"expected {len(models)} sets of Grams, got {len(grams)}.")
    named = _leaves.numbered("models", models)
    _checks.same_leaves(**{f"grams[{i}]": gram for i, gram in enumerate(grams)})
    for path, gram in grams[0].items():
        _check_gram(path, gram, trees.flatten(models[0]))

    def formula(i: int, path: str, *leaves: Array) -> Array:
        if path not in grams[0]:
            return sum(leaves[1:], leaves[0]) / len(leaves)
        stacked = jnp.stack([jnp.asarray(gram[path], leaves[0].dtype) for gram in grams])
        eye = jnp.eye(stacked.shape[-1], dtype=stacked.dtype)
        soft, added = (_numerics.scalar(value, stacked) for value in (shrink, ridge))
        diagonal = jnp.diagonal(stacked, axis1=-2, axis2=-1)
        mean = jnp.mean(diagonal, axis=(0, -1))[..., None, None]
        eye = jnp.broadcast_to(eye, stacked.shape)
        stacked = soft * stacked + ((1 - soft) * diagonal[..., None, :] + added * mean[None]) * eye
        right = jnp.sum(jnp.matmul(stacked, jnp.stack(leaves), precision=_HIGHEST), axis=0)
        left = jnp.sum(stacked, axis=0)
        return jnp.linalg.solve(left, right)

    # The Grams of tied leaves differ.
    by_path = [list(trees.flatten(models[0]))]
    return _leaves.combine_leaves(formula, named, by_path)


def sce(
    base: Params, models: Sequence[Params], *, top: Scalar = 1.0, floor: Scalar = 0.0
) -> Params:
    """Select entries by variance, calculate weights by energy, erase minority signs, leaf by leaf.

    Entries are the `floor(top n)` of largest variance across models, `n` the entries that vary at
    all; model i weighs the mean square of its delta; an entry keeps the deltas whose sign is that
    of the sum, renormalized.

    Args:
      base: pretrained parameters.
      models: a list of fine-tuned models of its structure.
      top: share of varying entries to take, in `[0, 1]`; 1 takes every entry.
      floor: models weigh the same where their energies (squared units of the weights) sum to no
        more than this; mergekit's is 1e-6.

    Returns:
      A tree with the structure and dtypes of the base.

    Raises:
      ValueError: if names or shapes differ, or `top` lies outside `[0, 1]`.

    References:
      Wan et al., FuseChat, 2024 (2408.07990), SCE; mergekit's `sce`.
    """
    _checks.within(0, 1, top=top)

    def formula(i: int, path: str, start: Array, *leaves: Array) -> Array:
        deltas = jnp.stack([leaf - start for leaf in leaves])
        known = _checks.concrete(top)
        if known is None or known < 1:
            deltas = jnp.where(_varying(deltas, top)[None], deltas, 0)
        energy = jnp.mean(jnp.square(deltas), axis=tuple(range(1, deltas.ndim)), keepdims=True)
        whole = jnp.sum(energy)
        weighs = whole > _numerics.scalar(floor, whole)
        share = jnp.where(weighs, energy / jnp.where(weighs, whole, 1), 1 / len(leaves))
        sign = jnp.where(jnp.sum(deltas, axis=0) >= 0, 1, -1).astype(start.dtype)
        agrees = (jnp.sign(deltas) == sign[None]).astype(start.dtype)
        total = jnp.sum(agrees * share, axis=0)
        return start + jnp.sum(agrees * share * deltas, axis=0) / jnp.maximum(total, 1e-6)

    named = {"base": base} | _leaves.numbered("models", models)
    return _leaves.combine_leaves(formula, named, [])


def _check_gram(path: str, gram: Array, flat: Mapping[str, Array]) -> None:
    if path not in flat:
        near = trees.nearest(path, list(flat))
        raise ValueError(f"the models have no leaf {path!r}; nearest paths: {near}.")
    kernel = flat[path]
    wanted = (*kernel.shape[:-2], kernel.shape[-2], kernel.shape[-2]) if kernel.ndim > 1 else None
    if gram.shape != wanted:
        raise ValueError(
            f"{path!r} must be a kernel [..., in, out] with a Gram matrix [..., in, in], "
            f"got {_checks.described(kernel=kernel, gram=gram)}."
        )


def _varying(deltas: Array, top: Scalar) -> Array:
    variance = jnp.var(deltas, axis=0)
    varying = jnp.sum(variance != 0)
    known, count = _checks.concrete(top), _checks.concrete(varying)
    if known is not None and count is not None:
        kept = floor_share(int(count), top=top)
    else:
        kept = jnp.floor(jnp.asarray(top) * varying.astype(jnp.float32)).astype(jnp.int32)
    return _ranking.top(variance, kept)
