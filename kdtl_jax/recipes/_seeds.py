"""A training loop over all seeds of one method, with logging, evaluation, saving and resuming.

All seeds are in one `TrainState` with a leading seed axis; its `step` is shared. It advances in one
of two ways, which the loop, the log and checkpoints treat alike: all seeds at once under `vmap`,
where small matmuls become one batched matmul; or seed `i % S` at call `i`, so that convolutions
keep their own kernels (batched over seeds they become slow grouped ones, and in a loop on a CPU
they lose their threads).
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
from kdtl_jax.recipes._optimizers import with_averages
from kdtl_jax.recipes._training import CHECKS, Experiment, Point, in_chunks, keys, pick
from kdtl_jax.run import checkpoint, data, loop, scores, sharding
from kdtl_jax.train import Batch, TrainState

EVALUATION_BATCH = 512
EVALUATION = "eval/validation_"  # in a line of the metrics file
# vmap axes of a stacked state: the step is shared.
AXES: Any = TrainState._make(None if name == "step" else 0 for name in TrainState._fields)
NEVER = 2**62  # `smallest` of `sharding.place`: no leaf is large enough to be split


class SharedRun(NamedTuple):
    """The settings and data shared by all methods of a run."""

    folder: Path
    identity: str  # of the run, in its checkpoints
    resume: bool
    batch_size: int
    arrays: Mapping[str, Any]  # [N, ...]: "inputs", "labels", "index", cached outputs as "teacher"
    splits: Splits  # scores are measured on the last two
    lines: _logs.Lines  # of the metrics file so far
    rows: np.ndarray | None = None  # [S, n], training rows of each seed; None: all
    mesh: Mesh | None = None
    one_by_one: bool = False  # even if seeds could advance together
    save_every: int | None = None  # epochs; None: at the end
    say: Callable[[str, bool], None] = lambda text, last: None
    advance: Callable[[int, int], None] = lambda done, total: None  # of a method's steps
    rate: Callable[[int], float] | None = None  # the learning rate by step, for the log
    patience: int | None = None  # epochs without a better validation score; None: no early stopping
    measure: Measure = _measures.CLASSES  # of the targets


class Trained(NamedTuple):
    """The results of all seeds of one method."""

    state: TrainState  # stacked
    in_turn: bool  # whether seeds advanced in turn, not all at once
    epochs: list[int]  # at which validation scores were recorded
    curve: np.ndarray  # [checks, S], validation scores along the way
    validation: np.ndarray  # [S], at the end
    test: np.ndarray  # [S]
    answers: np.ndarray  # [S, test examples, ...], predicted classes, or other outputs
    skipped: list[int]  # per seed: updates skipped because they were not finite
    seconds: float
    kept_epoch: int | None = None  # the epoch whose weights are returned, if not the last


def train_seeds(
    name: str, experiment: Experiment, points: Point, shared: Any, run: SharedRun, epochs: int
) -> Trained:
    """Trains every seed of one method to the end.

    Seeds advance together under `vmap`, or in turn, one step each, if `one_by_one` is set or
    convolutions would lose their threads in a loop (`train.step_path`).

    Args:
      name: of the method, in the metrics file and under `checkpoints/`.
      experiment: the training of one seed.
      points: one per seed, every leaf `[S, ...]`.
      shared: read by all seeds, such as a live teacher's variables.
      run: data, folder and placement.
      epochs: passes over each seed's examples; 0 only evaluates the initial state.

    Raises:
      SystemExit: after a signal, with the state saved.
    """
    start_time, seeds = time.perf_counter(), len(points["seed"])
    per_epoch = examples_per_seed(run) // run.batch_size

    def start(points: Point, shared: Any) -> TrainState:
        state = jax.vmap(experiment.start, in_axes=(0, None))(points, shared)
        return state._replace(step=jnp.zeros((), jnp.int32))

    state = jax.jit(start)(points, shared)
    single = loop.skip_nonfinite(
        lambda state, batch, teacher_params=None: experiment.step(state, batch, *teacher_params)
    )
    single = jax.jit(single, inline=True)  # traced once, although `_prefers_steps` traces it first
    in_turn = not epochs or run.one_by_one or _prefers_steps(single, state, points, shared, run)
    # In turn: batches [B, ...]; together: [S, B, ...]. Metrics are [S] in both.
    together = jax.vmap(single, in_axes=(AXES, 0, (0, None)), out_axes=(AXES, 0))
    step = _step_in_turn(single, seeds) if in_turn else together
    order = _orders(points["seed"])
    source = _source_in_turn(run, order) if in_turn else _source_together(run, order)
    step_args, mesh = (points, shared), run.mesh

    def place(batch: Any) -> Any:
        if mesh is None:
            return jax.device_put(batch)
        return sharding.place(batch, mesh, smallest=NEVER)

    if mesh is not None:
        state = sharding.place(state, mesh)
        step = sharding.keep_placement(_place_step(step, mesh, 0 if in_turn else 1), state)
        step_args = sharding.place(step_args, mesh, smallest=NEVER)
    measure = run.measure
    evaluate = make_evaluate(experiment, shared, in_turn, mesh, measure)

    saves = _saves.restore(
        run.folder, run.identity, name, state, resume=run.resume, start_time=start_time
    )
    state, step_number, seconds_spent = saves.state, saves.step, saves.earlier_seconds
    calls = seeds if in_turn else 1  # per step of a seed
    epoch = per_epoch * calls
    total, score_key = epochs * epoch, f"validation_{measure.score_name.key}"

    def on_validation(state: TrainState) -> np.ndarray:
        part = run.splits.validation
        return measure.score(evaluate(state, part.inputs), part.labels)

    def validate(state: TrainState) -> dict[str, Any]:
        scores_ = on_validation(state)
        number, score = int(state.step) // epoch, measure.score_name.shown(scores_.mean())
        run.say(f"{name}: epoch {number} of {epochs}, validation {score}", number == epochs)
        return {score_key: scores_}

    evaluations = list(saves.meta.get("evaluations", []))
    evaluated = [line["step"] for line in evaluations]
    stop, keep, every = None, checkpoint.newest(1), max(1, epochs // CHECKS)
    save_every = run.save_every
    if run.patience is not None:
        stop = loop.no_improvement(score_key, run.patience, minimize=False)
        keep = checkpoint.newest_and_best(1, score_key, minimize=False)
        every = save_every = 1
    # Early, before the resume.
    stopped = stop is not None and step_number in evaluated and stop(evaluations)
    # A signal may have come before the last evaluation.
    if epochs and not stopped and (step_number < total or step_number not in evaluated):
        with (
            _saves.open_saves(saves, keep) as save,
            _log(run, name, step_number, calls, evaluated) as log,
        ):
            result = loop.run(
                step,
                state,
                source,
                step_args,
                steps=total,
                log=log,
                log_every=epoch,
                evaluate=validate,
                evaluate_every=every * epoch,
                stop=stop,
                save=save,
                save_every=save_every and save_every * epoch,
                # The path is known; finding it again would need another trace.
                meta=saves.meta or (None if in_turn else {"path": "scan"}),
                on_nonfinite=None,  # each seed skips its own
                place=place,
                reached=lambda step: run.advance(step, total),
            )
        state, evaluations = result.state, result.evaluations
        seconds_spent = _saves.seconds(saves)
    curve = np.array([line[f"eval/{score_key}"] for line in evaluations], np.float64)
    best = None if run.patience is None else scores.best(list(curve))
    if best is not None:
        step_number, last = (evaluations[i]["step"] for i in (best, -1))
        if last < total:
            stopped_after = f"{name}: stopped after epoch {last // epoch}"
            run.say(f"{stopped_after}, the weights of {step_number // epoch} are kept", True)
        state = checkpoint.restore(saves.folder, state, step=step_number, owner=saves.owner).state
    state = with_averages(state)
    answers = evaluate(state, run.splits.test.inputs)
    return Trained(
        state,
        in_turn,
        [line["step"] // epoch for line in evaluations],
        curve,
        curve[-1 if best is None else best] if evaluations else on_validation(state),
        measure.score(answers, run.splits.test.labels),
        answers,
        _skipped(run, name, per_epoch) if epochs else [],
        seconds_spent,
        None if best is None else evaluations[best]["step"] // epoch,
    )


@jax.jit
def _orders(seeds: Array) -> Array:
    return jax.vmap(lambda seed: keys(seed).order)(seeds)


def examples_per_seed(run: SharedRun) -> int:
    """The number of training examples per seed."""
    return len(run.arrays["labels"]) if run.rows is None else run.rows.shape[-1]


def make_evaluate(
    experiment: Experiment,
    shared: Any,
    in_turn: bool,
    mesh: Mesh | None = None,
    measure: Measure = _measures.CLASSES,
) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """`evaluate(state, inputs) -> answers [S, N, ...]` of a stacked state."""

    def answers(state: TrainState, inputs: Array, shared: Any) -> Array:
        return measure.answers(experiment.logits(state, inputs, shared))

    replicated = None if mesh is None else sharding.replicated(mesh)

    def answers_of_one(state: TrainState, seed: Any, inputs: Array, shared: Any) -> Array:
        return answers(_pick_seed(state, seed), inputs, shared)

    evaluate_one = jax.jit(answers_of_one, out_shardings=replicated)
    evaluate_all = jax.jit(jax.vmap(answers, in_axes=(AXES, None, None)), out_shardings=replicated)

    def evaluate(state: TrainState, inputs: np.ndarray) -> np.ndarray:
        # Nothing reads the optimizer's state from here on; without it one program serves all
        # methods.
        state, seeds = with_averages(state)._replace(opt_state=None), range(len(state.key))

        def by_example(x: Array) -> Any:
            if not in_turn:
                return np.asarray(evaluate_all(state, x, shared)).swapaxes(0, 1)
            return np.stack([evaluate_one(state, np.int32(i), x, shared) for i in seeds], axis=1)

        return in_chunks(by_example, inputs, EVALUATION_BATCH).swapaxes(0, 1)

    return evaluate


def _pick_seed(state: TrainState, seed: Any) -> TrainState:
    """One seed's state; `step` is shared."""
    return pick(state._replace(step=None), seed)._replace(step=state.step)


