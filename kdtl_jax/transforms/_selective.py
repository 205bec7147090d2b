"""Merging entry by entry: which model each entry comes from, and how much of it.

Quantities of the whole leaf (`arcee_threshold`, `ram_boosts`, `sce_selection`) are computed by
passes over its pieces; then each piece is merged separately (`arcee_piece`, `ram_piece`,
`sce_piece`), so a leaf may be larger than memory. A piece is a list of equal blocks of rows
`[rows, ...]` in one dtype: the base's, then one per model.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _blocks, _leaves, _ranking
from kdtl_jax.transforms._blocks import Read
from kdtl_jax.transforms._sparsify import floor_share

_ADDED = 1e-8  # to probabilities, by mergekit


def near_swap(base: Params, model: Params, *, t: Scalar) -> Params:
    """Takes the model's entry where the two are within `t`, and less of it at larger distances.

    `q model + (1 - q) base` with `q = min(t / |base - model|, 1)`.

    Args:
      t: the distance up to which the model's entry is taken fully; >= 0.

    References:
      mergekit's `nearswap` (2403.13257).
    """
    _checks.non_negative(t=t)

    def formula(i: int, path: str, a: Array, b: Array) -> Array:
        gap, distance = jnp.abs(a - b), _numerics.scalar(t, a, "t")
        is_near = gap <= distance
        share = jnp.where(is_near, 1, distance / jnp.where(is_near, 1, gap))
        return share * b + (1 - share) * a

    return _leaves.combine_leaves(formula, {"base": base, "model": model}, [])


def arcee_fusion(base: Params, model: Params) -> Params:
    """Takes the model's entries where their importance stands out, and the base's elsewhere.

    The importance of an entry is `|model - base|` times `KL(softmax(model) || softmax(base))` of
    its row (the last axis), with 1e-8 added to probabilities. It stands out if it is at least
    `median + 1.5 (third quartile - first quartile)` of its leaf.

    References:
      mergekit's `arcee_fusion`, which estimates the quartiles of leaves of more than a million
      entries from a random sample; here they are exact. For changes below 1e-3, its float32
      divergences are partly rounding error, and it takes more entries than stand out.
    """

    def formula(i: int, path: str, *leaves: Array) -> Array:
        threshold = arcee_threshold(lambda: _blocks.row_blocks(leaves))
        return _blocks.in_blocks(leaves, lambda k, pieces: arcee_piece(pieces, threshold))

    return _leaves.combine_leaves(formula, {"base": base, "model": model}, [])


def arcee_threshold(read: Read) -> Array:
    """The least importance `[]` at which an entry stands out; the pieces hold whole rows."""

    def importances() -> Iterable[Array]:
        return (_importance(*pieces) for pieces in read())

    pieces_read = [(pieces[0].size, pieces[0].dtype) for pieces in read()]
    size, dtype = sum(entries for entries, _ in pieces_read), pieces_read[0][1]
    # The entries at the places floor(share (n - 1)) of the sorted leaf.
    low, middle, high = (
        _ranking.kth_largest(importances, size - int(share * (size - 1)), dtype)
        for share in (0.25, 0.5, 0.75)
    )
    return middle + 1.5 * (high - low)


def arcee_piece(pieces: Sequence[Array], threshold: Array) -> Array:
    """`arcee_fusion` of one piece of base and model."""
    base, model = pieces
    is_important = _importance(base, model) >= threshold
    return jnp.where(is_important.reshape(base.shape), model, base)


def ram(
    base: Params,
    models: Sequence[Params],
    *,
    epsilon: Scalar = 1e-5,
    gain: Scalar = 0.0,
    limit: Scalar = 0.2,
) -> Params:
    """Reinforced Agent Merging: keeps changes made by one model only, and averages shared ones.

    A model changed an entry if it moved by more than `epsilon`. Changes made only by model i are
    multiplied by `1 + gain min(rho_i, limit)`, where `rho_i` is the number of entries it changed
    together with others over the number it changed alone, leaf by leaf.

    Args:
      epsilon: changes up to this size, >= 0, in units of the weights, are ignored.
      gain: 0 is RAM; 0.1 is RAM+.
      limit: the largest `rho` used, >= 0.

    References:
      Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models, 2026 (2601.13572);
      mergekit's `ram` and `ramplus_tl`.
    """
    _checks.scalar(epsilon=epsilon, gain=gain, limit=limit)
    _checks.non_negative(epsilon=epsilon, limit=limit)
    _checks.finite(gain=gain)

    def formula(i: int, path: str, *leaves: Array) -> Array:
        def read() -> Iterable[Sequence[Array]]:
            return _blocks.row_blocks(leaves)

        boosts = ram_boosts(read, epsilon=epsilon, gain=gain, limit=limit)
        return _blocks.in_blocks(
            leaves, lambda k, pieces: ram_piece(pieces, boosts, epsilon=epsilon)
        )

    trees_by_name = {"base": base} | _leaves.name_members("models", models)
    return _leaves.combine_leaves(formula, trees_by_name, [])


def ram_boosts(
    read: Read, *, epsilon: Scalar = 1e-5, gain: Scalar = 0.0, limit: Scalar = 0.2
) -> list[Array]:
    """The factor `[]` for each model's own changes, `1 + gain min(rho_i, limit)`."""
    totals: list[list[Array]] = []  # per model, entries changed with others and alone
    for pieces in read():
        counts = _counts(pieces, epsilon)
        totals = jax.tree.map(jnp.add, totals, counts) if totals else counts

    def boost(shared_count: Array, alone_count: Array) -> Array:
        ratio = shared_count / jnp.maximum(
            alone_count, _numerics.scalar(epsilon, alone_count, "epsilon")
        )
        return 1 + _numerics.scalar(gain, alone_count, "gain") * jnp.clip(ratio, 0, limit)

    return [boost(*pair) for pair in totals]


