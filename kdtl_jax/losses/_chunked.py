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

The result is an `objective.Mean` (the sum over the tokens that count, and their number; float32 or
wider), which can be used as a term directly: sum and count are kept separate, so microbatches give
exactly the result of the large batch.

Hidden states are `[..., width]`; their leading dimensions are tokens. `where`, bool `[...]`, marks
the tokens that count; the others may hold anything. `chunk_size` tokens, a static number, make a
chunk.

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
    constant_head = jax.lax.stop_gradient(teacher_head)

    def logits(teacher_rows: Array) -> Array:
        return head_logits(teacher_rows, constant_head)

    arguments = student_hidden, student_head, teacher_hidden, where, chunk_size
    return _chunked(divergence, logits, *arguments)


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
    prepare: Callable[[PyTree], PyTree],
    hidden: Array,
    head: Head,
    targets: PyTree,
    where: Array | None,
    chunk_size: int,
) -> Mean:
    """`chunked_loss` with the targets `prepared(targets)`, made for a whole chunk."""
    hidden, targets, where = _check_and_mask(hidden, head, targets, where, chunk_size)
    block = _chunk_blocks.block_rows(head.kernel.shape[1])
    rows = _chunks((hidden, targets, where), where.ndim, chunk_size, block)

    def shapes_of(tree: PyTree, size: int) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[2:]), a.dtype), tree)

    # Arrays that the loss closes over become arguments, so they get a gradient too.
    size, converted, constants = rows[2].shape[1], {}, []
    for n in (min(size, block), size):
        logits = jax.eval_shape(head_logits, shapes_of(rows[0], n), head)
        chunk_targets = jax.eval_shape(prepare, shapes_of(rows[1], n))
        converted[n], constants = jax.closure_convert(loss, logits, chunk_targets)

    def pure(logits: Array, chunk_targets: PyTree, *constants: Array) -> Array:
        return converted[logits.shape[0]](logits, chunk_targets, *constants)

    values = jax.eval_shape(pure, logits, chunk_targets, *constants)
    if getattr(values, "shape", None) != logits.shape[:-1]:
        raise ValueError(
            f"loss must return one value per token, {list(logits.shape[:-1])} for a chunk, "
            f"got {getattr(values, 'shape', values)}. Leave the reduction to this function."
        )
    # Small hyper-parameters in float32 or wider, since their gradients are accumulated.
    small_head = jax.tree.map(_as_float, head._replace(kernel=None))
    total = _sum_over_chunks(
        pure,
        lambda targets: jax.lax.stop_gradient(prepare(targets)),
        rows[0],
        small_head._replace(kernel=head.kernel),
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
    hidden, targets, where = _check_and_mask(hidden, head, targets, where, chunk_size)

    @jax.checkpoint
    def map_chunk(chunk: Any) -> PyTree:
        return fn(head_logits(chunk[0], head), chunk[1])

    values = jax.lax.map(map_chunk, _chunks((hidden, targets), where.ndim, chunk_size))

    def join(a: Array) -> Array:
        a = jnp.moveaxis(a, 0, 1)
        rows = a.reshape(-1, *a.shape[2:])[: where.size]
        return _numerics.kept(rows.reshape(*where.shape, *a.shape[2:]), where)

    return jax.tree.map(join, values)


def _check_and_mask(
    hidden: Array, head: Head, targets: PyTree, where: Array | None, chunk_size: int
) -> tuple[Array, PyTree, Array]:
    """Checks the arguments and zeros the tokens that do not count, which may be NaN."""
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


def _sum_over_chunks(
    loss: Callable[..., Array],
    prepare: Callable[[PyTree], PyTree],
    hidden: Array,
    head: Head,
    constants: tuple[Array, ...],
    targets: PyTree,
    where: Array,
) -> Array:
    """The sum over chunks `[chunks, n, ...]`, with its gradient computed along the way."""

    def loss_of(product: Array, shared: Any, chunk_targets: PyTree, counts: Array) -> Array:
        logits = _head.transformed(product, shared[0])
        values = _numerics.upcast(loss(logits, chunk_targets, *shared[1])).astype(logits.dtype)
        return jnp.sum(jnp.where(counts, values, 0))

    @jax.custom_vjp
    def total_loss(hidden: Array, head: Head, constants: tuple[Array, ...]) -> Array:
        kernel = head.kernel.astype(hidden.dtype)

        def add(total: Array, chunk: Any) -> tuple[Array, None]:
            rows, chunk_targets, counts = chunk
            product = _head.adapted(_head.product(rows, kernel), rows, head.delta)
            return total + loss_of(product, (head, constants), prepare(chunk_targets), counts), None

        return jax.lax.scan(add, _zero(hidden), (hidden, targets, where))[0]

    def forward(hidden: Array, head: Head, constants: tuple[Array, ...]) -> Any:
        kernel = head.kernel.astype(hidden.dtype)
        shared = head._replace(kernel=None, delta=None), constants

        def add(carry: Any, chunk: Any) -> tuple[Any, Array]:
            total, kernel_gradient, delta_gradient, shared_gradient = carry
            rows, chunk_targets, counts = chunk
            product, pull = jax.vjp(
                partial(_head.adapted, _head.product(rows, kernel)), rows, head.delta
            )
            value, product_gradient, chunk_shared_gradient = _chunk_blocks.gradient(
                loss_of, product, shared, prepare(chunk_targets), counts
            )
            rows_gradient, chunk_delta_gradient = pull(product_gradient)
            product_gradient = product_gradient.astype(rows.dtype)
            rows_gradient += jnp.matmul(product_gradient, kernel.T)
            kernel_gradient = _chunk_blocks.with_product(kernel_gradient, rows, product_gradient)
            delta_gradient, shared_gradient = jax.tree.map(
                jnp.add,
                (delta_gradient, shared_gradient),
                (chunk_delta_gradient, chunk_shared_gradient),
            )
            return (total + value, kernel_gradient, delta_gradient, shared_gradient), rows_gradient

        start = (
            _zero(hidden),
            jnp.zeros(head.kernel.shape, _zero(hidden).dtype),
            jax.tree.map(jnp.zeros_like, head.delta),
            jax.tree.map(jnp.zeros_like, shared),
        )
        result, hidden_gradient = jax.lax.scan(add, start, (hidden, targets, where))
        total, kernel_gradient, delta_gradient, (head_gradient, constants_gradient) = result
        head_gradient = head_gradient._replace(
            kernel=kernel_gradient.astype(head.kernel.dtype), delta=delta_gradient
        )
        return total, (hidden_gradient, head_gradient, constants_gradient)

    def backward(gradient: Any, cotangent: Array) -> Any:
        return jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradient)

    total_loss.defvjp(forward, backward)
    return total_loss(hidden, head, constants)


def _as_float(x: Scalar) -> Array:
    array = jnp.asarray(x)
    return _numerics.upcast(
        array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
    )


def _zero(hidden: Array) -> Array:
    return jnp.zeros((), _numerics.upcast(hidden).dtype)
