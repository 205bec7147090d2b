"""SCE: selects entries by their variance across models, and weights models by their energy.

Variances are ranked and energies summed by passes over a leaf's pieces (`sce_selection`); then each
piece is merged separately (`sce_piece`), so a leaf may be larger than memory. A piece is a list of
equal blocks of rows `[rows, ...]` in one dtype: the base's, then one per model.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _blocks, _leaves, _ranking
from kdtl_jax.transforms._blocks import Read
from kdtl_jax.transforms._sparsify import floor_share


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
    return start + _leaves.total(terms) / jnp.where(weight != 0, weight, 1)


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
