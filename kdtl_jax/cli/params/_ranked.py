"""Merges that rank a tensor's entries, as streams: TIES tensor by tensor, breadcrumbs and SCE."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import transforms
from kdtl_jax.cli.params import _ranks, _rewrite
from kdtl_jax.cli.params._members import (
    PIECE,
    Members,
    Options,
    Stored,
    Stream,
    Tree,
    added,
    agreed,
    pieces,
    shape,
    taus,
)

Bounds = Callable[[int], tuple[int, int]]  # a tensor's size -> the first rank kept, and its end
Combine = Callable[[Members, Options, Sequence[Tree]], Tree]

_taus = jax.jit(taus)


def ties(o: Options) -> Stream:
    """As `transforms.ties_per_leaf`: the entries of largest magnitude, an undecided sign is +."""
    return _between(o, lambda size: (0, math.floor(o.density * size)), agreed)


def breadcrumbs(o: Options) -> Stream:
    """As `transforms.breadcrumbs`: neither the largest entries nor the smallest."""

    def bounds(size: int) -> tuple[int, int]:
        kept = math.floor(o.density * size)
        top = min(math.floor(o.outliers * size), size - kept)
        return top, top + kept

    return _between(o, bounds, added)


def sce(o: Options) -> Stream:
    """As `transforms.sce`: entries by variance, models by energy, the majority's signs."""

    @jax.jit
    def merged(x: Members, kept: jax.Array, shares: jax.Array) -> jax.Array:
        vectors = [transforms.keep(tau, {PIECE: kept}) for tau in taus(x)]
        agreeing = transforms.agreeing_weight(shares)
        mean = transforms.disjoint_merge(
            vectors,
            transforms.elect_sign(vectors),
            shares,
            divisor=lambda agrees: jnp.maximum(agreeing(agrees), 1e-6),
        )
        return transforms.apply_task_vectors(x.base, [mean])[PIECE]

    def stream(x: Stored) -> Iterator[np.ndarray]:
        cut = _varying(x, o.density)
        shares = _shares(x, cut)
        for piece, kept in _selected(x, cut):
            yield np.asarray(merged(piece, kept, shares))

    return stream


def _between(o: Options, bounds: Bounds, combine: Combine) -> Stream:
    @jax.jit
    def merged(x: Members, masks: list[Tree]) -> jax.Array:
        vectors = [transforms.keep(t, m) for t, m in zip(taus(x), masks, strict=True)]
        return combine(x, o, vectors)[PIECE]

    def stream(x: Stored) -> Iterator[np.ndarray]:
        first, end = bounds(math.prod(shape(x)))
        # Every model's entries are ranked twice, for the two ends.
        cut = _ranks.find(
            lambda: (_magnitudes(piece) * 2 for piece in pieces(x, _rewrite.BLOCK)),
            [end] * x.number + [first] * x.number,
        )
        seen = np.zeros(2 * x.number, np.int64)
        for piece in pieces(x, _rewrite.BLOCK):
            masks = []
            for i, keys in enumerate(_magnitudes(piece)):
                dropped = _ranks.taken(cut, keys, x.number + i, seen)
                masks.append({PIECE: _ranks.taken(cut, keys, i, seen) & ~dropped})
            yield np.asarray(merged(piece, masks))

    return stream


def _magnitudes(piece: Members) -> list[np.ndarray]:
    return [_ranks.keys(np.asarray(tau[PIECE])) for tau in _taus(piece)]


def _varying(x: Stored, top: float) -> _ranks.Cut:
    """The `floor(top n)` largest of the n variances that are not 0; every entry if `top` is 1."""
    if top == 1:
        return _ranks.Cut(np.array([0]), np.array([math.prod(shape(x))]))

    def read() -> Iterator[list[np.ndarray]]:
        for piece in pieces(x, _rewrite.BLOCK):
            yield [_variances(piece)]

    varying = sum(int(np.count_nonzero(keys != 1)) for (keys,) in read())
    return _ranks.find(read, [math.floor(top * varying)])


@np.errstate(invalid="ignore", over="ignore")  # infinity gives NaN, which is reported by tensor
def _variances(piece: Members) -> np.ndarray:
    # NumPy's is several times faster than XLA's on a CPU. The last bits, which differ, differ
    # between XLA's programs for tensors of several sizes as well.
    return _ranks.keys(np.var([np.asarray(tau[PIECE]) for tau in _taus(piece)], axis=0))


def _selected(x: Stored, cut: _ranks.Cut) -> Iterator[tuple[Members, np.ndarray]]:
    seen = np.zeros(1, np.int64)
    for piece in pieces(x, _rewrite.BLOCK):
        yield piece, _ranks.taken(cut, _variances(piece), 0, seen)


@np.errstate(invalid="ignore", over="ignore")
def _shares(x: Stored, cut: _ranks.Cut) -> np.ndarray:
    """Every model's share of the energy of all; equal ones where there is none."""
    energy = np.zeros(x.number)
    for piece, kept in _selected(x, cut):
        vectors = [np.asarray(tau[PIECE])[kept].astype(np.float64) for tau in _taus(piece)]
        energy += [np.dot(vector, vector) for vector in vectors]
    whole = energy.sum()
    shares = energy / whole if whole > 0 else np.full(x.number, 1 / x.number)
    return shares.astype(np.float32)
