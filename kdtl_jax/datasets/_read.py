"""Reading data: one entry point for everything that `FORMATS` lists.

splits = datasets.read_splits("photos/", image_size=(64, 64))
splits, preprocessing = datasets.prepared(splits)  # standardized by the training part
inputs = datasets.read_inputs("new/", preprocessing)  # later, without labels
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdtl_jax import _checks
from kdtl_jax.datasets import _columns, _images, _source, _tables
from kdtl_jax.datasets._dataset import Dataset, digits, finite_numbers
from kdtl_jax.datasets._formats import FORMATS, sources
from kdtl_jax.datasets._idx import read_idx_array
from kdtl_jax.datasets._images import Pictures
from kdtl_jax.datasets._preprocessing import Preprocessing
from kdtl_jax.datasets._source import Choices, Source
from kdtl_jax.datasets._splits import Splits, drawn, stratified
from kdtl_jax.datasets._tables import Missing, Table
from kdtl_jax.datasets._targets import Target, from_arrays

PARTS = Splits._fields


def read_splits(
    text: str,
    *,
    label: str = "label",
    inputs: str | None = None,
    target: Target = "auto",
    missing: Missing | None = None,
    one_hot: bool = False,
    drop: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    validation: float = 0.2,
    test: float = 0.3,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> Splits:
    """Reads train, validation and test parts of the data.

    Args:
      text: `digits`, or a file or folder of any kind in `FORMATS`.
      label: the label column, or several separated by commas; or the array of labels.
      inputs: the array of inputs, or a column of images; None means the usual names.
      target: what the targets are; "auto" decides by the values.
      missing: what replaces a table's missing values, measured on the training part, or "drop" to
        leave such rows out; None makes them an error.
      one_hot: whether to turn text columns into one input per category; else they are an error.
      drop: columns of a table to leave out.
      image_size: (height, width) to resize images to, regardless of aspect ratio.
      validation: fraction of the training rows (of all rows, if there is no test part either).
      test: fraction of all rows, if there is no test part.
      seed: for drawing rows; parts keep the proportions of classes.
      preprocessing: of a model; inputs and targets are read as it expects. Its choices replace
        those above, except that rows may be dropped and images resized to its size. Nothing is
        scaled.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if there is no such data, or its contents are not valid.
    """
    if text == "digits":
        if drop or image_size is not None:
            raise ValueError(
                "digits: has no columns to leave out (--drop-columns) and no image files to resize "
                "(--image-size)."
            )
        whole, like = digits(), _model(preprocessing)
        if target != "auto" or like is not None:
            whole = from_arrays(whole.name, *whole[1:3], target=target, like=like)
        return stratified(whole, validation=validation, test=test, seed=seed)
    path = _checks.path(text=text)
    if not path.exists():
        known = "" if path.suffix else f" Expected {FORMATS}."  # a name with an end means a file
        raise ValueError(f"{text}: no such file or folder.{known}")
    choices = _choices(label, inputs, target, missing, one_hot, drop, image_size, preprocessing)
    found = sources(path, choices)
    first = found.get("train") or found["whole"]._replace(name=path.name)
    like = _model(preprocessing)
    train = _numbered(first, target, like)
    given = {part: _numbered(found[part], target, train) for part in PARTS[1:] if part in found}
    parts = drawn(train, given.get("validation"), given.get("test"), validation, test, seed)
    origins = [first, *(found[p] if p in given else first for p in PARTS[1:])]
    form, notices = _given_form(preprocessing, choices), []
    if form is None:
        form, notices = _form(first, parts.train, choices)
    made = [
        _encoded(origin, part, form)._replace(name=path.name)
        for origin, part in zip(origins, parts, strict=True)
    ]
    notices += _unknown(found, form)
    told = (*first.notices, *made[0].notices, *notices)
    shapes = [part.inputs.shape[1:] for part in made]
    if len(set(shapes)) > 1:
        raise ValueError(f"{path}: parts have examples of different shapes, {shapes}.")
    return Splits(made[0]._replace(notices=tuple(dict.fromkeys(told))), *made[1:])


def read(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    label: str = "label",
    inputs: str | None = None,
    target: Target = "auto",
    missing: Missing | None = None,
    one_hot: bool = False,
    drop: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    classes: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """Everything that a path holds as one `Dataset`: all of its parts, the training part first.

    Args:
      path: as for `read_splits`, or the idx file of images.
      labels: the idx file of labels; only for idx.
      label: as for `read_splits`.
      inputs: as for `read_splits`.
      target: as for `read_splits`.
      missing: as for `read_splits`.
      one_hot: as for `read_splits`.
      drop: as for `read_splits`.
      image_size: as for `read_splits`.
      classes: number of classes, as in `checked`; None numbers the labels that occur.
      preprocessing: of a model; inputs and targets are read as it expects. Nothing is scaled.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if its contents are not valid.
    """
    path = _checks.path(path=path)
    choices = _choices(label, inputs, target, missing, one_hot, drop, image_size, preprocessing)
    found = _idx_pair(path, labels) or sources(path, choices)
    like = _model(preprocessing)
    named = _in_order(found)
    first = _numbered(named[0], target, like, classes)
    parts = [first, *(_numbered(source, target, first) for source in named[1:])]
    form, notices = _given_form(preprocessing, choices), []
    if form is None:
        form, notices = _form(named[0], first, choices)
    made = [_encoded(source, part, form) for source, part in zip(named, parts, strict=True)]
    whole = together = made[0]
    if len(made) > 1:
        all_inputs, all_labels = (
            np.concatenate(x) for x in zip(*(part[1:3] for part in made), strict=True)
        )
        together = whole._replace(inputs=all_inputs, labels=all_labels)
    told = (*(note for source in named for note in source.notices), *whole.notices, *notices)
    return together._replace(notices=tuple(dict.fromkeys(told)))


def read_inputs(path: str | Path, preprocessing: Preprocessing) -> np.ndarray:
    """Inputs `[N, ...]` as a model reads them, from data with or without targets, unscaled.

    Args:
      path: anything that `read_splits` takes (columns and arrays of targets are ignored), or one
        `.npy` array, one idx file of images, one image, or a folder of images.
      preprocessing: the model's.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if its contents are not what the model reads.
    """
    return read_unlabeled(path, preprocessing).inputs


class Unlabeled(NamedTuple):
    """Inputs without targets."""

    inputs: np.ndarray  # [N, ...]
    files: tuple[str, ...] = ()  # of every input, if each is its own file
    notices: tuple[str, ...] = ()  # such as unknown categories


def read_unlabeled(path: str | Path, preprocessing: Preprocessing) -> Unlabeled:
    """`read_inputs`, with the files that the inputs come from, and notices.

    Raises:
      ValueError: if the files cannot be read, hold no examples, or do not fit what the model was
        trained on.
    """
    if str(path) == "digits":
        return Unlabeled(digits().inputs)
    choices = Choices(
        inputs=preprocessing.inputs,
        with_targets=False,
        targets=preprocessing.targets,
        takes=preprocessing,
    )
    found = sources(_checks.path(path=path), choices)
    made = [_inputs(source, None, preprocessing) for source in _in_order(found)]
    inputs = made[0] if len(made) == 1 else np.concatenate(made)
    if not len(inputs):
        raise ValueError(f"{path}: holds no examples.")
    _source.check_shape(str(path), inputs.shape, preprocessing)
    pictures = [s.inputs for s in _in_order(found) if isinstance(s.inputs, Pictures)]
    files = [file for each in pictures for file in each.files if isinstance(file, Path)]
    named = tuple(map(str, files)) if len(files) == len(inputs) else ()
    return Unlabeled(inputs, named, tuple(_unknown(found, preprocessing)))


def _in_order(found: dict[str, Source]) -> list[Source]:
    """The training part, or what replaces it, first."""
    return [found[part] for part in ("whole", *PARTS) if part in found]


def _choices(
    label: str,
    inputs: str | None,
    target: Target,
    missing: Missing | None,
    one_hot: bool,
    drop: Sequence[str],
    image_size: tuple[int, int] | None,
    preprocessing: Preprocessing | None,
) -> Choices:
    if missing is not None and missing not in _tables.MISSING:
        raise ValueError(
            f"missing must be one of {', '.join(_tables.MISSING)}, got {missing!r:.40}."
        )
    if preprocessing is None:
        is_labels = target == "labels"
        return Choices(
            label, inputs, missing, tuple(drop), image_size, one_hot, may_be_none=is_labels
        )
    if not isinstance(preprocessing, Preprocessing):
        raise TypeError(
            "preprocessing must be a model's Preprocessing (datasets.prepared returns it), got "
            f"{type(preprocessing).__name__}."
        )
    if label == "label" and preprocessing.targets:
        label = ",".join(preprocessing.targets)
    missing = "drop" if preprocessing.leaves_out else missing
    is_labels = "labels" in (target, preprocessing.kind)
    return Choices(
        label,
        inputs or preprocessing.inputs,
        missing,
        image_size=image_size,
        may_be_none=is_labels,
        takes=preprocessing,
    )


def _model(preprocessing: Preprocessing | None) -> Dataset | None:
    """An empty part that has a model's classes; None where it has none of its own."""
    if preprocessing is None or not preprocessing.outputs:
        return None
    nothing = np.zeros(0, np.float32)
    outputs, names = preprocessing.outputs, preprocessing.names
    return Dataset("the model", nothing, nothing, outputs, names, form=preprocessing)


