"""The compiled programs that a run calls: one step, or many in a loop of unknown length.

Both update the same `Carry`. The number of steps in the loop is an argument, never a constant, so
that how a run is cut into calls (saves, signals, the pace of the machine) cannot change a bit of
the result: the body is compiled once and knows nothing of its trip count.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from kdtl_jax import trees
from kdtl_jax.objective import Metrics
from kdtl_jax.run import data
from kdtl_jax.train import Batch, Step, TrainState

CHUNK_STEPS = 64  # dispatch then costs about a microsecond per step
CHUNK_BYTES = 32 * 2**20  # rows gathered ahead for one call


class Carry(NamedTuple):
    """What goes from call to call.

    `window` sums the metrics since the last line of the log. `bad` marks the leaves that the
    first non-finite update hit (last: the loss); from then on the state is held as it was before.
    """

    state: TrainState
    window: Metrics
    bad: Array


Advance = Callable[..., tuple[Carry, Array]]  # (carry, teacher, ...) -> (carry, step reached)


def checked_paths(state: TrainState) -> list[str]:
    """The names of the entries of `Carry.bad`."""
    flat = trees.flatten(state.params)
    return [*(path for path, leaf in flat.items() if trees.is_inexact(leaf)), "loss"]


def start(state: TrainState, metrics: Metrics, sums: Any = None) -> Carry:
    """The carry before the first call; `metrics` is abstract, `sums` a window taken up again.

    Where the state lies on a mesh so does the rest, as it will after a call: or else the second
    call, on arguments placed in another way, would compile once more.
    """
    zeros = np.zeros(metrics.sums.shape, metrics.sums.dtype)
    window = zeros if sums is None else np.asarray(sums, metrics.sums.dtype)
    bad = np.zeros(len(checked_paths(state)), np.bool_)
    on = getattr(state.step, "sharding", None)
    on = on if isinstance(on, NamedSharding) else None
    return Carry(state, Metrics(metrics.names, jax.device_put(window, on)), jax.device_put(bad, on))


def single(step: Step, check_finite: bool) -> Advance:
    """`advance(carry, teacher, batch)`, one step on a given batch."""
    one = _guarded(step, check_finite)

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, teacher: Any, batch: Batch) -> tuple[Carry, Array]:
        carry = one(carry, teacher, batch)
        return carry, carry.state.step + 0

    return advance


def resident_single(step: Step, source: data.Resident, check_finite: bool) -> Advance:
    """`advance(carry, teacher, held, index)`: one step, its rows gathered in the same program."""
    one, batch_at = _guarded(step, check_finite), _batch_at(source)

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, teacher: Any, held: Any, index: Array) -> tuple[Carry, Array]:
        place = carry.state.step % len(index)
        carry = one(carry, teacher, batch_at(held, index[place], carry.state.step, place))
        return carry, carry.state.step + 0

    return advance


def resident_many(step: Step, source: data.Resident, check_finite: bool, width: int) -> Advance:
    """`advance(carry, teacher, held, index, n)`: `n <= width` steps within one epoch."""
    one, batch_at = _guarded(step, check_finite), _batch_at(source)

    @partial(jax.jit, donate_argnums=0)
    def advance(
        carry: Carry, teacher: Any, held: Any, index: Array, n: Array
    ) -> tuple[Carry, Array]:
        first = carry.state.step
        places = (first % len(index) + jnp.arange(width, dtype=jnp.int32)) % len(index)
        # One gather for all: inside the loop it would cost a quarter of a small model's step.
        batches = jax.vmap(lambda rows, at: batch_at(held, rows, first, at))(index[places], places)

        def body(i: Array, carry: Carry) -> Carry:
            return one(carry, teacher, jax.tree.map(lambda x: x[i], batches))

        carry = jax.lax.fori_loop(jnp.zeros((), jnp.int32), n, body, carry)
        return carry, carry.state.step + 0

    return advance


def chunk_width(source: data.Resident, batch: Any) -> int:
    """How many steps one call of `resident_many` may run."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    fitting = max(1, CHUNK_BYTES // max(size, 1))
    return int(min(CHUNK_STEPS, fitting, data.steps_per_epoch(source)))


def example_batch(source: data.Resident) -> Any:
    """The shapes of a batch."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.eval_shape(lambda epoch: data.epoch_rows(source, epoch)[0], number)
    return jax.eval_shape(_batch_at(source), holdings(source), rows, number, number)


def holdings(source: data.Resident) -> Any:
    """The arrays of the data, as an argument of the programs."""
    return source.arrays, source.teacher, source.augment_key


def _batch_at(source: data.Resident) -> Callable[..., Batch]:
    def batch_at(held: Any, rows: Array, step: Array, place: Array) -> Batch:
        arrays, teacher, key = held
        here = source._replace(arrays=arrays, teacher=teacher, augment_key=key)
        epoch = step // data.steps_per_epoch(source)
        return data.gather(here, rows, epoch, place)

    return batch_at


def _guarded(step: Step, check_finite: bool) -> Callable[[Carry, Any, Batch], Carry]:
    def one(carry: Carry, teacher: Any, batch: Batch) -> Carry:
        state, metrics = step(carry.state, teacher, batch)
        window = Metrics(metrics.names, carry.window.sums + metrics.sums)
        if not check_finite:
            return Carry(state, window, carry.bad)
        bad = nonfinite_leaves(state, metrics)
        held = jnp.any(carry.bad)
        good = ~(held | jnp.any(bad))
        kept = choose(good, Carry(state, window, carry.bad), carry)
        return kept._replace(bad=jnp.where(held, carry.bad, bad))

    return one


def nonfinite_leaves(state: TrainState, metrics: Metrics) -> Array:
    """bool `[leaves + 1]`: which parameters, and last the loss, are not finite."""
    leaves = [leaf for leaf in jax.tree.leaves(state.params) if trees.is_inexact(leaf)]
    loss = metrics.sums[..., metrics.names.index("loss"), 0] if "loss" in metrics.names else 0.0
    return jnp.stack([~jnp.all(jnp.isfinite(x)) for x in [*leaves, jnp.asarray(loss)]])


def choose(good: Array, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`; typed keys included."""
    return jax.tree.map(lambda a, b: jax.lax.select(good, a, b) if a is not b else a, new, old)
