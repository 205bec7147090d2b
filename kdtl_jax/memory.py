"""Memory of contrastive losses as values: banks with one row per training example, and queues.

A step carries them in `TrainState.memory` and returns what the functions here return. Nothing is
mutated, and nothing is set in secret: a bank's normalizer is a field with a value from the start,
changed only by `bank_set_normalizer`. Rows are constants: no gradient flows into a memory.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar

# On a CPU a product costs about a tenth of gathering its row: up to so many times the drawn rows
# all of the bank is multiplied.
_ALL_ROWS = 8


class Bank(NamedTuple):
    """One embedding per training example.

    `rows` `[n, D]`, unit length once updated; `log_z` `[]`, the logarithm of the constant that
    divides the scores `exp(v . row / T)` of queries against these rows.
    """

    rows: Array
    log_z: Array


class Queue(NamedTuple):
    """The last K embeddings: `rows` `[K, D]`, `pointer` `[]` int32, where the next one goes."""

    rows: Array
    pointer: Array


def bank_init(key: Array, size: int, width: int) -> Bank:
    """A bank of random rows, uniform in `+-1 / sqrt(width / 3)` as in CRD, with `Z = size`.

    `Z = size` normalizes scores whose mean is 1; call `bank_set_normalizer` with a first batch for
    the published constant.

    Args:
      key: a random key.
      size: n, the number of training examples.
      width: D of the embeddings.

    Returns:
      A `Bank`, float32.

    Raises:
      ValueError: if a size is below 1.
      TypeError: if a size is not an integer.
    """
    _checks.count(1, size=size, width=width)
    bound = 1 / math.sqrt(width / 3)
    rows = jax.random.uniform(key, (size, width), jnp.float32, -bound, bound)
    return Bank(rows, jnp.asarray(math.log(size), jnp.float32))


def bank_draw(key: Array, index: Array, *, size: int, negatives: int) -> Array:
    """Rows to compare with: column 0 the example itself, then uniform draws of other examples.

    Args:
      key: a random key.
      index: `[B]` integers, the batch's places in the training set.
      size: n, rows of the bank, at least 2.
      negatives: K, at least 1 (published: 16384).

    Returns:
      `[B, 1 + K]` int32.

    Raises:
      ValueError: if there is no other row to draw, none are asked for, or a concrete index lies
        outside the bank.
      TypeError: if `index` is not of integers, or `size` or `negatives` not an integer.
    """
    _checks.count(2, size=size)
    _checks.count(1, negatives=negatives)
    _checks.rank(1, 1, index=index)
    _checks.indices(size, index=index)
    own = index.astype(jnp.int32)[:, None]
    drawn = jax.random.randint(key, (len(index), negatives), 0, size - 1, jnp.int32)
    others = drawn + (drawn >= own).astype(jnp.int32)  # skips the example itself
    return jnp.concatenate([own, others], axis=1)


def _products(bank: Bank, x: Array, index: Array) -> Array:
    """`x_b . row[index[b, j]]`: never a `[B, K, D]` array.

    All products with the bank, where it is hardly larger than what is drawn; otherwise the drawn
    rows, gathered a few examples at a time.
    """
    rows = jax.lax.stop_gradient(bank.rows.astype(x.dtype))
    if len(rows) <= _ALL_ROWS * index.shape[1]:
        return jnp.take_along_axis(_numerics.gram(x, rows), index, axis=1)

    @jax.checkpoint
    def one(pair: tuple[Array, Array]) -> Array:
        row, places = pair
        return jnp.matmul(rows[places], row, precision=jax.lax.Precision.HIGHEST)

    at_once = max(2**22 // (index.shape[1] * x.shape[1]), 1)
    if at_once >= len(x):
        return jax.vmap(lambda *pair: one(pair))(x, index)
    return jax.lax.map(one, (x, index), batch_size=at_once)


def bank_scores(bank: Bank, x: Array, index: Array, *, temperature: Scalar = 0.07) -> Array:
    """`log (exp(x . row / T) / Z)` of each query against its rows, for `losses.crd`.

    Args:
      bank: rows of the *other* model: the student's queries meet the teacher's bank.
      x: `[B, D]`, unit embeddings (`connectors.unit_norm`).
      index: `[B, 1 + K]` integers from `bank_draw`.
      temperature: T > 0.

    Returns:
      `[B, 1 + K]`, differentiable in `x` and `temperature`, not in the bank.

    Raises:
      ValueError: if the widths or batch sizes differ, a concrete index lies outside the bank, or
        the temperature is not positive.
      TypeError: if `x` is not floating point or `index` not of integers.
    """
    _checked("bank_scores", bank, x, index, 2)
    _checks.positive(temperature=temperature)
    x = _numerics.upcast(x)
    log_z = jax.lax.stop_gradient(bank.log_z).astype(x.dtype)
    return _products(bank, x, index) / _numerics.scalar(temperature, x) - log_z


def bank_set_normalizer(bank: Bank, x: Array, index: Array, *, temperature: Scalar = 0.07) -> Bank:
    """The bank with `Z = n mean(exp(x . row / T))`, estimated from this batch and then constant.

    CRD does this with the first batch it meets; here it happens when you call it.

    Args:
      bank: the bank.
      x: `[B, D]`, unit embeddings.
      index: `[B, 1 + K]` integers.
      temperature: T of the later scores.

    Returns:
      The bank, `log_z` replaced.

    Raises:
      ValueError: if the widths or batch sizes differ, a concrete index lies outside the bank, or
        the temperature is not positive.
      TypeError: if `x` is not floating point or `index` not of integers.
    """
    raw = bank_scores(
        bank._replace(log_z=jnp.zeros_like(bank.log_z)), x, index, temperature=temperature
    )
    log_mean = jax.nn.logsumexp(raw) - math.log(raw.size)
    log_z = jax.lax.stop_gradient(log_mean + math.log(len(bank.rows)))
    return bank._replace(log_z=log_z.astype(bank.log_z.dtype))


def bank_update(bank: Bank, x: Array, index: Array, *, momentum: Scalar = 0.5) -> Bank:
    """The bank with `row <- unit(momentum row + (1 - momentum) x)` for the batch's examples.

    Args:
      bank: the bank of the model that made `x`.
      x: `[B, D]`, unit embeddings.
      index: `[B]` integers, distinct; the batch's places in the training set.
      momentum: of the old row.

    Returns:
      The bank, rows replaced.

    Raises:
      ValueError: if the widths or batch sizes differ, a concrete index lies outside the bank, or
        the momentum is outside [0, 1].
      TypeError: if `x` is not floating point or `index` not of integers.
    """
    _checked("bank_update", bank, x, index, 1)
    _checks.within(0, 1, momentum=momentum)
    x = jax.lax.stop_gradient(_numerics.upcast(x)).astype(bank.rows.dtype)
    keep = _numerics.scalar(momentum, x)
    mixed = _numerics.normalize(keep * bank.rows[index] + (1 - keep) * x)
    return bank._replace(rows=bank.rows.at[index].set(mixed))


def _checked(fn: str, bank: Bank, x: Array, index: Array, index_rank: int) -> None:
    _checks.floating(x=x)
    _checks.indices(len(bank.rows), index=index)
    _checks.rank(2, 2, x=x)
    _checks.rank(index_rank, index_rank, index=index)
    _checks.same_batch(x=x, index=index)
    if x.shape[1] != bank.rows.shape[1]:
        raise ValueError(
            f"x must have the bank's width, got {_checks.described(x=x, rows=bank.rows)}."
        )


def queue_init(key: Array, size: int, width: int) -> Queue:
    """A queue of random unit rows, for losses over the last `size` embeddings.

    Args:
      key: a random key.
      size: K.
      width: D of the embeddings.

    Returns:
      A `Queue`, float32, the pointer at 0.

    Raises:
      ValueError: if a size is below 1.
      TypeError: if a size is not an integer.
    """
    _checks.count(1, size=size, width=width)
    rows = _numerics.normalize(jax.random.normal(key, (size, width), jnp.float32))
    return Queue(rows, jnp.zeros((), jnp.int32))


def queue_push(queue: Queue, x: Array) -> Queue:
    """The queue with the oldest rows replaced by `x`, first in first out, wrapping around.

    Any batch size: of more than K embeddings the last K stay.

    Args:
      queue: the queue.
      x: `[B, D]`, unit embeddings.

    Returns:
      The queue with its rows and pointer advanced.

    Raises:
      ValueError: if the widths differ.
      TypeError: if `x` is not floating point.
    """
    _checks.floating(x=x)
    size, width = queue.rows.shape
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"x must be [B, {width}], got {_checks.described(x=x, rows=queue.rows)}.")
    skipped = max(len(x) - size, 0)
    steps = jnp.arange(skipped, len(x), dtype=jnp.int32)
    places = (queue.pointer + steps) % size
    kept = jax.lax.stop_gradient(x[skipped:]).astype(queue.rows.dtype)
    pointer = (queue.pointer + len(x)) % size
    return Queue(queue.rows.at[places].set(kept), pointer.astype(queue.pointer.dtype))
