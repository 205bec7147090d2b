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
_STATISTICS = ("image_mean", "image_std")
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
    # of the tree that has the template's names, or else of the innermost one.
    tree: Callable[[PyTree], PyTree] = lambda template: None
    metadata: Mapping[str, str] = MappingProxyType({})  # of a file


def opened(path: str) -> Source:
    """The source in a file or folder.

    Raises:
      ValueError: if there is no such file, or its metadata are damaged.
    """
    if is_hugging_face(path):
        about = About(f"{HUGGING_FACE}{path}", scaling=scaling(path), names=class_names(path))
        return Source(path, about, lambda template: _hugging_face_tree(path))
    if is_orbax(path):
        return Source(path, About(), lambda template: from_orbax(path, template))
    about = model_files.about(path)
    metadata = safetensors.index(path).metadata
    return Source(path, about, lambda template: from_safetensors(path, template), metadata)


def variables(source: Source, template: Variables) -> Variables:
    """Loads a source's weights as the template's variables.

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
    leaves = source.tree(model_files.tree(template))
    return model_files.filled(str(source.path), trees.flatten(leaves), template)


def is_hugging_face(path: str) -> bool:
    """Whether a path is a folder with a config.json."""
    return (Path(path) / "config.json").is_file()


def pretrained(folder: str) -> Pretrained:
    """Loads the model of a Hugging Face folder.

    Raises:
      ValueError: if the model reads text, or cannot take a new head for classes.
    """
    model = huggingface.load(folder)
    kind = _text.quoted(model.config["model_type"])
    if huggingface.reads_text(model.config):
        raise ValueError(f"{folder}: a model of the type {kind} reads text, not images or tables.")
    if not hasattr(model.module, "classes"):
        raise ValueError(f"{folder}: a model of the type {kind} cannot take a head for classes.")
    return model


def _hugging_face_tree(folder: str) -> PyTree:
    model = pretrained(folder)
    return model_files.tree(Variables(*jax.tree.map(np.asarray, (model.params, model.model_state))))


def class_names(folder: str) -> tuple[str, ...]:
    """The class names of a Hugging Face folder; () if it only has LABEL_0, LABEL_1, and so on.

    Raises:
      ValueError: if its config does not number them 0..K-1.
    """
    file = Path(folder) / "config.json"
    id2label = _files.read_json(file).get("id2label")
    if not isinstance(id2label, dict) or not id2label:
        return ()
    try:
        names_by_number = {int(number): str(name) for number, name in id2label.items()}
        names = tuple(names_by_number[i] for i in range(len(id2label)))
    except (ValueError, KeyError):
        raise ValueError(
            f"{file}: id2label must name the classes 0..{len(id2label) - 1}, got "
            f"{_text.shown(str(list(id2label)), 200)}."
        ) from None
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def kind(folder: str) -> Kind | None:
    """The kind of task of a Hugging Face folder's head; None if its config does not say."""
    problem_type = _files.read_json(Path(folder) / "config.json").get("problem_type")
    return _KINDS.get(problem_type) if isinstance(problem_type, str) else None


def scaling(folder: str) -> Standardizer | None:
    """The scaling of a Hugging Face folder's images, from 0..255; None if it does not say.

    Raises:
      ValueError: naming the file, if its values cannot be used to scale images, or it names an
        unknown step.
    """
    file, config = _preprocessor(folder)
    used_keys = {*_STATISTICS, "do_normalize", "do_rescale", "rescale_factor"}
    set_keys = {key for key, value in config.items() if value not in (None, False, "", [], {})}
    if strange := sorted(set_keys - _NO_NUMBERS - used_keys):
        raise ValueError(
            f"{file}: {_text.listed(strange)} is not known here, and may change the numbers of an "
            "image. Remove it if it does not."
        )
    if config.get("do_normalize", True) and not config.keys() >= {*_STATISTICS}:
        return None
    try:
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
        statistics = (
            [config[name] for name in _STATISTICS] if config.get("do_normalize", True) else (0, 1)
        )
        mean, deviation, factor = (np.asarray(part, np.float32) for part in (*statistics, factor))
        with np.errstate(all="ignore"):
            standardizer = Standardizer(mean / factor, deviation / factor)
        if not all(np.isfinite(part).all() for part in standardizer):
            raise ValueError("not finite")
        if any(part.ndim > 1 for part in standardizer) or not (standardizer.scale > 0).all():
            raise ValueError("not one number above 0 per channel")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file}: image_mean, image_std and rescale_factor cannot be used ({error})."
        ) from None
    return standardizer