def _step_in_turn(step: Any, seeds: int) -> train.Step:
    """One seed per call, in turn: batches `[B, ...]`, metrics `[S]` with one entry filled.

    `state.step` counts calls; the inner step sees the number of the seed's own steps.
    """

    def step_one(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        points, shared = teacher_params
        seed = state.step % seeds
        seed_state = _pick_seed(state, seed)._replace(step=state.step // seeds)
        new, metrics = step(seed_state, batch, (pick(points, seed), shared))

        def set_seed(stacked: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(stacked, part, seed, 0)

        shared_fields = {"step": None, "key": None}
        stacked = state._replace(**shared_fields)
        result = jax.tree.map(set_seed, stacked, new._replace(**shared_fields))
        zeros = jnp.zeros((seeds, *metrics.sums.shape), metrics.sums.dtype)
        result = result._replace(step=state.step + 1, key=state.key)
        return result, Metrics(metrics.names, zeros.at[seed].set(metrics.sums))

    return step_one


def _place_step(step: train.Step, mesh: Mesh, examples_axis: int) -> train.Step:
    """The step with its batch split over the mesh and its metrics on every device."""
    split = NamedSharding(mesh, PartitionSpec(*(None,) * examples_axis, sharding.AXES))

    def on_mesh(state: TrainState, batch: Batch, teacher_params: Any = None) -> Any:
        batch = jax.lax.with_sharding_constraint(dict(batch), split)
        new, metrics = step(state, batch, teacher_params)
        sums = jax.lax.with_sharding_constraint(metrics.sums, sharding.replicated(mesh))
        return new, Metrics(metrics.names, sums)

    return on_mesh


def _source_together(run: SharedRun, order: Array) -> data.Resident:
    """Batches `[S, B, ...]` from arrays on the device."""
    arrays = dict(run.arrays)
    teacher = arrays.pop("teacher", None)
    source = data.resident(arrays, run.batch_size, key=order, rows=run.rows, teacher=teacher)
    source = source._replace(order=order)  # itself, as in `_training.fit`, not a part of it
    if run.mesh is None:
        return source
    names = ("arrays", "teacher", "order", "augment_key", "rows")
    tensors = {name: getattr(source, name) for name in names}
    return source._replace(**sharding.place(tensors, run.mesh, smallest=NEVER))


def _source_in_turn(run: SharedRun, order: Array) -> data.Source:
    """Batches `[B, ...]` of seed 0, 1, …, 0, 1, …, each in its own order, read on the host."""
    host = jax.tree.map(np.asarray, dict(run.arrays))
    seeds, size = len(order), examples_per_seed(run)

    def index_of(key: Array, epoch: Any) -> Array:
        return train.epoch_index(key, epoch, size, run.batch_size)

    shuffled = jax.jit(jax.vmap(index_of, (0, None)))

    def source(step: int) -> Iterator[Batch]:
        rows, cached_epoch = np.empty(0), -1
        while True:
            epoch, position = divmod(step // seeds, size // run.batch_size)
            if epoch != cached_epoch:
                rows, cached_epoch = np.asarray(shuffled(order, np.int32(epoch))), epoch
            seed = step % seeds
            index = rows[seed, position]
            yield data.take_rows(host, index if run.rows is None else run.rows[seed, index])
            step += 1

    return source


def _prefers_steps(
    step: Any, state: TrainState, points: Point, shared: Any, run: SharedRun
) -> bool:
    """Whether single steps are faster here than a loop in one program."""

    def shape(x: Any, *leading: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype)

    state_shapes = jax.tree.map(shape, state._replace(step=state.step[None]))
    batch = jax.tree.map(lambda x: shape(x, run.batch_size), dict(run.arrays))
    step_args = jax.tree.map(shape, dict(points)), shared
    return train.step_path(step, state_shapes, batch, step_args) == "steps"


@contextlib.contextmanager
def _log(
    run: SharedRun, name: str, last_step: int, calls: int, evaluated: list[int]
) -> Iterator[loop.Log | None]:
    """Opens the method's lines in the run's file, to continue after `last_step`."""
    if jax.process_index() != 0:
        yield None
        return

    def keep(line: dict[str, Any]) -> bool:
        step = line["step"] * calls
        is_evaluation = any(name.startswith(EVALUATION) for name in line)
        return step in evaluated if is_evaluation else step <= last_step

    with _logs.method_log(run.folder, run.lines, name, keep) as log:

        def write(line: dict[str, Any]) -> None:
            step = line["step"] // calls
            rate = {"learning_rate": run.rate(step - 1)} if run.rate and "loss" in line else {}
            log({**line, **rate, "step": step})

        yield write


def _skipped(run: SharedRun, name: str, per_epoch: int) -> list[int]:
    """Non-finite updates skipped per seed, from the metrics file."""
    shares = [line["skipped"] for line in run.lines.get(name, []) if "skipped" in line]
    return np.round(np.sum(shares, axis=0) * per_epoch).astype(int).tolist() if shares else []
