"""TIES over whole models without holding one: passes that find each model's threshold.

Magnitudes are ranked in float32. Their bits, read as integers, sort as they do, so two passes of
histograms (upper and lower 16 bits) find the exact smallest magnitude kept; a third counts its
equals, of which the first ones are kept in order of tensor names, as `transforms.trim_global`
keeps them, and takes the majority sign. Writing is the fourth.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PASSES = 3  # over all task vectors, before they are written
Taus = Callable[[str], Iterator[list[np.ndarray]]]  # path -> pieces, one array per model each


class Trim(NamedTuple):
    """What is kept of every model: magnitudes above a threshold, and some equal to it."""

    threshold: np.ndarray  # [models], a magnitude's rank key
    equal: np.ndarray  # [models], how many of that very magnitude are kept
    before: dict[str, np.ndarray]  # [models], how many of these lie in earlier tensors
    majority: int  # the sign that most entries of the trimmed sum have


def measure(paths: Sequence[str], taus: Taus, count: int, total: int, density: float) -> Trim:
    """Reads all task vectors three times; `total` entries each, of `count` models."""
    order = sorted(paths)
    kept = math.floor(density * total)
    upper = _histogram(order, taus, count, lambda keys, i: keys >> 16)
    high, above = _cut(upper, np.full(count, kept))
    lower = _histogram(order, taus, count, lambda keys, i: keys[keys >> 16 == high[i]] & 0xFFFF)
    low, more = _cut(lower, kept - above)
    threshold = (high << 16) | low
    trim = Trim(threshold, kept - above - more, {}, 1)
    seen, balance = np.zeros(count, np.int64), 0
    for path in order:
        trim.before[path] = seen.copy()
        for piece in taus(path):
            summed = sum(trimmed(trim, tau, i, seen) for i, tau in enumerate(piece))
            balance += int(np.count_nonzero(summed > 0)) - int(np.count_nonzero(summed < 0))
    return trim._replace(majority=1 if balance >= 0 else -1)


def trimmed(trim: Trim, tau: np.ndarray, i: int, seen: np.ndarray) -> np.ndarray:
    """A piece of model `i`'s task vector with what is not kept set to 0; counts on in `seen`."""
    keys, threshold = _keys(tau), np.uint32(trim.threshold[i])
    kept, equal = keys > threshold, np.flatnonzero(keys == threshold)
    kept[equal[: max(trim.equal[i] - seen[i], 0)]] = True
    seen[i] += equal.size
    return np.where(kept, tau, 0)


def _histogram(
    order: Sequence[str], taus: Taus, count: int, part: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    counts = np.zeros((count, 1 << 16), np.int64)
    for path in order:
        for piece in taus(path):
            for i, tau in enumerate(piece):
                counts[i] += np.bincount(part(_keys(tau), i), minlength=1 << 16)
    return counts


def _cut(counts: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per model the bin in which the `kept`-th largest lies, and how many lie above it."""
    tails = np.cumsum(counts[:, ::-1], axis=1)
    # A count of 0 is reached before the first bin: the threshold is then the largest key, and
    # the number of its equals that are kept is 0.
    place = np.array([np.searchsorted(tail, k) for tail, k in zip(tails, kept, strict=True)])
    above = np.array([tail[p - 1] if p else 0 for tail, p in zip(tails, place, strict=True)])
    return counts.shape[1] - 1 - place, above


def _keys(tau: np.ndarray) -> np.ndarray:
    """Ranks of magnitudes as integers; NaN comes last."""
    magnitude = np.abs(tau).astype(np.float32).ravel()
    keys = magnitude.view(np.uint32) + np.uint32(1)
    keys[np.isnan(magnitude)] = 0
    return keys
