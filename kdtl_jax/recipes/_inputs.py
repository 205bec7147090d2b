"""Loading a trained model, and the examples to run it on, with labels in the model's classes."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kdtl_jax import _files, _text, datasets
from kdtl_jax.datasets import Dataset
from kdtl_jax.interop import model_files, sources
from kdtl_jax.interop.model_files import Model
from kdtl_jax.recipes import _data, _imports, _models
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import record

PARTS = ("train", "validation", "test")
UNIT_EXAMPLES = 4096  # examples from which units are inferred


def source(value: Any) -> str | None:
    """`parse=` of a setting: `FILE.py:NAME`, or a Hugging Face folder."""
    is_folder = isinstance(value, str) and sources.is_hugging_face(value)
    return value if is_folder else _imports.checked(value)


@dataclass(frozen=True)
class TrainedModelSettings:
    """The settings that name a trained model."""

    student: str | None = setting(
        None, "a model's file, such as students/kd.safetensors of a run", positional=True
    )
    model: str | None = setting(
        None, "the source of your own model, as FILE.py:NAME (only this file and its imports run), "
        "or the Hugging Face folder that the model comes from", metavar="FILE.py:NAME",
        parse=source,
    )  # fmt: skip


@dataclass(frozen=True)
class Used(TrainedModelSettings):
    """The settings of a command that uses a trained model on data."""

    part: Literal["all", "train", "validation", "test"] | None = setting(
        None, "part of the data; default: test if the data has one, else all"
    )
    label: str | None = setting(
        None, "a CSV's label column; default: the one that the model was trained with",
        metavar="COLUMN",
    )  # fmt: skip


@dataclass(frozen=True)
class Written:
    """The setting of a command that can replace a file."""

    force: bool = setting(False, "replace the file --out if it exists")


class Examples(NamedTuple):
    """Inputs `[N, ...]` preprocessed for the model, and their labels, if requested."""

    inputs: np.ndarray
    labels: np.ndarray | None
    description: str  # what was read
    files: tuple[str, ...] = ()  # one per example, if each is a file


def check_out(settings: Any) -> None:
    """Rejects, before any work, an `out` that cannot be written or already exists.

    Raises:
      FileExistsError: if it is a file and `--force` is not given, or if it is not a file.
      UsageError: if `out` is one of the input files.
      FileNotFoundError: if its folder does not exist.
    """
    if settings.out is None:
        return
    out = Path(settings.out)
    _files.check_place(out)
    if out.exists() and not settings.force:
        raise FileExistsError(f"--out {out} exists. Name another file, or pass --force.")
    source = (settings.model or "").rpartition(":")[0]  # of FILE.py:NAME
    for path in (settings.student, getattr(settings, "data", None), source):
        if path and out.exists() and os.path.exists(path) and out.samefile(path):
            raise UsageError(f"--out {out} is an input file. Name another one.")


def load(settings: Any, example: str, *, with_labels: bool) -> tuple[Model, Examples]:
    """Loads the model of `Used` settings, and the examples to run it on.

    Raises:
      UsageError: showing `example`, if the student or the data are not named.
    """
    if settings.student is None or settings.data is None:
        raise UsageError(f"name STUDENT and DATA, for example: {example}")
    model = model_of(settings)
    examples = read_examples(
        settings.data, model, part=settings.part, label=settings.label, with_labels=with_labels
    )
    return model, examples


def model_of(settings: Any) -> Model:
    """Loads the model of the settings; prints a note if its source file has changed.

    Raises:
      UsageError: if `model` is given and the file is not of that model.
    """
    trained_name = model_files.about(settings.student).model
    shape = getattr(settings, "shape", None)
    if settings.model is None:
        return model_files.load(settings.student, shape=shape)
    name = trained_name and (model_files.hugging_face_of(trained_name) or trained_name)
    if not name or Path(name).name != Path(settings.model).name:
        raise UsageError(f"--model: {settings.student} holds {trained_name}, not {settings.model}.")
    text = settings.model
    if sources.is_hugging_face(text):
        model, text = sources.pretrained(text).module, f"{model_files.HUGGING_FACE}{text}"
        loaded = model_files.load(settings.student, model=model)
    else:
        model = _imports.imported(text)
        with _imports.importing(text):
            loaded = model_files.load(settings.student, model=model)
        functions = (loaded.predict, loaded.outputs)
        predict, outputs = (_imports.run_in_folder(text, use) for use in functions)
        loaded = loaded._replace(predict=predict, outputs=outputs)
    _models.note_changed(text, loaded.metadata)
    return loaded


def read_examples(
    data: str, model: Model, *, part: str | None, label: str | None, with_labels: bool
) -> Examples:
    """Reads examples with the model's preprocessing.

    The default `part` without labels is everything, in order. With labels, it is the test part if
    the data has one, or if the model was trained on this data and its run held one out; otherwise
    everything.

    Raises:
      UsageError: if the data has no such part.
      ValueError: if the data has other classes, another input shape, or other units (only a note
        for rows of a table without labels).
    """
    form = model.about.preprocessing
    if not with_labels and part in (None, "all"):
        classes, shape = model.about.classes or 0, model.about.shape or ()
        # A file that records no preprocessing is for arrays.
        arrays = datasets.Preprocessing("classes", model.about.names, classes, shape)
        preprocessing = form or arrays
        inputs, files, notices = datasets.read_unlabeled(data, preprocessing)
        _print_notices(notices)
        check_shape(data, inputs, model)
        problem = _unit_problem(inputs, model)
        if problem and inputs.ndim == 2:  # these rows may be similar or extreme on purpose
            print(f"note: the model {problem}", file=sys.stderr)
        elif problem:
            raise ValueError(f"{data}: the model {problem}")
        return Examples(inputs, None, f"{len(inputs)} examples", files)
    shares, seed, label_of_run = _split_of(model)
    label = label or label_of_run
    data_files = datasets.files_of(data, label=label, inputs=form and form.inputs)
    digest = record.made_from({"data": data_files}).files["data"]
    is_training_data = digest == model.metadata.get("data")
    if part == "all" or not is_training_data:  # all rows stay in their order
        shares = 0.0, 0.0
    parts = datasets.read_splits(
        data,
        label=label,
        target="auto" if form is None else form.kind,
        preprocessing=form,
        validation=shares[0],
        test=shares[1],
        seed=seed,
    )
    _print_notices(parts.train.notices)
    chosen = part or ("test" if len(parts.test.labels) else "all")
    chosen_parts = list(parts) if chosen == "all" else [getattr(parts, chosen)]
    chosen_parts = [x for x in chosen_parts if len(x.labels)]
    if not chosen_parts:
        raise UsageError(f"--part {chosen}: {data} has no such part. Use --part all.")
    inputs = chosen_parts[0].inputs
    if len(chosen_parts) > 1:
        inputs = np.concatenate([x.inputs for x in chosen_parts])
    check_shape(data, inputs, model)
    if problem := _unit_problem(inputs, model):
        raise ValueError(f"{data}: the model {problem}")
    labels = np.concatenate([p.labels if form else in_classes_of(model, p) for p in chosen_parts])
    scaling = None if form is None else form.target_scaling
    if scaling is not None and len(labels) >= _data.FEW_ROWS:
        scaled = (labels - scaling.mean) / scaling.scale
        if problem := _data.other_target_units(scaled, model.about.names):
            raise ValueError(f"{data}: the model {problem}")
    description = f"{len(inputs)} {'' if chosen == 'all' else f'{chosen} '}examples"
    if is_training_data:
        description += ", of the data that the model was trained on"
    return Examples(inputs, labels, description)


def _split_of(model: Model) -> tuple[tuple[float, float], int, str]:
    """The split of the model's training data: shares of validation and test, seed, label.

    Raises:
      ValueError: if the file's record is invalid.
    """
    try:
        fields = json.loads(model.metadata.get("split", "{}"))
        validation, test = (float(fields.get(name, 0)) for name in PARTS[1:])
        seed, label = int(fields.get("seed", 0)), fields.get("label") or "label"
        if not (0 <= validation < 1 and 0 <= test < 1 and 0 <= seed < 2**32):
            raise ValueError("shares must be between 0 and 1")
        if not isinstance(label, str):
            raise ValueError("the label must be a name")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"the model's file does not say how its data were split ({_text.shown(str(error))})."
        ) from None
    return (validation, test), seed, label


def _print_notices(notices: Sequence[str]) -> None:
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def check_shape(data: str, inputs: np.ndarray, model: Model) -> None:
    """Raises ValueError for inputs of a shape that the model does not take."""
    expected = model.about.shape
    if expected is not None and inputs.shape[1:] != expected:
        raise ValueError(
            f"{data}: its examples are {list(inputs.shape[1:])}, but the model takes "
            f"{list(expected)}."
        )


def _unit_problem(inputs: np.ndarray, model: Model) -> str | None:
    """`_data.other_units` of the first examples; None for a table of few rows."""
    scaling, form = model.about.scaling, model.about.preprocessing
    if scaling is None or (inputs.ndim == 2 and len(inputs) < _data.FEW_ROWS):
        return None
    columns = [] if form is None else [column.name for column in form.columns]
    return _data.other_units((inputs[:UNIT_EXAMPLES] - scaling.mean) / scaling.scale, columns)


def in_classes_of(model: Model, data: Dataset) -> np.ndarray:
    """Labels as indices of the model's classes.

    Raises:
      ValueError: naming a class that the model does not have.
    """
    names, classes = data.class_names(), class_names(model)
    index = {name: i for i, name in enumerate(classes)}
    occurring = np.unique(data.labels)
    unknown = [names[i] for i in occurring if names[i] not in index]
    if unknown:
        listed = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
        raise ValueError(
            f"{data.name}: the model knows no class {unknown[0]!r}"
            f"{f' (nor {len(unknown) - 1} more)' if unknown[1:] else ''}. Its classes are {listed}."
        )
    return np.array([index.get(name, -1) for name in names], np.int32)[data.labels]


def class_names(model: Model) -> tuple[str, ...]:
    """A name for every class of a model."""
    return model.about.names or tuple(map(str, range(model.about.classes or 0)))


def target_kind(model: Model) -> datasets.Kind:
    """What a model predicts: one class, several labels at once, or numbers."""
    form = model.about.preprocessing
    return "classes" if form is None else form.kind
