"""The work on a chunk of logits, in blocks that fit a CPU's caches.

Matrix products are fastest on many rows, elementwise operations on few. XLA's CPU programs pass
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
    loss_of: Callable[..., Array], product: Array, shared: Any, targets: PyTree, counts: Array
) -> tuple[Array, Array, Any]:
    """A chunk's total `sum_i l(z_i, y_i)`, `[]`, and its gradients for `product` and `shared`.

    On a CPU it works on one block of rows at a time and writes each gradient over the logits it
    comes from: the loss passes a dozen times over its logits, and a block stays in the processor's
    cache.

    Args:
      loss_of: `(product, shared, targets, counts) -> []`, a sum over any number of rows.
      product: `[n, vocabulary]`; n is at most `block_rows(vocabulary)` or a multiple of it.
      shared: pytree of floating-point arrays that all rows share.
      targets: pytree of arrays `[n, *]`, constants.
      counts: bool `[n]`, rows that count.
    """

    def at_once(product: Array, shared: Any, *constants: Any) -> tuple[Array, Array, Any]:
        value, pull = jax.vjp(lambda *inputs: loss_of(*inputs, *constants), product, shared)
        return value, *pull(jnp.ones_like(value))

    size, vocabulary = product.shape
    rows = block_rows(vocabulary)
    if size <= rows:
        return at_once(product, shared, targets, counts)
    blocks = size // rows

    def in_blocks(product: Array, shared: Any, *constants: Any) -> tuple[Array, Array, Any]:
        # Block i holds rows i, i + blocks, …: split over devices like the chunk (see `_chunks`).
        def split(a: Array) -> Array:
            return a.reshape(rows, blocks, *a.shape[1:])

        def block(i: Array, carry: Any) -> Any:
            total, slots, shared_gradient = carry

            def rows_of_block(a: Array) -> Array:
                return jax.lax.dynamic_index_in_dim(a, i, axis=1, keepdims=False)

            value, block_gradient, block_shared_gradient = at_once(
                rows_of_block(slots), shared, *jax.tree.map(rows_of_block, parts)
            )
            slots = jax.lax.dynamic_update_index_in_dim(slots, block_gradient, i, axis=1)
            return (
                total + value,
                slots,
                jax.tree.map(jnp.add, shared_gradient, block_shared_gradient),
            )

        parts = jax.tree.map(split, constants)
        start = jnp.zeros((), product.dtype), split(product), jax.tree.map(jnp.zeros_like, shared)
        total, slots, shared_gradient = jax.lax.fori_loop(0, blocks, block, start)
        return total, slots.reshape(product.shape), shared_gradient

    arguments = product, shared, targets, counts
    return jax.lax.platform_dependent(*arguments, cpu=in_blocks, default=at_once)


def with_product(total: Array, rows: Array, by_product: Array) -> Array:
    """`total + rows^T by_product`: `[n, width]` and `[n, vocabulary]` give `[width, vocabulary]`.

    Accumulated in the dtype of `total`. On a CPU, where no matrix product accumulates into an
    existing array, it works on one block of columns at a time: the product to be added is never as
    large as the head.
    """

    def add(total: Array, rows: Array, by_product: Array) -> Array:
        # Written in the layout of `total`, so that the product is added in place.
        return total + jax.lax.dot_general(
            rows, by_product, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype
        )

    width, vocabulary = total.shape
    columns = max(512, BLOCK_OF_HEAD // width)
    if vocabulary <= columns:
        return add(total, rows, by_product)

    def in_blocks(total: Array, rows: Array, by_product: Array) -> Array:
        def block(total: Array, start: Any, columns: int) -> Array:
            def columns_of_block(a: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(a, start, columns, axis=1)

            new = add(columns_of_block(total), rows, columns_of_block(by_product))
            return jax.lax.dynamic_update_slice_in_dim(total, new, start, axis=1)

        full_blocks, last_columns = divmod(vocabulary, columns)
        total = jax.lax.fori_loop(
            0, full_blocks, lambda i, total: block(total, i * columns, columns), total
        )
        return block(total, full_blocks * columns, last_columns) if last_columns else total

    return jax.lax.platform_dependent(total, rows, by_product, cpu=in_blocks, default=add)


def block_rows(vocabulary: int) -> int:
    """Rows of a block of logits `[rows, vocabulary]`: a power of two, at least 8.

    The largest such that `rows * vocabulary <= BLOCK_OF_LOGITS`, if 8 are not too many.
    """
    return max(8, 1 << (BLOCK_OF_LOGITS // vocabulary).bit_length() >> 1)
