"""Data read as a model's file says, and whether they match it: its classes, columns and units."""

import sys
from collections.abc import Sequence

import numpy as np

from kdtl_jax import _text
from kdtl_jax.datasets import (
    Dataset,
    Kind,
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
FEW = 20  # rows, too few to judge the units of one column


def read(
    settings: Data,
    source: Source,
    *,
    kinds: Sequence[Kind] = ("classes",),
    other_targets: bool = False,
) -> tuple[Splits, Preprocessing]:
    """The data, read and scaled as the source says or by their training part, and how.

    Prints what they are and what looks wrong.

    Args:
      settings: what names the data.
      source: of the model.
      kinds: of targets that the caller can learn.
      other_targets: whether the data's targets may differ; inputs are read as the source says.

    Raises:
      UsageError: if targets are of an unsupported kind, or settings contradict the source.
      ValueError: if the source has other classes, inputs or units.
    """
    path, about = source.path, source.about
    check_choices(settings, path, about)
    known = read_so = about.preprocessing
    if known is not None and (other_targets or known.kind == "classes"):
        read_so = known._replace(outputs=0, names=())  # its classes are compared below
    if read_so is not None and other_targets:
        read_so = read_so._replace(target_scaling=None)
    raw = read_splits(
        settings.data,
        label=settings.label,
        inputs=settings.inputs,
        target=settings.target,
        missing=settings.missing,
        one_hot=settings.text_columns is not None,
        drop=settings.drop_columns,
        image_size=settings.image_size,
        validation=settings.validation,
        test=settings.test,
        seed=settings.split_seed,
        preprocessing=read_so,
    )
    for line in summary(raw):
        print(line, file=sys.stderr)
    _check_kind(settings.data, raw.train.kind, kinds)
    if known is not None and known.kind != raw.train.kind and not other_targets:
        raise ValueError(
            f"{path} learned {known.kind}, but the targets of the data are {raw.train.kind}."
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
    if known is not None and not other_targets:
        form = form._replace(target_scaling=known.target_scaling)
    _check_scaling(path, form.scaling, raw.train.inputs.shape)
    splits = scaled(raw, form)
    columns = [column.name for column in form.columns]
    if about.scaling is not None and (why := other_units(splits.train.inputs, columns)):
        raise ValueError(f"{path} {why}")
    if raw.train.kind == "numbers" and path is not None and not other_targets:
        if known is None:
            print(
                f"note: {path} does not say the units of its numbers: targets are standardized by "
                "the data's own mean and deviation.",
                file=sys.stderr,
            )
        elif why := other_target_units(splits.train.labels, raw.train.names):
            raise ValueError(f"{path} {why}")
    return splits, form


def _check_kind(data: str, kind: Kind, kinds: Sequence[Kind]) -> None:
    """Raises UsageError if a command cannot learn targets of that kind."""
    if kind in kinds:
        return
    meant = {"labels": "several labels per example", "numbers": "numbers (regression)"}
    raise UsageError(
        f"--data {data}: targets are {meant.get(kind, 'classes')}, and this "
        f"command learns {' or '.join(meant.get(each, 'one class each') for each in kinds)}. "
        "Choose what they are with --target."
    )


def _check_scaling(path: str | None, scaling: Standardizer | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError if inputs `[N, ...]` cannot be scaled as a model's file says."""
    assert scaling is not None
    try:
        fits = np.broadcast_shapes(shape, scaling.mean.shape, scaling.scale.shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{path} scales inputs of shape {list(scaling.mean.shape)}, but the data's examples "
            f"are {list(shape[1:])}."
        )


def check_parts(splits: Splits) -> None:
    """Refuses data with nothing held out for validation or for the test.

    Raises:
      UsageError: naming the flag.
    """
    for name in ("validation", "test"):
        if not len(getattr(splits, name).labels):
            raise UsageError(f"--{name} 0 leaves no {name} examples. Give a share above 0.")


def check_choices(settings: Data, path: str | None, about: About) -> None:
    """Refuses settings that contradict how a model's file reads its data.

    Raises:
      UsageError: if one does, naming the flag and what the file says.
    """
    form = about.preprocessing
    if form is None:
        return
    read = [column.name for column in form.columns]
    if dropped := [name for name in settings.drop_columns if name in read]:
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
    fills = [column.fill for column in form.columns if column.fill is not None]
    if settings.missing not in (None, "drop") and read and not fills:
        raise UsageError(
            f"--missing {settings.missing}: {path} was trained on columns in which nothing was "
            "filled in, so no values to fill in with are known. Say --missing drop, or fill them "
            "in beforehand."
        )


def check_folder(path: str, data: Dataset, *, other_targets: bool) -> None:
    """Compares data with what a Hugging Face folder says; notes a different size of images.

    Args:
      path: of the folder.
      data: one part of the data.
      other_targets: whether the data's targets may differ from the folder's.

    Raises:
      ValueError: if its head predicts something other than the targets.
    """
    kind, sides = sources.kind(path), sources.sides(path)
    if not other_targets and kind not in (None, data.kind):
        raise ValueError(
            f"the head of {path} answers {kind} (problem_type in its config.json), but the "
            f"targets of the data are {data.kind}. Use --target {kind} if they are that; remove "
            "problem_type if it is wrong."
        )
    if data.inputs.ndim == 4 and sides not in (None, data.inputs.shape[1:3]):
        wanted, given = ("x".join(map(str, each)) for each in (sides, data.inputs.shape[1:3]))
        print(
            f"note: {path} was made for images of {wanted}; these are {given}; --image-size "
            f"{wanted} resizes files of images.",
            file=sys.stderr,
        )


def in_classes_of(path: str | None, about: About, raw: Splits) -> Splits:
    """The data with their classes in the order of the model's file.

    Args:
      path: of the file.
      about: what it records; without classes and names, nothing is compared.
      raw: the data, in their own order.

    Raises:
      ValueError: if the file has other classes.
    """
    own, found, classes = about.names, raw.train.names, raw.train.classes
    if about.classes not in (None, classes):
        raise ValueError(
            f"{path} has {about.classes} classes, but the data has {classes}. Give it data of its "
            "own classes."
        )
    if own == found or (about.classes is None and not own):
        return raw
    places = {_plain(name): i for i, name in enumerate(own)}
    if len(places) == len(own) and {_plain(name) for name in found} == places.keys():
        if raw.train.kind != "classes":  # columns are in the model's order already
            return raw
        numbers = np.array([places[_plain(name)] for name in found], np.int32)
        return Splits(*(x._replace(labels=numbers[x.labels], names=own) for x in raw))
    listed, of_data = (_listed(names) or f"0..{classes - 1}" for names in (own, found))
    if about.classes is None and len(own) == classes and not found:
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
    """What is wrong with inputs whose deviation, scaled as the file says, is far from 1.

    Args:
      inputs: scaled, `[N, ...]`.
      columns: names of a table's columns, each with a unit of its own. A column that mostly has
        one value, like categories and rare events, may vary by any amount.
    """
    axes = tuple(range(inputs.ndim - 1)) if inputs.ndim == 4 else (0,)
    deviations = inputs.std(axis=axes, dtype=np.float64).ravel()
    varying = deviations[deviations > 0]
    found, of = float(np.sqrt(np.mean(np.square(varying)))) if varying.size else 1.0, "the data has"
    if 1 / UNITS < found < UNITS and len(columns) == len(deviations) and len(inputs) >= FEW:
        low, high = np.quantile(inputs, (0.25, 0.75), axis=0)
        narrow = np.flatnonzero((high > low) & (deviations <= 1 / UNITS))
        if narrow.size:
            found, of = deviations[narrow[0]], f"the column {columns[narrow[0]]!r:.80} has"
    if 1 / UNITS < found < UNITS:
        return _far_away(inputs, columns)
    return (
        f"scales inputs by its own mean and deviation, so {of} a scaled deviation of "
        f"{found:.3g} where about 1 is expected. Are the data in other units, such as pixels from "
        "0 to 255 and from 0 to 1?"
    )


def _far_away(inputs: np.ndarray, columns: Sequence[str]) -> str | None:
    """What is wrong with columns outside the range that the file's scaling was measured on.

    A column is judged only if it has many values. Without names, columns may be pixels, and most of
    them have to be outside.
    """
    if inputs.ndim != 2 or len(inputs) < FEW:
        return None
    low, high = np.quantile(inputs, (0.25, 0.75), axis=0)
    away = (high > low) & ((low >= UNITS) | (high <= -UNITS))
    if not away.any() or (len(columns) != len(away) and 2 * away.sum() <= len(away)):
        return None
    first = int(np.flatnonzero(away)[0])
    which = f"the column {columns[first]!r:.80}" if len(columns) == len(away) else "the data"
    return (
        f"scales inputs by its own mean and deviation, so half of {which}, scaled, lies between "
        f"{low[first]:.3g} and {high[first]:.3g} where about 0 is expected. Are the data in other "
        "units, such as kelvins in place of degrees Celsius?"
    )


def other_target_units(targets: np.ndarray, names: Sequence[str]) -> str | None:
    """What is wrong with targets whose deviation, scaled as the file says, is far from 1.

    Args:
      targets: scaled, `[N, K]`.
      names: of the K numbers, or none.
    """
    with np.errstate(over="ignore"):
        size = np.sqrt(np.mean(np.square(targets.astype(np.float64)), axis=0))
        deviations = targets.std(axis=0, dtype=np.float64)
    far = np.flatnonzero((size >= UNITS) | ((deviations > 0) & (deviations <= 1 / UNITS)))
    if not far.size:
        return None
    which = f"the target {names[far[0]]!r:.80} has" if names else "the targets have"
    return (
        f"learned numbers of its own units, so {which} a scaled deviation of "
        f"{deviations[far[0]]:.3g} and a root mean square of {size[far[0]]:.3g} where about 1 is "
        "expected. Are they in other units, such as cents in place of euros?"
    )


def _plain(name: str) -> str:
    """A class's name, normalized for the differences between files and folders."""
    return name.strip().casefold().replace("_", " ")


def _listed(names: Sequence[str], most: int = 300) -> str:
    return _text.shown(", ".join(names), most)
