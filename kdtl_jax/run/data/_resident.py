"""Data on the device: rows are gathered inside the compiled step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _model_functions, augment, train, trees
from kdtl_jax._types import PyTree

Batch = Mapping[str, Any]  # arrays by name, or trees of them, [B, ...] each
Augment = Callable[[Array, Batch], Batch]  # keys [B], batch -> batch


class Resident(NamedTuple):
    """Data on the device; build it with `resident`.

    `arrays` hold `[N, ...]`, `teacher` (cached outputs) `[views, N, ...]` or None. `order` is the
    shuffling key, or None for the given order. View `epoch % views` augments epoch `epoch`. `rows`
    are the examples to use, `[n]`, or None for all.

    With keys `[S]` (and rows `[S, n]`) batches are `[S, B, ...]`: the batches of S runs,
    each in its own order, for a step that is vmapped over runs.
    """

    arrays: Batch
    batch_size: int
    order: Array | None
    drop_remainder: bool
    augment: Augment | None
    augment_key: Array | None
    teacher: PyTree
    views: int | None
    rows: Array | None = None


def resident(
    arrays: Batch,
    batch_size: int,
    *,
    key: Array | None,
    drop_remainder: bool = True,
    augment: Augment | None = None,
    teacher: PyTree = None,
    views: int | None = None,
    rows: np.ndarray | None = None,
) -> Resident:
    """Puts data on the device for training or evaluation.

    Args:
      arrays: `{"inputs": [N, ...], "labels": [N, ...], ...}`.
      batch_size: examples per step.
      key: PRNG key for shuffling and augmentation (legacy keys are accepted); None keeps the
        order. Keys `[S]` give the batches of S runs at once, each the same as with its key alone.
      drop_remainder: whether to drop the short last batch (different examples each epoch) or pad
        it with weight 0. For a model with batch statistics, `loop.run` does not pad: the last batch
        keeps its own shape.
      augment: `(keys, batch) -> batch`, applied inside the step before teacher and student; the
        keys are `augment.example_keys` of the epoch's view.
      teacher: cached outputs, `[N, ...]`, or `[views, N, ...]` if `views` is given; they appear
        as `batch["teacher"]`.
      views: after this many epochs the augmented views repeat; None never repeats.
      rows: int `[n]`, the examples to use (all by default); `[S, n]` for keys `[S]`.

    Raises:
      ValueError: if the arrays have different lengths, the batch is too large, or rows are not
        valid example indices.
    """
    key = typed_key(key)
    total = length(_model_functions.check_named_arrays("arrays", arrays))
    rows = _check_rows(rows, total, key)
    size = total if rows is None else rows.shape[-1]
    _checks.count(1, batch_size=batch_size)
    if batch_size > size:
        raise ValueError(
            f"batch_size must lie in 1..{size} (the number of examples), got {batch_size}."
        )
    if augment is not None and key is None:
        raise ValueError("augmentation needs a key, got key=None.")
    if teacher is not None:
        outputs = teacher if views is not None else jax.tree.map(lambda x: x[None], teacher)
        shapes = {np.shape(leaf)[:2] for leaf in jax.tree.leaves(outputs)}
        if shapes != {(views or 1, total)}:
            raise ValueError(
                f"teacher outputs must have {total} rows"
                f"{f' in each of {views} views' if views else ''}, got leading shapes "
                f"{sorted(shapes)}."
            )
        if augment is not None and views is None:
            raise ValueError(
                "cached teacher outputs of augmented inputs need views= (how many "
                "epochs of views the cache holds)."
            )
        teacher = jax.tree.map(_put, outputs)
    order, views_key = (None, None) if key is None else _split(key)
    arrays = jax.tree.map(lambda x: _put(canonical(x)), dict(arrays))
    chosen = None if rows is None else jnp.asarray(rows)
    return Resident(
        arrays, batch_size, order, drop_remainder, augment, views_key, teacher, views, chosen
    )


def view_key(key: Array) -> Array:
    """The augmentation key of `resident(..., key=key)`, for building a teacher cache."""
    return jax.random.split(typed_key(key))[1]


def examples(data: Resident) -> int:
    """The number of examples in an epoch."""
    return length(data.arrays) if data.rows is None else data.rows.shape[-1]


def steps_per_epoch(data: Resident) -> int:
    """The number of batches in an epoch."""
    size = examples(data)
    return size // data.batch_size if data.drop_remainder else -(-size // data.batch_size)


def epoch_rows(data: Resident, epoch: Array) -> Array:
    """int32 `[steps, B]` (`[steps, S, B]` for S runs): the rows of an epoch.

    The padding repeats the epoch's first rows.
    """

    def rows_of_run(order: Array | None, rows: Array | None) -> Array:
        positions = order_rows(order, epoch, examples(data), data.batch_size, data.drop_remainder)
        return positions if rows is None else rows[positions]

    if data.order is None or not data.order.ndim:
        return rows_of_run(data.order, data.rows)
    in_axes = (0, None if data.rows is None or data.rows.ndim == 1 else 0)
    return jnp.swapaxes(jax.vmap(rows_of_run, in_axes=in_axes)(data.order, data.rows), 0, 1)


def gather(data: Resident, rows: Array, epoch: Array, step_in_epoch: Array) -> dict[str, Any]:
    """The batch of `rows` `[B]` or `[S, B]`, inside `jit`: gathered, weighted, augmented."""
    batch = train.take(data.arrays, rows)
    if not data.drop_remainder:
        position = step_in_epoch * data.batch_size + jnp.arange(data.batch_size, dtype=jnp.int32)
        real_weights = jnp.broadcast_to((position < examples(data)).astype(jnp.float32), rows.shape)
        batch["weights"] = real_weights * batch["weights"] if "weights" in batch else real_weights
    view = epoch if data.views is None else epoch % data.views
    if (make_views := data.augment) is not None and (key := data.augment_key) is not None:

        def augment_run(key: Array, rows: Array, batch: Batch) -> dict[str, Any]:
            return dict(make_views(augment.example_keys(key, view, rows), batch))

        batch = (jax.vmap(augment_run) if key.ndim else augment_run)(key, rows, batch)
    if data.teacher is not None:
        view_index = view if data.views is not None else jnp.zeros_like(epoch)
        batch["teacher"] = jax.tree.map(lambda x: x[view_index, rows], data.teacher)
    return batch


@jax.jit
def _split(key: Array) -> tuple[Array, Array]:
    """The keys of the order and of the views, for every run."""
    keys = jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)
    return keys[..., 0], keys[..., 1]


def typed_key(key: Any) -> Any:
    """Wraps a legacy key (uint32 `[2]`), whose axis would look like an axis of runs."""
    dtype = getattr(key, "dtype", None)
    if key is None or _checks.is_key(key):
        return key
    try:
        return jax.random.wrap_key_data(key)
    except TypeError:
        got = f"{key!r} ({type(key).__name__})" if dtype is None else f"{dtype}{list(key.shape)}"
        raise TypeError(
            f"key must be a PRNG key such as jax.random.key(0), or None, got {got}."
        ) from None


def _check_rows(rows: np.ndarray | None, total: int, key: Array | None) -> np.ndarray | None:
    if rows is None:
        return None
    rows = np.asarray(rows)
    runs = () if key is None else key.shape
    if rows.dtype.kind not in "iu" or rows.ndim < 1 or rows.shape[:-1] not in ((), runs):
        raise ValueError(
            f"rows must be whole numbers [n]{' or [S, n]' if runs else ''}, got "
            f"{rows.dtype}{list(rows.shape)} for keys {list(runs)}."
        )
    if not rows.size or rows.min() < 0 or rows.max() >= total:
        raise ValueError(f"rows must name examples 0..{total - 1}, at least one.")
    return rows.astype(np.int32)


def order_rows(
    order: Array | None, epoch: Array, size: int, batch_size: int, drop_remainder: bool
) -> Array:
    """The rows of an epoch, int32 `[steps, B]`; the last batch is padded from the first rows."""
    if order is None:
        rows = jnp.arange(size, dtype=jnp.int32)
    else:
        (rows,) = train.epoch_index(order, epoch, size, size)
    steps = size // batch_size if drop_remainder else -(-size // batch_size)
    padded = jnp.concatenate([rows, rows])[: steps * batch_size]
    return padded.reshape(steps, batch_size)


def length(arrays: Batch) -> int:
    """The number of examples, which must be the same for all arrays.

    Raises:
      ValueError: if there is no array, one has no axis, or the leading axes differ.
    """
    flat = trees.flatten(dict(arrays))
    _checks.rank(1, **flat)
    _checks.same_batch(**flat)
    if not flat:
        raise ValueError("there is no array in the batch.")
    return len(next(iter(flat.values())))


def _put(x: Any) -> Array:
    """Puts an array on the device, whose memory is not that of an array that may still change."""
    array = jax.device_put(x)
    if not _may_change(x):
        return array
    jax.block_until_ready(array)
    is_on_host = next(iter(array.devices())).platform == "cpu"
    return jax.device_put(x.copy()) if is_on_host and np.may_share_memory(array, x) else array


def _may_change(x: Any) -> bool:
    """Whether a host array can be written, or a read-only one is a view of one that can."""
    while isinstance(x, np.ndarray):
        if x.flags.writeable:
            return True
        x = x.base
    return False


def canonical(x: Any) -> Any:
    """Converts host arrays to the 32-bit dtype that JAX would give them, before the transfer."""
    if isinstance(x, jax.Array):
        return x
    array = np.asarray(x)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