def _idx_pair(path: Path, labels: str | Path | None) -> dict[str, Source]:
    if labels is not None and not (path.is_dir() or path.suffix):
        inputs = _source.with_channels(read_idx_array(path))
        return {"whole": Source(str(path), inputs, read_idx_array(labels))}
    return {}


def _numbered(
    source: Source, target: Target, like: Dataset | None, classes: int | None = None
) -> Dataset:
    """The targets of a part; its inputs are rows of the source if they still have to be encoded."""
    inputs = source.inputs
    if not isinstance(inputs, np.ndarray):
        inputs = np.zeros((inputs.size, 1), np.float32)
    made = from_arrays(
        source.name, inputs, source.targets, target=target, classes=classes, like=like,
        names=source.names, decimal_comma=source.decimal_comma,
    )  # fmt: skip
    if made.kind != "classes" and not made.names and len(source.columns) == made.classes:
        made = made._replace(names=source.columns)
    if not isinstance(source.inputs, np.ndarray):
        made = made._replace(inputs=np.arange(len(inputs)))
    return made


def _given_form(preprocessing: Preprocessing | None, choices: Choices) -> Preprocessing | None:
    """A model's form, with the user's choices: rows left out, images resized to its size."""
    if preprocessing is None:
        return None
    images = preprocessing.images
    if images is not None and choices.image_size == preprocessing.shape[:2]:
        images = images._replace(resize=True)
    return preprocessing._replace(images=images, leaves_out=choices.missing == "drop")


