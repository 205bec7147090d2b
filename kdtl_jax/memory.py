"""Memory for contrastive losses as values: banks with one row per training example, and queues.

A step carries them in `TrainState.memory` and returns what the functions here return. Nothing is
mutated: a bank's normalizer is a field with a value from the start, changed only by
`bank_set_normalizer`. Rows are constants: no gradient flows into a memory.

Embeddings `x` are `[B, D]`, of unit length. `where` (bool `[B]`) marks the real examples of a
batch. The others write nothing, for any values and index. Under `jit`, where indices are not known,
a real example whose index lies outside the bank scores NaN and writes nothing.

TypeError: `key` is not a key, embeddings are not floating point, or indices or sizes are not
integers. ValueError: shapes do not fit, a concrete index lies outside the bank, or a
hyper-parameter is out of its range.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar

# On a CPU a product costs about a tenth of gathering its row: a bank with up to this many times the
# drawn rows is multiplied as a whole.
_MAX_BANK_RATIO = 8


class Bank(NamedTuple):
    """One embedding per training example.

    `rows` are `[n, D]`, of unit length once updated; `log_z`, `[]`, is the logarithm of the
    constant that divides the scores `exp(v . row / T)` of queries against these rows.
    """

    rows: Array
    log_z: Array


class Queue(NamedTuple):
    """The last K embeddings: `rows` `[K, D]`, and `pointer` `[]` int32, the next row to write."""

    rows: Array
    pointer: Array


def bank_init(key: Array, size: int, width: int) -> Bank:
    """A bank of random rows, uniform in `+-1 / sqrt(width / 3)` as in CRD, with `Z = size`.

    `Z = size` normalizes scores with mean 1; for the published constant, call `bank_set_normalizer`
    with a first batch.

    Args:
      size: n, the number of training examples.
      width: D of the embeddings.

    Returns:
      A `Bank` of rows `[n, D]`, float32.
    """
    _checks.key(key=key)
    _checks.count(1, size=size, width=width)
    bound = 1 / math.sqrt(width / 3)
    rows = jax.random.uniform(key, (size, width), jnp.float32, -bound, bound)
    return Bank(rows, jnp.asarray(math.log(size), jnp.float32))


def bank_draw(
    key: Array, index: Array, *, size: int, negatives: int, where: Array | None = None
) -> Array:
    """Draws rows to compare with: the example itself in column 0, then other examples, uniformly.

    Args:
      index: `[B]` integers, the batch's places in the training set.
      size: n, rows of the bank, at least 2.
      negatives: K, at least 1 (published: 16384).
      where: bool `[B]`, real examples; the others draw for row 0.

    Returns:
      `[B, 1 + K]` int32.
    """
    _checks.key(key=key)
    _checks.count(2, size=size)
    _checks.count(1, negatives=negatives)
    _checks.rank(1, 1, index=index)
    _checks.mask(where, jnp.shape(index))
    index = _numerics.kept(index, where)
    _checks.indices(size, index=index)
    positives = index.astype(jnp.int32)[:, None]
    draws = jax.random.randint(key, (len(index), negatives), 0, size - 1, jnp.int32)
    negative_rows = draws + (draws >= positives).astype(jnp.int32)  # skips the example itself
    return jnp.concatenate([positives, negative_rows], axis=1)


def _products(bank: Bank, x: Array, index: Array) -> Array:
    """`x_b . row[index[b, j]]`, without a `[B, K, D]` array; NaN for an index outside the bank.

    Multiplies the whole bank if it is hardly larger than the drawn rows; otherwise gathers the
    drawn rows a few examples at a time.
    """
    is_valid = _is_valid(bank, index)
    index = jnp.where(is_valid, index, 0)
    rows = jax.lax.stop_gradient(jnp.asarray(bank.rows, x.dtype))

    @jax.checkpoint
    def example_products(pair: tuple[Array, Array]) -> Array:
        row, row_index = pair
        return jnp.matmul(rows[row_index], row, precision=jax.lax.Precision.HIGHEST)

    batch_size = max(2**22 // (index.shape[1] * x.shape[1]), 1)
    if len(rows) <= _MAX_BANK_RATIO * index.shape[1]:
        products = jnp.take_along_axis(_numerics.gram(x, rows), index, axis=1)
    elif batch_size >= len(x):
        products = jax.vmap(lambda *pair: example_products(pair))(x, index)
    else:
        products = jax.lax.map(example_products, (x, index), batch_size=batch_size)
    return jnp.where(is_valid, products, jnp.nan)


def _is_valid(bank: Bank, index: Array) -> Array:
    """Whether indices are rows of the bank: JAX reads both -1 and n as the last row."""
    return (index >= 0) & (index < len(bank.rows))


def bank_scores(
    bank: Bank,
    x: Array,
    index: Array,
    *,
    temperature: Scalar = 0.07,
    where: Array | None = None,
) -> Array:
    """`log (exp(x . row / T) / Z)` of each query against its rows, for `losses.crd`.

    Args:
      bank: rows of the *other* model: the student's queries are compared with the teacher's bank.
      x: `[B, D]`, unit embeddings (`connectors.unit_norm`).
      index: `[B, 1 + K]` integers from `bank_draw`.
      temperature: T > 0.
      where: bool `[B]`, real examples; the others are scored as zeros against row 0.

    Returns:
      `[B, 1 + K]`, differentiable in `x` and `temperature`, not in the bank.
    """
    x, index = _check_batch(bank, x, index, 2, where)
    _checks.positive(temperature=temperature)
    log_z = jax.lax.stop_gradient(bank.log_z).astype(x.dtype)
    return _products(bank, x, index) / _numerics.scalar(temperature, x, "temperature") - log_z


def bank_set_normalizer(
    bank: Bank,
    x: Array,
    index: Array,
    *,
    temperature: Scalar = 0.07,
    where: Array | None = None,
) -> Bank:
    """The bank with `Z = n mean(exp(x . row / T))`, estimated from this batch and then constant.

    CRD does this with its first batch; here it happens when you call it. Takes `[B, D]` embeddings
    and `[B, 1 + K]` indices.

    Args:
      temperature: T of the later scores.

    Returns:
      The bank with a new `log_z`; unchanged if no example is real.
    """
    unnormalized = bank._replace(log_z=jnp.zeros_like(bank.log_z))
    scores = bank_scores(unnormalized, x, index, temperature=temperature, where=where)
    is_real = None if where is None else jnp.broadcast_to(where[:, None], scores.shape)
    log_mean = jax.nn.logsumexp(scores, where=is_real) - jnp.log(
        jnp.asarray(scores.size, scores.dtype)
        if is_real is None
        else jnp.sum(is_real, dtype=scores.dtype)
    )
    log_z = jax.lax.stop_gradient(log_mean + math.log(len(bank.rows))).astype(bank.log_z.dtype)
    if where is not None:
        log_z = jnp.where(jnp.any(where), log_z, bank.log_z)
    return bank._replace(log_z=log_z)


def bank_update(
    bank: Bank,
    x: Array,
    index: Array,
    *,
    momentum: Scalar = 0.5,
    where: Array | None = None,
) -> Bank:
    """The bank with `row <- unit(momentum row + (1 - momentum) x)` for the batch's examples.

    Args:
      bank: the bank of the model that made `x`.
      index: `[B]` integers, the batch's places in the training set, distinct for real examples.
      momentum: of the old row.
    """
    x, index = _check_batch(bank, x, index, 1, where)
    _checks.within(0, 1, momentum=momentum)
    x = jax.lax.stop_gradient(x).astype(bank.rows.dtype)
    decay = _numerics.scalar(momentum, x, "momentum")
    new_rows = _numerics.normalize(decay * bank.rows[index] + (1 - decay) * x)
    is_written = _is_valid(bank, index) if where is None else _is_valid(bank, index) & where
    index = jnp.where(is_written, index, len(bank.rows))  # outside: dropped
    return bank._replace(rows=jnp.asarray(bank.rows).at[index].set(new_rows, mode="drop"))


def _check_batch(
    bank: Bank, x: Array, index: Array, index_rank: int, where: Array | None
) -> tuple[Array, Array]:
    """Checks embeddings and indices; returns both, 0 in masked rows, embeddings upcast."""
    _checks.floating(x=x)
    _checks.rank(2, 2, x=x)
    _checks.rank(index_rank, index_rank, index=index)
    _checks.same_batch(x=x, index=index)
    _checks.mask(where, jnp.shape(x)[:1])
    index = _numerics.kept(index, where)
    _checks.indices(len(bank.rows), index=index)
    if x.shape[1] != bank.rows.shape[1]:
        raise ValueError(
            f"x must have the bank's width, got {_checks.described(x=x, rows=bank.rows)}."
        )
    return _numerics.kept(_numerics.upcast(x), where), index


def queue_init(key: Array, size: int, width: int) -> Queue:
    """A queue of random unit rows, for losses over the last `size` embeddings.

    Returns:
      A `Queue` of rows `[K, D]`, float32, the pointer at 0.
    """
    _checks.key(key=key)
    _checks.count(1, size=size, width=width)
    rows = _numerics.normalize(jax.random.normal(key, (size, width), jnp.float32))
    return Queue(rows, jnp.zeros((), jnp.int32))


def queue_push(queue: Queue, x: Array, *, where: Array | None = None) -> Queue:
    """The queue with the oldest rows replaced by `x`, first in first out, wrapping around.

    The batch may have any size: if it has more than K embeddings, the last K stay.

    Args:
      where: bool `[B]`, real examples; the others are not pushed.
    """
    _checks.floating(x=x)
    size, width = queue.rows.shape
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"x must be [B, {width}], got {_checks.described(x=x, rows=queue.rows)}.")
    _checks.mask(where, x.shape[:1])
    is_real = jnp.ones(len(x), jnp.bool_) if where is None else where
    count = jnp.sum(is_real, dtype=jnp.int32)
    arrival = jnp.cumsum(is_real, dtype=jnp.int32) - 1  # among the real examples, from 0
    is_kept = is_real & (arrival >= count - size)
    positions = jnp.where(is_kept, (queue.pointer + arrival) % size, size)  # outside: dropped
    new_rows = jax.lax.stop_gradient(x).astype(queue.rows.dtype)
    pointer = (queue.pointer + count) % size
    rows = jnp.asarray(queue.rows).at[positions].set(new_rows, mode="drop")
    return Queue(rows, pointer.astype(queue.pointer.dtype))
