"""Reading data: one entry point for everything that `FORMATS` lists.

splits = datasets.read_splits("photos/", image_size=(64, 64))
splits, preprocessing = datasets.prepared(splits)  # standardized by the training part
inputs = datasets.read_inputs("new/", preprocessing)  # later, without labels

Raises OSError if a file does not exist or cannot be read, and ValueError if there are no such data,
or their contents are not valid or not what a model reads.
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
from kdtl_jax.datasets._images import EncodedImages
from kdtl_jax.datasets._preprocessing import Preprocessing
from kdtl_jax.datasets._source import Choices, StoredPart
from kdtl_jax.datasets._splits import Splits, stratified, with_drawn_parts
from kdtl_jax.datasets._tables import ColumnTable, Missing
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
      target: the kind of targets; "auto" decides by the values.
      missing: how to fill a table's missing values, measured on the training part, or "drop" to
        leave such rows out; None makes them an error.
      one_hot: whether to turn text columns into one input per category; else they are an error.
      drop: columns of a table to leave out.
      image_size: (height, width) to resize images to, regardless of aspect ratio.
      validation: fraction of the training rows (of all rows, if there is no test part either).
      test: fraction of all rows, if there is no test part.
      seed: for drawing rows; parts keep the proportions of classes.
      preprocessing: a model's; inputs and targets are read as the model expects. It replaces the
        choices above, except that rows may be dropped and images resized to the model's size.
        Nothing is scaled.
    """
    if text == "digits":
        if drop or image_size is not None:
            raise ValueError(
                "digits: has no columns to leave out (--drop-columns) and no image files to resize "
                "(--image-size)."
            )
        if preprocessing is None and (inputs is not None or label != "label"):
            raise ValueError("digits: has no columns or arrays to choose (--inputs, --label).")
        data, like = digits(), _model_dataset(preprocessing)
        if target != "auto" or like is not None:
            data = from_arrays(data.name, data.inputs, data.labels, target=target, like=like)
        return stratified(data, validation=validation, test=test, seed=seed)
    path = _checks.path(text=text)
    if not path.exists():
        expected = "" if path.suffix else f" Expected {FORMATS}."  # a suffix means a file
        raise ValueError(f"{text}: no such file or folder.{expected}")
    choices = Choices(label, inputs, missing, tuple(drop), image_size, one_hot)
    choices = _for_model(choices, target, preprocessing)
    stored = sources(path, choices)
    first = stored.get("train") or stored["whole"]._replace(name=path.name)
    train = _number_targets(first, target, _model_dataset(preprocessing))
    others = {p: _number_targets(stored[p], target, train) for p in PARTS[1:] if p in stored}
    splits = with_drawn_parts(train, others, validation, test, seed)
    origins = [first, *(stored.get(part, first) for part in PARTS[1:])]
    parts, notices = _encode_parts(preprocessing, choices, origins, splits)
    train = parts[0]
    notices = (*first.notices, *train.notices, *notices, *_input_notices(stored, train.form))
    shapes = [part.inputs.shape[1:] for part in parts]
    if len(set(shapes)) > 1:
        raise ValueError(f"{path}: parts have examples of different shapes, {shapes}.")
    parts[0] = train._replace(notices=tuple(dict.fromkeys(notices)))
    return Splits(*(part._replace(name=path.name) for part in parts))


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
    """Reads all parts of the data at a path as one `Dataset`, the training part first.

    Args:
      path: as for `read_splits`, or the idx file of images.
      labels: the idx file of labels; only for idx.
      label, inputs, target, missing, one_hot, drop, image_size: as for `read_splits`.
      classes: number of classes, as in `checked`; None numbers the labels that occur.
      preprocessing: a model's; inputs and targets are read as the model expects. Nothing is scaled.
    """
    path = _checks.path(path=path)
    choices = Choices(label, inputs, missing, tuple(drop), image_size, one_hot)
    choices = _for_model(choices, target, preprocessing)
    if labels is not None and not (path.is_dir() or path.suffix):
        images = _source.with_channels(read_idx_array(path))
        stored = [StoredPart(str(path), images, read_idx_array(labels))]
    else:
        stored = _training_first(sources(path, choices))
    first = _number_targets(stored[0], target, _model_dataset(preprocessing), classes)
    parts = [first, *(_number_targets(source, target, first) for source in stored[1:])]
    parts, notices = _encode_parts(preprocessing, choices, stored, parts)
    data = parts[0]
    notices = (*(n for source in stored for n in source.notices), *data.notices, *notices)
    if len(parts) > 1:
        data = data._replace(
            inputs=np.concatenate([part.inputs for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        )
    return data._replace(notices=tuple(dict.fromkeys(notices)))


def read_inputs(path: str | Path, preprocessing: Preprocessing) -> np.ndarray:
    """Reads unscaled inputs `[N, ...]` for a model, from data with or without targets.

    Args:
      path: anything that `read_splits` takes (columns and arrays of targets are ignored), or one
        `.npy` array, one idx file of images, one image, or a folder of images.
      preprocessing: the model's.
    """
    return read_unlabeled(path, preprocessing).inputs


class Unlabeled(NamedTuple):
    """Inputs without targets."""

    inputs: np.ndarray  # [N, ...]
    files: tuple[str, ...] = ()  # of every input, if each is its own file
    notices: tuple[str, ...] = ()  # such as unknown categories


def read_unlabeled(path: str | Path, preprocessing: Preprocessing) -> Unlabeled:
    """As `read_inputs`, with the files that the inputs come from, and notices."""
    if str(path) == "digits":
        return Unlabeled(digits().inputs)
    choices = Choices(
        inputs=preprocessing.inputs,
        with_targets=False,
        targets=preprocessing.targets,
        model=preprocessing,
    )
    stored = sources(_checks.path(path=path), choices)
    ordered = _training_first(stored)
    parts = [_encode_inputs(source, None, preprocessing) for source in ordered]
    inputs = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if not len(inputs):
        raise ValueError(f"{path}: holds no examples.")
    _source.check_shape(str(path), inputs.shape, preprocessing)
    pictures = [source.inputs for source in ordered if isinstance(source.inputs, EncodedImages)]
    files = [file for part in pictures for file in part.files if isinstance(file, Path)]
    names = tuple(map(str, files)) if len(files) == len(inputs) else ()
    return Unlabeled(inputs, names, tuple(_input_notices(stored, preprocessing)))


def _training_first(stored: dict[str, StoredPart]) -> list[StoredPart]:
    """The parts in order: the undivided data or the training part comes first."""
    return [stored[part] for part in ("whole", *PARTS) if part in stored]


def _for_model(choices: Choices, target: Target, preprocessing: Preprocessing | None) -> Choices:
    """The choices, checked; with a model, what it does not determine."""
    if choices.missing is not None and choices.missing not in _tables.MISSING:
        raise ValueError(
            f"missing must be one of {', '.join(_tables.MISSING)}, got {choices.missing!r:.40}."
        )
    is_labels = target == "labels"
    if preprocessing is None:
        return choices._replace(allow_unlabeled=is_labels)
    if not isinstance(preprocessing, Preprocessing):
        raise TypeError(
            "preprocessing must be a model's Preprocessing (datasets.prepared returns it), got "
            f"{type(preprocessing).__name__}."
        )
    is_default = choices.label == "label" and preprocessing.targets
    return Choices(
        ",".join(preprocessing.targets) if is_default else choices.label,
        choices.inputs or preprocessing.inputs,
        "drop" if preprocessing.leaves_out else choices.missing,
        image_size=choices.image_size,
        allow_unlabeled=is_labels or preprocessing.kind == "labels",
        model=preprocessing,
    )


def _model_dataset(preprocessing: Preprocessing | None) -> Dataset | None:
    """An empty `Dataset` with a model's classes; None if the model has none."""
    if preprocessing is None or not preprocessing.outputs:
        return None
    empty = np.zeros(0, np.float32)
    outputs, names = preprocessing.outputs, preprocessing.names
    return Dataset("the model", empty, empty, outputs, names, form=preprocessing)


def _number_targets(
    source: StoredPart, target: Target, like: Dataset | None, classes: int | None = None
) -> Dataset:
    """A part with numbered classes; inputs that are not arrays yet stand as row numbers."""
    inputs = source.inputs
    if not isinstance(inputs, np.ndarray):
        inputs = np.zeros((inputs.size, 1), np.float32)
    data = from_arrays(
        source.name,
        inputs,
        source.targets,
        target=target,
        classes=classes,
        like=like,
        names=source.names,
        decimal_comma=source.decimal_comma,
    )
    if data.kind != "classes" and not data.names and len(source.columns) == data.classes:
        data = data._replace(names=source.columns)
    if not isinstance(source.inputs, np.ndarray):
        data = data._replace(inputs=np.arange(len(inputs)))
    return data


def _encode_parts(
    preprocessing: Preprocessing | None,
    choices: Choices,
    stored: Sequence[StoredPart],
    parts: Sequence[Dataset],
) -> tuple[list[Dataset], list[str]]:
    """The parts with encoded inputs, as a model takes them or as the training part decides.

    The form of each records which targets were read. Also returns notices about the form.
    """
    if preprocessing is None:
        form, notices = _fit_form(stored[0], parts[0], choices)
    else:
        form, notices = _model_form(preprocessing, choices, stored), []
    encoded = []
    for source, part in zip(stored, parts, strict=True):
        inputs = part.inputs  # or rows
        if not isinstance(source.inputs, np.ndarray):
            inputs = _encode_inputs(source, inputs, form)
        part_form = form._replace(kind=part.kind, targets=source.columns or form.targets)
        encoded.append(part._replace(inputs=inputs, form=part_form))
    return encoded, notices


def _model_form(
    preprocessing: Preprocessing, choices: Choices, stored: Sequence[StoredPart]
) -> Preprocessing:
    """A model's form with the user's choices: rows dropped, images resized to its size."""
    images = preprocessing.images
    if choices.image_size is not None:
        for source in stored:
            if images is None or not isinstance(source.inputs, EncodedImages):
                _check_no_resizing(source.name, choices)
        height, width = preprocessing.shape[:2]
        if choices.image_size != (height, width):
            raise ValueError(
                f"image_size must be that of the model, {(height, width)}, got "
                f"{choices.image_size}. Leave it out, or give the model's."
            )
        assert images is not None
        images = images._replace(resize=True)
    return preprocessing._replace(images=images, leaves_out=choices.missing == "drop")


def _fit_form(
    source: StoredPart, train: Dataset, choices: Choices
) -> tuple[Preprocessing, list[str]]:
    """The form of a training part, except for the scaling."""
    form = Preprocessing(
        train.kind,
        train.names,
        train.classes,
        targets=source.columns,
        inputs=choices.inputs,
        leaves_out=choices.missing == "drop",
    )
    if isinstance(source.inputs, ColumnTable):
        _check_no_resizing(source.name, choices)
        columns = _columns.columns_of(
            source.inputs, train.inputs, missing=choices.missing, one_hot=choices.one_hot
        )
        width = sum(len(column.categories) or 1 for column in columns)
        notices = _columns.amounts_read(source.inputs, columns)
        return form._replace(columns=columns, shape=(width,)), notices
    if isinstance(source.inputs, EncodedImages):
        images, shape, notices = _images.array_form(source.inputs, train.inputs, choices.image_size)
        return form._replace(images=images, shape=shape), notices
    _check_no_resizing(source.name, choices)
    return form._replace(shape=train.inputs.shape[1:]), []


def _check_no_resizing(name: str, choices: Choices) -> None:
    if choices.image_size is not None:
        raise ValueError(
            f"{name}: holds no image files, and only those are resized (--image-size)."
        )


def _encode_inputs(source: StoredPart, rows: np.ndarray | None, form: Preprocessing) -> np.ndarray:
    """The inputs of some rows, or of all."""
    inputs = source.inputs
    if isinstance(inputs, ColumnTable):
        _source.check_columns(source.name, tuple(inputs.columns), form)
        table = inputs if rows is None else inputs.take(rows)
        return finite_numbers(source.name, _columns.encode(table, form.columns))
    if isinstance(inputs, EncodedImages):
        _source.check_images(source.name, form)
        assert form.images is not None
        rows = np.arange(inputs.size) if rows is None else rows
        return _images.decode_images(inputs, rows, form.images, form.shape)
    return finite_numbers(source.name, inputs if rows is None else inputs[rows])


def _input_notices(stored: dict[str, StoredPart], form: Preprocessing) -> list[str]:
    """Notices about categories that are new to the model, and about inputs without names."""
    inputs = [source.inputs for source in stored.values()]
    notices = [
        notice
        for table in inputs
        if isinstance(table, ColumnTable)
        for notice in _columns.unknown_categories(table, form.columns)
    ]
    if form.columns and any(isinstance(part, np.ndarray) for part in inputs):
        names = ", ".join(column.name for column in form.columns)
        notices.append(
            f"inputs have no column names: they are taken for {names:.200} in this order"
        )
    return notices
