"""All seeds of one method in a loop: logged, evaluated, saved, resumed, on one device or a mesh.

All seeds are in one `TrainState` with a leading seed axis; its `step` is shared. It is advanced in
one of two ways, which the loop, the log, checkpoints and resuming treat alike: all seeds at once
under `vmap`, where small matmuls become one batched matmul; or seed `i % S` at call `i`, so that
convolutions keep their own kernels (batched over seeds they become slow grouped ones, and in a loop
on a CPU they lose their threads).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdtl_jax import train
from kdtl_jax.datasets import Splits
from kdtl_jax.objective import Metrics
from kdtl_jax.recipes import _logs, _measures, _saves
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._optimizers import used
from kdtl_jax.recipes._training import CHECKS, Experiment, Point, in_chunks, keys, pick
from kdtl_jax.run import checkpoint, data, loop, scores, sharding
from kdtl_jax.train import Batch, TrainState

EVALUATION_BATCH = 512
EVALUATION = "eval/validation_"  # in a line of the metrics file
# Of a stacked state under vmap: the step is shared.
AXES: Any = TrainState._make(None if name == "step" else 0 for name in TrainState._fields)
NEVER = 2**62  # of `sharding.place`: no leaf is large enough to be split


class Run(NamedTuple):
    """What all methods of a run have in common."""

    folder: Path
    identity: str  # of the run, in its checkpoints
    resume: bool
    batch_size: int
    arrays: Mapping[str, Any]  # [N, ...]: "inputs", "labels", "index", cached outputs as "teacher"
    splits: Splits  # accuracy is measured on the last two
    lines: _logs.Lines  # of the metrics file so far
    rows: np.ndarray | None = None  # [S, n], what each seed sees; None: everything
    mesh: Mesh | None = None
    one_by_one: bool = False  # even if seeds could advance together
    save_every: int | None = None  # epochs; None: at the end
    say: Callable[[str, bool], None] = lambda text, last: None
    moved: Callable[[int, int], None] = lambda done, total: None  # of a method's steps
    rate: Callable[[int], float] | None = None  # the learning rate by step, for the log
    patience: int | None = None  # epochs without a better validation; None: all epochs
    measure: Measure = _measures.CLASSES  # of the targets


class Trained(NamedTuple):
    """All seeds of one method at the end."""

    state: TrainState  # stacked
    in_turn: bool  # seed after seed, or all at once
    epochs: list[int]  # at which validation accuracy was recorded
    curve: np.ndarray  # [checks, S], validation scores along the way
    validation: np.ndarray  # [S], at the end
    test: np.ndarray  # [S]
    named: np.ndarray  # [S, test examples, ...], predicted classes, or other outputs
    skipped: list[int]  # per seed: updates skipped because they were not finite
    seconds: float
    kept: int | None = None  # the epoch whose weights are returned, if not the last


def train_seeds(
    name: str, experiment: Experiment, points: Point, shared: Any, run: Run, epochs: int
) -> Trained:
    """Trains every seed of one method to the end.

    Seeds advance together under `vmap`; or one after another, a step each, if `one_by_one`
    is set or convolutions would lose their threads in a loop (`train.step_path`).

    Args:
      name: of the method, in the metrics file and under `checkpoints/`.
      experiment: what is trained.
      points: one per seed, every leaf `[S, ...]`.
      shared: what all seeds read, such as a live teacher's variables.
      run: data, folder and placement.
      epochs: passes over each seed's examples; 0 measures what it starts from.

    Raises:
      SystemExit: after a signal, with the state saved.
    """
    begun, seeds = time.perf_counter(), len(points["seed"])
    per_epoch = examples(run) // run.batch_size

    def start(points: Point, shared: Any) -> TrainState:
        state = jax.vmap(experiment.start, in_axes=(0, None))(points, shared)
        return state._replace(step=jnp.zeros((), jnp.int32))

    state = jax.jit(start)(points, shared)
    single = loop.skip_nonfinite(
        lambda state, batch, teacher_params=None: experiment.step(state, batch, *teacher_params)
    )
    single = jax.jit(single, inline=True)  # traced once, though the shapes are asked first
    in_turn = not epochs or run.one_by_one or _convolves(single, state, points, shared, run)
    step = _in_turn(single, seeds) if in_turn else _together(single)
    order = _orders(points["seed"])
    source = _source_in_turn(run, order) if in_turn else _source_together(run, order)
    given, mesh = (points, shared), run.mesh

    def place(batch: Any) -> Any:
        if mesh is None:
            return jax.device_put(batch)
        return sharding.place(batch, mesh, smallest=NEVER)

    if mesh is not None:
        state = sharding.place(state, mesh)
        step = sharding.keep_placement(_placed(step, mesh, 0 if in_turn else 1), state)
        given = sharding.place(given, mesh, smallest=NEVER)
    measure = run.measure
    evaluate = evaluation(experiment, shared, in_turn, mesh, measure)

    saves = _saves.taken_up(run.folder, run.identity, name, state, resume=run.resume, begun=begun)
    state, at, spent = saves.state, saves.step, saves.before
    calls = seeds if in_turn else 1  # per step of a seed

    def on_validation(state: TrainState) -> np.ndarray:
        part = run.splits.validation
        return measure.score(evaluate(state, part.inputs), part.labels)

    def validate(state: TrainState) -> dict[str, Any]:
        found = on_validation(state)
        epoch = int(state.step) // calls // per_epoch
        score = measure.score_name.shown(found.mean())
        run.say(f"{name}: epoch {epoch} of {epochs}, validation {score}", epoch == epochs)
        return {f"validation_{measure.score_name.key}": found}

    evaluations = list(saves.meta.get("evaluations", []))
    evaluated = [line["step"] for line in evaluations]
    total = epochs * per_epoch * calls
    scored = f"validation_{measure.score_name.key}"
    stop, keep, every = None, checkpoint.newest(1), max(1, epochs // CHECKS)
    save_every = run.save_every
    if run.patience is not None:
        stop = loop.no_improvement(scored, run.patience, minimize=False)
        keep = checkpoint.newest_and_best(1, scored, minimize=False)
        every = save_every = 1
    ended = stop is not None and at in evaluated and stop(evaluations)  # early, before it resumed
    # A signal may have come before the last evaluation.
    if epochs and not ended and (at < total or at not in evaluated):
        epoch = per_epoch * calls
        with (
            _saves.opened(saves, keep) as save,
            _log(run, name, at, calls, evaluated) as log,
        ):
            result = loop.run(
                step,
                state,
                source,
                given,
                steps=total,
                log=log,
                log_every=epoch,
                evaluate=validate,
                evaluate_every=every * epoch,
                stop=stop,
                save=save,
                save_every=save_every and save_every * epoch,
                # The path is already known: finding it would need another trace.
                meta=saves.meta or (None if in_turn else {"path": "scan"}),
                on_nonfinite=None,  # each seed skips its own
                place=place,
                reached=lambda step: run.moved(step, total),
            )
        state, evaluations = result.state, result.evaluations
        spent = _saves.seconds(saves)
    curve = np.array(
        [line[f"{EVALUATION}{measure.score_name.key}"] for line in evaluations], np.float64
    )
    best = None if run.patience is None else scores.best(list(curve))
    if best is not None:
        at, last = (evaluations[i]["step"] for i in (best, -1))
        if last < total:
            after, kept = (step // calls // per_epoch for step in (last, at))
            run.say(f"{name}: stopped after epoch {after}, the weights of {kept} are kept", True)
        state = checkpoint.restore(saves.home, state, step=at, owner=saves.owner).state
    state = used(state)
    named = evaluate(state, run.splits.test.inputs)
    return Trained(
        state,
        in_turn,
        [line["step"] // calls // per_epoch for line in evaluations],
        curve,
        curve[-1 if best is None else best] if evaluations else on_validation(state),
        measure.score(named, run.splits.test.labels),
        named,
        _skipped(run, name, per_epoch) if epochs else [],
        spent,
        None if best is None else evaluations[best]["step"] // calls // per_epoch,
    )


@jax.jit
def _orders(seeds: Array) -> Array:
    return jax.vmap(lambda seed: keys(seed).order)(seeds)


def examples(run: Run) -> int:
    """How many examples each seed sees."""
    return len(run.arrays["labels"]) if run.rows is None else run.rows.shape[-1]


def evaluation(
    experiment: Experiment,
    shared: Any,
    in_turn: bool,
    mesh: Mesh | None = None,
    measure: Measure = _measures.CLASSES,
) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """`evaluate(state, inputs) -> answers [S, N, ...]` of a stacked state."""

    def answers(state: TrainState, inputs: Array, shared: Any) -> Array:
        return measure.answers(experiment.logits(state, inputs, shared))

    whole = None if mesh is None else sharding.replicated(mesh)

    def answers_of_one(state: TrainState, at: Any, inputs: Array, shared: Any) -> Array:
        return answers(_own(state, at), inputs, shared)

    single = jax.jit(answers_of_one, out_shardings=whole)
    every = jax.jit(jax.vmap(answers, in_axes=(AXES, None, None)), out_shardings=whole)

    def evaluate(state: TrainState, inputs: np.ndarray) -> np.ndarray:
        # Without the optimizer's state, which nothing reads from here on, one program serves all
        # methods.
        state, seeds = used(state)._replace(opt_state=None), range(len(state.key))

        def by_example(x: Array) -> Any:
            if not in_turn:
                return np.asarray(every(state, x, shared)).swapaxes(0, 1)
            return np.stack([single(state, np.int32(i), x, shared) for i in seeds], axis=1)

        return in_chunks(by_example, inputs, EVALUATION_BATCH).swapaxes(0, 1)

    return evaluate


def _own(state: TrainState, at: Any) -> TrainState:
    """One seed's part of a stacked state, whose step is shared."""
    return pick(state._replace(step=None), at)._replace(step=state.step)


