"""Which entries are the largest, found in passes over pieces, without sorting or holding them.

Magnitudes are ranked in float32. Their bits, read as integers, sort as they do, so two passes of
histograms (upper and lower 16 bits) find the exact smallest magnitude taken. Of its equals the
first ones are taken, in the order in which they are read.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PASSES = 2
Read = Callable[[], Iterator[Sequence[np.ndarray]]]  # pieces from the start, keys per ranking


class Cut(NamedTuple):
    """What is taken, per ranking: keys above a threshold, and some equal to it."""

    threshold: np.ndarray  # a key
    equal: np.ndarray  # how many of that very key are taken


def find(read: Read, counts: Sequence[int]) -> Cut:
    """The cut that takes the `counts[i]` largest of ranking i."""
    wanted = np.asarray(counts)
    upper = _histogram(read, len(wanted), lambda keys, i: keys >> 16)
    high, above = _last(upper, wanted)
    lower = _histogram(read, len(wanted), lambda keys, i: keys[keys >> 16 == high[i]] & 0xFFFF)
    low, more = _last(lower, wanted - above)
    return Cut((high << 16) | low, wanted - above - more)


def taken(cut: Cut, keys: np.ndarray, i: int, seen: np.ndarray) -> np.ndarray:
    """Which entries of a piece of ranking i are taken; counts the threshold's equals in `seen`."""
    threshold = np.uint32(cut.threshold[i])
    taken, equal = keys > threshold, np.flatnonzero(keys == threshold)
    taken[equal[: max(cut.equal[i] - seen[i], 0)]] = True
    seen[i] += equal.size
    return taken


def keys(x: np.ndarray) -> np.ndarray:
    """Ranks of magnitudes as integers: 1 for zero, and 0 for NaN, which comes last."""
    magnitude = np.abs(x).astype(np.float32).ravel()
    keys = magnitude.view(np.uint32) + np.uint32(1)
    keys[np.isnan(magnitude)] = 0
    return keys


def _histogram(read: Read, count: int, part: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    bins = np.zeros((count, 1 << 16), np.int64)
    for piece in read():
        for i, each in enumerate(piece):
            bins[i] += np.bincount(part(each, i), minlength=1 << 16)
    return bins


def _last(bins: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per ranking the bin in which the `wanted`-th largest lies, and how many lie above it."""
    tails = np.cumsum(bins[:, ::-1], axis=1)
    # A count of 0 is reached before the first bin: the threshold is then the largest key, and
    # the number of its equals that are taken is 0.
    place = np.array([np.searchsorted(tail, k) for tail, k in zip(tails, wanted, strict=True)])
    above = np.array([tail[p - 1] if p else 0 for tail, p in zip(tails, place, strict=True)])
    return bins.shape[1] - 1 - place, above
