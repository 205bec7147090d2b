"""Data on the device: rows are gathered inside the compiled step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, augment, train
from kdtl_jax._types import PyTree

Batch = Mapping[str, Any]
Augment = Callable[[Array, Batch], Batch]  # keys [B], batch -> batch


class Resident(NamedTuple):
    """Data on the device; build it with `resident`.

    `arrays` hold `[N, ...]`, `teacher` (cached outputs) `[views, N, ...]` or None. `order` is the
    shuffling key, or None for the given order. View `epoch % views` augments epoch `epoch`.
    """

    arrays: Batch
    batch_size: int
    order: Array | None
    drop_remainder: bool
    augment: Augment | None
    augment_key: Array | None
    teacher: PyTree
    views: int | None


def resident(
    arrays: Batch,
    batch_size: int,
    *,
    key: Array | None,
    drop_remainder: bool = True,
    augment: Augment | None = None,
    teacher: PyTree = None,
    views: int | None = None,
) -> Resident:
    """Puts data on the device for training or evaluation.

    Args:
      arrays: `{"inputs": [N, ...], "labels": [N, ...], ...}`.
      batch_size: examples per step.
      key: typed PRNG key of the shuffling and the augmentation; None keeps the order.
      drop_remainder: leave the ragged last batch out (other examples each epoch), or fill it up
        and give the filling weight 0.
      augment: `(keys, batch) -> batch`, applied inside the step before teacher and student; the
        keys are `augment.example_keys` of the epoch's view.
      teacher: cached outputs, `[N, ...]`, or `[views, N, ...]` where `views` is given; they arrive
        as `batch["teacher"]`.
      views: after so many epochs the augmented views repeat; None never repeats.

    Raises:
      ValueError: if the arrays have different lengths, or the batch does not fit.
    """
    size = length("resident", arrays)
    if not 0 < batch_size <= size:
        raise ValueError(
            f"resident: batch_size must lie in 1..{size} (the number of examples), "
            f"got {batch_size}."
        )
    if augment is not None and key is None:
        raise ValueError("resident: augmentation needs a key, got key=None.")
    if teacher is not None:
        stacked = teacher if views is not None else jax.tree.map(lambda x: x[None], teacher)
        shapes = {np.shape(leaf)[:2] for leaf in jax.tree.leaves(stacked)}
        if shapes != {(views or 1, size)}:
            raise ValueError(
                f"resident: teacher outputs must have {size} rows"
                f"{f' in each of {views} views' if views else ''}, got leading shapes "
                f"{sorted(shapes)}."
            )
        if augment is not None and views is None:
            raise ValueError(
                "resident: cached teacher outputs of augmented inputs need views= (how many "
                "epochs of views the cache holds)."
            )
        teacher = jax.device_put(stacked)
    order, views_key = (None, None) if key is None else jax.random.split(key)
    return Resident(
        arrays=jax.device_put(jax.tree.map(canonical, dict(arrays))),
        batch_size=batch_size,
        order=order,
        drop_remainder=drop_remainder,
        augment=augment,
        augment_key=views_key,
        teacher=teacher,
        views=views,
    )


def view_key(key: Array) -> Array:
    """The augmentation's key of `resident(..., key=key)`, for building a teacher cache."""
    return jax.random.split(key)[1]


def steps_per_epoch(data: Resident) -> int:
    """How many batches one epoch has."""
    size = length("steps_per_epoch", data.arrays)
    return size // data.batch_size if data.drop_remainder else -(-size // data.batch_size)


def epoch_rows(data: Resident, epoch: Array) -> Array:
    """int32 `[steps, B]`: the rows of an epoch; the filling repeats the epoch's first rows."""
    size = length("epoch_rows", data.arrays)
    return order_rows(data.order, epoch, size, data.batch_size, data.drop_remainder)


def gather(data: Resident, rows: Array, epoch: Array, step_in_epoch: Array) -> dict[str, Any]:
    """The batch of `rows` `[B]`, inside `jit`: gathered, weighted, augmented."""
    batch = train.take(data.arrays, rows)
    size = length("gather", data.arrays)
    if not data.drop_remainder:
        place = step_in_epoch * data.batch_size + jnp.arange(data.batch_size, dtype=jnp.int32)
        real = (place < size).astype(jnp.float32)
        batch["weights"] = real * batch["weights"] if "weights" in batch else real
    view = epoch if data.views is None else epoch % data.views
    if data.augment is not None and data.augment_key is not None:
        keys = augment.example_keys(data.augment_key, view, rows)
        batch = dict(data.augment(keys, batch))
    if data.teacher is not None:
        held = view if data.views is not None else jnp.zeros_like(epoch)
        batch["teacher"] = jax.tree.map(lambda x: x[held, rows], data.teacher)
    return batch


def order_rows(
    order: Array | None, epoch: Array, size: int, batch_size: int, drop_remainder: bool
) -> Array:
    if order is None:
        rows = jnp.arange(size, dtype=jnp.int32)
    else:
        rows = jax.random.permutation(jax.random.fold_in(order, epoch), size).astype(jnp.int32)
    steps = size // batch_size if drop_remainder else -(-size // batch_size)
    filled = jnp.concatenate([rows, rows])[: steps * batch_size]
    return filled.reshape(steps, batch_size)


def length(fn: str, arrays: Batch) -> int:
    flat = {"/".join(map(str, p)): x for p, x in jax.tree_util.tree_leaves_with_path(dict(arrays))}
    _checks.rank(fn, 1, **flat)
    _checks.same_batch(fn, **flat)
    if not flat:
        raise ValueError(f"{fn}: there is no array in the batch.")
    return len(next(iter(flat.values())))


def canonical(x: Any) -> Any:
    """Host arrays in the 32-bit dtype that JAX would give them, said before the transfer."""
    if isinstance(x, jax.Array):
        return x
    array = np.asarray(x)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
