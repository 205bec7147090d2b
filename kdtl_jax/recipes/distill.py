"""Distills one teacher into students by several methods, and compares them.

One teacher, trained here or given, is frozen. Every method then trains the same students: seed s
starts from the same weights and draws the same batches under every method, so methods are compared
seed by seed with the student that learns from the labels alone.

    kdtl distill --methods kd,dkd,hint --seeds 5
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import methods
from kdtl_jax._types import Variables
from kdtl_jax.datasets import per_class
from kdtl_jax.interop import networks
from kdtl_jax.recipes import (
    _caching,
    _devices,
    _distill_report,
    _evidence,
    _folders,
    _logs,
    _measures,
    _optimizers,
    _output,
    _pair,
    _progress,
    _seeds,
    _students,
    _tables,
    _training,
    _user_code,
)
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes._distill_report import STUDENTS
from kdtl_jax.recipes._pair import BASELINE, TEACHER
from kdtl_jax.recipes._training import Experiment
from kdtl_jax.recipes.settings import UsageError, setting

EPOCHS, STEPS = 60, 1000  # minimum per student
FEW_NOTES = 3  # notes on methods that do not apply, printed in full before training
CACHE_BYTES = 512 * 2**20  # teacher outputs up to this size are computed once
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
EXAMPLES = """
  kdtl distill --methods kd,dkd,hint --seeds 5
  kdtl distill --data mnist/ --teacher cnn:32,64,128 --student cnn:8,16 --methods all
  kdtl distill --methods kd --loss-weights kd=0.9,task=0.1 --temperature 4 --out runs/kd
  kdtl distill --config runs/kd/config.yaml --resume
