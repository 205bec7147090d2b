"""Weights from elsewhere, beside the library's own files: Orbax and Hugging Face folders."""

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdtl_jax import _files, _text, trees
from kdtl_jax._types import PyTree
from kdtl_jax.datasets import Standardizer
from kdtl_jax.interop import huggingface
from kdtl_jax.interop.huggingface import Pretrained

HUGGING_FACE = "huggingface:"  # before the folder, as a model's text
LARGE, MOST_PACKED = 2**26, 1000  # numbers; per byte of the files
_HOW = ("image_mean", "image_std")
ITEMS = ("params", "default", "state", "model")  # of a step, in the order they are looked for


def is_hugging_face(path: str) -> bool:
    """Whether a path is a folder with a config.json."""
    return (Path(path) / "config.json").is_file()


def is_orbax(path: str) -> bool:
    """Whether a path is a folder that Orbax wrote: a tree, a step, or a manager's steps."""
    return Path(path).is_dir() and _tree_in(Path(path)) is not None


def scaling(folder: str) -> Standardizer | None:
    """How a Hugging Face folder's images are scaled, from 0..255; None if it does not say.

    Raises:
      ValueError: naming the file, if no images can be scaled by what it says.
    """
    file = Path(folder) / "preprocessor_config.json"
    known = _files.read_json(file) if file.is_file() else {}
    if known.get("do_normalize", True) and not known.keys() >= {*_HOW}:
        return None
    try:
        if known.get("rescale_offset", False):
            raise ValueError("rescale_offset is not known here")
        factor = known.get("rescale_factor", 1 / 255) if known.get("do_rescale", True) else 1
        stated = [known[name] for name in _HOW] if known.get("do_normalize", True) else (0, 1)
        mean, deviation, factor = (np.asarray(part, np.float32) for part in (*stated, factor))
        with np.errstate(all="ignore"):
            made = Standardizer(mean / factor, deviation / factor)
        if not (np.isfinite(made.mean).all() and np.isfinite(made.scale).all()):
            raise ValueError("not finite")
        if made.mean.ndim > 1 or made.scale.ndim > 1 or not (made.scale > 0).all():
            raise ValueError("not one number above 0 per channel")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file}: image_mean, image_std and rescale_factor cannot be used ({error})."
        ) from None
    return made


def pretrained(text: str) -> Pretrained:
    """The model that `huggingface:FOLDER` names.

    Raises:
      ValueError: if its model takes no head for classes of its own.
    """
    folder = text.removeprefix(HUGGING_FACE)
    found = huggingface.load(folder)
    if not hasattr(found.module, "classes"):
        kind = _text.quoted(found.config["model_type"])
        raise ValueError(f"{folder}: a model of the type {kind} takes no head for classes here.")
    return found


def from_orbax(path: str, like: PyTree) -> dict[str, Any]:
    """Leaves by path from an Orbax folder: of the tree in it that has the names of `like`.

    What holds parameters beside other things (an optimizer's state) gives its `params`; where no
    tree has all names, the one that has most of them is given.
    """
    found = _restored(path)
    wanted = trees.flatten(like)
    candidates = [trees.flatten(each) for each in _within(found)]
    fits = [flat for flat in candidates if flat.keys() == wanted.keys()]
    nearest = max(candidates, key=lambda flat: len(flat.keys() & wanted.keys()))
    return (fits or [nearest])[0]


def any_orbax(path: str) -> PyTree:
    """The innermost tree of parameters in an Orbax folder, with batch statistics beside it."""
    *outer, params = _within(_restored(path))
    if outer and "batch_stats" in outer[-1]:
        return {"params": params, "batch_stats": outer[-1]["batch_stats"]}
    return params


def _restored(path: str) -> Any:
    import orbax.checkpoint as ocp

    folder = _tree_in(Path(path))
    if folder is None:
        raise ValueError(f"{path} is not a folder that Orbax wrote.")
    reader = ocp.PyTreeCheckpointer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that arrays come without a sharding
            _check_announced(folder, reader.metadata(folder.absolute()))
            return reader.restore(folder.absolute())
    except Exception as error:  # Orbax, TensorStore and JAX raise kinds of their own
        said = _text.shown(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ValueError(f"{path} cannot be read by Orbax ({said}).") from error


def _check_announced(folder: Path, metadata: Any) -> None:
    """Refuses arrays that no files of this size unpack to, before memory is taken."""
    inside = getattr(metadata, "item_metadata", metadata)  # of later versions
    announced = jax.tree.leaves(getattr(inside, "tree", inside))
    shapes = [leaf.shape for leaf in announced if getattr(leaf, "shape", None) is not None]
    asked = sum(math.prod(shape) for shape in shapes)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if asked > max(LARGE, MOST_PACKED * size):
        raise ValueError(f"its arrays have {asked:,} numbers, its files {size:,} bytes")


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
