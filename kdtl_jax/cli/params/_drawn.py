"""Merges that drop a tensor's entries at random, as streams: DARE and DELLA.

They draw what `transforms.dare` and `transforms.della` draw for the whole tensor, but only a
piece's share of it: whole draws pass through 17 bytes per entry.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, transforms
from kdtl_jax.cli.params import _rewrite
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
from kdtl_jax.transforms import _leaves

Combine = Callable[[Members, Options, Sequence[Tree]], Tree]
Probabilities = Callable[[np.ndarray], np.ndarray]  # of keeping a task vector's entries

_taus = jax.jit(taus)


def dare(o: Options) -> Stream:
    """As `transforms.dare`, added to the base."""
    return _dare(o, added)


def dare_ties(o: Options) -> Stream:
    """As `transforms.dare`, then elected signs."""
    return _dare(o, agreed)


def della(o: Options) -> Stream:
    """As `transforms.della`, then elected signs; pieces are whole rows, which it ranks within."""

    def probabilities(row: int) -> Probabilities:
        ranks = {PIECE: np.arange(row, dtype=np.float32)}  # each entry is its own rank
        found = transforms.della_probabilities(ranks, density=o.density, epsilon=o.epsilon)
        by_rank = np.asarray(found[PIECE])

        def of(tau: np.ndarray) -> np.ndarray:
            # NumPy sorts several times faster than XLA on a CPU, and the order is the same.
            order = np.argsort(np.abs(tau.reshape(-1, row)), axis=-1, kind="stable")
            found = np.empty(order.shape, by_rank.dtype)
            np.put_along_axis(found, order, np.broadcast_to(by_rank, order.shape), axis=-1)
            return found.ravel()

        return of

    thinned = _thinned(o, agreed)
    return lambda x: thinned(x, shape(x)[-1], probabilities(shape(x)[-1]))


def uniform(key: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Entries `start:start + size` of `jax.random.uniform(key, [n])`, float32, for any larger n.

    JAX's default generator numbers the entries of a draw (below 2^32) and hashes each number with
    the key, as `fold_in` does; `uniform` makes the random bits the mantissa of a number in [1, 2).
    """
    numbers = start + jnp.arange(size, dtype=jnp.uint32)
    halves = jax.random.key_data(jax.vmap(functools.partial(jax.random.fold_in, key))(numbers))
    mantissa = (halves[:, 0] ^ halves[:, 1]) >> np.uint32(9)
    one = np.float32(1)
    return jax.lax.bitcast_convert_type(mantissa | one.view(np.uint32), jnp.float32) - one


def _dare(o: Options, combine: Combine) -> Stream:
    _checks.positive(density=o.density)
    thinned = _thinned(o, combine)
    return lambda x: thinned(x, 1, lambda tau: np.full(tau.shape, o.density, tau.dtype))


def _thinned(
    o: Options, combine: Combine
) -> Callable[[Stored, int, Probabilities], Iterator[np.ndarray]]:
    def thinned(key: jax.Array, tau: Tree, chance: jax.Array, start: jax.Array) -> Tree:
        kept = uniform(key, start, chance.size) < chance
        return {PIECE: jnp.where(kept, tau[PIECE] / jnp.where(kept, chance, 1), 0)}

    @jax.jit
    def merged(
        x: Members, chances: list[jax.Array], keys: list[jax.Array], start: jax.Array
    ) -> jax.Array:
        each = zip(keys, taus(x), chances, strict=True)
        return combine(x, o, [thinned(key, tau, chance, start) for key, tau, chance in each])[PIECE]

    def stream(x: Stored, row: int, probabilities: Probabilities) -> Iterator[np.ndarray]:
        """In pieces of whole rows."""
        keys = jax.random.split(jax.random.key(o.seed), x.number)
        keys = [_leaves.fold_path(key, x.path) for key in keys]
        start = 0
        for piece in pieces(x, max(1, _rewrite.BLOCK // row) * row):
            chances = [probabilities(np.asarray(tau[PIECE])) for tau in _taus(piece)]
            yield np.asarray(merged(piece, chances, keys, np.uint32(start)))
            start += chances[0].size

    return stream
