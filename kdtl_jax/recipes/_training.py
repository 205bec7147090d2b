"""One method's training: all seeds, logged, evaluated, checkpointed, taken up where it was left."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from kdtl_jax import objective, train
from kdtl_jax._types import ModelFn, Params, Variables
from kdtl_jax.datasets import Dataset
from kdtl_jax.methods import Method, Predict, no_connectors, no_memory
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _seeds
from kdtl_jax.recipes._networks import Network
from kdtl_jax.run import checkpoint, data, loop, sharding
from kdtl_jax.train import TrainState

Detail = Callable[[str, bool], None]  # how it goes; whether that is the last of it
# (state, inputs, seed by seed?) -> the classes named [S, N]
Named = Callable[[TrainState, np.ndarray, bool], np.ndarray]
EVALUATION_BATCH = 512
EVALUATION = "eval/validation_accuracy"  # in a line of the metrics file


class Schedule(NamedTuple):
    """How a run goes, whatever it trains."""

    epochs: int
    batch_size: int
    optimizer: Callable[[int], optax.GradientTransformation]  # of the number of steps
    microbatches: int = 1
    views: _seeds.Views | None = None
    mesh: Mesh | None = None
    take_turns: bool = False  # also where seeds could advance together
    save_every: int | None = None  # epochs; None: at the end
    checks: int = 10  # how often validation accuracy is recorded


class Place(NamedTuple):
    """Where a run writes, and what of it is there already."""

    folder: Path
    resume: bool
    finished: list[str]  # the runs before this one


class Bench(NamedTuple):
    """What the seeds are trained and measured on."""

    arrays: Mapping[str, Any]  # [N, ...]: "inputs", "labels", "index", cached outputs as "teacher"
    rows: np.ndarray | None  # [S, n], what each seed sees; None: everything
    held: Dataset  # the validation split
    keys: _seeds.Keys


class Trained(NamedTuple):
    """All seeds of one method at the end."""

    state: TrainState  # stacked
    turns: bool  # seed by seed, or all at once
    epochs: list[int]  # at which validation accuracy was recorded
    validation: np.ndarray  # [checks, S]
    skipped: list[int]  # per seed: updates left out because they were not finite
    seconds: float


def train_seeds(
    name: str,
    net: Network,
    starts: Variables,
    built: Method,
    bench: Bench,
    schedule: Schedule,
    place: Place,
    named: Named,
    *,
    teacher: tuple[ModelFn, Variables] | None = None,
    say: Detail = lambda text, last: None,
) -> Trained:
    """Trains every seed of one method to the end.

    Args:
      name: of the method, in the metrics file and under `checkpoints/`.
      net: what is trained.
      starts: its first variables, stacked over seeds.
      built: terms, weights, connectors and memory.
      bench: the data, and each seed's part of it.
      schedule: epochs, batches, optimizer, placement.
      place: the run folder.
      named: names the classes of held-out inputs, from `namer`.
      teacher: a live one; None: its outputs are in `bench.arrays`, or there is none.
      say: progress.

    Raises:
      SystemExit: after a signal, with the state saved.
      ValueError: if the batch does not fit the data, the microbatches or the mesh.
    """
    begun, seeds = time.perf_counter(), len(bench.keys.model)
    per_epoch = examples(bench) // checked_batch(schedule, examples(bench))
    steps = schedule.epochs * per_epoch
    tx = schedule.optimizer(steps)
    step = _step(net, built, teacher, tx, schedule, per_epoch)
    frozen = None if teacher is None else teacher[1]
    state = _start(starts, bench.keys, built, tx)
    turns = schedule.take_turns or _convolves(step, state, frozen, bench, schedule)
    step, source = _over_seeds(step, bench, schedule, turns)
    if schedule.mesh is not None:
        state = sharding.place(state, schedule.mesh)
        step = sharding.keep_placement(step, state)
        frozen = sharding.place(frozen, schedule.mesh, smallest=_seeds.NEVER)

    home = place.folder / "checkpoints" / name
    state, at, meta = _newest(home, state) if place.resume else (state, 0, {})
    every = seeds if turns else 1  # calls per step of a seed
    before = float(meta.get("seconds", 0.0))

    def evaluate(state: TrainState) -> dict[str, Any]:
        right = named(state, bench.held.inputs, turns) == bench.held.labels
        accuracy = right.mean(axis=1)
        epoch = int(state.step) // every // per_epoch
        say(
            f"{name}: epoch {epoch} of {schedule.epochs}, validation accuracy "
            f"{100 * accuracy.mean():.1f} %",
            epoch == schedule.epochs,
        )
        return {"validation_accuracy": accuracy}

    def save(step: int, state: TrainState, meta: dict[str, Any]) -> None:
        spent = before + time.perf_counter() - begun
        checkpoint.save(checkpoints, step, state, {**meta, "seconds": spent})

    evaluations = list(meta.get("evaluations", []))
    evaluated = [line["step"] for line in evaluations]
    if at < steps * every or at not in evaluated:  # a signal may have come before the last one
        epoch = per_epoch * every
        with (
            checkpoint.open_folder(home, keep=checkpoint.newest(1)) as checkpoints,
            _log(place, name, at, every, evaluated) as log,
        ):
            result = loop.run(
                step,
                state,
                source,
                frozen,
                steps=steps * every,
                log=log,
                log_every=epoch,
                evaluate=evaluate,
                evaluate_every=max(1, schedule.epochs // schedule.checks) * epoch,
                save=save,
                save_every=schedule.save_every and schedule.save_every * epoch,
                # The path is known already: it need not be found by tracing once more.
                meta=meta or (None if turns else {"path": "scan"}),
                on_nonfinite=None,  # each seed leaves out its own
                place=_seeds.placement(schedule.mesh),
            )
        state, evaluations = result.state, result.evaluations
        before += time.perf_counter() - begun
    place.finished.append(name)
    return Trained(
        state,
        turns,
        [line["step"] // every // per_epoch for line in evaluations],
        np.array([line[EVALUATION] for line in evaluations], np.float64),
        _skipped(place, name, per_epoch),
        before,
    )


def namer(net: Network, predict: Predict | None = None, mesh: Mesh | None = None) -> Named:
    """`named(state, inputs, turns) -> classes [S, N]`, the classes of the largest logits."""

    def one(params: Params, model_state: Any, glue: Any, inputs: Array) -> Array:
        outputs, _ = net.apply(params, model_state, inputs)
        if predict is None:
            logits = outputs["logits"]
        else:
            connectors, memory = glue
            logits = predict(connectors, memory, outputs)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    whole = None if mesh is None else sharding.replicated(mesh)
    single, part = jax.jit(one, out_shardings=whole), jax.jit(_seeds.pick)
    every = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None)), out_shardings=whole)

    def batch_named(held: Any, x: np.ndarray, turns: bool, seeds: int) -> np.ndarray:
        if not turns:
            return np.asarray(every(*held, x))
        return np.stack([np.asarray(single(*part(held, np.int32(s)), x)) for s in range(seeds)])

    def named(state: TrainState, inputs: np.ndarray, turns: bool) -> np.ndarray:
        # Without the connectors that no prediction reads, one compilation serves all methods.
        glue = () if predict is None else (state.connectors, state.memory)
        held = state.params, state.model_state, glue
        found = []
        for batch in data.in_order({"inputs": inputs}, min(EVALUATION_BATCH, len(inputs))):
            classes = batch_named(held, batch["inputs"], turns, len(state.key))
            found.append(classes[:, np.asarray(batch["weights"]) > 0])
        return np.concatenate(found, axis=1)

    return named


def examples(bench: Bench) -> int:
    """How many examples each seed sees."""
    return len(bench.arrays["index"]) if bench.rows is None else bench.rows.shape[-1]


def task(inputs: Inputs) -> dict[str, Array]:
    """Cross-entropy with the labels, or with the mixed labels `batch["targets"]` `[B, K]`."""
    if "targets" in inputs.batch:
        targets = inputs.batch["targets"]
        return {"task": optax.softmax_cross_entropy(inputs.student["logits"], targets)}
    return objective.classification(inputs)


ALONE = Method(task, {"task": 1.0}, no_connectors, no_memory)


def initial(net: Network, keys: Array, example: Any) -> Variables:
    """Fresh variables of every seed, stacked."""
    return jax.jit(jax.vmap(lambda key: net.init(key, example)))(keys)


def untrained(variables: Variables, keys: _seeds.Keys) -> TrainState:
    """Given variables as the state of one seed, for `named`."""
    params, model_state = jax.tree.map(lambda x: jnp.asarray(x)[None], tuple(variables))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, {}, None, model_state, None, keys.steps)


def outputs(net: Network, variables: Variables, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a frozen network, `[N, ...]` on the host."""
    apply = jax.jit(lambda v, x: dict(net.apply(v.params, v.model_state, x)[0]))
    found = []
    for batch in data.in_order({"inputs": inputs}, min(EVALUATION_BATCH, len(inputs))):
        real = np.asarray(batch["weights"]) > 0
        got = jax.device_get(apply(variables, batch["inputs"]))
        found.append({name: value[real] for name, value in got.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _start(
    starts: Variables, keys: _seeds.Keys, built: Method, tx: optax.GradientTransformation
) -> TrainState:
    def one(start: Variables, key: _seeds.Keys) -> TrainState:
        return train.init_state(
            start.params,
            tx,
            key=key.steps,
            connectors=built.connectors(key.connectors),
            model_state=start.model_state,
            memory=built.memory(key.memory),
        )

    state = jax.jit(jax.vmap(one))(starts, keys)
    return state._replace(step=jnp.zeros((), jnp.int32))


def _step(
    net: Network,
    built: Method,
    teacher: tuple[ModelFn, Variables] | None,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    per_epoch: int,
) -> train.Step:
    """The step of one seed."""
    step = train.make_step(
        net.apply,
        built.terms,
        built.weights,
        tx,
        teacher=None if teacher is None else teacher[0],
        microbatches=schedule.microbatches,
    )
    step = loop.skip_nonfinite(step)
    if schedule.views is None:
        return step
    return _seeds.augmented(step, schedule.views, per_epoch)


def _over_seeds(
    step: train.Step, bench: Bench, schedule: Schedule, turns: bool
) -> tuple[train.Step, data.Resident | data.Source]:
    """The step of all seeds, and its batches."""
    given = bench.arrays, schedule.batch_size, bench.keys.order, bench.rows
    if turns:
        step, source = _seeds.in_turn(step, len(bench.keys.order)), _seeds.source_in_turn(*given)
    else:
        step, source = _seeds.together(step), _seeds.source_together(*given, schedule.mesh)
    if schedule.mesh is not None:
        step = _seeds.placed(step, schedule.mesh, 0 if turns else 1)
    return step, source


def _convolves(
    step: train.Step, state: TrainState, teacher: Any, bench: Bench, schedule: Schedule
) -> bool:
    """Whether single steps are faster here than steps in a program's loop."""

    def shape(x: Any, *lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype)

    one = jax.tree.map(shape, state._replace(step=state.step[None]))
    batch = jax.tree.map(lambda x: shape(x, schedule.batch_size), dict(bench.arrays))
    return train.step_path(step, one, batch, teacher) == "steps"


def checked_batch(schedule: Schedule, size: int) -> int:
    """The batch size, if batches of it can be made of so many examples."""
    batch, parts = schedule.batch_size, schedule.microbatches
    if batch > size:
        raise ValueError(
            f"a batch of {batch} is larger than the {size} training examples. Choose a "
            "smaller batch size."
        )
    devices = 1 if schedule.mesh is None else schedule.mesh.size
    if batch % (parts * devices):
        raise ValueError(
            f"a batch of {batch} does not divide into {parts} microbatches on {devices} "
            f"devices. Choose a multiple of {parts * devices}."
        )
    return batch


def _newest(home: Path, state: TrainState) -> tuple[TrainState, int, dict[str, Any]]:
    try:
        found = checkpoint.restore(home, state)
    except FileNotFoundError:  # nothing there yet, or the first save was cut short
        return state, 0, {}
    return found.state, found.step, found.meta


@contextlib.contextmanager
def _log(
    place: Place, name: str, at: int, every: int, evaluated: Sequence[int]
) -> Iterator[loop.Log | None]:
    """The run's lines in the shared file, after those that the state at step `at` has behind it."""
    if jax.process_index() != 0:
        yield None
        return

    def stays(line: dict[str, Any]) -> bool:
        step = line["step"] * every
        behind = step in evaluated if EVALUATION in line else step <= at
        return line["method"] in place.finished or (line["method"] == name and behind)

    with loop.metrics_file(place.folder / "metrics.jsonl", stays=stays) as log:
        yield _seeds.lines(name, log, every)


def _skipped(place: Place, name: str, per_epoch: int) -> list[int]:
    if jax.process_index() != 0:
        return []
    lines = loop.read_metrics(place.folder / "metrics.jsonl")
    return _seeds.skipped([line for line in lines if line["method"] == name], per_epoch)
