"""Epochs over device-resident data: their order, as one scan or as single steps if faster."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _donation, _host_arrays, _jaxprs
from kdtl_jax.objective import Metrics
from kdtl_jax.train._state import Batch, Step, TrainState


class Epoch(Protocol):
    """`(state, data, rows of every batch, teacher_params) -> (state, metrics)`."""

    def __call__(
        self, state: TrainState, data: Batch, index: Array, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]: ...


def take(data: Batch, index: Array) -> dict[str, Any]:
    """Rows `index` of every array in `data`; `index` of any shape.

    Raises:
      TypeError: if `index` is not an array of integers.
    """
    _checks.integers(index=index)
    index = jnp.asarray(index)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), dict(data))


def scan_epoch(step: Step) -> Epoch:
    """An epoch over device-resident data as one program.

    Returns:
      `epoch(state, data, index, teacher_params=None) -> (state, metrics)`: `data` holds whole
      arrays `[N, ...]`, and `index`, int32 `[steps, B]`, lists the rows of each batch; metrics get
      a leading step axis. Rows are gathered once, outside the loop. Not jitted: use
      `jit_step(epoch)`.
    """

    def epoch(
        state: TrainState, data: Batch, index: Array, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        def body(carry: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return step(carry, batch, teacher_params)

        return jax.lax.scan(body, state, take(data, index))

    return epoch


def step_path(step: Step, state: TrainState, batch: Batch, teacher_params: Any = None) -> str:
    """`"scan"` or `"steps"`: how to run many steps on this back end.

    Inside a while loop, XLA's CPU back end compiles convolutions without their threaded kernels, so
    an epoch takes longer than its single steps. Only in that case, a step with convolutions is
    called batch by batch. This is decided by tracing (`batch` may be abstract), without running
    anything, so a resumed run takes the same path.
    """
    if jax.default_backend() != "cpu":
        return "scan"
    primitives = _jaxprs.primitives(step, state, batch, teacher_params)
    return "steps" if "conv_general_dilated" in primitives else "scan"


def epoch_path(
    step: Step, state: TrainState, data: Batch, batch_size: int = 1, teacher_params: Any = None
) -> str:
    """`step_path` for batches of `batch_size` rows of `data`: what `jit_epoch` does."""
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    batch = jax.eval_shape(take, dict(data), rows)
    return step_path(step, state, batch, teacher_params)


def jit_epoch(step: Step) -> Epoch:
    """`scan_epoch` jitted with the state donated, or single steps if those are faster.

    NumPy arrays of the data are copied in every call; put them on the device to avoid it.

    Returns:
      `epoch(state, data, index, teacher_params=None)` as in `scan_epoch`, with equal results on
      either path; `epoch_path` returns the path that it takes. It raises RuntimeError as the step
      of `jit_step` does.
    """
    step = jax.jit(step, inline=True)  # one trace for the path and for the program
    scanned = jax.jit(scan_epoch(step), donate_argnums=0)

    jitted_step = jax.jit(
        lambda state, data, rows, teacher: step(state, take(data, rows), teacher), donate_argnums=0
    )

    def epoch(
        state: TrainState, data: Batch, index: Array, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        data = _host_arrays.unshared(data)
        others = {"data": data, "teacher_params": teacher_params}
        if epoch_path(step, state, data, index.shape[1], teacher_params) == "scan":
            with _donation.explained(state, **others):
                return scanned(state, data, index, teacher_params)
        collected = []
        for rows in np.asarray(index):
            with _donation.explained(state, **others):
                state, metrics = jitted_step(state, data, rows, teacher_params)
            collected.append(metrics)
        return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)

    return epoch


def epoch_index(key: Array, epoch: int | Array, size: int, batch_size: int) -> Array:
    """int32 `[size // batch_size, batch_size]`: the shuffled rows of one epoch.

    It depends only on `(key, epoch)`, so a resumed run sees the same order. The remainder of the
    division is dropped (different rows in each epoch).

    Raises:
      TypeError: if `key` is not a key.
      ValueError: if batch_size is not in 1..size.
    """
    _checks.key(key=key)
    _checks.count(1, size=size)
    _checks.integer(batch_size=batch_size)
    _checks.scalar(epoch=epoch)
    _checks.integers(epoch=epoch)
    if not 0 < batch_size <= size:
        raise ValueError(
            f"batch_size must lie in 1..{size} (the number of examples), got {batch_size}."
        )
    order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    steps = size // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size).astype(jnp.int32)
