"""Distillation of one teacher into students by many methods: data, teacher, students, table.

One teacher, trained here or given, is frozen. Every method then trains the same students: seed s
starts from the same weights and draws the same batches under every method, so methods are compared
seed by seed with the student that learns from the labels alone. Run by `kdtl distill`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import Variables
from kdtl_jax.datasets import Splits, per_class
from kdtl_jax.methods import Entry, Method, Setup
from kdtl_jax.recipes import _networks, _options, _seeds, _training
from kdtl_jax.recipes._networks import Network
from kdtl_jax.recipes._options import Options
from kdtl_jax.recipes._training import ALONE, Bench, Detail, Place, Schedule, Trained
from kdtl_jax.run import report, teacher_cache

TEACHER, BASELINE = "teacher", "student_alone"
TEACHERS, STUDENTS = "teacher", "distillation"  # families of the table
CACHE_BYTES = 512 * 2**20  # teacher outputs up to this size are computed once
Progress = Callable[[str], None]


class Settings(NamedTuple):
    """What fixes the experiment, beside data, models and methods."""

    seeds: int
    students: Schedule
    teachers: Schedule
    options: Options = Options()
    layers: tuple[tuple[str, str], ...] = ()  # (student tap, teacher tap); (): by depth
    dtype: Any = None  # of the computation; None: float32
    per_class: int | None = None  # images per class that each seed's student sees; None: all
    teacher_weights: Path | None = None  # a safetensors file instead of training a teacher
    teacher_cache: Path | None = None  # a folder of the teacher's outputs, filled if need be


class Outcome(NamedTuple):
    """What a run found."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]
    notes: list[str]
    failed: list[str]  # methods that raised an error
    teacher: Variables
    best: str  # the method with the highest validation accuracy, among those that ...
    student: Variables  # ... need nothing but the student at inference; its first seed


class Pair(NamedTuple):
    """Both networks, and the teacher's variables."""

    student: Network
    teacher: Network
    frozen: Variables
    example: Any  # inputs [1, ...]


def run(
    splits: Splits,
    teacher: nn.Module,
    student: nn.Module,
    methods: Sequence[Entry],
    settings: Settings,
    place: Place,
    say: Progress,
    detail: Detail,
) -> Outcome:
    """Trains the teacher and, by every method, its students; compares them on the test split.

    Args:
      splits: standardized data.
      teacher: the large module.
      student: the small one.
      methods: what to compare; those that do not apply to the pair are noted, with the reason.
      settings: of the experiment.
      place: the run folder, and whether what is there is taken up.
      say: told the name of what begins.
      detail: told how it goes, and whether that is the last of a method.

    Raises:
      SystemExit: after a signal, with everything saved.
      ValueError: if data, models, weights, layers and settings do not fit each other; before
        anything is trained wherever that can be known before.
    """
    example = jnp.zeros((1, *splits.train.inputs.shape[1:]), jnp.float32)
    small, large = (_networks.network(m, example, dtype=settings.dtype) for m in (student, teacher))
    shapes = jax.eval_shape(lambda: large.init(jax.random.key(0), example))
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    bench = _bench(splits, settings)
    # Once with a blank teacher, so that what cannot work is said before one is trained.
    setup = _setup(Pair(small, large, blank, example), bench, settings)
    _applicable(methods, setup, settings.options)

    frozen, teacher_row, named_by_teacher = _teacher(
        large, example, splits, bench, settings, place, say, detail
    )
    pair = Pair(small, large, frozen, example)
    setup = _setup(pair, bench, settings)
    chosen, notes = _applicable(methods, setup, settings.options)
    bench, live = _with_outputs(bench, pair, settings)
    starts = _training.initial(pair.student, bench.keys.model, example)
    plain = _training.namer(pair.student, mesh=settings.students.mesh)

    rows, learning, failed = [teacher_row], {}, []
    best: tuple[float, str, Variables] | None = None
    jobs = {BASELINE: (None, ALONE), **{m.name: (m, built) for m, built in chosen}}
    for i, (name, (method, built)) in enumerate(jobs.items()):
        say(f"{name} ({i + 1} of {len(jobs)})")
        named = plain
        if built.predict is not None:
            named = _training.namer(pair.student, built.predict, settings.students.mesh)
        try:
            trained = _training.train_seeds(
                name,
                pair.student,
                starts,
                built,
                bench,
                settings.students,
                place,
                named,
                teacher=None if method is None else live,
                say=detail,
            )
        except (ValueError, TypeError) as error:
            if method is None:
                raise
            notes.append(f"{name} failed: {error}")
            failed.append(name)
            continue
        row = _row(name, method, built, trained, named, splits, settings, named_by_teacher)
        rows.append(row)
        learning[name] = _curve(trained)
        if built.predict is None and (best is None or row.validation.mean > best[0]):
            first = _seeds.pick((trained.state.params, trained.state.model_state), 0)
            best = row.validation.mean, name, Variables(*first)
    assert best is not None
    rows = report.compared(rows, {STUDENTS: BASELINE})
    notes += _skip_notes(rows)
    return Outcome(rows, learning, notes, failed, frozen, best[1], best[2])


