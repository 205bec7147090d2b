"""TIES over whole models without holding one: passes that find each model's threshold.

Two passes rank the magnitudes of all tensors in order of their names (`_ranks`), as
`transforms.trim_global` does; a third counts how many of the threshold's equals every tensor has
and takes the majority sign. Writing is the fourth.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kdtl_jax.cli.params import _ranks

PASSES = _ranks.PASSES + 1  # over all task vectors, before they are written
Taus = Callable[[str], Iterator[list[np.ndarray]]]  # path -> pieces, one array per model each


class Trim(NamedTuple):
    """What is kept of every model: the entries of a cut."""

    cut: _ranks.Cut
    before: dict[str, np.ndarray]  # [models], how many of the threshold's equals come earlier
    majority: int  # the sign that most entries of the trimmed sum have


def measure(paths: Sequence[str], taus: Taus, count: int, total: int, density: float) -> Trim:
    """Reads all task vectors three times; `total` entries each, of `count` models."""
    order = sorted(paths)

    def read() -> Iterator[list[np.ndarray]]:
        for path in order:
            for piece in taus(path):
                yield [_ranks.keys(tau) for tau in piece]

    trim = Trim(_ranks.find(read, [math.floor(density * total)] * count), {}, 1)
    seen, balance = np.zeros(count, np.int64), 0
    for path in order:
        trim.before[path] = seen.copy()
        for piece in taus(path):
            summed = sum(trimmed(trim, tau, i, seen) for i, tau in enumerate(piece))
            balance += int(np.count_nonzero(summed > 0)) - int(np.count_nonzero(summed < 0))
    return trim._replace(majority=1 if balance >= 0 else -1)


def trimmed(trim: Trim, tau: np.ndarray, i: int, seen: np.ndarray) -> np.ndarray:
    """A piece of model `i`'s task vector with what is not kept set to 0; counts on in `seen`."""
    return np.where(_ranks.taken(trim.cut, _ranks.keys(tau), i, seen), tau, 0)