def _preprocessor(folder: str) -> tuple[Path, dict[str, Any]]:
    file = Path(folder) / "preprocessor_config.json"
    return file, _files.read_json(file) if file.is_file() else {}


def sides(folder: str) -> tuple[int, int] | None:
    """The height and width to which a Hugging Face folder resizes or crops images.

    None if it does not say. Convolutional networks accept other sizes, with worse results.
    """
    _, config = _preprocessor(folder)
    size = config.get("crop_size") if config.get("do_center_crop") else config.get("size")
    if isinstance(size, Mapping):
        shortest = size.get("shortest_edge")
        size = [size.get("height", shortest), size.get("width", shortest)]
    lengths = size if isinstance(size, list) else [size, size]
    whole_lengths = [side for side in lengths if isinstance(side, int)]
    if not config.get("do_resize", True) or not len(whole_lengths) == len(lengths) == 2:
        return None
    return whole_lengths[0], whole_lengths[1]


def from_safetensors(path: str, template: PyTree = None) -> PyTree:
    """Loads the leaves of a file by name.

    If all names begin with `params/`, as from Flax's `init`, the prefix is removed, unless names of
    the template have it too.
    """
    leaves = safetensors.load(path)
    names = () if template is None else trees.flatten(template)
    if leaves and all(name.startswith(PARAMS) for name in leaves):
        if not any(name.startswith(PARAMS) for name in names):
            return {name.removeprefix(PARAMS): leaf for name, leaf in leaves.items()}
    return leaves


def is_orbax(path: str) -> bool:
    """Whether a path is a folder that Orbax wrote: a tree, a step, or a manager's steps."""
    return Path(path).is_dir() and _tree_in(Path(path)) is not None


def from_orbax(path: str, template: PyTree = None) -> PyTree:
    """Loads the tree of an Orbax folder that has the template's names, or else most of them.

    If parameters are beside other things (an optimizer's state), the tree is `params`. Without a
    template, it is the innermost tree of parameters, with the batch statistics beside it.
    """
    candidates = [*_subtrees(_restored(path))]
    if template is not None:
        names = trees.flatten(template).keys()
        flat_trees = [trees.flatten(tree) for tree in candidates]
        matches = [tree for tree in flat_trees if tree.keys() == names]
        return (matches or [max(flat_trees, key=lambda tree: len(tree.keys() & names))])[0]
    *enclosing, params = candidates
    if enclosing and "batch_stats" in enclosing[-1]:
        return {"params": params, "batch_stats": enclosing[-1]["batch_stats"]}
    return params


def _restored(path: str) -> Any:
    import orbax.checkpoint as ocp

    folder = _tree_in(Path(path))
    if folder is None:
        raise ValueError(f"{path} is not a folder that Orbax wrote.")
    reader = ocp.PyTreeCheckpointer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the arrays have no sharding
            _check_size(folder, reader.metadata(folder.absolute()))
            return reader.restore(folder.absolute())
    except Exception as error:  # Orbax, TensorStore and JAX raise their own kinds of errors
        message = _text.shown(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ValueError(f"{path} cannot be read by Orbax ({message}).") from error


def _check_size(folder: Path, metadata: Any) -> None:
    """Refuses arrays too large for files of this size, before memory is allocated."""
    item = getattr(metadata, "item_metadata", metadata)  # in later versions
    leaves = jax.tree.leaves(getattr(item, "tree", item))
    shapes = [leaf.shape for leaf in leaves if getattr(leaf, "shape", None) is not None]
    count = sum(math.prod(shape) for shape in shapes)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if count > max(LARGE, MOST_PACKED * size):
        raise ValueError(f"its arrays have {count:,} numbers, its files {size:,} bytes")


def _subtrees(tree: Any) -> Iterator[Any]:
    """A tree, and the trees named params or state in it."""
    yield tree
    if isinstance(tree, Mapping):
        for name in ITEMS:
            if isinstance(tree.get(name), Mapping):
                yield from _subtrees(tree[name])


def _tree_in(folder: Path) -> Path | None:
    """The folder with a tree's metadata: this one, an item of it, or of its newest step."""
    if (folder / "_METADATA").is_file():
        return folder
    for name in ITEMS:
        if (folder / name / "_METADATA").is_file():
            return folder / name
    steps = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return _tree_in(max(steps, key=lambda path: int(path.name))) if steps else None
