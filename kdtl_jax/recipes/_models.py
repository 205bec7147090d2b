"""Models by their text (`mlp:128,64`, `wrn-16-2`), as networks for methods, and their files.

Networks are those of `interop.networks`; weights are those of `interop.sources`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdtl_jax import _files, models, transforms
from kdtl_jax._types import Params, Variables
from kdtl_jax.datasets import (
    Kind,
    Preprocessing,
    Splits,
    Standardizer,
    prepared,
    read_splits,
    scaled,
    summary,
)
from kdtl_jax.interop import model_files, networks, own, sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.interop.networks import Network
from kdtl_jax.interop.sources import Source
from kdtl_jax.recipes import _agreement, _own
from kdtl_jax.recipes._training import in_chunks
from kdtl_jax.recipes.settings import MODEL, Data, UsageError
from kdtl_jax.run import record


def module(text: str, classes: int) -> nn.Module:
    """The Flax module that a text names, with `classes` outputs.

    Raises:
      UsageError: listing the forms, if the text has none of them or its numbers are invalid.
    """
    try:
        return models.named(text.strip(), classes)
    except ValueError as error:
        hint = ""
        if text.endswith((".safetensors", ".msgpack", ".npz", ".bin", ".pt")):
            hint = " Weights go to --teacher-weights, beside the model that they belong to."
        raise UsageError(f"{text!r} is not a model: {error}{hint} Expected {MODEL}.") from None


def text_of(value: Any) -> str | None:
    """`parse=` of a model's setting: the text itself, after checking that it names a model."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"expected a model as in mlp:128,64, got {value!r:.80}")
    if model_files.is_own(value):
        return _own.checked(value)
    module(value.lower(), 2)
    return value.lower()


def check(text: str | None) -> None:
    """Imports a user's model, to report errors in its file before data are read."""
    if text is not None and model_files.is_own(text):
        _own.imported(text)


def described(text: str, classes: int, example: Any, *, dtype: Any = None) -> Network:
    """The network that a text names: in the library, a Hugging Face folder or a user's file.

    Raises:
      ValueError: if it is not a model or does not take such inputs, naming a user's file.
    """
    if folder := model_files.hugging_face_of(text):
        made = sources.pretrained(folder).module.clone(classes=classes)
        return networks.network(made, example, dtype=dtype)
    if not model_files.is_own(text):
        return networks.network(module(text, classes), example, dtype=dtype)
    found = _own.imported(text)
    try:
        with _own.at_work(text):
            made = own.network(found, classes=classes, example=example, dtype=dtype)
    except Exception as error:  # whatever the user's code raises
        said = _own.at_fault(Path(_own.file_of(text)), error)
        raise ValueError(f"{text}: {said}") from error
    init, apply = (_own.neighborly(text, function) for function in (made.init, made.apply))
    return made._replace(init=init, apply=apply)


def same(text: str, other: str) -> bool:
    """Whether two texts name one model; a user's file counts by its name, in any folder."""
    if model_files.is_own(text) or model_files.is_own(other):
        return Path(text).name == Path(other).name
    return module(text, 2) == module(other, 2)


def files_of(text: str) -> list[Path]:
    """The files behind a model's text: the user's, a folder's configuration, or none."""
    if folder := model_files.hugging_face_of(text):
        return [Path(folder) / "config.json"]
    return _own.files_of(text) if model_files.is_own(text) else []


def tell_changed(text: str, metadata: Mapping[str, str]) -> None:
    """Prints a note if the files behind a text have changed since the model was trained."""
    was = metadata.get("source_sha256")
    files = [] if was is None else files_of(text)
    if not files or not all(file.is_file() for file in files):  # refused when it is opened
        return
    if record.made_from({"source": files}).files["source"] != was:
        name = files[0] if model_files.hugging_face_of(text) else text
        print(f"note: {name} has changed since the model was trained", file=sys.stderr)


def identity(text: str) -> str:
    """A model's identity in a cache, including a file's code or a folder's configuration."""
    if folder := model_files.hugging_face_of(text):
        return f"{model_files.HUGGING_FACE}{_files.sha256(Path(folder) / 'config.json')}"
    if model_files.is_own(text):
        made = record.made_from({"source": files_of(text)})
        return f"{Path(text).name}, {made.files['source']}"
    return models.canonical_name(text)


def opened(path: str | None, text: str | None, default: str) -> Source:
    """A source with its model, on which the file and the user must agree.

    Args:
      path: a model's file or folder, or None if there is none.
      text: what the user says the model is, or None.
      default: the text if neither says anything.

    Raises:
      UsageError: if the file holds a model other than the user's text.
      ValueError: if the file does not exist or its metadata are damaged.
    """
    check(text)
    source = Source(None, About()) if path is None else sources.opened(path)
    said = source.about.model
    if said is None:
        if path is not None and sources.is_orbax(path) and text is None:
            raise UsageError(
                f"{path} is an Orbax folder, which does not say its model. Name it (--teacher, or "
                "--model of kdtl transfer)."
            )
        return source._replace(about=source.about._replace(model=text or default))
    if text is not None and model_files.hugging_face_of(said):
        raise UsageError(f"{path} already says which model it is. Leave out {text}.")
    if text is not None and not same(text, said):
        raise UsageError(f"{path} holds the model {said}, not {text}.")
    if text is None and model_files.is_own(said):
        raise UsageError(
            f"{path} belongs to {said}. Name that file where it is now: only what is named is "
            "imported."
        )
    tell_changed(text or said, source.metadata)
    return source._replace(about=source.about._replace(model=text or said))


def read_data(
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
    _agreement.check_choices(settings, path, about)
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
        _agreement.check_folder(path, raw.train, other_targets=other_targets)
    raw = _agreement.in_classes_of(path, about, raw)
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
    if about.scaling is not None and (why := _agreement.other_units(splits.train.inputs, columns)):
        raise ValueError(f"{path} {why}")
    if raw.train.kind == "numbers" and path is not None and not other_targets:
        if known is None:
            print(
                f"note: {path} does not say the units of its numbers: targets are standardized by "
                "the data's own mean and deviation.",
                file=sys.stderr,
            )
        elif why := _agreement.other_targets(splits.train.labels, raw.train.names):
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


def selected(teacher: Params, student: Params) -> Params:
    """A student filled with evenly spaced units of its teacher, layer by layer.

    A unit is selected on both sides: the rows that a layer reads are those that the layer before
    writes.
    """
    return transforms.transfer(
        teacher, student, on_mismatch=transforms.select_uniform, check_finite=False
    )[0]


def outputs(net: Network, variables: Variables, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a frozen network, `[N, ...]` on the host."""

    @jax.jit
    def teacher_outputs(variables: Variables, inputs: Any) -> dict[str, Any]:
        return dict(net.apply(variables.params, variables.model_state, inputs)[0])

    return in_chunks(lambda x: teacher_outputs(variables, x), inputs, 512)