def _together(step: Any) -> train.Step:
    """All seeds at once: batches `[S, B, ...]`, metrics `[S]`."""
    return jax.vmap(step, in_axes=(AXES, 0, (0, None)), out_axes=(AXES, 0))


def _in_turn(step: Any, seeds: int) -> train.Step:
    """One seed per call, the next one at the next: batches `[B, ...]`, metrics `[S]`, one filled.

    `state.step` counts calls; what a seed sees is the number of its own steps.
    """

    def one(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        points, shared = teacher_params
        seed = state.step % seeds
        mine = _own(state, seed)._replace(step=state.step // seeds)
        new, metrics = step(mine, batch, (pick(points, seed), shared))

        def put(whole: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(whole, part, seed, 0)

        fixed = {"step": None, "key": None}
        after = jax.tree.map(put, state._replace(**fixed), new._replace(**fixed))
        sums = (
            jnp.zeros((seeds, *metrics.sums.shape), metrics.sums.dtype).at[seed].set(metrics.sums)
        )
        after = after._replace(step=state.step + 1, key=state.key)
        return after, Metrics(metrics.names, sums)

    return one


def _placed(step: train.Step, mesh: Mesh, examples_axis: int) -> train.Step:
    """The step with its batch split over the mesh and its metrics on every device."""
    split = NamedSharding(mesh, PartitionSpec(*(None,) * examples_axis, sharding.AXES))

    def on_mesh(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        batch = jax.lax.with_sharding_constraint(dict(batch), split)
        new, metrics = step(state, batch, teacher_params)
        whole = jax.lax.with_sharding_constraint(metrics.sums, sharding.replicated(mesh))
        return new, Metrics(metrics.names, whole)

    return on_mesh


def _source_together(run: Run, order: Array) -> data.Resident:
    """Batches `[S, B, ...]` from arrays on the device."""
    arrays = dict(run.arrays)
    teacher = arrays.pop("teacher", None)
    source = data.resident(arrays, run.batch_size, key=order, rows=run.rows, teacher=teacher)
    source = source._replace(order=order)  # itself, as in `_training.fit`, not a part of it
    if run.mesh is None:
        return source
    held = source.arrays, source.teacher, source.order, source.augment_key, source.rows
    arrays, teacher, order, unused, rows = sharding.place(held, run.mesh, smallest=NEVER)
    return source._replace(
        arrays=arrays, teacher=teacher, order=order, augment_key=unused, rows=rows
    )


def _source_in_turn(run: Run, order: Array) -> data.Source:
    """Batches `[B, ...]` of seed 0, 1, …, 0, 1, …, each in its own order, read on the host."""
    host = jax.tree.map(np.asarray, dict(run.arrays))
    seeds, size = len(order), examples(run)

    def order_of(key: Array, epoch: Any) -> Array:
        return train.epoch_index(key, epoch, size, run.batch_size)

    shuffled = jax.jit(jax.vmap(order_of, (0, None)))

    def source(step: int) -> Iterator[Batch]:
        rows, known = np.empty(0), -1
        while True:
            epoch, at = divmod(step // seeds, size // run.batch_size)
            if epoch != known:
                rows, known = np.asarray(shuffled(order, np.int32(epoch))), epoch
            seed = step % seeds
            mine = rows[seed, at]
            yield data.take_rows(host, mine if run.rows is None else run.rows[seed, mine])
            step += 1

    return source


def _convolves(step: Any, state: TrainState, points: Point, shared: Any, run: Run) -> bool:
    """Whether single steps are faster here than steps in a program's loop."""

    def shape(x: Any, *lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype)

    one = jax.tree.map(shape, state._replace(step=state.step[None]))
    batch = jax.tree.map(lambda x: shape(x, run.batch_size), dict(run.arrays))
    return train.step_path(step, one, batch, (jax.tree.map(shape, dict(points)), shared)) == "steps"


@contextlib.contextmanager
def _log(
    run: Run, name: str, at: int, calls: int, evaluated: list[int]
) -> Iterator[loop.Log | None]:
    """The method's lines in the run's file, continuing after step `at`."""
    if jax.process_index() != 0:
        yield None
        return

    def stays(line: dict[str, Any]) -> bool:
        step = line["step"] * calls
        checked = any(name.startswith(EVALUATION) for name in line)
        return step in evaluated if checked else step <= at

    with _logs.of_method(run.folder, run.lines, name, stays) as log:

        def write(line: dict[str, Any]) -> None:
            step = line["step"] // calls
            now = {"learning_rate": run.rate(step - 1)} if run.rate and "loss" in line else {}
            log({**line, **now, "step": step})

        yield write


def _skipped(run: Run, name: str, per_epoch: int) -> list[int]:
    """Updates skipped per seed because they were not finite, from the metrics file."""
    shares = [line["skipped"] for line in run.lines.get(name, []) if "skipped" in line]
    return np.round(np.sum(shares, axis=0) * per_epoch).astype(int).tolist() if shares else []
