"""The compiled programs that a run calls, and the pace at which the host calls them.

A program makes one step, or many in a loop of unknown length; both update the same `Carry`. The
number of steps in the loop is an argument, never a constant, so that how a run is divided into
calls (by saves, signals or the machine's speed) cannot change a bit of the result: the body is
compiled once, independently of its trip count.
"""

import collections
import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import train, trees
from kdtl_jax._model_functions import described
from kdtl_jax.objective import Metrics
from kdtl_jax.run import data
from kdtl_jax.run.loop import _metrics
from kdtl_jax.train import Batch, Step, TrainState

CHUNK_STEPS = 64  # steps per call, at most
CHUNK_BYTES = 32 * 2**20  # rows gathered ahead for one call
CALL_SECONDS = 0.2  # longest call, so that signals are handled promptly
AHEAD_SECONDS = 0.5  # most work that the host queues
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
One = Callable[[Carry, Any, Batch], Carry]
BatchAt = Callable[..., Batch]  # (arrays, rows, step, position in the epoch) -> batch


@contextlib.contextmanager
def opened(
    step: Step,
    state: TrainState,
    teacher: Any,
    source: data.Resident | data.Source,
    meta: Mapping[str, Any],
    check_finite: bool,
    prefetch: int,
    place: Callable[[Any], Any],
) -> Iterator[tuple[Carry, Move, str]]:
    """The first carry, the function that advances it, and the path: "scan" or "steps".

    Padding would affect the batch statistics of a model. If the model state holds any, a short last
    batch keeps its own shape and gets its own program. A single row has no variance: it is padded
    with other examples, which count, and a warning is given.
    """
    if not isinstance(source, data.Resident) and not callable(source):
        raise TypeError(
            f"source must be data.resident(arrays, batch_size, key=key) or a function step -> "
            f"batches, got {described(source)}. data.iterate(batches) makes one of any iterable."
        )
    at = int(jax.device_get(state.step))
    step = jax.jit(step, inline=True)  # one trace for its shapes, its path and its programs
    measures = any(trees.is_inexact(leaf) for leaf in jax.tree.leaves(state.model_state))
    if isinstance(source, data.Resident):
        batch_at = _batch_at(source, padded=not measures)
        batch = _example_batch(source, batch_at)
        # A resumed run stays on the path it started on: the two may differ in the last bit.
        path = meta.get("path") or train.step_path(step, state, batch, teacher)
        make = _many if path == "scan" else _one_by_one
        one = _guarded(step, check_finite)
        move = make(one, source, batch_at, teacher, batch)
        rest = data.examples(source) % source.batch_size
        if measures and rest == 1 and not source.drop_remainder:
            _warn_of_one_row()  # the padding rows have no weights
        elif measures and rest and not source.drop_remainder:
            move = _with_rest(move, one, source, batch_at, teacher, rest)
        yield _start(step, state, teacher, batch, meta), _paced(move), path
        return
    given = _measurable(source, at) if measures else source(at)
    with contextlib.closing(data.prefetch(given, prefetch, place)) as batches:
        first = next(batches, None)
        if first is None:
            raise ValueError(f"the source has no batch from step {at} on.")
        move = _from_stream(step, teacher, first, batches, check_finite)
        yield _start(step, state, teacher, first, meta), _paced(move), "steps"


def checked_paths(state: TrainState) -> tuple[list[str], list[str]]:
    """The names of the entries of `Carry.bad`: parameters and the loss; the model's state."""
    trained, kept = (
        [
            path
            for each in trees_of
            for path, leaf in zip(trees.leaf_paths(each), jax.tree.leaves(each), strict=True)
            if trees.is_inexact(leaf)
        ]
        for trees_of in (
            (state.params, {"connectors": state.connectors}),
            ({"model_state": state.model_state},),
        )
    )
    return [*trained, "loss"], kept


def nonfinite_leaves(new: TrainState, metrics: Metrics, old: TrainState) -> Array:
    """bool: which parameters are not finite, the loss, and which model state is no longer finite.

    A running variance may overflow when the loss does not. The optimizer's state is not
    checked here: it is larger than the parameters and would take longer to read. See `overflowed`.
    """
    leaves = _inexact((new.params, new.connectors))
    loss = metrics.sums[..., metrics.names.index("loss"), 0] if "loss" in metrics.names else 0.0
    trained = [~jnp.all(jnp.isfinite(x)) for x in [*leaves, jnp.asarray(loss)]]
    before, after = (_inexact(x.model_state) for x in (old, new))
    kept = [jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b)) for a, b in zip(before, after, strict=True)]
    return jnp.stack([*trained, *kept])


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


