"""Reading data for a model, and checking that classes, columns and units match its file."""

import contextlib
import sys
from collections.abc import Sequence

import numpy as np

from kdtl_jax import _text
from kdtl_jax.datasets import (
    Dataset,
    Preprocessing,
    Splits,
    Standardizer,
    prepared,
    read_splits,
    scaled,
    summary,
)
from kdtl_jax.interop import sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.interop.sources import Source
from kdtl_jax.recipes.settings import Data, UsageError

UNITS = 20.0  # a scaled deviation off by this factor means other units
FEW_ROWS = 20  # with fewer, the units of a column cannot be judged


def read_data(
    settings: Data, source: Source, *, other_targets: bool = False
) -> tuple[Splits, Preprocessing]:
    """Reads data, scaled as the source records or by the training part; returns the preprocessing.

    Prints a summary of the data and what looks wrong.

    Args:
      settings: of the data.
      source: of the model.
      other_targets: whether the targets may differ from the source's; inputs may not.

    Raises:
      UsageError: if settings contradict the source.
      ValueError: if the source has other classes, inputs or units.
    """
    path, about = source.path, source.about
    check_choices(settings, path, about)
    recorded = reading = about.preprocessing
    if recorded is not None and (other_targets or recorded.kind == "classes"):
        reading = recorded._replace(outputs=0, names=())  # its classes are compared below
    if reading is not None and other_targets:
        reading = reading._replace(target_scaling=None)
    raw = read_splits(
        settings.data,
        label=settings.label,
        inputs=settings.inputs,
        target=settings.target,
        missing=settings.missing,
        one_hot=settings.text_columns is not None,
        drop=settings.drop_columns,
        image_size=settings.image_size,
        preprocessing=reading,
        validation=settings.validation,
        test=settings.test,
        seed=settings.split_seed,
    )
    for line in summary(raw):
        print(line, file=sys.stderr)
    if recorded is not None and recorded.kind != raw.train.kind and not other_targets:
        raise ValueError(
            f"{path} learned {recorded.kind}, but the targets of the data are {raw.train.kind}."
        )
    if path is not None and sources.is_hugging_face(path):
        check_folder(path, raw.train, other_targets=other_targets)
    raw = in_classes_of(path, about, raw)
    if about.shape not in (None, raw.train.inputs.shape[1:]):
        raise ValueError(
            f"{path} takes inputs {list(about.shape or ())}, but the data's examples are "
            f"{list(raw.train.inputs.shape[1:])}."
        )
    if path is not None and about.scaling is None:
        print(
            f"note: {path} does not say how its inputs were scaled: they are standardized by the "
            "data's own mean and deviation.",
            file=sys.stderr,
        )
    _, form = prepared(raw)
    form = form._replace(scaling=about.scaling or form.scaling)
    if recorded is not None and not other_targets:
        form = form._replace(target_scaling=recorded.target_scaling)
    _check_scaling(path, form.scaling, raw.train.inputs.shape)
    splits = scaled(raw, form)
    columns = [column.name for column in form.columns]
    if about.scaling is not None and (problem := other_units(splits.train.inputs, columns)):
        raise ValueError(f"{path} {problem}")
    if raw.train.kind == "numbers" and path is not None and not other_targets:
        if recorded is None:
            print(
                f"note: {path} does not say the units of its numbers: targets are standardized by "
                "the data's own mean and deviation.",
                file=sys.stderr,
            )
        elif problem := other_target_units(splits.train.labels, raw.train.names):
            raise ValueError(f"{path} {problem}")
    return splits, form


