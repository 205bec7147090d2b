"""Processes leaves in blocks of rows: sums and draws of a block depend only on its number.

A leaf gives the same numbers in memory and when it is read from a file block by block.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import _checks
from kdtl_jax._types import Array

Read = Callable[[], Iterable[Sequence[Array]]]  # one leaf of several trees, in pieces side by side
BLOCK = 1 << 20  # entries that one key draws for


def fold_path(key: Array, path: str) -> Array:
    """A key specific to the path, so that draws do not depend on the other leaves."""
    _checks.key(key=key)
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def block_rows(shape: Sequence[int]) -> int:
    """The number of rows (along the last axis) in a block; one key draws for one block.

    As many rows as make 2**20 entries, and at least one. A leaf larger than memory can be read in
    such blocks: what `dare` and `della` draw for a block depends only on its number.
    """
    return max(1, BLOCK // max(1, math.prod(shape[-1:])))


def row_blocks(leaves: Sequence[Array]) -> Iterator[list[Array]]:
    """Leaves of one shape in blocks of `block_rows` rows, side by side; vectors stay whole.

    Sums over a leaf are sums of its blocks' sums, whether the blocks come from memory or a file.
    """
    shape = leaves[0].shape
    size = math.prod(shape[:-1])
    step = block_rows(shape)
    if len(shape) < 2 or size <= step:
        yield list(leaves)
        return
    flat = [leaf.reshape(size, shape[-1]) for leaf in leaves]
    for start in range(0, size, step):
        rows = min(step, size - start)
        yield [jax.lax.dynamic_slice_in_dim(leaf, start, rows) for leaf in flat]


def in_blocks(leaves: Sequence[Array], formula: Callable[[int, Sequence[Array]], Array]) -> Array:
    """`formula(number, pieces)` of every block of rows, joined back into one array."""
    pieces = [formula(number, block) for number, block in enumerate(row_blocks(leaves))]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces).reshape(leaves[0].shape)


def uniform(key: Array, path: str, shape: tuple[int, ...], dtype: Any, block: Any = 0) -> Array:
    """Uniform draws in [0, 1) for a leaf, or for its blocks from number `block` on.

    Draws are float32 for every dtype, so a wider copy of a leaf keeps the same entries.
    """
    draws = _uniform(fold_path(key, path), block, shape, block_rows(shape))
    return draws.astype(dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _uniform(key: Array, first_block: Array, shape: tuple[int, ...], rows_per_block: int) -> Array:
    def draw(number: Array, rows: int) -> Array:
        block = (rows, *shape[-1:])
        return jax.random.uniform(jax.random.fold_in(key, number), block, jnp.float32)

    full_blocks, last_rows = divmod(math.prod(shape[:-1]), rows_per_block)
    # Sequential: a generator's temporaries take several times the memory of its draws.
    blocks = jax.lax.map(lambda i: draw(i, rows_per_block), first_block + jnp.arange(full_blocks))
    rows = [blocks.reshape(full_blocks * rows_per_block, *shape[-1:])]
    if last_rows:
        rows.append(draw(first_block + full_blocks, last_rows))
    return jnp.concatenate(rows).reshape(shape)
