"""The work on a chunk of logits, in blocks that fit a CPU's caches.

Matrix products are fastest on many rows at a time, everything else on few. XLA's CPU programs pass
over whole arrays, and a chunk of logits is larger than the caches, so on a CPU the loss processes
its chunk block by block. On other devices a chunk is one block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax._types import PyTree

BLOCK_OF_LOGITS = 2**18  # logits of one model that fit a CPU core's cache
BLOCK_OF_HEAD = 2**21  # weights of a head that fit a CPU's last-level cache twice


def gradient(
    of_product: Callable[..., Array], product: Array, small: Any, aims: PyTree, counts: Array
) -> tuple[Array, Array, Any]:
    """A chunk's total `sum_i l(z_i, y_i)` and its gradient with respect to `product` and `small`.

    On a CPU it works on one block of rows at a time and writes each gradient over the logits it
    comes from: the loss passes a dozen times over its logits, and a block stays in the processor's
    cache.

    Args:
      of_product: `(product, small, aims, counts) -> []`, a sum over rows, of any number of rows.
      product: `[n, vocabulary]`, where n is a multiple of `block_rows(vocabulary)` or below it.
      small: pytree of floating-point arrays that all rows share.
      aims: pytree of arrays `[n, *]`, constants.
      counts: bool `[n]`, rows that count.

    Returns:
      The total `[]` and its gradients with respect to `product`, `[n, vocabulary]`, and to `small`.
    """

    def at_once(product: Array, small: Any, *rest: Any) -> tuple[Array, Array, Any]:
        value, pull = jax.vjp(lambda *by: of_product(*by, *rest), product, small)
        return value, *pull(jnp.ones_like(value))

    size, vocabulary = product.shape
    rows = block_rows(vocabulary)
    if size <= rows:
        return at_once(product, small, aims, counts)
    blocks = size // rows

    def in_blocks(product: Array, small: Any, *rest: Any) -> tuple[Array, Array, Any]:
        # Block i holds rows i, i + blocks, …: split over devices like the chunk (see `_chunks`).
        def split(a: Array) -> Array:
            return a.reshape(rows, blocks, *a.shape[1:])

        def block(i: Array, carry: Any) -> Any:
            total, slots, by_small = carry

            def own(a: Array) -> Array:
                return jax.lax.dynamic_index_in_dim(a, i, axis=1, keepdims=False)

            value, by_own, more = at_once(own(slots), small, *jax.tree.map(own, parts))
            slots = jax.lax.dynamic_update_index_in_dim(slots, by_own, i, axis=1)
            return total + value, slots, jax.tree.map(jnp.add, by_small, more)

        parts = jax.tree.map(split, rest)
        start = jnp.zeros((), product.dtype), split(product), jax.tree.map(jnp.zeros_like, small)
        total, slots, by_small = jax.lax.fori_loop(0, blocks, block, start)
        return total, slots.reshape(product.shape), by_small

    given = product, small, aims, counts
    return jax.lax.platform_dependent(*given, cpu=in_blocks, default=at_once)


def with_product(total: Array, rows: Array, by_product: Array) -> Array:
    """`total + rows^T by_product`.

    On a CPU, where no matrix product accumulates into an existing array, it works on one block of
    columns at a time: the product to be added is never as large as the head.

    Args:
      total: `[width, vocabulary]`.
      rows: `[n, width]`, hidden states.
      by_product: `[n, vocabulary]`, their dtype.

    Returns:
      `[width, vocabulary]`, accumulated in the dtype of `total`.
    """

    def added(total: Array, rows: Array, by_product: Array) -> Array:
        # Written in the layout of `total`, so that the product is added in place.
        return total + jax.lax.dot_general(
            rows, by_product, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype
        )

    width, vocabulary = total.shape
    columns = max(512, BLOCK_OF_HEAD // width)
    if vocabulary <= columns:
        return added(total, rows, by_product)

    def in_blocks(total: Array, rows: Array, by_product: Array) -> Array:
        def block(total: Array, start: Any, columns: int) -> Array:
            def own(a: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(a, start, columns, axis=1)

            new = added(own(total), rows, own(by_product))
            return jax.lax.dynamic_update_slice_in_dim(total, new, start, axis=1)

        whole, rest = divmod(vocabulary, columns)
        total = jax.lax.fori_loop(
            0, whole, lambda i, total: block(total, i * columns, columns), total
        )
        return block(total, whole * columns, rest) if rest else total

    return jax.lax.platform_dependent(total, rows, by_product, cpu=in_blocks, default=added)


def block_rows(vocabulary: int) -> int:
    """Rows of a block of logits `[rows, vocabulary]`: a power of two, at least 8.

    The largest such that `rows * vocabulary <= BLOCK_OF_LOGITS`, if 8 are not too many.
    """
    return max(8, 1 << (BLOCK_OF_LOGITS // vocabulary).bit_length() >> 1)
