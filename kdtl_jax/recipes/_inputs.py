"""What a trained model is used on: examples with or without labels, in the model's own classes."""

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
LOOKED_AT = 4096  # examples from which units are inferred


def source(value: Any) -> str | None:
    """`parse=` of a setting: a Python file with a name in it, or a Hugging Face folder."""
    is_folder = isinstance(value, str) and sources.is_hugging_face(value)
    return value if is_folder else _imports.checked(value)


@dataclass(frozen=True)
class Trained:
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
class Used(Trained):
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
    """Inputs `[N, ...]` as the model's file expects them, and their labels, if requested."""

    inputs: np.ndarray
    labels: np.ndarray | None
    said: str  # what was read, in words
    files: tuple[str, ...] = ()  # of every example, if each is its own file


def check_out(settings: Any) -> None:
    """Refuses, before any work, an `out` that cannot be written or already exists.

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
    for read in (settings.student, getattr(settings, "data", None), source):
        if read and out.exists() and os.path.exists(read) and out.samefile(read):
            raise UsageError(f"--out {out} is an input file. Name another one.")


def used(settings: Any, example: str, *, with_labels: bool) -> tuple[Model, Examples]:
    """The model that `Used` settings name, and the examples to run it on.

    Raises:
      UsageError: showing `example`, if the student or the data are not named.
    """
    if settings.student is None or settings.data is None:
        raise UsageError(f"name STUDENT and DATA, for example: {example}")
    model = model_of(settings)
    found = read(
        settings.data, model, part=settings.part, label=settings.label, with_labels=with_labels
    )
    return model, found


def model_of(settings: Any) -> Model:
    """The model of the settings; prints a note if its source file has changed.

    Raises:
      UsageError: if `model` is given and the file is not of that model.
    """
    known = model_files.about(settings.student).model
    shape = getattr(settings, "shape", None)
    if settings.model is None:
        return model_files.load(settings.student, shape=shape)
    held = known and (model_files.hugging_face_of(known) or known)
    if not held or Path(held).name != Path(settings.model).name:
        raise UsageError(f"--model: {settings.student} holds {known}, not {settings.model}.")
    text = settings.model
    if sources.is_hugging_face(text):
        model, text = sources.pretrained(text).module, f"{model_files.HUGGING_FACE}{text}"
        found = model_files.load(settings.student, model=model)
    else:
        model = _imports.imported(text)
        with _imports.at_work(text):
            found = model_files.load(settings.student, model=model)
        uses = (found.predict, found.outputs)
        predict, outputs = (_imports.neighborly(text, use) for use in uses)
        found = found._replace(predict=predict, outputs=outputs)
    _models.tell_changed(text, found.metadata)
    return found


def read(
    data: str, model: Model, *, part: str | None, label: str | None, with_labels: bool
) -> Examples:
    """The examples of some data, read in the model's way.

    Without `part`: everything in order if no labels are requested. With labels, the test part if
    the data has one, or if the model was trained on these same data and its run held one out;
    otherwise everything.

    Raises:
      UsageError: if the data has no such part.
      ValueError: if the data have other classes, another input shape, or other units (only a note
        if rows of a table are to be predicted).
    """
    form = model.about.preprocessing
    if not with_labels and part in (None, "all"):
        inputs, files, notices = datasets.read_unlabeled(data, form or _form_of_old(model))
        _tell(notices)
        checked_shape(data, inputs, model)
        why = _in_other_units(inputs, model)
        if why and inputs.ndim == 2:  # similar or extreme rows may be intended
            print(f"note: the model {why}", file=sys.stderr)
        elif why:
            raise ValueError(f"{data}: the model {why}")
        return Examples(inputs, None, f"{len(inputs)} examples", files)
    split = _split_of(model)
    label = label or split.label
    read_now = datasets.files_of(data, label=label, inputs=form and form.inputs)
    seen = record.made_from({"data": read_now}).files["data"] == model.metadata.get("data")
    held_out = seen and part != "all"  # else all rows stay in their order
    shares = split.shares if held_out else (0.0, 0.0)
    parts = datasets.read_splits(
        data,
        label=label,
        target="auto" if form is None else form.kind,
        preprocessing=form,
        validation=shares[0],
        test=shares[1],
        seed=split.seed,
    )
    _tell(parts.train.notices)
    chosen = part or ("test" if len(parts.test.labels) else "all")
    found = list(parts) if chosen == "all" else [getattr(parts, chosen)]
    found = [each for each in found if len(each.labels)]
    if not found:
        raise UsageError(f"--part {chosen}: {data} has no such part. Use --part all.")
    inputs = found[0].inputs
    if len(found) > 1:
        inputs = np.concatenate([each.inputs for each in found])
    checked_shape(data, inputs, model)
    if why := _in_other_units(inputs, model):
        raise ValueError(f"{data}: the model {why}")
    labels = np.concatenate([each.labels if form else in_classes_of(model, each) for each in found])
    scaling = None if form is None else form.target_scaling
    if scaling is not None and len(labels) >= _data.FEW:
        scaled = (labels - scaling.mean) / scaling.scale
        if why := _data.other_target_units(scaled, model.about.names):
            raise ValueError(f"{data}: the model {why}")
    said = f"{len(inputs)} examples" if chosen == "all" else f"{len(inputs)} {chosen} examples"
    if seen:
        said += ", of the data that the model was trained on"
    return Examples(inputs, labels, said)


class Split(NamedTuple):
    """How a run divided its data: the shares of validation and test, the seed, the label."""

    shares: tuple[float, float]
    seed: int
    label: str


def _split_of(model: Model) -> Split:
    """What a model's file says about its training data.

    Raises:
      ValueError: if that cannot be used.
    """
    try:
        known = json.loads(model.metadata.get("split", "{}"))
        validation, test = (float(known.get(name, 0)) for name in PARTS[1:])
        found = Split((validation, test), int(known.get("seed", 0)), known.get("label") or "label")
        if not (0 <= validation < 1 and 0 <= test < 1 and 0 <= found.seed < 2**32):
            raise ValueError("shares must be between 0 and 1")
        if not isinstance(found.label, str):
            raise ValueError("the label must be a name")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"the model's file does not say how its data were split ({_text.shown(str(error))})."
        ) from None
    return found


def _tell(notices: Sequence[str]) -> None:
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def checked_shape(data: str, inputs: np.ndarray, model: Model) -> None:
    """Refuses inputs that the model does not take, naming both shapes."""
    wanted = model.about.shape
    if wanted is not None and inputs.shape[1:] != wanted:
        raise ValueError(
            f"{data}: its examples are {list(inputs.shape[1:])}, but the model takes "
            f"{list(wanted)}."
        )


def _in_other_units(inputs: np.ndarray, model: Model) -> str | None:
    """`_data.other_units` of the first examples; not checked for a table of few rows."""
    scaling, form = model.about.scaling, model.about.preprocessing
    if scaling is None or (inputs.ndim == 2 and len(inputs) < _data.FEW):
        return None
    columns = [] if form is None else [column.name for column in form.columns]
    return _data.other_units((inputs[:LOOKED_AT] - scaling.mean) / scaling.scale, columns)


def in_classes_of(model: Model, data: Dataset) -> np.ndarray:
    """Labels in the model's numbering of classes.

    Raises:
      ValueError: naming a class that the model does not know.
    """
    names, own = data.class_names(), class_names(model)  # if the file does not say more
    place = {name: i for i, name in enumerate(own)}
    occurring = np.unique(data.labels)
    unknown = [names[i] for i in occurring if names[i] not in place]
    if unknown:
        listed = ", ".join(own[:8]) + (", …" if len(own) > 8 else "")
        raise ValueError(
            f"{data.name}: the model knows no class {unknown[0]!r}"
            f"{f' (nor {len(unknown) - 1} more)' if unknown[1:] else ''}. Its classes are {listed}."
        )
    return np.array([place.get(name, -1) for name in names], np.int32)[data.labels]


def class_names(model: Model) -> tuple[str, ...]:
    """A name for every class of a model."""
    return model.about.names or tuple(map(str, range(model.about.classes or 0)))


def kind(model: Model) -> datasets.Kind:
    """What a model predicts: one class, several labels at once, or numbers."""
    form = model.about.preprocessing
    return "classes" if form is None else form.kind


def _form_of_old(model: Model) -> datasets.Preprocessing:
    """For a file that does not say how its data are read: as arrays."""
    about = model.about
    return datasets.Preprocessing("classes", about.names, about.classes or 0, about.shape or ())