@jax.jit
def ram_piece(pieces: Sequence[Array], boosts: Sequence[Array], *, epsilon: Scalar = 1e-5) -> Array:
    """`ram` of one piece of base and models."""
    start, *leaves = pieces
    masks = _changed(pieces, epsilon)
    count = sum((shared | alone).astype(start.dtype) for shared, alone in masks)
    out = jnp.zeros_like(start)
    for leaf, (shared, alone), boost in zip(leaves, masks, boosts, strict=True):
        delta = leaf - start
        out = out + jnp.where(alone, boost * delta, jnp.where(shared, delta / count, 0))
    return start + out


@jax.jit
def _counts(pieces: Sequence[Array], epsilon: Scalar) -> list[list[Array]]:
    """For each model, the number of entries it changed with others, and that it changed alone."""
    return [
        [jnp.sum(mask).astype(pieces[0].dtype) for mask in masks]
        for masks in _changed(pieces, epsilon)
    ]


def _changed(pieces: Sequence[Array], epsilon: Scalar) -> list[tuple[Array, Array]]:
    """For each model, masks of the entries it changed with others, and that it changed alone."""
    start, *leaves = pieces
    masks = [jnp.abs(leaf - start) > _numerics.scalar(epsilon, start, "epsilon") for leaf in leaves]
    count = sum(mask.astype(jnp.int32) for mask in masks)
    return [(mask & (count > 1), mask & (count == 1)) for mask in masks]


@jax.jit
def _importance(base: Array, model: Array) -> Array:
    """`|model - base| KL(softmax(model) || softmax(base))`, with the divergence of each row."""
    base, model = (jnp.atleast_1d(x) for x in (base, model))
    p, q = (jnp.exp(_softmax.log_softmax(x)) for x in (model, base))
    # Weights change little, so the plain sum of `p log(p / q)` would be mostly rounding error.
    ratio = _softmax.log_ratio(model, base)
    is_near = jnp.abs(ratio) < 1
    difference = jnp.where(is_near, q * jnp.expm1(jnp.where(is_near, ratio, 0)), p - q)
    log_p, log_q = jnp.log(p + _ADDED), jnp.log(q + _ADDED)
    terms = _softmax.kl_terms(log_p, log_q, jnp.log1p(difference / (q + _ADDED)))
    return jnp.abs(model - base) * jnp.sum(terms, axis=-1, keepdims=True)


class Selection(NamedTuple):
    """The entries and model weights that `sce` uses for a leaf."""

    cut: _ranking.Cut | None  # None: every entry
    before: Sequence[Any]  # how many entries equal to the cut come before each piece
    shares: Sequence[Array]  # `[]` for each model, of sum 1


def sce(
    base: Params, models: Sequence[Params], *, top: Scalar = 1.0, floor: Scalar = 0.0
) -> Params:
    """Selects entries by variance, weights models by energy, erases minority signs, leaf by leaf.

    Takes the `floor(top n)` entries of largest variance across models, where `n` entries vary at
    all. The weight of model i is the mean square of its delta. An entry keeps the deltas with the
    sign of their sum, renormalized. Deltas are squared, so float32 covers sizes 1e-18 to 1e18.

    Args:
      top: share of varying entries to take, in `[0, 1]`; 1 takes every entry.
      floor: models get equal weights if their energies (squared units of the weights) sum to at
        most this, >= 0; mergekit's is 1e-6.

    References:
      Wan et al., FuseChat, 2024 (2408.07990), SCE; mergekit's `sce`.
    """
    _checks.scalar(top=top)
    _checks.within(0, 1, top=top)
    _checks.non_negative(floor=floor)

    def formula(i: int, path: str, *leaves: Array) -> Array:
        selection = sce_selection(lambda: _blocks.row_blocks(leaves), top=top, floor=floor)
        return _blocks.in_blocks(leaves, lambda k, pieces: sce_piece(pieces, selection, k))

    trees_by_name = {"base": base} | _leaves.name_members("models", models)
    return _leaves.combine_leaves(formula, trees_by_name, [])


