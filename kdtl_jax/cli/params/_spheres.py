"""Merges on spheres as streams: their results are linear combinations of the models.

The coefficients depend on inner products alone. So one pass measures these, the method itself runs
on short vectors that have the same ones, and a second pass combines. Inner products are those of
the base (or first model) and of the differences from it, in double precision: what tells models
apart that were fine-tuned from one would be lost in products of the models themselves.

With an axis, the tensor's vectors along it are merged independently. A slab is what is contiguous
and independent of the rest: such vectors side by side, `[length, inner]`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from kdtl_jax.cli.params import _rewrite
from kdtl_jax.cli.params._members import (
    PIECE,
    Members,
    Merge,
    Options,
    Stored,
    Stream,
    part,
    pieces,
    shape,
)


class _Slabs(NamedTuple):
    """How a tensor divides: `number` slabs of `inner` vectors of `length` entries."""

    number: int
    length: int
    inner: int


# Squared: directions that vectors of length 1 span by less than its root are rounding errors.
_TINY = 1e-13
# Infinity gives NaN, which is reported by tensor.
_quiet = np.errstate(invalid="ignore", over="ignore")


def stream(merge: Merge, o: Options) -> Stream:
    """`merge` of the whole tensor or along `o.axis`; small slabs are merged as they are."""
    along = _jitted(merge, o._replace(axis=-2))
    coefficients = _coefficients(_jitted(merge, o._replace(axis=-1)))

    def merged(x: Stored) -> Iterator[np.ndarray]:
        slabs = _slabs(shape(x), o.axis)
        size = slabs.length * slabs.inner
        if size <= _rewrite.BLOCK:
            for piece in pieces(x, _rewrite.BLOCK // size * size):
                rows = jax.tree.map(lambda a: a.reshape(-1, *slabs[1:]), piece)
                yield np.asarray(along(rows)).ravel()
            return
        for i in range(slabs.number):
            slab = part(x, i * size, (i + 1) * size)
            yield from _combined(slab, coefficients(_gram(slab, slabs.inner)))

    return merged


def _slabs(shape: tuple[int, ...], axis: int | None) -> _Slabs:
    """As the methods read `axis`: leaves that lack it, and vectors, are one vector."""
    if axis is None or len(shape) < 2 or not -len(shape) <= axis < len(shape):
        return _Slabs(1, math.prod(shape), 1)
    axis %= len(shape)
    return _Slabs(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def _jitted(merge: Merge, o: Options) -> Callable[[Members], jax.Array]:
    return jax.jit(lambda x: merge(x, o)[PIECE])


@_quiet
def _gram(x: Stored, inner: int) -> np.ndarray:
    """`[inner, 1 + models, 1 + models]`, inner products of a slab's vectors."""
    gram = np.zeros((inner, x.number + 1, x.number + 1))
    for _, vectors in _vectors(x, inner):
        columns = np.moveaxis(vectors, 2, 0)
        gram += columns @ columns.mT
    return gram


def _combined(x: Stored, coefficients: np.ndarray) -> Iterator[np.ndarray]:
    """`[inner, 1 + models]` coefficients applied to a slab's vectors, rounded once."""
    for dtype, vectors in _vectors(x, len(coefficients)):
        terms = coefficients.T[:, None] * vectors
        yield terms.sum(axis=0).ravel().astype(dtype)


def _vectors(x: Stored, inner: int) -> Iterator[tuple[np.dtype, np.ndarray]]:
    """The result's dtype and `[1 + models, rows, inner]`: the base and differences from it."""
    for piece in pieces(x, max(1, _rewrite.BLOCK // inner) * inner):
        vectors = _differences(piece)
        yield piece.base[PIECE].dtype, vectors.reshape(len(vectors), -1, inner)


@_quiet
def _differences(piece: Members) -> np.ndarray:
    first = piece.base[PIECE].astype(np.float64)
    return np.stack([first, *(model[PIECE].astype(np.float64) - first for model in piece.models)])


def _coefficients(
    merge: Callable[[Members], jax.Array],
) -> Callable[[np.ndarray], np.ndarray]:
    """`[inner, k, k]` inner products to the `[inner, k]` coefficients of the merge."""

    def found(gram: np.ndarray) -> np.ndarray:
        finite = np.all(np.isfinite(gram), axis=(1, 2))
        gram = np.where(finite[:, None, None], gram, 0)
        lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
        lengths = np.where(lengths > 0, lengths, 1)
        # Of vectors of length 1, or a small difference would be a rounding error of the base.
        squares, axes = np.linalg.eigh(gram / lengths[:, :, None] / lengths[:, None])
        stretch = np.sqrt(np.where(squares > _TINY, squares, 0))
        vectors = lengths[:, :, None] * axes * stretch[:, None]
        result = np.asarray(merge(_surrogates(vectors)))
        inside = np.divide(result, stretch, out=np.zeros_like(result), where=stretch > 0)
        shares = np.einsum("ij,ikj->ik", inside, axes) / lengths
        return np.where(finite[:, None], shares, np.nan)

    return found


def _surrogates(vectors: np.ndarray) -> Members:
    """Short vectors `[inner, k]` for the base and, added to it, for the models' differences."""
    base = vectors[:, 0]
    models = [{PIECE: base + vectors[:, i]} for i in range(1, vectors.shape[1])]
    return Members({PIECE: base}, models, [])
