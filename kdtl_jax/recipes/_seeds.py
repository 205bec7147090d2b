"""Several runs of one student, seed by seed alike, as one program.

All seeds stand in one `TrainState` with a leading seed axis; its `step` is shared. Two steps move
it, and the loop, the log, checkpoints and resuming know no difference:

- `together`: all seeds advance at once under `vmap`, small matmuls becoming one batched matmul;
- `in_turn`: seed `i % S` advances at call `i`. Convolutions keep their own kernels: batched over
  seeds they become grouped ones, which run slowly, and in a loop on a CPU they lose their threads.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdtl_jax._types import PyTree
from kdtl_jax.objective import Metrics
from kdtl_jax.run import data, loop, sharding
from kdtl_jax.train import Batch, Step, TrainState

Views = Callable[[Array, Array, Batch], Batch]  # key, epoch, batch -> batch
AXES = TrainState._make((None, 0, 0, 0, 0, 0, 0))  # the step is shared
# Folded into a run's key for its views. Steps fold in their own numbers, which stay below.
VIEWS = np.uint32(2**32 - 1)
NEVER = 2**62  # of `sharding.place`: no leaf is large enough to be split


class Keys(NamedTuple):
    """What is random in a run, apart from each other; `[S]` each."""

    model: Array
    order: Array
    steps: Array
    connectors: Array
    memory: Array


def keys(seeds: int) -> Keys:
    """The keys of seeds 0, 1, …: a seed has the same start and order under every method."""
    whole = jax.vmap(jax.random.key)(jnp.arange(seeds, dtype=jnp.uint32))
    parts = jax.vmap(lambda key: jax.random.split(key, len(Keys._fields)))(whole)
    return Keys(*(parts[:, i] for i in range(len(Keys._fields))))


def together(step: Step) -> Step:
    """All seeds at once: batches `[S, B, ...]`, metrics `[S]`."""
    return jax.vmap(step, in_axes=(AXES, 0, None), out_axes=(AXES, 0))


def in_turn(step: Step, seeds: int) -> Step:
    """One seed per call, the next one at the next: batches `[B, ...]`, metrics `[S]`, one filled.

    `state.step` counts calls; what a seed sees is the number of its own steps.
    """

    def one(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        seed, zero = state.step % seeds, jnp.zeros((), jnp.int32)
        stacks = state[1:-1]  # all but the step and the keys, which do not change
        own = jax.tree.map(lambda x: x[seed], stacks)
        new, metrics = step(
            TrainState._make((state.step // seeds, *own, state.key[seed])), batch, teacher_params
        )

        def put(whole: Array, part: Array) -> Array:
            start = (seed, *(zero for _ in part.shape))
            return jax.lax.dynamic_update_slice(whole, part[None], start)

        after = jax.tree.map(put, stacks, new[1:-1])
        sums = jnp.zeros((seeds, *metrics.sums.shape), metrics.sums.dtype)
        sums = sums.at[seed].set(metrics.sums)
        state = TrainState._make((state.step + 1, *after, state.key))
        return state, Metrics(metrics.names, sums)

    return one


def augmented(step: Step, views: Views, steps_per_epoch: int) -> Step:
    """The step on augmented views, the same for teacher and student; new ones every epoch."""

    def on_views(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, VIEWS)
        return step(state, views(key, state.step // steps_per_epoch, batch), teacher_params)

    return on_views


def placed(step: Step, mesh: Mesh, examples_axis: int) -> Step:
    """The step with its batch split over the mesh and its metrics on every device."""
    split = NamedSharding(mesh, PartitionSpec(*(None,) * examples_axis, sharding.AXES))

    def on_mesh(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        batch = jax.lax.with_sharding_constraint(dict(batch), split)
        new, metrics = step(state, batch, teacher_params)
        whole = jax.lax.with_sharding_constraint(metrics.sums, sharding.replicated(mesh))
        return new, Metrics(metrics.names, whole)

    return on_mesh


def source_together(
    arrays: Batch, batch_size: int, order: Array, rows: np.ndarray | None, mesh: Mesh | None
) -> data.Resident:
    """Batches `[S, B, ...]` from arrays on the device."""
    arrays = dict(arrays)
    teacher = arrays.pop("teacher", None)
    source = data.resident(arrays, batch_size, key=order, rows=rows, teacher=teacher)
    if mesh is None:
        return source
    held = source.arrays, source.teacher, source.order, source.augment_key, source.rows
    arrays, teacher, order, views, rows = sharding.place(held, mesh, smallest=NEVER)
    return source._replace(
        arrays=arrays, teacher=teacher, order=order, augment_key=views, rows=rows
    )


def source_in_turn(
    arrays: Batch, batch_size: int, order: Array, rows: np.ndarray | None
) -> data.Source:
    """Batches `[B, ...]` of seed 0, 1, …, 0, 1, …, each in its own order, read on the host."""
    host = jax.tree.map(np.asarray, dict(arrays))
    size = len(host["index"]) if rows is None else rows.shape[-1]

    def reader(own: np.ndarray | None) -> data.Reader:
        return lambda epoch, r: data.take_rows(host, r if own is None else own[r])

    seeds = len(order)
    each = [
        data.stream(reader(None if rows is None else rows[i]), size, batch_size, key=order[i])
        for i in range(seeds)
    ]

    def source(step: int) -> Iterator[Batch]:
        # Seed i has made its part of the steps so far, one more if its turn has just been.
        started = [each[i](step // seeds + (i < step % seeds)) for i in range(seeds)]
        for turn in itertools.count(step):
            yield next(started[turn % seeds])

    return source


def placement(mesh: Mesh | None) -> Callable[[Any], Any]:
    """Puts a host's batch on the device, or whole on every device of a mesh."""
    if mesh is None:
        return jax.device_put
    return lambda batch: sharding.place(batch, mesh, smallest=NEVER)


def pick(tree: PyTree, seed: int) -> PyTree:
    """One seed's part of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[seed], tree)


def lines(name: str, log: loop.Log, calls_per_step: int) -> loop.Log:
    """A log whose lines carry the method's name and count the seeds' own steps."""

    def write(line: dict[str, Any]) -> None:
        log({"method": name, **line, "step": line["step"] // calls_per_step})

    return write


def skipped(lines: Sequence[Mapping[str, Any]], steps_per_line: int) -> list[int]:
    """Updates left out per seed because they were not finite, from the lines of a metrics file."""
    shares = [line["skipped"] for line in lines if "skipped" in line]
    if not shares:
        return []
    return np.round(np.sum(shares, axis=0) * steps_per_line).astype(int).tolist()
