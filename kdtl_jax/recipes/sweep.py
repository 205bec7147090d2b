"""Sweeps settings and seeds of students; each method is one compiled program.

The outputs of the single teacher are computed once. Within a method, seeds, temperatures, weights,
alpha and learning rates are traced; methods run one after another. Settings are compared by their
mean validation accuracy over seeds; the test split is used only for the final numbers.

    kdtl sweep --grid temperature=1,2,4,8 learning_rate=1e-3,1e-2 --seeds 5
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _files, methods, transforms
from kdtl_jax._types import Params, Variables
from kdtl_jax.interop import networks
from kdtl_jax.methods import Entry, Setup
from kdtl_jax.recipes import (
    _axes,
    _choice,
    _devices,
    _folders,
    _halving,
    _logs,
    _measures,
    _models,
    _optimizers,
    _output,
    _pair,
    _progress,
    _seeds,
    _stored_results,
    _sweep_report,
    _training,
)
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes._training import Experiment, Fitted, Point
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.train import sweep as sweeps

PROBE_STEPS, PROBE_POINTS = 8, 16
EXAMPLES = """
  kdtl sweep --grid temperature=1,2,4,8 learning_rate=1e-3,3e-3,1e-2 --seeds 5
  kdtl sweep --methods kd,dkd,dist --grid temperature=1,4 task=0.1,0.5,1
  kdtl sweep --sample 64 --range temperature=1..20:log kd=0.1..2 --halving 3
"""


@dataclass(frozen=True)
class Settings(
    _pair.ModelSettings, _optimizers.TrainingSettings, _optimizers.SelectionSettings,
    _logs.LogSettings, types.Data, types.Resumable,
):  # fmt: skip
    """Settings of `kdtl sweep`."""

    out: str = setting("runs/sweep", "the run folder", metavar="FOLDER")
    methods: tuple[str, ...] = setting(
        ("kd",), "methods that train only the student (kdtl distill --list)", metavar="NAME,...",
        parse=types.method_names,
    )  # fmt: skip
    grid: Mapping[str, tuple[float, ...]] = setting(
        {}, "every combination of these values; default: temperature=1,2,4,8. An axis is "
        "temperature, learning_rate, weight_decay, alpha (start from alpha times the teacher's "
        "selected weights), weight (multiplies a method's own weights of its terms), or a term's "
        "own name: task, kd, …",
        metavar="AXIS=X,...", parse=_axes.grid, many=True, group="axes",
    )  # fmt: skip
    sample: int | None = setting(
        None, "instead of a grid, draw N settings that cover the ranges of --range evenly",
        metavar="N", least=1, most=_axes.MOST, group="axes",
    )  # fmt: skip
    range: Mapping[str, str] = setting(
        {}, "for --sample, e.g. temperature=1..20:log", metavar="AXIS=LOW..HIGH[:log]",
        parse=_axes.ranges, many=True, group="axes",
    )  # fmt: skip
    seeds: int = setting(3, "students per setting", metavar="N", least=1, most=10_000, quick=2)
    epochs: int = setting(30, "epochs per student", metavar="N", least=1, quick=4)
    teacher_epochs: int = setting(30, "epochs of the teacher", metavar="N", least=1, quick=4)
    student: str = setting(
        "mlp:16,16", "as --teacher", metavar="MODEL", parse=_models.text_of, group="models"
    )
    halving: int = setting(
        1, "stop early: after each of RUNGS equal parts of the epochs, only the better half of "
        "the settings continues; 1: train all to the end",
        metavar="RUNGS", least=1, group="how it runs",
    )  # fmt: skip
    memory: int | None = setting(
        None, "memory limit of one call, e.g. 2GB; default: none", metavar="BYTES",
        parse=types.byte_size, group="how it runs",
    )  # fmt: skip
    devices: int | None = setting(
        None, "spread students over N devices; on a CPU, N virtual ones", metavar="N", least=1,
        most=4096, group="how it runs",
    )  # fmt: skip
    path: Literal["fastest", "together", "mapped", "one-by-one"] = setting(
        "fastest", "together: one program for all students; fastest: measured first",
        group="how it runs",
    )  # fmt: skip


class Shared(NamedTuple):
    """Arrays read by every point."""

    arrays: dict[str, Any]  # [N, ...]: "inputs", "labels", "index", "teacher"
    teacher: Variables


class SweepInputs(NamedTuple):
    """The inputs shared by the methods of a sweep."""

    settings: Settings
    shared: Shared
    held_out: Sequence[Any]  # the validation and the test split, on the device
    devices: Sequence[Any] | None
    say: Callable[[str], None]
    store: _stored_results.Store


class Swept(NamedTuple):
    """One method's results: K settings, S seeds. NaN for settings that were stopped."""

    method: str
    columns: dict[str, np.ndarray]  # [K] each, of the method's axes
    validation: np.ndarray  # [K, S]
    test: np.ndarray  # [K, S]
    loss: np.ndarray  # [K, S], in the last epoch
    epochs: np.ndarray  # [K, S], after which a student was not trained further
    complete: np.ndarray  # [K], whether it survived `--halving`
    best: Fitted  # the students of the best setting by validation, with their `Variables`
    path: str
    per_call: int
    seconds: float
    probed: dict[str, float]  # seconds per student of each path, if measured


