"""Weights from elsewhere, beside the library's own files: Orbax and Hugging Face folders."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import PyTree
from kdtl_jax.datasets import Standardizer
from kdtl_jax.interop import huggingface, safetensors
from kdtl_jax.interop.huggingface import Pretrained

HUGGING_FACE = "huggingface:"  # before the folder, as a model's text
ITEMS = ("params", "default", "state", "model")  # of a step, in the order they are looked for


def is_hugging_face(path: str) -> bool:
    """Whether a path is a folder with a config.json."""
    return (Path(path) / "config.json").is_file()


def is_orbax(path: str) -> bool:
    """Whether a path is a folder that Orbax wrote: a tree, a step, or a manager's steps."""
    return Path(path).is_dir() and _tree_in(Path(path)) is not None


def scaling(folder: str) -> Standardizer | None:
    """How a Hugging Face folder's images are scaled, from 0..255; None if it does not say."""
    try:
        known = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        mean, deviation = (np.asarray(known[f"image_{n}"], np.float32) for n in ("mean", "std"))
        factor = np.float32(known.get("rescale_factor", 1 / 255))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Standardizer(mean / factor, deviation / factor)


def pretrained(text: str) -> Pretrained:
    """The model that `huggingface:FOLDER` names.

    Raises:
      ValueError: if it is no classifier of one array of inputs.
    """
    folder = text.removeprefix(HUGGING_FACE)
    found = huggingface.load(folder)
    if "id2label" not in found.config and "num_labels" not in found.config:
        raise ValueError(f"{folder}: its config.json names no classes: it is no classifier.")
    return found


def from_orbax(path: str, like: PyTree) -> PyTree:
    """A tree from an Orbax folder, in the structure of `like`.

    What holds parameters beside other things (an optimizer's state) gives its `params`.

    Raises:
      ValueError: naming each leaf that is missing, extra, or of another shape.
    """
    import orbax.checkpoint as ocp

    folder = _tree_in(Path(path))
    if folder is None:
        raise ValueError(f"{path} is no folder that Orbax wrote.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that arrays come without a sharding
        found = ocp.PyTreeCheckpointer().restore(folder.absolute())
    wanted = trees.flatten(like)
    candidates = [trees.flatten(each) for each in _within(found)]
    fits = [flat for flat in candidates if flat.keys() == wanted.keys()]
    nearest = max(candidates, key=lambda flat: len(flat.keys() & wanted.keys()))
    return safetensors.fill(like, (fits or [nearest])[0])


def _within(found: Any) -> Iterator[Any]:
    """A tree, and the trees called params or state in it."""
    yield found
    if isinstance(found, Mapping):
        for name in ITEMS:
            if isinstance(found.get(name), Mapping):
                yield from _within(found[name])


def _tree_in(folder: Path) -> Path | None:
    """The folder with a tree's metadata: this one, an item of it, or of its newest step."""
    if (folder / "_METADATA").is_file():
        return folder
    for name in ITEMS:
        if (folder / name / "_METADATA").is_file():
            return folder / name
    steps = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return _tree_in(max(steps, key=lambda path: int(path.name))) if steps else None