def _bench(splits: Splits, settings: Settings) -> Bench:
    train = splits.train
    arrays = {
        "inputs": train.inputs,
        "labels": train.labels,
        "index": np.arange(len(train.labels), dtype=np.int32),
    }
    rows = None
    if settings.per_class is not None:
        numbered = train._replace(inputs=arrays["index"])
        rows = np.stack(
            [per_class(numbered, settings.per_class, seed=s).inputs for s in range(settings.seeds)]
        )
    return Bench(arrays, rows, splits.validation, _seeds.keys(settings.seeds))


def _setup(pair: Pair, bench: Bench, settings: Settings) -> Setup:
    schedule = settings.students
    size = _training.examples(bench)
    return _networks.setup(
        pair.student,
        pair.teacher,
        pair.frozen,
        example=pair.example,
        classes=bench.held.classes,
        batch_size=schedule.batch_size // schedule.microbatches,
        examples=len(bench.arrays["index"]),
        steps=schedule.epochs * (size // _training.checked_batch(schedule, size)),
        task=_training.task,
        layers=settings.layers,
    )


def _applicable(
    methods: Sequence[Entry], setup: Setup, options: Options
) -> tuple[list[tuple[Entry, Method]], list[str]]:
    """Methods that apply, built with the user's weights; notes on the others."""
    notes = {m.name: reason for m in methods if (reason := m.applies(setup)) is not None}
    fitting = [m for m in methods if m.name not in notes]
    own = options._replace(weights={})
    terms = {m.name: sorted(_options.build(m, setup, own).weights) for m in fitting}
    terms[BASELINE] = ["task"]
    for key in options.weights:
        name, dot, term = key.rpartition(".")
        known = terms.get(name, []) if dot else [t for found in terms.values() for t in found]
        if term not in known:
            listed = "; ".join(f"{name}: {', '.join(found)}" for name, found in terms.items())
            raise ValueError(
                f"a weight is given for {key!r}, which is no term here. The terms are "
                f"{listed}. Write term=weight, or method.term=weight for one method."
            )
    built = [(m, _options.build(m, setup, _own(options, m.name, terms[m.name]))) for m in fitting]
    return built, [f"{name} does not apply: {reason}." for name, reason in notes.items()]


def _own(options: Options, name: str, terms: Sequence[str]) -> Options:
    """The user's weights for one method: `method.term` wins over `term`."""
    shared = {t: w for t, w in options.weights.items() if t in terms}
    special = {t: options.weights[f"{name}.{t}"] for t in terms if f"{name}.{t}" in options.weights}
    return options._replace(weights={**shared, **special})


def _teacher(
    net: Network,
    example: Any,
    splits: Splits,
    bench: Bench,
    settings: Settings,
    place: Place,
    say: Progress,
    detail: Detail,
) -> tuple[Variables, report.Row, np.ndarray]:
    """The teacher's variables, its line of the table, the classes it names `[test examples]`."""
    keys, schedule, file = _seeds.keys(1), settings.teachers, settings.teacher_weights
    named = _training.namer(net, mesh=schedule.mesh)
    say("teacher" if file is None else f"teacher, from {file}")
    if file is None:
        starts = _training.initial(net, keys.model, example)
        everything = bench._replace(rows=None, keys=keys)
        trained = _training.train_seeds(
            TEACHER, net, starts, ALONE, everything, schedule, place, named, say=detail
        )
        state, seconds = trained.state, trained.seconds
        described = {"epochs": schedule.epochs, "batch_size": schedule.batch_size}
    else:
        given = _networks.load(str(file), net, example)
        state, seconds = _training.untrained(given, keys), 0.0
        described = {"weights": str(file)}
    on_validation, on_test = (
        named(state, part.inputs, True) for part in (splits.validation, splits.test)
    )
    frozen = Variables(*_seeds.pick((state.params, state.model_state), 0))
    row = report.Row(
        TEACHER,
        TEACHERS,
        "Teacher",
        trees.count(frozen.params),
        _accuracy(on_test, splits.test.labels),
        _accuracy(on_validation, splits.validation.labels),
        seconds,
        described,
    )
    return frozen, row, on_test[0]


def _with_outputs(
    bench: Bench, pair: Pair, settings: Settings
) -> tuple[Bench, tuple[Any, Variables] | None]:
    """The data with the teacher's outputs; or the live teacher, where they would not be its own."""
    size = len(bench.arrays["index"])
    shapes = _networks.shapes(pair.teacher, 1, pair.example).values()
    total = size * sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in shapes)
    if settings.teacher_cache is not None:
        outputs = _from_cache(settings.teacher_cache, bench, pair, settings.dtype)
    elif settings.students.views is not None or total > CACHE_BYTES:
        return bench, (pair.teacher.apply, pair.frozen)
    else:
        outputs = _training.outputs(pair.teacher, pair.frozen, bench.arrays["inputs"])
    return bench._replace(arrays={**bench.arrays, "teacher": outputs}), None


