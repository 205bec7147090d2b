"""Finding the largest entries by histograms of their bits, without sorting.

Floating-point numbers sort like their bits once the sign is folded in. A histogram of the upper 16
bits, and one of the next 16 within the bin that is hit, thus find the exact smallest value taken.
Among entries equal to it, those read first are taken. Histograms of several leaves can be added, so
leaves that are read one at a time are ranked together.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax._types import Array

_BINS = 1 << 16


class Cut(NamedTuple):
    """The ranked entries that are taken: those above a threshold and some equal to it."""

    threshold: Array  # the key of the smallest entry taken
    equal: Array  # how many entries equal to it are taken; the first ones are


def largest(read: Callable[[], Iterable[Array]], count: Any, dtype: Any = jnp.float32) -> Cut:
    """The cut that takes the `count` largest entries of all leaves that `read()` yields.

    `read` is called once per 16 bits of `dtype` (float32 or float64, in which entries are ranked)
    and must yield the same leaves every time, which may be read from a file one after another.
    `count`, at most the number of entries, may be traced. NaN comes last.
    """
    bits = 8 * jnp.dtype(dtype).itemsize
    threshold, remaining = jnp.zeros((), f"uint{bits}"), jnp.asarray(count, int)
    for shift in range(bits - 16, -1, -16):
        counts: Any = 0
        for leaf in read():
            counts = counts + _histogram(leaf, threshold, shift, bits)
        threshold, remaining = _narrow(counts, threshold, remaining, shift)
    return Cut(threshold, remaining)


def select(x: Array, cut: Cut, before: Any = 0) -> tuple[Array, Array]:
    """Marks the entries of a ranked leaf that a cut takes; also returns `before` for the next leaf.

    `before` is how many entries equal to the threshold came in earlier leaves.
    """
    before = jnp.asarray(before, cut.equal.dtype)
    return _select(x, cut.threshold, cut.equal, before)


@jax.jit
def top(x: Array, count: Any) -> Array:
    """Marks the `count` largest entries of one leaf: bool of its shape."""
    return select(x, largest(lambda: [x], count, x.dtype))[0]


def kth_largest(read: Callable[[], Iterable[Array]], count: Any, dtype: Any) -> Array:
    """The `count`-th largest entry of all leaves that `read()` yields, 1 for the largest."""
    key = largest(read, count, dtype).threshold
    bits = jnp.where(key >> (8 * key.dtype.itemsize - 1) == 1, key << 1 >> 1, ~key)
    return jax.lax.bitcast_convert_type(bits, dtype)


@jax.jit
def _select(x: Array, threshold: Array, count: Array, before: Array) -> tuple[Array, Array]:
    key = _keys(x, 8 * threshold.dtype.itemsize).ravel()
    equal = key == threshold
    rank = before + jnp.cumsum(equal, dtype=count.dtype)
    mask = (key > threshold) | (equal & (rank <= count))
    return mask.reshape(x.shape), before + jnp.sum(equal, dtype=count.dtype)


def _keys(x: Array, bits: int) -> Array:
    """Maps numbers to unsigned integers in the same order; NaN to 0."""
    x = jax.lax.stop_gradient(x).astype(f"float{bits}") + 0.0  # -0 is 0
    raw = jax.lax.bitcast_convert_type(x, f"uint{bits}")
    sign = jnp.asarray(1, raw.dtype) << (bits - 1)
    return jnp.where(jnp.isnan(x), 0, jnp.where(raw >= sign, ~raw, raw | sign)).astype(raw.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _histogram(x: Array, threshold: Array, shift: int, bits: int) -> Array:
    """Counts of each 16-bit value at `shift`, among keys with the threshold's higher bits."""
    key = _keys(x, bits).ravel()
    part = (key >> shift).astype(jnp.int32) & (_BINS - 1)
    if shift + 16 < bits:
        part = jnp.where(key >> (shift + 16) == threshold >> (shift + 16), part, _BINS)
    return jnp.bincount(part, length=_BINS + 1)[:_BINS].astype(int)


@functools.partial(jax.jit, static_argnums=3)
def _narrow(counts: Array, threshold: Array, remaining: Array, shift: int) -> tuple[Array, Array]:
    """Adds the bits of the bin with the last entry taken; also returns how many it supplies."""
    descending = counts[::-1]
    tail = jnp.cumsum(descending)
    # A count of 0 ends before the first bin: the threshold is then the largest key, none of whose
    # equals is taken.
    position = jnp.minimum(jnp.searchsorted(tail, remaining), _BINS - 1)
    bin_ = (_BINS - 1 - position).astype(threshold.dtype)
    return threshold | bin_ << shift, remaining - (tail[position] - descending[position])
