"""The students of a run: one file per method, and the recommended one.

A file holds the seed with the best validation accuracy; the recommended method has the best mean
validation accuracy. Neither uses the test split.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from kdtl_jax import _files, methods
from kdtl_jax._types import Variables
from kdtl_jax.interop import model_files
from kdtl_jax.interop.model_files import About, Connected
from kdtl_jax.recipes import _training
from kdtl_jax.run import record, report, scores

FOLDER = "students"


class SavedStudent(NamedTuple):
    """A method's student of one seed."""

    method: str
    seed: int
    variables: Variables
    connectors: Any = None  # and memory, if the method predicts through them
    memory: Any = None


class TableLine(Protocol):
    """A method's line of a table; its settings name the student's file, if there is one."""

    @property
    def method(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def validation(self) -> report.Interval: ...


L = TypeVar("L", bound=TableLine)


def best(
    method: str, state: Any, validation: Any, *, through_connectors: bool = False
) -> SavedStudent | None:
    """The student of the seed with the best validation score; None if no seed has a finite score.

    `state` is a `TrainState` or `Variables`, stacked over seeds; of a method that predicts
    `through_connectors`, these and its memory belong to the student.
    """
    seed = scores.best(list(validation))
    if seed is None:
        return None
    variables = Variables(*_training.pick((state.params, state.model_state), seed))
    if not through_connectors:
        return SavedStudent(method, seed, variables)
    return SavedStudent(
        method, seed, variables, *_training.pick((state.connectors, state.memory), seed)
    )


def select_best(
    rows: Sequence[report.Row], models: Mapping[str, Any]
) -> tuple[list[SavedStudent], list[report.Row]]:
    """The best student of every method that has one, and the rows with the files' names.

    `models` are `Variables`, stacked over seeds, by method.
    """
    students = {
        row.method: best(row.method, models[row.method], row.validation.values)
        for row in rows
        if row.method in models
    }
    rows_with_files = [
        row._replace(settings={**row.settings, **file_fields(students.get(row.method))})
        for row in rows
    ]
    return [student for student in students.values() if student is not None], rows_with_files


def file_fields(student: SavedStudent | None) -> dict[str, Any]:
    """A student's entries in the table's settings."""
    return {} if student is None else {"file": file_of(student.method), "file_seed": student.seed}


def file_of(method: str) -> str:
    """A method's file, relative to the run folder."""
    return f"{FOLDER}/{method}.safetensors"


def provenance(folder: Path, settings: Any, role: str) -> dict[str, str]:
    """The metadata that a file records about its run: data, split and precision.

    The role, "student" or "teacher", says whose source file is recorded, if it has one.
    """
    files = _files.read_sealed(folder / record.FILE)["files"]
    split = {"validation": settings.validation, "test": settings.test, "seed": settings.split_seed}
    metadata = {"data": files["data"], "split": json.dumps({**split, "label": settings.label})}
    metadata |= {"source_sha256": files[role]} if role in files else {}
    precision = getattr(settings, "precision", "float32")
    return metadata if precision == "float32" else {**metadata, "precision": precision}


def write(
    folder: Path,
    students: Sequence[SavedStudent],
    about: About,
    settings: Any,
    setup: methods.Setup | None = None,
) -> None:
    """Writes the students' files, of one model.

    `setup` has the teacher's head, for methods that predict through connectors.
    """
    origin = provenance(folder, settings, "student")
    _files.claim(folder / FOLDER, FOLDER)
    for student in students:
        metadata = {"method": student.method, "seed": str(student.seed), **origin}
        connected = None
        if student.connectors is not None:
            assert setup is not None
            connected = Connected(student.method, setup, student.connectors, student.memory)
        file = folder / file_of(student.method)
        model_files.save(file, student.variables, about, metadata, connected)


def diverged(rows: Sequence[report.Row]) -> list[str]:
    """Notes on the methods whose students diverged."""
    return [
        f"{row.method} diverged: its logits are not finite, so it is ranked last."
        for row in rows
        if not np.isfinite(row.validation.mean)
    ]


def notes(rows: Sequence[TableLine], baseline: str | None) -> list[str]:
    """A note on the students' files and the recommended one, if there are any."""
    if (best := best_row(rows)) is None:
        return []
    with_file = [row for row in rows if "file" in row.settings]
    names = (f"{row.settings['file']} (seed {row.settings['file_seed']})" for row in with_file)
    files = ", ".join(names)
    recommendation = f"Recommended by validation: {best.settings['file']}"
    if best.method == baseline and len(with_file) > 1:
        recommendation += (
            ", the student trained alone: no method does better on the validation split"
        )
    return [
        f"{recommendation}. Each method's file holds its best seed by validation: {files}. Pass "
        "one, below the run's folder, to kdtl predict, evaluate or export."
    ]


def best_row(rows: Sequence[L]) -> L | None:
    """The row of the recommended file; None if no method has a file."""
    with_file = [row for row in rows if "file" in row.settings]
    index = scores.best([row.validation.mean for row in with_file])
    return None if index is None else with_file[index]