def _from_cache(folder: Path, bench: Bench, pair: Pair, dtype: Any) -> dict[str, Any]:
    """The outputs in a teacher cache, which is filled, completed or mended first if need be.

    A whole cache of this teacher on these data serves in any precision (`kdtl cache --dtype`,
    `--precision`): whoever made it chose that.
    """
    inputs = {"inputs": bench.arrays["inputs"]}
    taps = sorted(_networks.shapes(pair.teacher, 1, pair.example))
    lowered = {} if dtype is None else {"precision": jnp.dtype(dtype).name}
    made = teacher_cache.fingerprint(pair.frozen, inputs, preprocessing=lowered, taps=taps)
    expected = made._replace(dtype=None, preprocessing=None)
    try:
        return teacher_cache.load(teacher_cache.open_cache(folder, expect=expected))
    except (FileNotFoundError, ValueError):  # `write` mends it, or says what differs
        teacher_cache.write(
            folder,
            pair.teacher.apply,
            pair.frozen,
            inputs,
            batch_size=512,
            preprocessing=lowered,
            taps=taps,
        )
    return teacher_cache.load(teacher_cache.open_cache(folder, expect=expected, contents=False))


def _row(
    name: str,
    method: Entry | None,
    built: Method,
    trained: Trained,
    named: _training.Named,
    splits: Splits,
    settings: Settings,
    named_by_teacher: np.ndarray,
) -> report.Row:
    on_test = named(trained.state, splits.test.inputs, trained.turns)
    params, glue = _seeds.pick((trained.state.params, trained.state.connectors), 0)
    schedule = settings.students
    described: dict[str, Any] = {
        "epochs": schedule.epochs,
        "batch_size": schedule.batch_size,
        "weights": {t: _number(w) for t, w in built.weights.items()},
        "ran": "seed by seed" if trained.turns else "all seeds at once",
    }
    if method is not None:
        described["paper"] = method.paper
    if any(trained.skipped):
        described["skipped_updates"] = trained.skipped
    return report.Row(
        name,
        STUDENTS,
        "Student alone" if method is None else method.title,
        trees.count(params if built.predict is None else (params, glue)),
        _accuracy(on_test, splits.test.labels),
        report.interval(trained.validation[-1]),
        trained.seconds,
        described,
        report.interval((on_test == named_by_teacher).mean(axis=1)),
    )


def _curve(trained: Trained) -> dict[str, list[float]]:
    return {
        "epoch": [float(epoch) for epoch in trained.epochs],
        "validation_accuracy": trained.validation.mean(axis=1).tolist(),
    }


def _accuracy(named: np.ndarray, labels: np.ndarray) -> report.Interval:
    return report.interval((named == labels).mean(axis=1))


def _number(weight: Any) -> float | str:
    return "schedule" if callable(weight) else round(float(weight), 6)


def _skip_notes(rows: Sequence[report.Row]) -> list[str]:
    return [
        f"{row.method}: updates that were not finite were left out, per seed "
        f"{row.settings['skipped_updates']}."
        for row in rows
        if "skipped_updates" in row.settings
    ]