def run(settings: Settings) -> None:
    """Trains the teacher and every student; writes and prints the best students."""
    chosen = types.select(settings.methods, _pair.entries(), "kdtl distill")
    devices = spread_devices(settings)  # before anything touches a device
    columns = _axes.columns_of(settings)
    if settings.epochs % settings.halving:
        raise UsageError(
            f"--halving {settings.halving} must divide the {settings.epochs} epochs of a student."
        )
    if settings.halving > 1 and settings.early_stopping is not None:
        raise UsageError(
            "--halving stops settings as a whole, --early-stopping one student. Give one of them."
        )
    _folders.check_out(settings, "sweep")
    _measures.check(settings)
    if columns.keys() - {*_axes.AXES} and (terms := _pair.terms(chosen, settings)):
        _axes.check(columns, terms)
    pair = _pair.read_pair(settings)
    chosen = _pair.select_methods(chosen, settings, pair.measure)
    size = len(pair.arrays["labels"])
    batch_size = settings.batch_size or _training.default_batch(size)
    settings = dataclasses.replace(settings, batch_size=batch_size)
    _training.check_batch(batch_size, size)
    steps = settings.epochs * (size // batch_size)
    make_setup = functools.partial(_pair.setup, pair, steps=steps, batch_size=batch_size)
    blank = make_setup(None)
    entries, notes = select_suitable(chosen, blank)
    axes = {entry.name: _axes.axes_of_method(entry, blank, columns) for entry in entries}
    _axes.check(columns, axes)
    if "alpha" in columns:
        pair_nets = (pair.teacher, pair.student)
        shapes = [networks.abstract(net, pair.example).params for net in pair_nets]
        jax.eval_shape(scaled_start, *shapes, jnp.float32(1))

    def tx_of(point: Point) -> Any:
        rate, decay = point.get("learning_rate"), point.get("weight_decay")
        return _optimizers.optimizer(settings, steps, rate=rate, weight_decay=decay)

    trains_teacher = pair.teacher_variables is None
    saves = [f"checkpoints/{_pair.TEACHER}"] if trains_teacher else []
    with _output.open_run(settings, "sweep", pair.files, saves=saves) as running:
        folder, run, bar, programs = running
        say = _progress.announce_parts(bar, len(entries) + 1)
        store = _stored_results.open_store(
            folder, run, resume=settings.resume, kinds=(Swept, Fitted, Variables)
        )
        say(f"teacher{'' if trains_teacher else f', from {settings.teacher_weights}'}")
        shared_run = _seeds.SharedRun(
            folder=folder, identity=run, resume=settings.resume,
            batch_size=batch_size, arrays=pair.arrays, splits=pair.splits,
            lines=_logs.read_lines(folder),
            measure=pair.measure, patience=settings.early_stopping,
        )  # fmt: skip
        teacher_steps = settings.teacher_epochs * (size // batch_size)
        tx = _optimizers.optimizer(settings, teacher_steps)
        frozen, teacher = _pair.train_teacher(
            pair, shared_run, methods.alone(blank), tx, settings.teacher_epochs
        )
        setup = make_setup(frozen)
        outputs = _training.outputs(pair.teacher, frozen, pair.arrays["inputs"])
        if all(entry.needs in ("labels", "logits") for entry in entries):
            outputs = {"logits": outputs["logits"]}
        on_device = jax.tree.map(jnp.asarray, {**pair.arrays, "teacher": outputs})
        shared = Shared(on_device, jax.tree.map(jnp.asarray, frozen))
        held_out = [_choice.on_device(part) for part in pair.splits[1:]]
        work = SweepInputs(settings, shared, held_out, devices, bar.line, store)
        swept: list[Swept] = []
        for i, entry in enumerate(entries):
            count = len(next(iter(axes[entry.name].values()), [0]))
            say(f"{entry.name} ({i + 1} of {len(entries)}): {count} settings")
            learner = student(pair, entry, setup, tx_of)
            earlier = swept[-1] if swept else None  # the fastest path is measured only once
            make = functools.partial(
                sweep_one, entry.name, learner, axes[entry.name], work, earlier
            )
            swept.append(_stored_results.load_or_run(store, entry.name, make)[0])
        results = _sweep_report.Sweep(
            pair, settings, swept, [*notes, programs()], teacher, _folders.run_record(folder)
        )
        best_students = [line.student for line in _sweep_report.lines(results) if line.student]
        _pair.write(folder, pair, settings, frozen, best_students, setup)
        _logs.write_curves(folder, _sweep_report.learning(results), settings.log)
        _files.write_atomic(folder / "sweep.csv", _sweep_report.to_csv(results).encode())
        _output.write(folder, _sweep_report.to_json(results), _sweep_report.html_page(results))
    _sweep_report.print_table(results)
    print(f"report: {folder / 'report.html'}")


def student(pair: _pair.Pair, entry: Entry, setup: Setup, tx: Callable[[Point], Any]) -> Experiment:
    """A method's student; temperature, weights, rates and start are the point's."""

    def at(point: Point) -> Experiment:
        method = _pair.build(entry, setup, point.get("temperature"))
        factor = point.get("weight")
        weights = {
            term: weight if factor is None or term == "task" else scale_weight(weight, factor)
            for term, weight in method.weights.items()
        }
        weights |= {term: point[term] for term in weights if term in point}

        def init(key: jax.Array, shared: Shared) -> Variables:
            variables = pair.student.init(key, pair.example)
            if "alpha" not in point:
                return variables
            params = scaled_start(shared.teacher.params, variables.params, point["alpha"])
            return variables._replace(params=params)

        return _pair.student(pair.student, method._replace(weights=weights), tx(point), init)

    return Experiment(
        lambda point, shared: at(point).start(point, shared),
        lambda state, batch, point, shared: at(point).step(state, batch, point, shared),
        lambda state, inputs, shared: _training.logits(pair.student, state, inputs),
        lambda point, shared: shared.arrays,
        pair.measure.judge,
    )


def sweep_one(
    name: str,
    learner: Experiment,
    columns: dict[str, np.ndarray],
    work: SweepInputs,
    earlier: Swept | None,
) -> Swept:
    """Trains all settings and seeds of one method; reuses the path of an `earlier` one."""
    settings, shared, held_out = work.settings, work.shared, work.held_out
    seeds, count = settings.seeds, len(next(iter(columns.values()), [0]))
    if count * seeds > _axes.MOST:
        raise UsageError(
            f"{count} settings of {seeds} seeds are more than {_axes.MOST:,} students."
        )
    points = _choice.for_every_seed(columns, seeds)
    patience = settings.early_stopping
    assert settings.batch_size is not None
    options = _training.FitOptions(
        settings.epochs,
        settings.batch_size,
        checks=settings.epochs if patience else _training.even_checks(settings.epochs),
        keep=_training.variables,
        patience=patience,
    )
    chunk = None
    if settings.memory is not None:
        fit = _training.fit(learner, options)
        chunk = sweeps.chunk_for_memory(fit, points, shared, *held_out, bytes=settings.memory)
    start, path, probed = time.perf_counter(), settings.path, {}
    if path == "fastest" and earlier is not None:
        path, probed = earlier.path, earlier.probed
    elif path == "fastest":
        probe = _training.FitOptions(1, settings.batch_size, steps=PROBE_STEPS)
        candidates = programs(learner, probe, chunk, work.devices)
        probed = time_programs(candidates, points, shared, held_out)
        path = min(probed, key=lambda name: probed[name], default="together")
        times = ", ".join(f"{way} {1e3 * s:.2f} ms" for way, s in probed.items())
        timing = f" (per student and {PROBE_STEPS} steps: {times})" if probed else ""
        work.say(f"path: {path}{timing}")
    if settings.halving > 1:
        result = _halving.run_halving(name, learner, columns, work, chunk)
        path = "together"
    else:
        fitted = programs(learner, options, chunk, work.devices)[path](points, shared, *held_out)
        epochs = np.full(count * seeds, settings.epochs)
        if fitted.epoch is not None:
            epochs = np.asarray(fitted.epoch)
        loss = np.take_along_axis(np.asarray(fitted.losses), epochs[:, None] - 1, axis=1)
        scores = (fitted.validation, fitted.test, loss)
        validation, test, loss = (np.asarray(x, np.float64).reshape(count, seeds) for x in scores)
        epochs, best = epochs.reshape(count, seeds), _choice.best(fitted, points).fitted
        result = validation, test, loss, epochs, np.ones(count, bool), best
    per_call = (chunk or count * seeds) if path == "together" else 1
    seconds = time.perf_counter() - start
    return Swept(name, columns, *result, path, per_call, seconds, probed)


def programs(
    learner: Experiment,
    options: _training.FitOptions,
    chunk: int | None,
    devices: Sequence[Any] | None,
) -> dict[str, Callable[..., Fitted]]:
    """Programs `(points, shared, *eval_splits) -> Fitted` by path."""
    fit = _training.fit(learner, options)
    together = sweeps.vmap(fit, chunk=chunk, devices=devices)
    if devices is not None:  # only students that run together can be spread
        return {"together": together}
    one_by_one = _training.fit_one_by_one(learner, options)
    return {"together": together, "mapped": sweeps.map(fit), "one-by-one": one_by_one}


def time_programs(
    candidates: Mapping[str, Callable[..., Any]],
    points: Point,
    shared: Any,
    held_out: Sequence[Any],
) -> dict[str, float]:
    """Seconds per student of each program, measured on a few points; empty for one program."""
    if len(candidates) == 1:
        return {}
    some_points = {axis: column[:PROBE_POINTS] for axis, column in points.items()}
    small = [jax.tree.map(lambda x: x[:1], part) for part in held_out]  # only the steps differ
    seconds = sweeps.timings([*candidates.values()], some_points, shared, *small, repeats=2)
    return dict(zip(candidates, seconds, strict=True))


def select_suitable(chosen: Sequence[Entry], setup: Setup) -> tuple[list[Entry], list[str]]:
    """Selects the methods that train only the student; returns notes on the others."""
    entries, notes = [], []
    for entry in chosen:
        reason = entry.applies(setup)
        if reason is None and entry.needs == "networks":
            reason = "it differentiates the networks themselves, which a sweep does not offer"
        if reason is None:
            method = entry.build(setup)
            memory = jax.eval_shape(method.memory, jax.random.key(0))
            if entry.connector or jax.tree.leaves(memory) or method.predict is not None:
                reason = "it trains or keeps more than the student; use kdtl distill"
        if reason is None:
            entries.append(entry)
        else:
            notes.append(f"{entry.name} is left out: {reason}.")
    if not entries:
        raise ValueError(f"no method is left. {' '.join(notes)}")
    return entries, notes


def scaled_start(teacher: Params, student: Params, alpha: Any) -> Params:
    """`alpha` times the teacher's evenly spaced units, in the student's shapes."""
    return transforms.scale(_models.select_units(teacher, student), alpha)


def scale_weight(weight: Any, factor: Any) -> Any:
    """A weight or schedule, multiplied."""
    return (lambda step: weight(step) * factor) if callable(weight) else weight * factor


def spread_devices(settings: Settings) -> list[Any] | None:
    """The devices of `--devices`, virtual ones on a CPU; None for a single device."""
    if settings.devices is None or settings.devices == 1:
        return None
    if settings.path in ("mapped", "one-by-one"):
        raise UsageError(
            f"--devices spreads students that run together, not --path {settings.path}."
        )
    return _devices.first_devices(settings.devices)
