"""Losses at vocabulary scale: from hidden states and output heads, a chunk of tokens at a time.

A dense divergence over a vocabulary V holds several `[tokens, V]` arrays in float32: gigabytes,
while the hidden states take megabytes. Here a scan computes the logits of one chunk of tokens, the
loss on them, *and its gradient*, then drops the logits. Memory is that of one chunk plus the head's
own gradient. Because the loss is a sum, its gradient can be computed in the forward pass and only
scaled in the backward pass; unlike with rematerialization, nothing is computed twice.

    kl = partial(losses.forward_kl, temperature=2.0)
    mean = losses.chunked_divergence(
        kl, hidden, Head(params["lm_head"]), teacher_hidden, Head(teacher["lm_head"]), where=mask)
    loss = mean.value()

The result is an `objective.Mean`, which can be used as a term directly: sum and count are kept
separate, so microbatches give exactly the result of the large batch.

All functions raise ValueError if shapes do not fit or a loss does not return one value per token.
They raise TypeError if an array is not floating point, if `where` is not bool, or under
forward-mode differentiation (`jax.jvp`), which a custom VJP does not support.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Mean, PyTree, Scalar
from kdtl_jax.losses import _chunk_blocks, _head
from kdtl_jax.losses._head import Head, head_logits


def chunked_divergence(
    divergence: Callable[[Array, Array], Array],
    student_hidden: Array,
    student_head: Head,
    teacher_hidden: Array,
    teacher_head: Head,
    *,
    where: Array | None = None,
    chunk_size: int = 256,
) -> Mean:
    """Sum over tokens of `divergence(student_logits, teacher_logits)`, with logits made in chunks.

    The teacher is a constant: nothing is differentiated through it.

    Args:
      divergence: `([n, V_S], [n, V_T]) -> [n]`: any loss of the package on logits (`forward_kl`,
        `reverse_kl`, `jsd_normalized`, `skew_reverse_kl`, `total_variation`, `uld` …), with its
        hyper-parameters bound by `functools.partial`; these may be traced and differentiated.
      student_hidden: `[..., width]`; leading dimensions are tokens.
      student_head: the student's output layer.
      teacher_hidden: `[..., teacher_width]`, the same leading dimensions.
      teacher_head: the teacher's output layer.
      where: bool `[...]`, tokens that count; others may hold anything.
      chunk_size: tokens per chunk, static. Larger values use the processor better; memory is about
        `4 chunk_size vocabulary` floats.

    Returns:
      `objective.Mean`: the sum over the tokens that count, and their number; float32 or wider.

    References:
      Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024 (2410.10989); its
      fused linear losses also compute the gradient in the forward pass.
    """
    _head.check_head(teacher_hidden, teacher_head)
    frozen = jax.lax.stop_gradient(teacher_head)

    def logits(teacher_rows: Array) -> Array:
        return head_logits(teacher_rows, frozen)

    given = student_hidden, student_head, teacher_hidden, where, chunk_size
    return _chunked(divergence, logits, *given)


def chunked_loss(
    loss: Callable[[Array, Any], Array],
    hidden: Array,
    head: Head,
    targets: PyTree,
    *,
    where: Array | None = None,
    chunk_size: int = 256,
) -> Mean:
    """Sum over tokens of `loss(logits, targets)`, with logits made chunk by chunk.

    For labels, stored logits, top-k teachers or any other target with one row per token.
    Derivatives with respect to the hidden states, the head and arrays that `loss` closes over (a
    learned temperature) are those of the dense composition; targets are constants. Higher
    derivatives (`grad` of `grad`, `hessian`) are correct too, but differentiate through the scan
    and need memory for all logits.

    Args:
      loss: `([n, V] logits, targets of n tokens) -> [n]`, e.g. `losses.top_k_kl_tail`, or
        `optax.softmax_cross_entropy_with_integer_labels`. On a CPU it sees a few rows at a time,
        which keeps its passes in the cache.
      hidden: `[..., width]`; leading dimensions are tokens.
      head: the output layer.
      targets: pytree of arrays `[..., *]` with the same leading dimensions.
      where: bool `[...]`, tokens that count; others may hold anything.
      chunk_size: tokens per chunk, static.

    Returns:
      `objective.Mean`: the sum over the tokens that count, and their number; float32 or wider.
    """
    return _chunked(loss, lambda targets: targets, hidden, head, targets, where, chunk_size)


def _chunked(
    loss: Callable[[Array, Any], Array],
    prepared: Callable[[PyTree], PyTree],
    hidden: Array,
    head: Head,
    targets: PyTree,
    where: Array | None,
    chunk_size: int,
) -> Mean:
    """`chunked_loss` with the targets `prepared(targets)`, made for a whole chunk."""
    hidden, targets, where = _counted(hidden, head, targets, where, chunk_size)
    block = _chunk_blocks.block_rows(head.kernel.shape[1])
    rows = _chunks((hidden, targets, where), where.ndim, chunk_size, block)

    def shapes(like: PyTree, size: int) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[2:]), a.dtype), like)

    # Arrays that the loss closes over become arguments, so they get a gradient too.
    size, converted, constants = rows[2].shape[1], {}, []
    for n in (min(size, block), size):
        logits = jax.eval_shape(head_logits, shapes(rows[0], n), head)
        aims = jax.eval_shape(prepared, shapes(rows[1], n))
        converted[n], constants = jax.closure_convert(loss, logits, aims)

    def pure(logits: Array, aims: PyTree, *constants: Array) -> Array:
        return converted[logits.shape[0]](logits, aims, *constants)

    values = jax.eval_shape(pure, logits, aims, *constants)
    if getattr(values, "shape", None) != logits.shape[:-1]:
        raise ValueError(
            f"loss must return one value per token, {list(logits.shape[:-1])} for a chunk, "
            f"got {getattr(values, 'shape', values)}. Leave the reduction to this function."
        )
    # Small hyper-parameters in float32 or wider, since their gradients are accumulated.
    small = jax.tree.map(_wide, head._replace(kernel=None))
    total = _summed(
        pure,
        lambda targets: jax.lax.stop_gradient(prepared(targets)),
        rows[0],
        small._replace(kernel=head.kernel),
        tuple(constants),
        jax.lax.stop_gradient(rows[1]),
        rows[2],
    )
    return Mean(total, jnp.sum(where, dtype=total.dtype))


def chunked_map(
    fn: Callable[[Array, Any], PyTree],
    hidden: Array,
    head: Head,
    targets: PyTree,
    *,
    where: Array | None = None,
    chunk_size: int = 256,
) -> PyTree:
    """`fn(logits, targets)` of every token, with logits made in chunks (and again for gradients).

    For values per token that are not to be summed: a teacher's log-probabilities at given classes
    (`top_k_at`), the student's own (`token_log_probs`), its k likeliest (`top_k_targets`).

    Args:
      fn: `([n, V] logits, targets of n tokens) -> pytree of [n, *]`.
      hidden: `[..., width]`; leading dimensions are tokens.
      head: the output layer.
      targets: pytree of arrays `[..., *]` with the same leading dimensions, `None` if there are
        none; differentiated like everything else.
      where: bool `[...]`, tokens that count; others may hold anything and give 0.
      chunk_size: tokens per chunk, static.

    Returns:
      `fn`'s pytree with leaves `[..., *]`.
    """
    hidden, targets, where = _counted(hidden, head, targets, where, chunk_size)

    @jax.checkpoint
    def of_chunk(chunk: Any) -> PyTree:
        return fn(head_logits(chunk[0], head), chunk[1])

    values = jax.lax.map(of_chunk, _chunks((hidden, targets), where.ndim, chunk_size))

    def joined(a: Array) -> Array:
        a = jnp.moveaxis(a, 0, 1)
        rows = a.reshape(-1, *a.shape[2:])[: where.size]
        return _numerics.kept(rows.reshape(*where.shape, *a.shape[2:]), where)

    return jax.tree.map(joined, values)


def _counted(
    hidden: Array, head: Head, targets: PyTree, where: Array | None, chunk_size: int
) -> tuple[Array, PyTree, Array]:
    """Checked, with 0 where a token does not count: it may be NaN, and 0 times NaN is NaN."""
    _head.check_head(hidden, head)
    _checks.nonempty(hidden=hidden)
    _checks.positive(chunk_size=chunk_size)
    leading = jnp.shape(hidden)[:-1]
    _checks.mask(where, leading)
    for leaf in jax.tree.leaves(targets):
        if jnp.shape(leaf)[: len(leading)] != leading:
            raise ValueError(
                f"targets must begin with the tokens' dimensions {list(leading)}, got "
                f"{_checks.described(target=leaf, hidden=hidden)}."
            )
    if where is None:
        where = jnp.ones(leading, jnp.bool_)
    else:
        hidden, targets = jax.tree.map(lambda a: _numerics.kept(a, where), (hidden, targets))
    return hidden, targets, where


def _chunks(tree: PyTree, leading: int, chunk_size: int, rows: int = 1) -> PyTree:
    """Leaves `[chunks, n, ...]`, padded by zeros to equal chunks of whole blocks of `rows`.

    Chunk c holds tokens c, c + chunks, …: a batch sharded along its first dimension stays in place,
    and every device works on its share of every chunk.
    """

    def split(a: Array) -> Array:
        a = jnp.asarray(a)
        a = a.reshape(-1, *a.shape[leading:])
        count = -(-a.shape[0] // chunk_size)
        size = -(-a.shape[0] // count)
        size = size if size <= rows else -(-size // rows) * rows
        a = jnp.pad(a, [(0, size * count - a.shape[0])] + [(0, 0)] * (a.ndim - 1))
        return jnp.moveaxis(a.reshape(size, count, *a.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def _summed(
    loss: Callable[..., Array],
    prepared: Callable[[PyTree], PyTree],
    hidden: Array,
    head: Head,
    constants: tuple[Array, ...],
    targets: PyTree,
    where: Array,
) -> Array:
    """The sum over chunks `[chunks, n, ...]`, with its gradient computed along the way."""

    def of_product(product: Array, small: Any, aims: PyTree, counts: Array) -> Array:
        return _chunk_total(loss, _head.transformed(product, small[0]), small[1], aims, counts)

    @jax.custom_vjp
    def summed(hidden: Array, head: Head, constants: tuple[Array, ...]) -> Array:
        kernel = head.kernel.astype(hidden.dtype)

        def add(total: Array, chunk: Any) -> tuple[Array, None]:
            rows, aims, counts = chunk
            product = _head.adapted(_head.product(rows, kernel), rows, head.delta)
            return total + of_product(product, (head, constants), prepared(aims), counts), None

        return jax.lax.scan(add, _zero(hidden), (hidden, targets, where))[0]

    def forward(hidden: Array, head: Head, constants: tuple[Array, ...]) -> Any:
        kernel = head.kernel.astype(hidden.dtype)
        small = head._replace(kernel=None, delta=None), constants

        def add(carry: Any, chunk: Any) -> tuple[Any, Array]:
            total, by_kernel, by_delta, by_small = carry
            rows, aims, counts = chunk
            product, pull = jax.vjp(
                partial(_head.adapted, _head.product(rows, kernel)), rows, head.delta
            )
            value, by_product, more = _chunk_blocks.gradient(
                of_product, product, small, prepared(aims), counts
            )
            by_rows, by_own_delta = pull(by_product)
            by_product = by_product.astype(rows.dtype)
            by_rows += jnp.matmul(by_product, kernel.T)
            by_kernel = _chunk_blocks.with_product(by_kernel, rows, by_product)
            by_delta, by_small = jax.tree.map(jnp.add, (by_delta, by_small), (by_own_delta, more))
            return (total + value, by_kernel, by_delta, by_small), by_rows

        start = (
            _zero(hidden),
            jnp.zeros(head.kernel.shape, _zero(hidden).dtype),
            jax.tree.map(jnp.zeros_like, head.delta),
            jax.tree.map(jnp.zeros_like, small),
        )
        found, by_hidden = jax.lax.scan(add, start, (hidden, targets, where))
        total, by_kernel, by_delta, (by_head, by_constants) = found
        by_head = by_head._replace(kernel=by_kernel.astype(head.kernel.dtype), delta=by_delta)
        return total, (by_hidden, by_head, by_constants)

    def backward(gradient: Any, cotangent: Array) -> Any:
        return jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradient)

    summed.defvjp(forward, backward)
    return summed(hidden, head, constants)


def _wide(x: Scalar) -> Array:
    array = jnp.asarray(x)
    return _numerics.upcast(
        array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
    )


def _zero(hidden: Array) -> Array:
    return jnp.zeros((), _numerics.upcast(hidden).dtype)


def _chunk_total(
    loss: Callable[..., Array],
    logits: Array,
    constants: tuple[Array, ...],
    targets: PyTree,
    where: Array,
) -> Array:
    values = _numerics.upcast(loss(logits, targets, *constants)).astype(logits.dtype)
    return jnp.sum(jnp.where(where, values, 0))