def sce_selection(read: Read, *, top: Scalar = 1.0, floor: Scalar = 0.0) -> Selection:
    """Selects entries and weighs models for `sce` of a leaf.

    `read()` must yield the same pieces every time.
    """
    _checks.within(0, 1, top=top)
    concrete = _checks.concrete(top)
    cut = None if concrete is not None and concrete >= 1 else _most_varying(read, top)
    sums: list[Array] = []
    size, before = 0, [0]
    for pieces in read():
        mask, ties_before = _select(pieces, cut, before[-1])
        squares = _squared_sums(pieces, mask)
        before.append(ties_before)
        size += pieces[0].size
        sums = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
    energies = [square_sum / size for square_sum in sums]
    total_energy = _leaves.total(energies)
    is_above_floor = total_energy > _numerics.scalar(floor, total_energy, "floor")
    divisor = jnp.where(is_above_floor, total_energy, 1)
    shares = [jnp.where(is_above_floor, energy / divisor, 1 / len(energies)) for energy in energies]
    return Selection(cut, before, shares)


def sce_piece(pieces: Sequence[Array], selection: Selection, number: int) -> Array:
    """`sce` of the piece that `read()` yielded at this number, counted from 0."""
    mask, _ = _select(pieces, selection.cut, selection.before[number])
    return _merge(pieces, mask, selection.shares)


@jax.jit
def _merge(pieces: Sequence[Array], mask: Array | None, weights: Sequence[Array]) -> Array:
    start, deltas = pieces[0], _deltas(pieces, mask)
    total = _leaves.total(deltas)
    sign = jnp.where(total >= 0, 1, -1).astype(start.dtype)
    agreement = [(jnp.sign(delta) == sign).astype(start.dtype) for delta in deltas]
    shares = [agree * share for agree, share in zip(agreement, weights, strict=True)]
    weight = _leaves.total(shares)
    terms = [share * delta for share, delta in zip(shares, deltas, strict=True)]
    return start + _leaves.total(terms) / _numerics.nonzero(weight)


def _most_varying(read: Read, top: Scalar) -> _ranking.Cut:
    """The cut that takes the `floor(top n)` of largest variance of the n entries that vary."""

    def variances() -> Iterable[Array]:
        return (_variance(pieces) for pieces in read())

    varying_count: Any = 0
    dtype: Any = None
    for variance in variances():
        varying_count, dtype = varying_count + jnp.sum(variance != 0), variance.dtype
    concrete_top, concrete_count = _checks.concrete(top), _checks.concrete(varying_count)
    if concrete_top is not None and concrete_count is not None:
        kept_count = floor_share(int(concrete_count), top=top)
    else:
        kept_count = jnp.floor(jnp.asarray(top) * varying_count.astype(jnp.float32)).astype(
            jnp.int32
        )
    return _ranking.largest(variances, kept_count, dtype)


def _select(
    pieces: Sequence[Array], cut: _ranking.Cut | None, before: Any
) -> tuple[Array | None, Any]:
    """Marks the entries that the cut takes (None: all); also returns `before` for the next piece.

    Variances come from the program that computed them for ranking, so they are equal bit for bit.
    """
    return (None, before) if cut is None else _ranking.select(_variance(pieces), cut, before)


def _deltas(pieces: Sequence[Array], mask: Array | None) -> list[Array]:
    """The changes, 0 where the mask is False."""
    start, *leaves = pieces
    deltas = [leaf - start for leaf in leaves]
    return deltas if mask is None else [jnp.where(mask, delta, 0) for delta in deltas]


@jax.jit
def _squared_sums(pieces: Sequence[Array], mask: Array | None) -> list[Array]:
    """The sum of every model's squared changes."""
    return [jnp.sum(jnp.square(delta)) for delta in _deltas(pieces, mask)]


@jax.jit
def _variance(pieces: Sequence[Array]) -> Array:
    start, *leaves = pieces
    return jnp.var(jnp.stack([leaf - start for leaf in leaves]), axis=0)
