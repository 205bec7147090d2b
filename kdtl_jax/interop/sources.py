"""Trained weights in any form: a safetensors file, an Orbax folder, or a Hugging Face folder.

    source = sources.opened("teacher.safetensors")
    variables = sources.variables(source, networks.abstract(net, example))

A source's description of its model is read at once; its weights are read when requested.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import _files, _text, trees
from kdtl_jax._types import PyTree, Variables
from kdtl_jax.datasets import Kind, Standardizer
from kdtl_jax.interop import huggingface, model_files, safetensors
from kdtl_jax.interop.huggingface import Pretrained
from kdtl_jax.interop.model_files import HUGGING_FACE, About

LARGE, MOST_PACKED = 2**26, 1000  # numbers; per byte of the files
# The prefix of parameters' paths in a file that holds a model's collections.
PARAMS = "params/"
_HOW = ("image_mean", "image_std")
# Other keys of a preprocessor_config.json, which do not change the numbers of an image that
# already has the model's size and channels.
_NO_NUMBERS = frozenset(
    """
    image_processor_type feature_extractor_type processor_class _processor_class
    _valid_processor_keys transformers_version model_input_names return_tensors
    data_format input_data_format device disable_grouping image_seq_length
    do_resize size size_divisor resample interpolation antialias default_to_square
    do_center_crop crop_size crop_pct do_pad pad_size do_convert_rgb num_channels do_reduce_labels
    """.split()
)
_KINDS: Mapping[Any, Kind] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "numbers",
}
ITEMS = ("params", "default", "state", "model")  # of a step, in the order they are looked for


class Source(NamedTuple):
    """Weights on disk, or a model without any."""

    path: str | None
    about: About  # its description of itself
    # All leaves, as `model_files.tree` lays them out. If a folder holds more than one tree, those
    # of the tree that has the names of `like`, or else of the innermost one.
    tree: Callable[[PyTree], PyTree] = lambda like: None
    metadata: Mapping[str, str] = MappingProxyType({})  # of a file


def opened(path: str) -> Source:
    """The source in a file or folder.

    Raises:
      ValueError: if there is no such file, or its metadata are damaged.
    """
    if is_hugging_face(path):
        about = About(f"{HUGGING_FACE}{path}", scaling=scaling(path), names=class_names(path))
        return Source(path, about, lambda like: _of_hugging_face(path))
    if is_orbax(path):
        return Source(path, About(), lambda like: from_orbax(path, like))
    about = model_files.about(path)
    metadata = safetensors.index(path).metadata
    return Source(path, about, lambda like: from_safetensors(path, like), metadata)


def variables(source: Source, template: Variables) -> Variables:
    """The template's variables.

    Raises:
      OSError: if the file cannot be read.
      ValueError: naming each leaf that is missing, extra, of another shape, or not finite; or if
        the file holds a student that is not just a network.
    """
    if source.metadata.get("kind") == model_files.CONNECTED:
        method = _text.quoted(source.metadata.get("method", ""))
        raise ValueError(
            f"{source.path} holds a student of {method}, which answers through connectors and its "
            "teacher's head: it cannot be used as a network. Name another file of the run."
        )
    found = source.tree(model_files.tree(template))
    return model_files.filled(str(source.path), trees.flatten(found), template)


def is_hugging_face(path: str) -> bool:
    """Whether a path is a folder with a config.json."""
    return (Path(path) / "config.json").is_file()


def pretrained(folder: str) -> Pretrained:
    """The model of a Hugging Face folder.

    Raises:
      ValueError: if the model reads text, or cannot take a new head for classes.
    """
    found = huggingface.load(folder)
    kind = _text.quoted(found.config["model_type"])
    if huggingface.reads_text(found.config):
        raise ValueError(f"{folder}: a model of the type {kind} reads text, not images or tables.")
    if not hasattr(found.module, "classes"):
        raise ValueError(f"{folder}: a model of the type {kind} cannot take a head for classes.")
    return found


def _of_hugging_face(folder: str) -> PyTree:
    found = pretrained(folder)
    return model_files.tree(Variables(*jax.tree.map(np.asarray, (found.params, found.model_state))))


def class_names(folder: str) -> tuple[str, ...]:
    """The class names of a Hugging Face folder; () if it only has LABEL_0, LABEL_1, and so on.

    Raises:
      ValueError: if its config does not number them 0..K-1.
    """
    file = Path(folder) / "config.json"
    known = _files.read_json(file).get("id2label")
    if not isinstance(known, dict) or not known:
        return ()
    try:
        numbered = {int(number): str(name) for number, name in known.items()}
        names = tuple(numbered[i] for i in range(len(known)))
    except (ValueError, KeyError):
        raise ValueError(
            f"{file}: id2label must name the classes 0..{len(known) - 1}, got "
            f"{_text.shown(str(list(known)), 200)}."
        ) from None
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def kind(folder: str) -> Kind | None:
    """The kind of task of a Hugging Face folder's head; None if its config does not say."""
    said = _files.read_json(Path(folder) / "config.json").get("problem_type")
    return _KINDS.get(said) if isinstance(said, str) else None