def _check_scaling(path: str | None, scaling: Standardizer | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError if the scaling of a model's file does not fit inputs `[N, ...]`."""
    assert scaling is not None
    with contextlib.suppress(ValueError):
        if np.broadcast_shapes(shape, scaling.mean.shape, scaling.scale.shape) == shape:
            return
    raise ValueError(
        f"{path} scales inputs of shape {list(scaling.mean.shape)}, but the data's examples are "
        f"{list(shape[1:])}."
    )


def check_parts(splits: Splits) -> None:
    """Raises UsageError, naming the flag, if there are no validation or no test examples."""
    for name in ("validation", "test"):
        if not len(getattr(splits, name).labels):
            raise UsageError(f"--{name} 0 leaves no {name} examples. Give a share above 0.")


def check_choices(settings: Data, path: str | None, about: About) -> None:
    """Raises UsageError if a setting contradicts the preprocessing recorded in a model's file."""
    form = about.preprocessing
    if form is None:
        return
    columns = [column.name for column in form.columns]
    if dropped := [name for name in settings.drop_columns if name in columns]:
        raise UsageError(
            f"--drop-columns {dropped[0]}: {path} reads this column. Leave the flag out, or use a "
            "model that was trained without it."
        )
    sides = form.shape[:2]
    if settings.image_size is not None and form.images is not None and settings.image_size != sides:
        raise UsageError(
            f"--image-size {'x'.join(map(str, settings.image_size))}: {path} takes images of "
            f"{'x'.join(map(str, sides))}. Leave the flag out."
        )
    fill_values = [column.fill for column in form.columns if column.fill is not None]
    if settings.missing not in (None, "drop") and columns and not fill_values:
        raise UsageError(
            f"--missing {settings.missing}: {path} was trained on columns in which nothing was "
            "filled in, so no values to fill in with are known. Say --missing drop, or fill them "
            "in beforehand."
        )


def check_folder(path: str, data: Dataset, *, other_targets: bool) -> None:
    """Compares data with a Hugging Face folder's configuration; notes other image sizes.

    Raises:
      ValueError: if its head predicts something other than the targets, which `other_targets`
        allows.
    """
    kind, sides = sources.kind(path), sources.sides(path)
    if not other_targets and kind not in (None, data.kind):
        raise ValueError(
            f"the head of {path} answers {kind} (problem_type in its config.json), but the "
            f"targets of the data are {data.kind}. Use --target {kind} if they are that; remove "
            "problem_type if it is wrong."
        )
    if data.inputs.ndim == 4 and sides not in (None, data.inputs.shape[1:3]):
        expected, actual = ("x".join(map(str, size)) for size in (sides, data.inputs.shape[1:3]))
        print(
            f"note: {path} was made for images of {expected}; these are {actual}; --image-size "
            f"{expected} resizes files of images.",
            file=sys.stderr,
        )


def in_classes_of(path: str | None, about: About, raw: Splits) -> Splits:
    """Reorders the data's classes to match the model's file, if it records any.

    Raises:
      ValueError: if the file has other classes.
    """
    model_names, data_names, classes = about.names, raw.train.names, raw.train.classes
    if about.classes not in (None, classes):
        raise ValueError(
            f"{path} has {about.classes} classes, but the data has {classes}. Give it data of its "
            "own classes."
        )
    if model_names == data_names or (about.classes is None and not model_names):
        return raw
    places = {_normalized(name): i for i, name in enumerate(model_names)}
    is_same_set = {_normalized(name) for name in data_names} == places.keys()
    if is_same_set and len(places) == len(model_names):
        if raw.train.kind != "classes":  # columns are in the model's order already
            return raw
        numbers = np.array([places[_normalized(name)] for name in data_names], np.int32)
        return Splits(*(x._replace(labels=numbers[x.labels], names=model_names) for x in raw))
    listed, of_data = (
        _text.shown(", ".join(names), 300) or f"0..{classes - 1}"
        for names in (model_names, data_names)
    )
    if about.classes is None and len(model_names) == classes and not data_names:
        print(f"note: classes 0..{classes - 1} are {path}'s {listed}", file=sys.stderr)
        return raw
    repair = ""
    if about.classes is None:  # a Hugging Face folder's, from its configuration
        repair = " Or, if they are the same in this order, remove id2label from its config.json."
    raise ValueError(
        f"{path} was trained on the classes {listed}, but the data has {of_data}. Give it data "
        f"whose classes have the same names.{repair}"
    )


def other_units(inputs: np.ndarray, columns: Sequence[str] = ()) -> str | None:
    """Describes the problem if inputs, scaled as the file says, deviate far more or less than 1.

    Columns of a table, if named, are each in their own unit. One that mostly has one value, such as
    a category or a rare event, may have any deviation.
    """
    axes = tuple(range(inputs.ndim - 1)) if inputs.ndim == 4 else (0,)
    deviations = inputs.std(axis=axes, dtype=np.float64).ravel()
    nonzero = deviations[deviations > 0]
    deviation = float(np.sqrt(np.mean(np.square(nonzero)))) if nonzero.size else 1.0
    subject, is_usual = "the data has", 1 / UNITS < deviation < UNITS
    if is_usual and len(columns) == len(deviations) and len(inputs) >= FEW_ROWS:
        low, high = np.quantile(inputs, (0.25, 0.75), axis=0)
        narrow = np.flatnonzero((high > low) & (deviations <= 1 / UNITS))
        if narrow.size:
            deviation, subject = deviations[narrow[0]], f"the column {columns[narrow[0]]!r:.80} has"
    if 1 / UNITS < deviation < UNITS:
        return _far_away(inputs, columns)
    return (
        f"scales inputs by its own mean and deviation, so {subject} a scaled deviation of "
        f"{deviation:.3g} where about 1 is expected. Are the data in other units, such as pixels "
        "from 0 to 255 and from 0 to 1?"
    )


def _far_away(inputs: np.ndarray, columns: Sequence[str]) -> str | None:
    """Describes the problem if columns lie outside the range that the scaling was measured on.

    Only columns with many values are judged. Without names, columns may be pixels: then most of
    them must lie outside.
    """
    if inputs.ndim != 2 or len(inputs) < FEW_ROWS:
        return None
    low, high = np.quantile(inputs, (0.25, 0.75), axis=0)
    is_far = (high > low) & ((low >= UNITS) | (high <= -UNITS))
    if not is_far.any() or (len(columns) != len(is_far) and 2 * is_far.sum() <= len(is_far)):
        return None
    index = int(np.flatnonzero(is_far)[0])
    subject = f"the column {columns[index]!r:.80}" if len(columns) == len(is_far) else "the data"
    return (
        f"scales inputs by its own mean and deviation, so half of {subject}, scaled, lies between "
        f"{low[index]:.3g} and {high[index]:.3g} where about 0 is expected. Are the data in other "
        "units, such as kelvins in place of degrees Celsius?"
    )


def other_target_units(targets: np.ndarray, names: Sequence[str]) -> str | None:
    """Describes the problem if targets `[N, K]`, scaled as the file says, are far from 1."""
    with np.errstate(over="ignore"):
        size = np.sqrt(np.mean(np.square(targets.astype(np.float64)), axis=0))
        deviations = targets.std(axis=0, dtype=np.float64)
    far = np.flatnonzero((size >= UNITS) | ((deviations > 0) & (deviations <= 1 / UNITS)))
    if not far.size:
        return None
    subject = f"the target {names[far[0]]!r:.80} has" if names else "the targets have"
    return (
        f"learned numbers of its own units, so {subject} a scaled deviation of "
        f"{deviations[far[0]]:.3g} and a root mean square of {size[far[0]]:.3g} where about 1 is "
        "expected. Are they in other units, such as cents in place of euros?"
    )


def _normalized(name: str) -> str:
    """A class's name, ignoring case, outer spaces, and underscores for spaces."""
    return name.strip().casefold().replace("_", " ")
