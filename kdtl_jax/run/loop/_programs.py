"""The compiled programs that a run calls, and the pace at which the host calls them.

A program makes one step, or many in a loop; both update the same `Carry`. The number of steps in
the loop is an argument, never a constant: the body is compiled once, independently of its trip
count, so that the division of a run into calls (by saves, signals or the machine's speed) cannot
change a bit of the result.
"""

import collections
import contextlib
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import train, trees
from kdtl_jax._model_functions import describe
from kdtl_jax.objective import Metrics
from kdtl_jax.run import data
from kdtl_jax.run.loop import _metrics
from kdtl_jax.train import Batch, Step, TrainState

CHUNK_STEPS = 64  # steps per call, at most
CHUNK_BYTES = 32 * 2**20  # rows gathered ahead for one call
CALL_SECONDS = 0.2  # longest call, so that signals are handled promptly
AHEAD_SECONDS = 0.5  # longest work that the host queues
AHEAD_CALLS = 32


class Carry(NamedTuple):
    """The state passed from call to call.

    `window` sums the metrics since the last line of the log. `bad` marks the leaves that the
    first non-finite update affected (last: the loss); from then on, nothing changes.
    """

    state: TrainState
    window: Metrics
    bad: Array


# (carry, its step, maximum number of steps) -> (carry, the step reached, steps made)
Move = Callable[[Carry, int, int], tuple[Carry, Array, int]]
Update = Callable[[Carry, Any, Batch], Carry]
BatchAt = Callable[..., Batch]  # (arrays, rows, step, position in the epoch) -> batch


@contextlib.contextmanager
def open_program(
    step: Step,
    state: TrainState,
    teacher: Any,
    source: data.Resident | data.Source,
    meta: Mapping[str, Any],
    check_finite: bool,
    prefetch: int,
    place: Callable[[Any], Any],
) -> Iterator[tuple[Carry, Move, str]]:
    """Yields the first carry, the function that advances it, and the path: "scan" or "steps".

    Padding would affect the batch statistics of a model. If the model state holds any, a short last
    batch keeps its own shape and gets its own program. A single row has no variance: it is padded
    with other examples, which count, and a warning is given.
    """
    if not isinstance(source, data.Resident) and not callable(source):
        raise TypeError(
            f"source must be data.resident(arrays, batch_size, key=key) or a function step -> "
            f"batches, got {describe(source)}. data.iterate(batches) makes one of any iterable."
        )
    start = int(jax.device_get(state.step))
    step = jax.jit(step, inline=True)  # one trace for its shapes, its path and its programs
    uses_statistics = any(trees.is_inexact(leaf) for leaf in jax.tree.leaves(state.model_state))
    if isinstance(source, data.Resident):
        batch_at = _batch_at(source, padded=not uses_statistics)
        batch = _example_batch(source, batch_at)
        # A resumed run stays on the path it started on: the two may differ in the last bit.
        path = meta.get("path") or train.step_path(step, state, batch, teacher)
        update = _make_update(step, check_finite)
        if path == "scan":
            move = _scan_program(update, source, batch_at, teacher, batch)
        else:
            move = _step_program(update, source, batch_at, teacher, source.batch_size)
        remainder = data.examples(source) % source.batch_size
        if uses_statistics and remainder == 1 and not source.drop_remainder:
            _warn_single_row()  # the padding rows have no weights
        elif uses_statistics and remainder and not source.drop_remainder:
            finish = _step_program(update, source, batch_at, teacher, remainder)
            move = _with_short_batch(move, finish, data.steps_per_epoch(source) - 1)
        yield _first_carry(step, state, teacher, batch, meta), _with_pacing(move), path
        return
    source_batches = _real_rows(source, start) if uses_statistics else source(start)
    with contextlib.closing(data.prefetch(source_batches, prefetch, place)) as batches:
        first = next(batches, None)
        if first is None:
            raise ValueError(f"the source has no batch from step {start} on.")
        move = _stream_program(step, teacher, first, batches, check_finite)
        yield _first_carry(step, state, teacher, first, meta), _with_pacing(move), "steps"


def checked_paths(state: TrainState) -> tuple[list[str], list[str]]:
    """The names of the entries of `Carry.bad`: parameters and the loss; then the model's state."""
    parameters, model_state = (
        [
            path
            for tree in group
            for path, leaf in zip(trees.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
            if trees.is_inexact(leaf)
        ]
        for group in (
            (state.params, {"connectors": state.connectors}),
            ({"model_state": state.model_state},),
        )
    )
    return [*parameters, "loss"], model_state


def nonfinite_leaves(new: TrainState, metrics: Metrics, old: TrainState) -> Array:
    """Flags parameters and losses that are not finite, and model state that no longer is.

    A running variance may overflow when the loss does not. The optimizer's state is not
    checked here: it is larger than the parameters and would take longer to read. See `overflowed`.
    """
    leaves = _inexact((new.params, new.connectors))
    loss = metrics.sums[..., metrics.names.index("loss"), 0] if "loss" in metrics.names else 0.0
    updated = [~jnp.all(jnp.isfinite(x)) for x in [*leaves, jnp.asarray(loss)]]
    pairs = zip(_inexact(old.model_state), _inexact(new.model_state), strict=True)
    overflows = [jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b)) for a, b in pairs]
    return jnp.stack([*updated, *overflows])


