"""The report of `kdtl distill`, and the settings of its students."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kdtl_jax import methods
from kdtl_jax.methods import Entry, Method
from kdtl_jax.recipes import _choice, _evidence, _optimizers, _pair, _students
from kdtl_jax.recipes._pair import BASELINE, TEACHER
from kdtl_jax.recipes._seeds import Trained
from kdtl_jax.recipes._students import SavedStudent
from kdtl_jax.run import report

STUDENTS = "distillation"  # their family in the table


def method_settings(
    settings: Any,  # `distill.Settings`
    entry: Entry | None,
    method: Method,
    trained: Trained,
    student: SavedStudent | None,
) -> dict[str, Any]:
    """A method's settings in the table; `entry` is None for the student alone."""
    weights = {
        term: "schedule" if callable(weight) else _choice.rounded(weight)
        for term, weight in method.weights.items()
    }
    return {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "optimizer": settings.optimizer,
        "learning_rate": _optimizers.peak_rate(settings),
        **({"weight_decay": settings.weight_decay} if settings.weight_decay else {}),
        **_temperature(settings.temperature, entry),
        "weights": weights,
        **({} if trained.kept_epoch is None else {"epoch_kept": trained.kept_epoch}),
        "ran": "seed by seed" if trained.in_turn else "all seeds at once",
        **({} if entry is None else {"paper": entry.paper}),
        **_students.file_fields(student),
        **({"skipped_updates": trained.skipped} if any(trained.skipped) else {}),
    }


def _temperature(chosen: float | None, entry: Entry | None) -> dict[str, float]:
    """The temperature of a method that has one: the user's, or its own."""
    if entry is None or not methods.takes_temperature(entry):
        return {}
    default = inspect.signature(entry.build).parameters["temperature"].default
    return {"temperature": chosen or default}


def results(
    settings: Any,  # `distill.Settings`
    pair: _pair.Pair,
    rows: Sequence[report.Row],
    learning: Mapping[str, Any],
    predictions: Mapping[str, _evidence.Predictions],  # by method, including the teacher
    notes: Sequence[str],
) -> report.Results:
    """The report: the recommended student, and its errors."""
    few, splits, best = settings.per_class, pair.splits, _students.best_row(rows)
    examples = f"{few} per class, drawn anew for every seed"
    sizes = {name: len(part.labels) for name, part in splits._asdict().items()}
    data = {
        "name": splits.train.name,
        "classes": splits.train.classes,
        **sizes,
        "student_examples": examples if few else "all",
        "recommended": best and best.settings["file"],
    }
    few_text = f"sees all training examples, students ({settings.student}) {examples}"
    all_text = f"and the students ({settings.student}) see all training examples"
    data_note = (
        f"Data: {data['name']}, {sizes['train']} training, {sizes['validation']} validation and "
        f"{sizes['test']} test examples. The teacher ({pair.teacher_text}) "
        f"{few_text if few else all_text}. A seed has the same initial weights and batches "
        "under every method. Nothing was chosen on the test split."
    )
    evidence = []
    if best is not None and pair.measure.kind == "classes":
        evidence = _evidence.sections(
            splits.test, predictions[best.method], predictions[TEACHER].classes
        )
    return report.Results(
        "kdtl distill: one teacher, students by several methods",
        data,
        report.compared(rows, {STUDENTS: BASELINE}),
        learning,
        {},
        [data_note, *notes, *_students.notes(rows, BASELINE)],
        sections=evidence,
        score=pair.measure.score_name,
    )
