"""Models by their text (`mlp:128,64`, `wrn-16-2`), as networks for methods, and their files.

Networks are those of `interop.networks`; weights are those of `interop.sources`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from kdtl_jax import _files, models, transforms
from kdtl_jax._types import Params
from kdtl_jax.interop import model_files, networks, own, sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.interop.networks import Network
from kdtl_jax.interop.sources import Source
from kdtl_jax.recipes import _imports
from kdtl_jax.recipes.settings import MODEL, UsageError
from kdtl_jax.run import record


def module(text: str, classes: int) -> nn.Module:
    """The Flax module named by a text, with `classes` outputs.

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
    """`parse=` of a model's setting: the text, after checking that it names a model."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"expected a model as in mlp:128,64, got {value!r:.80}")
    if model_files.is_own(value):
        return _imports.checked(value)
    module(value.lower(), 2)
    return value.lower()


def check(text: str | None) -> None:
    """Imports a user's model, to report errors in its file before data are read."""
    if text is not None and model_files.is_own(text):
        _imports.imported(text)


def make_network(text: str, classes: int, example: Any, *, dtype: Any = None) -> Network:
    """The network named by a text: built in, from a Hugging Face folder, or from a user's file.

    Raises:
      ValueError: if it is not a model or does not take such inputs, naming a user's file.
    """
    if folder := model_files.hugging_face_of(text):
        network = sources.pretrained(folder).module.clone(classes=classes)
        return networks.network(network, example, dtype=dtype)
    if not model_files.is_own(text):
        return networks.network(module(text, classes), example, dtype=dtype)
    module_ = _imports.imported(text)
    with _imports.located_errors(text, text), _imports.importing(text):
        network = own.network(module_, classes=classes, example=example, dtype=dtype)
    init, apply = (_imports.run_in_folder(text, use) for use in (network.init, network.apply))
    return network._replace(init=init, apply=apply)


def is_same_model(text: str, other: str) -> bool:
    """Whether two texts name the same model; users' files are compared without their folders."""
    if model_files.is_own(text) or model_files.is_own(other):
        return Path(text).name == Path(other).name
    return module(text, 2) == module(other, 2)


def files_of(text: str) -> list[Path]:
    """The files behind a model's text: the user's, a folder's configuration, or none."""
    if folder := model_files.hugging_face_of(text):
        return [Path(folder) / "config.json"]
    return _imports.files_of(text) if model_files.is_own(text) else []


def note_changed(text: str, metadata: Mapping[str, str]) -> None:
    """Prints a note if the files behind a text have changed since the model was trained."""
    digest = metadata.get("source_sha256")
    files = [] if digest is None else files_of(text)
    if not files or not all(file.is_file() for file in files):  # an error when opened
        return
    if record.made_from({"source": files}).files["source"] != digest:
        name = files[0] if model_files.hugging_face_of(text) else text
        print(f"note: {name} has changed since the model was trained", file=sys.stderr)


def identity(text: str) -> str:
    """A model's identity in a cache, including a file's code or a folder's configuration."""
    if folder := model_files.hugging_face_of(text):
        return f"{model_files.HUGGING_FACE}{_files.sha256(Path(folder) / 'config.json')}"
    if model_files.is_own(text):
        record_ = record.made_from({"source": files_of(text)})
        return f"{Path(text).name}, {record_.files['source']}"
    return models.canonical_name(text)


def open_source(path: str | None, text: str | None, default: str) -> Source:
    """Opens a source with its model; raises if the file and the user disagree on the model.

    Args:
      path: a model's file or folder, or None.
      text: the model named by the user, or None.
      default: the model if neither names one.

    Raises:
      UsageError: if the file holds a model other than the user's text.
      ValueError: if the file does not exist or its metadata are damaged.
    """
    check(text)
    source = Source(None, About()) if path is None else sources.opened(path)
    recorded = source.about.model
    if recorded is None:
        if path is not None and sources.is_orbax(path) and text is None:
            raise UsageError(
                f"{path} is an Orbax folder, which does not say its model. Name it (--teacher, or "
                "--model of kdtl transfer)."
            )
        return source._replace(about=source.about._replace(model=text or default))
    if text is not None and model_files.hugging_face_of(recorded):
        raise UsageError(f"{path} already says which model it is. Leave out {text}.")
    if text is not None and not is_same_model(text, recorded):
        raise UsageError(f"{path} holds the model {recorded}, not {text}.")
    if text is None and model_files.is_own(recorded):
        raise UsageError(
            f"{path} belongs to {recorded}. Name that file where it is now: only what is named is "
            "imported."
        )
    note_changed(text or recorded, source.metadata)
    return source._replace(about=source.about._replace(model=text or recorded))


def select_units(teacher: Params, student: Params) -> Params:
    """Fills a student with evenly spaced units of its teacher, layer by layer.

    The selected inputs of a layer are the selected outputs of the layer before.
    """
    return transforms.transfer(
        teacher, student, on_mismatch=transforms.select_uniform, check_finite=False
    )[0]