def _start(
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
    on = state.step.sharding if getattr(state.step, "committed", False) else None
    return Carry(state, Metrics(metrics.names, jax.device_put(window, on)), jax.device_put(bad, on))


def _guarded(step: Step, check_finite: bool) -> One:
    def one(carry: Carry, teacher: Any, batch: Batch) -> Carry:
        state, metrics = step(carry.state, batch, teacher)
        window = Metrics(metrics.names, carry.window.sums + metrics.sums)
        if not check_finite:
            return Carry(state, window, carry.bad)
        bad = nonfinite_leaves(state, metrics, carry.state)
        stopped = jnp.any(carry.bad)
        good = ~(stopped | jnp.any(bad))
        chosen = choose(good, Carry(state, window, carry.bad), carry)
        return chosen._replace(bad=jnp.where(stopped, carry.bad, bad))

    return one


def _many(one: One, source: data.Resident, batch_at: BatchAt, teacher: Any, batch: Any) -> Move:
    """Up to `width` steps per call, within one epoch, with rows gathered before the loop."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    length = data.steps_per_epoch(source)
    width = int(min(CHUNK_STEPS, max(1, CHUNK_BYTES // max(size, 1)), length))

    @partial(jax.jit, donate_argnums=0)
    def advance(
        carry: Carry, teacher: Any, arrays: Any, index: Array, n: Array
    ) -> tuple[Carry, Array]:
        first = carry.state.step
        places = (first % len(index) + jnp.arange(width, dtype=jnp.int32)) % len(index)
        batches = jax.vmap(lambda rows, at: batch_at(arrays, rows, first, at))(
            index[places], places
        )

        def body(i: Array, carry: Carry) -> Carry:
            return one(carry, teacher, jax.tree.map(lambda x: x[i], batches))

        carry = jax.lax.fori_loop(jnp.zeros((), jnp.int32), n, body, carry)
        return carry, carry.state.step + 0

    arrays, epochs = _device_arrays(source), _epochs(source)

    def move(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        made = min(most, width, length - at % length)
        steps = jax.device_put(np.int32(made))
        return *advance(carry, teacher, arrays, epochs(at // length), steps), made

    return move


def _one_by_one(
    one: One, source: data.Resident, batch_at: BatchAt, teacher: Any, batch: Any
) -> Move:
    """One step per call, with rows gathered in the same program."""

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, teacher: Any, arrays: Any, index: Array) -> tuple[Carry, Array]:
        place = carry.state.step % len(index)
        carry = one(carry, teacher, batch_at(arrays, index[place], carry.state.step, place))
        return carry, carry.state.step + 0

    arrays, epochs = _device_arrays(source), _epochs(source)
    length = data.steps_per_epoch(source)

    def move(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        return *advance(carry, teacher, arrays, epochs(at // length)), 1

    return move


def _with_rest(
    move: Move, one: One, source: data.Resident, batch_at: BatchAt, teacher: Any, rest: int
) -> Move:
    """`move` for the full batches of an epoch, and a separate program for the `rest` rows."""
    arrays, epochs = _device_arrays(source), _epochs(source)
    last = data.steps_per_epoch(source) - 1

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, teacher: Any, arrays: Any, index: Array) -> tuple[Carry, Array]:
        rows, place = index[-1][..., :rest], jnp.asarray(last, jnp.int32)
        carry = one(carry, teacher, batch_at(arrays, rows, carry.state.step, place))
        return carry, carry.state.step + 0

    def whole(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        epoch, place = divmod(at, last + 1)
        if place < last:
            return move(carry, at, min(most, last - place))
        return *advance(carry, teacher, arrays, epochs(epoch)), 1

    return whole


def _from_stream(
    step: Step, teacher: Any, first: Any, rest: Iterator[Any], check_finite: bool
) -> Move:
    """One step per call, on the batches of an iterator."""
    one, ready = _guarded(step, check_finite), [first]

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Carry, teacher: Any, batch: Batch) -> tuple[Carry, Array]:
        carry = one(carry, teacher, batch)
        return carry, carry.state.step + 0

    def move(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        batch = ready.pop() if ready else next(rest)
        return *advance(carry, teacher, batch), 1

    return move


def _measurable(source: data.Source, at: int) -> Iterator[Batch]:
    """The real rows of every batch; a single one replaces the first row of the batch before it."""
    before: Batch | None = None
    for batch in source(at):
        real = data.unpad(batch)
        if data.length(real) > 1:
            before = real
        elif before is None and at:  # a run resumed here: the same batch as without interruption
            before = next((data.unpad(each) for each in source(at - 1)), None)
        if before is not None and data.length(real) == 1 < data.length(before):
            _warn_of_one_row()
            real = jax.tree.map(lambda one, many: np.concatenate([one, many[1:]]), real, before)
        yield real


def _warn_of_one_row() -> None:
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

    def batch_at(given: Any, rows: Array, step: Array, place: Array) -> Batch:
        arrays, teacher, key = given
        here = source._replace(arrays=arrays, teacher=teacher, augment_key=key, drop_remainder=drop)
        epoch = step // data.steps_per_epoch(source)
        return data.gather(here, rows, epoch, place)

    return batch_at


def _epochs(source: data.Resident) -> Callable[[int], Array]:
    """The rows of an epoch, computed once per epoch, on the device."""

    def epoch_rows(epoch: Array) -> Array:
        return data.epoch_rows(source, epoch)

    rows = jax.jit(epoch_rows)
    known: dict[int, Array] = {}

    def of(epoch: int) -> Array:
        if epoch not in known:
            known.clear()
            known[epoch] = rows(jax.device_put(np.int32(epoch)))
        return known[epoch]

    return of


def _paced(move: Move) -> Move:
    """Chooses the steps per call and waits for old calls, to keep the queue of work short.

    Waiting for an old call keeps the device busy, and nothing is transferred.
    """
    queued: collections.deque[tuple[Array, int]] = collections.deque()
    seconds_per_step, last, calls = 0.0, 0.0, 0

    def paced(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        nonlocal seconds_per_step, last, calls
        if jax.process_count() == 1:  # with more, all must make the same calls
            most = min(most, max(1, int(CALL_SECONDS / seconds_per_step))) if calls > 1 else 1
        carry, reached, made = move(carry, at, most)
        queued.append((reached, made))
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
        return carry, reached, made

    return paced
