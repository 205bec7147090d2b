"""Diagonal Fisher information, for `penalties.ewc` and `transforms.fisher_merge`.

Three quantities are called "the Fisher"; they differ by factors of up to the batch size:

- `empirical_fisher`: mean over examples of the squared gradient at the given labels;
- `true_fisher`: the same with labels drawn from the model's own distribution, summed exactly;
- `batch_fisher`: mean over batches of the squared gradient of the batch mean, as in Avalanche; it
  is too small by a factor of up to the batch size.

`params` are any pytree, of which leaves that are not inexact pass through, and `examples` a pytree
of arrays `[N, ...]`. The result is a tree like `params`, float32 or wider. Raises ValueError if the
examples differ in number or are empty.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, _softmax, trees
from kdtl_jax._types import Array, Params, PyTree

ExampleLoss = Callable[[Params, Any], Array]  # (params, one example) -> []
ExampleLogits = Callable[[Params, Any], Array]  # (params, one example) -> [C]


def empirical_fisher(
    loss: ExampleLoss, params: Params, examples: PyTree, *, chunk: int = 32
) -> PyTree:
    """`mean_i (d loss(x_i, y_i) / d theta)^2`, per example and exact.

    Takes examples as arrays `[N, ...]`; returns a tree like `params`, in float32 or wider.

    Args:
      loss: `loss(params, example) -> []`, the negative log-likelihood of one example.
      chunk: examples differentiated at once; memory is `chunk` gradients.
    """

    def squares(trained: Params, frozen: Params, example: Any) -> PyTree:
        def of_example(trained: Params) -> Array:
            value = loss(trees.combine(trained, frozen), example)
            if jnp.shape(value):
                raise ValueError(
                    "loss must be one number for one example (without a batch axis), got "
                    f"{_checks.described(loss=value)}."
                )
            return value

        grads = jax.grad(of_example)(trained)
        return jax.tree.map(_square, grads)

    return _mean_over(squares, params, examples, chunk)


def true_fisher(
    logits: ExampleLogits, params: Params, examples: PyTree, *, chunk: int = 32
) -> PyTree:
    """`mean_i sum_y p(y | x_i) (d log p(y | x_i) / d theta)^2`, with an exact expectation.

    Args:
      logits: `logits(params, example) -> [C]`; labels are not used.
      chunk: examples differentiated at once; memory is `chunk * C` gradients.

    Raises:
      ValueError: if there is only one logit: its softmax is 1, so its information is 0.

    References:
      Amari, Natural gradient works efficiently in learning, 1998.
    """

    def squares(trained: Params, frozen: Params, example: Any) -> PyTree:
        def log_p(t: Params) -> Array:
            z = logits(trees.combine(t, frozen), example)
            _checks.several_classes(logits=z)
            return _softmax.log_softmax(z)

        p = jnp.exp(log_p(trained))
        rows = jax.jacrev(log_p)(trained)

        def expected_square(row: Array) -> Array:
            return jnp.tensordot(p.astype(_numerics.upcast(row).dtype), _square(row), axes=1)

        return jax.tree.map(expected_square, rows)

    return _mean_over(squares, params, examples, chunk)


def batch_fisher(loss: ExampleLoss, params: Params, examples: PyTree, *, batch_size: int) -> PyTree:
    """`mean_batches (d mean_i loss_i / d theta)^2` over consecutive batches: Avalanche's EWC.

    Raises:
      ValueError: if `N` is not a multiple of `batch_size`.
    """
    count = _count(examples)
    _checks.count(1, batch_size=batch_size)
    if count % batch_size:
        raise ValueError(f"{count} examples are not a multiple of {batch_size}.")
    batches = jax.tree.map(lambda x: jnp.reshape(x, (-1, batch_size, *x.shape[1:])), examples)

    def mean_loss(params: Params, batch: PyTree) -> Array:
        return jnp.mean(jax.vmap(lambda example: loss(params, example))(batch))

    return empirical_fisher(mean_loss, params, batches, chunk=1)


def _mean_over(
    squares: Callable[[Params, Params, Any], PyTree], params: Params, examples: PyTree, chunk: int
) -> PyTree:
    count = _count(examples)
    _checks.count(1, chunk=chunk)
    trained, frozen = trees.partition(params, trees.everything)

    def summed(part: PyTree) -> PyTree:
        squares_by_example = jax.vmap(squares, in_axes=(None, None, 0))(trained, frozen, part)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), squares_by_example)

    chunk = min(chunk, count)
    divisible = count // chunk * chunk
    chunks = jax.tree.map(lambda x: x[:divisible].reshape(-1, chunk, *x.shape[1:]), examples)

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, summed(part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(_numerics.upcast(x)), trained)
    total, _ = jax.lax.scan(add, zeros, chunks)
    if divisible < count:
        remainder = summed(jax.tree.map(lambda x: x[divisible:], examples))
        total = jax.tree.map(jnp.add, total, remainder)
    return trees.combine(jax.tree.map(lambda x: x / count, total), frozen)


def _count(examples: PyTree) -> int:
    flat = trees.flatten(examples)
    if not flat or not all(map(np.ndim, flat.values())):
        raise ValueError(f"examples must be arrays with one row per example, got {examples!r:.80}.")
    _checks.same_batch(**flat)
    _checks.nonempty(**flat)
    return np.shape(next(iter(flat.values())))[0]


def _square(x: Array) -> Array:
    return jnp.square(_numerics.upcast(x))