def _form(source: Source, train: Dataset, choices: Choices) -> tuple[Preprocessing, list[str]]:
    """How this training part is read, except for the scaling."""
    form = Preprocessing(
        train.kind, train.names, train.classes, targets=source.columns,
        inputs=choices.inputs, leaves_out=choices.missing == "drop",
    )  # fmt: skip
    if isinstance(source.inputs, Table):
        _check_not_resized(source.name, choices)
        columns = _columns.columns_of(
            source.inputs, train.inputs, missing=choices.missing, one_hot=choices.one_hot
        )
        width = sum(len(column.categories) or 1 for column in columns)
        notices = _columns.amounts_read(source.inputs, columns)
        return form._replace(columns=columns, shape=(width,)), notices
    if isinstance(source.inputs, Pictures):
        images, shape, notices = _images.form_of(source.inputs, train.inputs, choices.image_size)
        return form._replace(images=images, shape=shape), notices
    _check_not_resized(source.name, choices)
    return form._replace(shape=train.inputs.shape[1:]), []


def _check_not_resized(name: str, choices: Choices) -> None:
    if choices.image_size is not None:
        raise ValueError(
            f"{name}: holds no image files, and only those are resized (--image-size)."
        )


def _encoded(source: Source, part: Dataset, form: Preprocessing) -> Dataset:
    """A part with its inputs in place of rows; its form records which targets were read."""
    inputs = part.inputs
    if not isinstance(source.inputs, np.ndarray):
        inputs = _inputs(source, inputs, form)
    read = form._replace(kind=part.kind, targets=source.columns or form.targets)
    return part._replace(inputs=inputs, form=read)


def _inputs(source: Source, rows: np.ndarray | None, form: Preprocessing) -> np.ndarray:
    """The inputs of some rows, or of all."""
    found = source.inputs
    if isinstance(found, Table):
        _source.check_columns(source.name, tuple(found.columns), form)
        table = found if rows is None else found.take(rows)
        return finite_numbers(source.name, _columns.encoded(table, form.columns))
    if isinstance(found, Pictures):
        _source.check_pictures(source.name, form)
        assert form.images is not None
        rows = np.arange(found.size) if rows is None else rows
        return _images.decoded(found, rows, form.images, form.shape)
    return finite_numbers(source.name, found if rows is None else found[rows])


def _unknown(found: dict[str, Source], form: Preprocessing) -> list[str]:
    """Notices about inputs that a model, or the training part, may not know."""
    inputs = [source.inputs for source in found.values()]
    notes = [
        note
        for table in inputs
        if isinstance(table, Table)
        for note in _columns.unknown_categories(table, form.columns)
    ]
    if form.columns and any(isinstance(each, np.ndarray) for each in inputs):
        listed = ", ".join(column.name for column in form.columns)
        notes.append(f"inputs have no column names: they are taken for {listed:.200} in this order")
    return notes