def scaling(folder: str) -> Standardizer | None:
    """How a Hugging Face folder's images are scaled, from 0..255; None if it does not say.

    Raises:
      ValueError: naming the file, if its values cannot be used to scale images, or it names an
        unknown step.
    """
    file = Path(folder) / "preprocessor_config.json"
    known = _files.read_json(file) if file.is_file() else {}
    read = {*_HOW, "do_normalize", "do_rescale", "rescale_factor"}
    said = {key for key, value in known.items() if value not in (None, False, "", [], {})}
    if strange := sorted(said - _NO_NUMBERS - read):
        raise ValueError(
            f"{file}: {_text.listed(strange)} is not known here, and may change the numbers of an "
            "image. Remove it if it does not."
        )
    if known.get("do_normalize", True) and not known.keys() >= {*_HOW}:
        return None
    try:
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


def sides(folder: str) -> tuple[int, int] | None:
    """The height and width to which a Hugging Face folder resizes or crops images.

    None if it does not say. Convolutional networks accept other sizes, with worse results.
    """
    file = Path(folder) / "preprocessor_config.json"
    known = _files.read_json(file) if file.is_file() else {}
    size = known.get("crop_size") if known.get("do_center_crop") else known.get("size")
    if isinstance(size, Mapping):
        shortest = size.get("shortest_edge")
        size = [size.get("height", shortest), size.get("width", shortest)]
    both = size if isinstance(size, list) else [size, size]
    found = [side for side in both if isinstance(side, int)]
    if not known.get("do_resize", True) or not len(found) == len(both) == 2:
        return None
    return found[0], found[1]


def from_safetensors(path: str, like: PyTree = None) -> PyTree:
    """The leaves of a file by name; without `params/` if all begin with it, as from Flax's `init`.

    It is kept if the names of `like` begin with it too.
    """
    found = safetensors.load(path)
    asked = () if like is None else trees.flatten(like)
    if found and all(name.startswith(PARAMS) for name in found):
        if not any(name.startswith(PARAMS) for name in asked):
            return {name.removeprefix(PARAMS): leaf for name, leaf in found.items()}
    return found


def is_orbax(path: str) -> bool:
    """Whether a path is a folder that Orbax wrote: a tree, a step, or a manager's steps."""
    return Path(path).is_dir() and _tree_in(Path(path)) is not None


def from_orbax(path: str, like: PyTree = None) -> PyTree:
    """A tree in an Orbax folder: the one that has the names of `like`, or else most of them.

    If parameters are beside other things (an optimizer's state), the tree is `params`. Without
    `like`, it is the innermost tree of parameters, with batch statistics beside it.
    """
    candidates = [*_within(_restored(path))]
    if like is not None:
        names = trees.flatten(like).keys()
        flat = [trees.flatten(each) for each in candidates]
        fits = [each for each in flat if each.keys() == names]
        return (fits or [max(flat, key=lambda each: len(each.keys() & names))])[0]
    *outer, params = candidates
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
    except Exception as error:  # Orbax, TensorStore and JAX raise their own kinds of errors
        said = _text.shown(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ValueError(f"{path} cannot be read by Orbax ({said}).") from error


def _check_announced(folder: Path, metadata: Any) -> None:
    """Refuses arrays that files of this size cannot unpack to, before memory is allocated."""
    inside = getattr(metadata, "item_metadata", metadata)  # of later versions
    announced = jax.tree.leaves(getattr(inside, "tree", inside))
    shapes = [leaf.shape for leaf in announced if getattr(leaf, "shape", None) is not None]
    asked = sum(math.prod(shape) for shape in shapes)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if asked > max(LARGE, MOST_PACKED * size):
        raise ValueError(f"its arrays have {asked:,} numbers, its files {size:,} bytes")


def _within(found: Any) -> Iterator[Any]:
    """A tree, and the trees named params or state in it."""
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