"""


@dataclass(frozen=True)
class Settings(
    _pair.ModelSettings, _user_code.Terms, _optimizers.TrainingSettings,
    _optimizers.SelectionSettings, _devices.Meshed, _logs.LogSettings, types.Data, types.Resumable,
):  # fmt: skip
    """Settings of `kdtl distill`."""

    out: str = setting("runs/distill", "the run folder", metavar="FOLDER")
    list: bool = setting(False, "print the table of methods and exit")
    methods: tuple[str, ...] = setting(
        ("kd", "dkd"), "methods to compare, or all; see --list", metavar="NAME,...",
        parse=types.method_names,
    )  # fmt: skip
    seeds: int = setting(5, "students per method", metavar="N", least=1, most=10_000, quick=2)
    epochs: int | None = setting(
        None, "epochs per student; default: 60, more if that is fewer than 1,000 steps",
        metavar="N", least=1, quick=10,
    )  # fmt: skip
    teacher_epochs: int = setting(30, "epochs of the teacher", metavar="N", least=1, quick=10)
    per_class: int | None = setting(
        None, "training examples per class, redrawn for every seed; 0: all; default: 10 of the "
        "built-in digits, all of other data", metavar="N", least=0, group="data",
    )  # fmt: skip
    teacher_cache: str | None = setting(
        None, "store the teacher's outputs here, or reuse those already stored; default: kept in "
        "memory up to 512 MB, unless --augment is given, else the teacher runs at every step",
        metavar="FOLDER", group="models",
    )  # fmt: skip
    temperature: float | None = types.positive_rate(
        None, "temperature of every method that has one; default: each method's own", group="losses"
    )
    loss_weights: Mapping[str, float] = setting(
        {}, "kd=0.9,task=0.1, or kd.task=0.1 for one method; default: each method's own",
        metavar="TERM=X,...", parse=types.term_weights, group="losses",
    )  # fmt: skip
    layers: tuple[tuple[str, str], ...] = setting(
        (), "layers to match; default: from the last layers backward",
        metavar="STUDENT:TEACHER,...", parse=types.layer_pairs, group="losses",
    )  # fmt: skip
    precision: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "compute in this precision; weights and losses stay in float32", group="training"
    )
    microbatches: int = setting(
        1, "split each batch into this many parts to save memory", metavar="N", least=1,
        group="training",
    )  # fmt: skip
    augment: tuple[str, ...] = setting(
        (), "crop or crop=PIXELS, flip, mixup or mixup=ALPHA, cutmix or cutmix=ALPHA; teacher and "
        "student see the same views. mixup and cutmix mix the labels of the cross-entropy; a "
        "method that reads labels itself gets the unmixed ones",
        metavar="NAME,...", parse=types.augmentations, group="training",
    )  # fmt: skip
    one_by_one: bool = setting(
        False, "train seeds one after another; default: all at once, except convolutions on a CPU",
        group="devices",
    )  # fmt: skip
    save_every: int | None = setting(
        None, "epochs between saves; default: only at the end", metavar="N", least=1
    )


def run(settings: Settings) -> int:
    """Trains the teacher, then its students by every method, and writes the run folder.

    Returns:
      0, or 1 if a method failed (the others are finished and written).

    Raises:
      SystemExit: after a signal, with everything saved.
      ValueError: if data, models, weights, layers and settings are incompatible; before any
        training if possible.
    """
    if settings.list:
        rows = [
            (e.name, e.title, e.paper, e.needs, "yes" if e.connector else "no")
            for e in methods.table()
        ]
        return _tables.list_methods(("method", "title", "paper", "needs", "connector"), rows)
    user_entries = _user_code.entries(settings)
    entries = types.select(settings.methods, {**_pair.entries(), **user_entries}, "kdtl distill")
    entries += [entry for entry in user_entries.values() if entry not in entries]
    mesh = _devices.make_mesh(settings)  # before anything touches a device
    devices = 1 if mesh is None else mesh.size
    _folders.check_out(settings, "distill")
    check(settings, entries, devices)
    pair = _pair.read_pair(settings, dtype=DTYPES[settings.precision])
    entries = _pair.select_methods(entries, settings, pair.measure)
    inputs, classes = pair.arrays["inputs"], pair.splits.train.classes
    _pair.check_augmentation(settings.augment, pair)
    if settings.teacher_cache is not None:
        cache = Path(settings.teacher_cache)
        _caching.check(cache, pair, entries, precision=settings.precision)
    rows, size = None, len(inputs)
    settings = resolved(settings, size, classes, settings.microbatches * devices)
    batch_size, few = settings.batch_size, settings.per_class
    assert batch_size is not None and settings.epochs is not None
    if few:
        indexed = pair.splits.train._replace(inputs=pair.arrays["index"])
        subsets = [per_class(indexed, few, seed=seed) for seed in range(settings.seeds)]
        rows = np.stack([part.inputs for part in subsets])  # [S, n], the examples that a seed sees
        size = rows.shape[-1]
    _training.check_batch(batch_size, size, settings.microbatches, devices)
    per_epoch = size // batch_size
    steps = settings.epochs * per_epoch
    teacher_steps = settings.teacher_epochs * (len(inputs) // batch_size)
    make_setup = functools.partial(
        _pair.setup,
        pair,
        steps=steps,
        batch_size=batch_size // settings.microbatches,
        layers=settings.layers,
    )
    # First with a blank teacher, to report errors before one is trained.
    blank = make_setup(None)
    built, reasons = _pair.build_all(entries, blank, settings)
    _pair.check_any(built, reasons, blank, pair.measure.kind)
    view = None
    if settings.augment:
        view = _training.views(settings.augment, classes, inputs.shape[1])
    tx = _optimizers.optimizer(settings, steps)

    def make_learner(method: methods.Method, *, is_live: bool) -> Experiment:
        return _pair.student(
            pair.student,
            method,
            tx,
            lambda key, _: pair.student.init(key, pair.example),
            teacher=pair.teacher.apply if is_live else None,
            microbatches=settings.microbatches,
            view=view,
            per_epoch=per_epoch,
        )

    for name, source in _user_code.sources_by_name(settings).items():
        if name in built:
            learner = make_learner(built[name], is_live=True)
            teacher_shapes = networks.abstract(pair.teacher, pair.example)
            _user_code.try_method(source, learner, pair.arrays, batch_size, teacher_shapes)
    print_notes(reasons)

    trains_teacher = pair.teacher_variables is None
    learners = [*([TEACHER] if trains_teacher else []), *built]
    files = {**pair.files, **_user_code.files(settings)}
    saves = [f"checkpoints/{x}" for x in learners]
    with _output.open_run(settings, "distill", files, saves=saves) as running:
        folder, identity, say, programs = running
        shared_run = _seeds.SharedRun(
            folder=folder, identity=identity, resume=settings.resume, batch_size=batch_size,
            arrays=pair.arrays, splits=pair.splits, lines=_logs.read_lines(folder),
            measure=pair.measure, mesh=mesh,
            one_by_one=settings.one_by_one, patience=settings.early_stopping,
            save_every=settings.save_every, say=_progress.throttle(say),
        )  # fmt: skip

        # The teacher.
        teacher_run = shared_run._replace(
            advance=_progress.track_part(say, TEACHER, 0, len(learners)),
            rate=_optimizers.rate_by_step(settings, teacher_steps),
        )
        say(f"teacher{'' if trains_teacher else f', from {settings.teacher_weights}'}")
        frozen, teacher = _pair.train_teacher(
            pair, teacher_run, built[BASELINE], _optimizers.optimizer(settings, teacher_steps),
            settings.teacher_epochs,
        )  # fmt: skip
        fields: dict[str, Any] = {"weights": settings.teacher_weights}
        if trains_teacher:
            fields = {"epochs": settings.teacher_epochs, "batch_size": batch_size}
        test_labels = pair.splits.test.labels
        table = [
            _measures.row(
                pair.measure, TEACHER, TEACHER, "Teacher", frozen.params, teacher,
                teacher.seconds, fields, targets=test_labels,
            )
        ]  # fmt: skip
        predictions = {TEACHER: _evidence.Predictions("Teacher", teacher.answers)}

        # The students.
        outputs = teacher_outputs(settings, pair, frozen, entries)
        arrays = pair.arrays if outputs is None else {**pair.arrays, "teacher": outputs}
        shared_run = shared_run._replace(
            arrays=arrays, rows=rows, rate=_optimizers.rate_by_step(settings, steps)
        )
        setup = make_setup(frozen)
        built, notes = _pair.build_all(entries, setup, settings)
        entry_by_name = {entry.name: entry for entry in entries}
        points, learning, failed = _training.points(settings.seeds), {}, []
        students: list[_students.SavedStudent] = []
        for i, (name, method) in enumerate(built.items()):
            title = f"{name} ({i + 1} of {len(built)})"
            say(title)
            number = len(learners) - len(built) + i
            shared_run = shared_run._replace(
                advance=_progress.track_part(say, title, number, len(learners))
            )
            entry = entry_by_name.get(name)
            is_live = outputs is None and name != BASELINE  # the teacher runs at every step
            try:
                trained = _seeds.train_seeds(
                    name,
                    make_learner(method, is_live=is_live),
                    points,
                    frozen if is_live else None,
                    shared_run,
                    settings.epochs,
                )
            except (ValueError, TypeError) as error:
                if entry is None:
                    raise
                notes.append(f"{name} failed: {error}")
                failed.append(name)
                continue
            state, label = trained.state, "Student alone" if entry is None else entry.title
            uses_connectors, best_student = method.predict is not None, None
            if uses_connectors and name in user_entries:
                notes.append(f"{name} has no file, because it predicts through its own connectors.")
            else:
                best_student = _students.best(
                    name, state, trained.validation, through_connectors=uses_connectors
                )
            students += [] if best_student is None else [best_student]
            at_inference = (state.params, state.connectors) if uses_connectors else state.params
            fields = _distill_report.method_settings(settings, entry, method, trained, best_student)
            row = _measures.row(
                pair.measure, name, STUDENTS, label, at_inference, trained, trained.seconds, fields,
                targets=test_labels, teacher=teacher.answers,
            )  # fmt: skip
            table.append(row)
            predictions[name] = _evidence.Predictions(label, trained.answers)
            learning[name] = {
                "epoch": [float(epoch) for epoch in trained.epochs],
                f"validation_{pair.measure.score_name.key}": trained.curve.mean(axis=1).tolist(),
            }
            if jax.process_index() == 0:
                lines = shared_run.lines.pop(name, [])
                learning[name] |= _logs.curves(lines)
                _logs.write_method_events(folder, lines, settings.log)
            if any(trained.skipped):
                notes.append(
                    f"{name}: updates that were not finite were left out, per seed "
                    f"{trained.skipped}."
                )
            notes += _students.diverged([row])
        say.hide()
        if jax.process_index() != 0:
            return 1 if failed else 0
        _pair.write(folder, pair, settings, frozen, students, setup)
        _logs.write(folder, settings.log)
        notes.append(programs())
        results = _distill_report.results(settings, pair, table, learning, predictions, notes)
        _output.finish(folder, results)
    if failed:
        print(f"kdtl distill: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def print_notes(reasons: Sequence[str]) -> None:
    """Prints which methods do not apply, before training begins."""
    if len(reasons) > FEW_NOTES:
        names = ", ".join(reason.partition(" ")[0] for reason in reasons)
        reasons = [f"these methods do not apply (the report says why): {names}"]
    for reason in reasons:
        print(f"note: {reason}", file=sys.stderr)


def teacher_outputs(
    settings: Settings, pair: _pair.Pair, frozen: Variables, entries: Sequence[methods.Entry]
) -> Any:
    """The teacher's outputs, computed once; None if the teacher runs at every step.

    It must if its outputs depend on augmentation or take too much memory.
    """
    if settings.teacher_cache is not None:
        cache, taps = Path(settings.teacher_cache), _caching.taps(entries, pair)
        return _caching.outputs(cache, pair, frozen, settings.precision, taps)
    inputs, shapes = pair.arrays["inputs"], networks.output_shapes(pair.teacher, pair.example)
    size = len(inputs) * sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values())
    if settings.augment or size > CACHE_BYTES:
        return None
    return _training.outputs(pair.teacher, frozen, inputs)


def check(settings: Settings, entries: Sequence[methods.Entry], devices: int) -> None:
    """Raises UsageError if settings contradict each other, regardless of the data."""
    _measures.check(settings)
    if settings.augment and settings.teacher_cache is not None:
        raise UsageError(
            "--teacher-cache holds outputs for the images as they are, not for --augment's views. "
            "Give one or the other."
        )
    if settings.batch_size is not None:
        size = settings.batch_size
        _training.check_batch(size, size, settings.microbatches, devices)
    _pair.check_layers(settings)
    if settings.teacher_cache is not None:
        has_teacher = settings.teacher_weights is not None or settings.resume
        _caching.check_folder(Path(settings.teacher_cache), has_teacher=has_teacher)
    if settings.loss_weights and (terms := _pair.terms(entries, settings)):
        _pair.check_weights(settings.loss_weights, {BASELINE: ("task",), **terms})


def resolved(settings: Settings, examples: int, classes: int, divisor: int = 1) -> Settings:
    """The settings, with defaults that depend on the data filled in."""
    per_class = types.few_or_all(settings.per_class, settings.data)
    size = per_class * classes or examples
    batch_size = settings.batch_size or _training.default_batch(size, divisor)
    epochs = settings.epochs or max(EPOCHS, math.ceil(STEPS / max(1, size // batch_size)))
    return dataclasses.replace(settings, per_class=per_class, batch_size=batch_size, epochs=epochs)