def overflowed(state: TrainState) -> list[str]:
    """The arrays of an optimizer's state that are not finite, by path.

    The square of a finite gradient above 1e19 overflows float32: Adam's second moment is infinite
    from then on, and its weight never moves again. Scalars may be infinite on purpose, such as an
    initial best loss.
    """
    tree = {"opt_state": state.opt_state}
    pairs = zip(trees.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    arrays = {path: x for path, x in pairs if trees.is_inexact(x) and jnp.ndim(x)}
    return [path for path, bad in jax.device_get(_not_finite(arrays)).items() if bad]


@jax.jit
def _not_finite(arrays: dict[str, Array]) -> dict[str, Array]:
    return {path: ~jnp.all(jnp.isfinite(x)) for path, x in arrays.items()}


def _inexact(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)]


def choose(good: Array, new: Any, old: Any) -> Any:
    """`new` if `good`, else `old`; also for typed keys."""
    return jax.tree.map(lambda a, b: jax.lax.select(good, a, b) if a is not b else a, new, old)


def _first_carry(
    step: Step, state: TrainState, teacher: Any, batch: Any, meta: Mapping[str, Any]
) -> Carry:
    """The carry before the first call, with the window of a resumed run.

    If the state is committed to devices, so is the rest, as after a call; otherwise the second
    call, on arguments placed differently, would compile again.
    """
    metrics = jax.eval_shape(step, state, batch, teacher)[1]
    sums = _metrics.from_json(meta.get("window"), metrics.names)
    zeros = np.zeros(metrics.sums.shape, metrics.sums.dtype)
    window = zeros if sums is None else np.asarray(sums, metrics.sums.dtype)
    bad = np.zeros(sum(map(len, checked_paths(state))), np.bool_)
    sharding = state.step.sharding if getattr(state.step, "committed", False) else None
    window, bad = jax.device_put((window, bad), sharding)
    return Carry(state, Metrics(metrics.names, window), bad)


def _make_update(step: Step, check_finite: bool) -> Update:
    def update(carry: Carry, teacher: Any, batch: Batch) -> Carry:
        state, metrics = step(carry.state, batch, teacher)
        window = Metrics(metrics.names, carry.window.sums + metrics.sums)
        if not check_finite:
            return Carry(state, window, carry.bad)
        bad = nonfinite_leaves(state, metrics, carry.state)
        stopped = jnp.any(carry.bad)
        good = ~(stopped | jnp.any(bad))
        selected = choose(good, Carry(state, window, carry.bad), carry)
        return selected._replace(bad=jnp.where(stopped, carry.bad, bad))

    return update


def _scan_program(
    update: Update, source: data.Resident, batch_at: BatchAt, teacher: Any, batch: Any
) -> Move:
    """Up to `chunk` steps per call, within one epoch, with rows gathered before the loop."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    epoch_steps = data.steps_per_epoch(source)
    chunk = int(min(CHUNK_STEPS, max(1, CHUNK_BYTES // max(size, 1)), epoch_steps))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        carry: Carry, teacher: Any, arrays: Any, index: Array, n: Array
    ) -> tuple[Carry, Array]:
        first = carry.state.step
        positions = (first % len(index) + jnp.arange(chunk, dtype=jnp.int32)) % len(index)
        batches = jax.vmap(lambda rows, at: batch_at(arrays, rows, first, at))(
            index[positions], positions
        )

        def body(i: Array, carry: Carry) -> Carry:
            return update(carry, teacher, jax.tree.map(lambda x: x[i], batches))

        carry = jax.lax.fori_loop(jnp.zeros((), jnp.int32), n, body, carry)
        return carry, carry.state.step + 0

    arrays, epochs = _device_arrays(source), _epoch_cache(source)

    def move(carry: Carry, at: int, max_steps: int) -> tuple[Carry, Array, int]:
        count = min(max_steps, chunk, epoch_steps - at % epoch_steps)
        steps = jax.device_put(np.int32(count))
        return *advance(carry, teacher, arrays, epochs(at // epoch_steps), steps), count

    return move


def _step_program(
    update: Update, source: data.Resident, batch_at: BatchAt, teacher: Any, size: int
) -> Move:
    """One step per call, with the first `size` rows of a batch gathered in the same program."""

    def batch_of(step: Array, arrays: Any, index: Array) -> Batch:
        position = step % len(index)
        return batch_at(arrays, index[position][..., :size], step, position)

    advance, length = _single_step(update, batch_of), data.steps_per_epoch(source)
    arrays, epochs = _device_arrays(source), _epoch_cache(source)

    def move(carry: Carry, start: int, max_steps: int) -> tuple[Carry, Array, int]:
        return *advance(carry, teacher, arrays, epochs(start // length)), 1

    return move


def _single_step(
    update: Update, batch_of: Callable[..., Batch] = lambda step, batch: batch
) -> Callable[..., tuple[Carry, Array]]:
    """`advance(carry, teacher, *args) -> (carry, step reached)` on `batch_of(step, *args)`."""

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, teacher: Any, *args: Any) -> tuple[Carry, Array]:
        carry = update(carry, teacher, batch_of(carry.state.step, *args))
        return carry, carry.state.step + 0

    return advance


def _with_short_batch(move: Move, finish: Move, last: int) -> Move:
    """`move` for the full batches of an epoch, `finish` for the short one at position `last`."""

    def move_or_finish(carry: Carry, start: int, max_steps: int) -> tuple[Carry, Array, int]:
        position = start % (last + 1)
        if position < last:
            return move(carry, start, min(max_steps, last - position))
        return finish(carry, start, 1)

    return move_or_finish


def _stream_program(
    step: Step, teacher: Any, first: Any, batches: Iterator[Any], check_finite: bool
) -> Move:
    """One step per call, on the batches of an iterator."""
    advance = _single_step(_make_update(step, check_finite))
    batches = itertools.chain([first], batches)

    def move(carry: Carry, start: int, max_steps: int) -> tuple[Carry, Array, int]:
        return *advance(carry, teacher, next(batches)), 1

    return move


def _real_rows(source: data.Source, start: int) -> Iterator[Batch]:
    """The real rows of every batch; a single one replaces the first row of the previous batch."""
    previous: Batch | None = None
    for batch in source(start):
        real = data.unpad(batch)
        if data.length(real) > 1:
            previous = real
        elif previous is None and start:
            # A run resumed here; use the batch that an uninterrupted run would use.
            previous = next((data.unpad(first) for first in source(start - 1)), None)
        if previous is not None and data.length(real) == 1 < data.length(previous):
            _warn_single_row()
            real = jax.tree.map(lambda one, many: np.concatenate([one, many[1:]]), real, previous)
        yield real


def _warn_single_row() -> None:
    warnings.warn(
        "A last batch of one row has no variance for the model's batch statistics: it is padded "
        "with other examples of the epoch. Another batch size, or drop_remainder=True, avoids it.",
        stacklevel=4,
    )


def _example_batch(source: data.Resident, batch_at: BatchAt) -> Any:
    """The shapes of a batch."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.eval_shape(lambda epoch: data.epoch_rows(source, epoch)[0], number)
    return jax.eval_shape(batch_at, _device_arrays(source), rows, number, number)


def _device_arrays(source: data.Resident) -> Any:
    """The arrays of the data, as an argument of the programs."""
    return source.arrays, source.teacher, source.augment_key


def _batch_at(source: data.Resident, *, padded: bool) -> BatchAt:
    drop = source.drop_remainder or not padded

    def batch_at(device_arrays: Any, rows: Array, step: Array, position: Array) -> Batch:
        arrays, teacher, key = device_arrays
        data_source = source._replace(
            arrays=arrays, teacher=teacher, augment_key=key, drop_remainder=drop
        )
        epoch = step // data.steps_per_epoch(source)
        return data.gather(data_source, rows, epoch, position)

    return batch_at


def _epoch_cache(source: data.Resident) -> Callable[[int], Array]:
    """The rows of an epoch, computed once per epoch, on the device."""

    @jax.jit
    def epoch_rows(epoch: Array) -> Array:
        return data.epoch_rows(source, epoch)

    return functools.lru_cache(1)(lambda epoch: epoch_rows(jax.device_put(np.int32(epoch))))


def _with_pacing(move: Move) -> Move:
    """Chooses the steps per call, and waits for old calls to keep the queue of work short.

    Waiting for an old call keeps the device busy, and nothing is transferred.
    """
    queued: collections.deque[tuple[Array, int]] = collections.deque()
    seconds_per_step, last, calls = 0.0, 0.0, 0

    def paced(carry: Carry, start: int, max_steps: int) -> tuple[Carry, Array, int]:
        nonlocal seconds_per_step, last, calls
        if jax.process_count() == 1:  # with more, all must make the same calls
            max_steps = (
                min(max_steps, max(1, int(CALL_SECONDS / seconds_per_step))) if calls > 1 else 1
            )
        carry, reached, count = move(carry, start, max_steps)
        queued.append((reached, count))
        calls += 1
        while queued and (
            calls <= 2  # the first compiles, the second is the first to be timed
            or len(queued) > AHEAD_CALLS
            or (len(queued) > 2 and sum(n for _, n in queued) * seconds_per_step > AHEAD_SECONDS)
        ):
            waited, steps = queued.popleft()
            waited.block_until_ready()
            now = time.perf_counter()
            if calls > 1:
                seconds = max((now - last) / steps, 1e-7)
                weight = 0.3 if seconds_per_step else 1.0
                seconds_per_step += weight * (seconds - seconds_per_step)
            last = now
        return carry, reached, count

    return paced
