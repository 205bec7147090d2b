"""mergekit YAML recipes: which tensors of which models are merged, and how.

Supported: `models` or `slices` (layers of several models one after another), `base_model`, and
parameters by model, slice and recipe, by filter and as gradients over a slice's layers. Anything
else is refused by name. We compute in float32 (mergekit: in `dtype`) and write `out_dtype` or
`dtype`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import _text, transforms, trees
from kdtl_jax.cli import _parser
from kdtl_jax.cli.params import _checkpoints, _folders, _merging
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite
from kdtl_jax.cli.params._merging import Part
from kdtl_jax.cli.params._methods import METHODS
from kdtl_jax.cli.params._recipe_parameters import KNOWN, Place, only, options, parameters
from kdtl_jax.cli.params.merge import Settings
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.transforms import Report

_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_DTYPES = ("float32", "bfloat16", "float16")


class SlicedModel(NamedTuple):
    """A model in a slice, its first layer there, and its own parameters."""

    model: str
    first: int
    parameters: Mapping[str, Any]


class Slice(NamedTuple):
    """Layers that are merged with each other."""

    sources: Sequence[SlicedModel]
    length: int | None  # None: all layers of every model
    parameters: Mapping[str, Any]


def merged(settings: Settings) -> Rewrite:
    """The merge that `settings.recipe` describes."""
    _refuse_others(settings)
    path = Path(str(settings.recipe))
    recipe = _parser.read_yaml(path, "--recipe")
    only("the recipe", recipe, _TOP)
    name = recipe.get("merge_method")
    if not isinstance(name, str) or name not in KNOWN:
        raise ValueError(
            f"{path}: merge_method {_text.quoted(name)} is not one of {', '.join(KNOWN)}."
        )
    method_name, parameter_names = KNOWN[name]
    method = METHODS[method_name]
    base = _reference(recipe.get("base_model"), path)
    slices = _slices(recipe, path, parameter_names, base)
    shared = parameters(recipe, f"{path}: parameters", parameter_names)
    listed = [source.model for part in slices for source in part.sources]
    paths = dict.fromkeys([base, *listed] if base else listed)
    inputs = {path: _checkpoints.opened(path, "a model", "") for path in paths}
    for checkpoint in inputs.values():
        transforms.refuse_codes(checkpoint.specs)
    if method.base == "needs" and base is None:
        raise ValueError(f"merge_method {name} needs base_model.")
    has_base = base is not None and method.base != "has no"
    # slerp starts at the base; other methods without one merge it like any model.
    slices = [_based(part, base, has_base, has_base or name == "slerp") for part in slices]

    specs: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    copies: dict[str, safetensors.Tensor] = {}
    layouts = {model: _layout(checkpoint) for model, checkpoint in inputs.items()}
    slices = [part._replace(length=_length(part, layouts)) for part in slices]
    for out, part, names, t in _tensors(layouts, slices):
        places = []
        for source, path_there in zip(part.sources, names, strict=True):
            checkpoint = inputs[source.model]
            stored_name = _stored(checkpoint, path_there)
            scopes = (source.parameters, part.parameters, shared)
            tensor, spec = checkpoint.tensors[stored_name], checkpoint.specs[stored_name]
            places.append(Place(path_there, tensor, spec, scopes))
        if len({place.spec.shape for place in places}) > 1:
            shapes = [list(place.spec.shape) for place in places]
            raise ValueError(f"{_text.quoted(out)} has the shapes {shapes} in the models to merge.")
        specs[out] = places[0].spec
        if not all(trees.is_inexact(place.spec) for place in places):
            copies[out] = _merging.common_tensor(out, [place.tensor for place in places])
            continue
        if len(dtypes := {place.spec.dtype for place in places}) > 1:
            dtype_of_result = np.result_type(np.float32, *[x for x in dtypes if x.itemsize >= 4])
            specs[out] = jax.ShapeDtypeStruct(places[0].spec.shape, dtype_of_result)
        merged_places = places[has_base:]
        if not method.fewest <= len(merged_places) <= (method.most or len(merged_places)):
            raise ValueError(f"merge_method {name} cannot merge {len(merged_places)} models.")
        tensor_options = options(parameter_names, out, merged_places, (part.parameters, shared), t)
        base_tensor = places[0].tensor if has_base else None
        tensors = tuple(place.tensor for place in merged_places)
        parts[out] = Part(tensors, tensor_options._replace(seed=settings.seed or 0), base_tensor)
    shapes = {out: spec.shape for out, spec in specs.items()}
    report = Report(
        merged=tuple(parts),
        kept=tuple(transforms.Kept(p, "not a floating-point array") for p in copies),
        shapes=shapes,
        sizes={out: math.prod(shapes[out]) for out in parts},
    )
    dtype = settings.dtype or recipe.get("out_dtype") or recipe.get("dtype")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"{path}: dtype {_text.quoted(dtype)} is not one of {', '.join(_DTYPES)}.")
    produce = _merging.by_tensor(method, method.mergekit or method.merge, parts, copies)
    # For each layer of the result, its number in the first source.
    layers = [part.sources[0].first + j for part in slices for j in range(part.length or 0)]
    return Rewrite(specs, produce, report, [*inputs.values()], layers=layers, dtype=dtype)


# --- from YAML to slices -------------------------------------------------------------------------


def _refuse_others(settings: Settings) -> None:
    keep = {"recipe", "seed", "write", "force", "dtype", "shard_bytes", "skip_sha256"}
    for field in dataclasses.fields(settings):
        if field.name not in keep and getattr(settings, field.name) != field.metadata["default"]:
            flag = f"--{field.name.removesuffix('_').replace('_', '-')}"
            name = field.name.upper() if "positional" in field.metadata else flag
            raise UsageError(f"--recipe says everything; leave out {name}")


def _reference(value: Any, recipe: Path) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) < 1000 or "+" in value:
        raise ValueError(
            f"{recipe}: the model {_text.quoted(value)} must be a path (merge its LoRA first)."
        )
    beside = recipe.parent / value
    path = value if Path(value).exists() or not beside.exists() else str(beside)
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{recipe}: the model {_text.quoted(value)} does not exist here; download it."
        )
    return path


def _slices(
    recipe: Mapping[str, Any], path: Path, names: Sequence[str], base: str | None
) -> list[Slice]:
    if ("models" in recipe) == ("slices" in recipe):
        raise ValueError(f"{path}: expected either models or slices.")
    if "models" in recipe:
        keys = ("model", "parameters")
        sources = [_source(part, path, keys, names) for part in _list(recipe, "models")]
        if base is not None and all(source.model != base for source in sources):
            sources.append(SlicedModel(base, 0, {}))
        return [Slice(sources, None, {})]
    out = []
    for part in _list(recipe, "slices"):
        only(f"{path}: a slice", part, ("sources", "parameters"))
        keys = ("model", "parameters", "layer_range")
        sources = [_source(source, path, keys, names) for source in _list(part, "sources")]
        lengths = {_range(source, path)[1] for source in part["sources"]}
        if len(lengths) != 1:
            raise ValueError(f"{path}: the sources of a slice must have the same number of layers.")
        slice_parameters = parameters(part, f"{path}: a slice's parameters", names)
        out.append(Slice(sources, lengths.pop(), slice_parameters))
    return out


def _list(mapping: Mapping[str, Any], key: str) -> list[Any]:
    value = mapping.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list that is not empty, got {_text.quoted(value)}.")
    return value


def _source(entry: Any, path: Path, keys: Sequence[str], names: Sequence[str]) -> SlicedModel:
    only(f"{path}: a model", entry, keys)
    model = _reference(entry.get("model"), path)
    if model is None:
        raise ValueError(f"{path}: a model has no 'model'.")
    first = _range(entry, path)[0] if "layer_range" in entry else 0
    model_parameters = parameters(entry, f"{path}: {model}: parameters", names, of_model=True)
    return SlicedModel(model, first, model_parameters)


def _range(entry: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """The first of a range of layers, and how many there are."""
    value = entry.get("layer_range")
    if isinstance(value, list) and [type(i) for i in value] == [int, int]:
        first, end = value
        if 0 <= first < end < 10**5:
            return first, end - first
    raise ValueError(f"{path}: layer_range must be [first, end], got {_text.quoted(value)}.")


# --- from slices to tensors ----------------------------------------------------------------------


class TensorNames(NamedTuple):
    """How a model names its tensors."""

    outside: list[str]  # of the layers
    layers: Mapping[int, list[tuple[str, str]]]  # what precedes and follows a layer's number


def _layout(model: Opened) -> TensorNames:
    config = _folders.config_of(model.checkpoint)
    pattern = _folders.layer_pattern(list(model.specs), _folders.depth(config or {}))
    layers: dict[int, list[tuple[str, str]]] = {}
    outside = []
    for name in model.specs:
        match = pattern.fullmatch(name) if pattern else None
        if match is None:
            outside.append(name)
        else:
            ends = name[: match.start(1)], name[match.end(1) :]
            layers.setdefault(int(match[1]), []).append(ends)
    return TensorNames(outside, layers)


def _based(part: Slice, base: str | None, has_base: bool, is_first: bool) -> Slice:
    """The slice with the base first, if it `is_first`; not a model to merge if it `has_base`."""
    if base is None or not is_first:
        return part
    bases = [source for source in part.sources if source.model == base]
    if not bases and len({source.first for source in part.sources}) > 1:
        raise ValueError(
            f"the base {base} is not a source of a slice whose sources begin at different layers: "
            "name it there with its layer_range."
        )
    bases = bases or [SlicedModel(base, part.sources[0].first, {})]
    bases = [source._replace(parameters={}) for source in bases] if has_base else bases
    remaining = [source for source in part.sources if source.model != base]
    return part._replace(sources=[*bases, *remaining])


def _length(part: Slice, layouts: Mapping[str, TensorNames]) -> int:
    """How many layers the slice has; every source must have them."""
    depths = {source.model: len(layouts[source.model].layers) for source in part.sources}
    if part.length is None:
        if len(set(depths.values())) > 1:
            raise ValueError(f"the models have {depths} layers: say which with slices.")
        return next(iter(depths.values()))
    for source in part.sources:
        if source.first + part.length > depths[source.model]:
            raise ValueError(
                f"{source.model} has {depths[source.model]} layers, not "
                f"{source.first + part.length}, the end of a layer_range."
            )
    return part.length


def _tensors(
    layouts: Mapping[str, TensorNames], slices: Sequence[Slice]
) -> Iterator[tuple[str, Slice, list[str], float]]:
    """Every tensor of the result: its name, slice, names in the sources, and position, 0 to 1.

    It includes whatever any source has. Layers are numbered continuously across slices.
    """
    sources = [source.model for part in slices for source in part.sources]
    for name in _common([layouts[model].outside for model in sources]):
        is_head = _folders.OUTPUT.fullmatch(name) is not None
        is_first = not is_head and re.search(r"embed|wte|wpe|^(.*\.)?shared\.", name) is not None
        part = slices[0 if is_first else -1]
        yield name, part, [name] * len(part.sources), 0.0
    before = 0
    for part in slices:
        length = part.length or 0
        for j in range(length):
            t = j / (length - 1) if length > 1 else 1.0
            rows = [layouts[s.model].layers[s.first + j] for s in part.sources]
            for head, rest in _common(rows):
                names = [f"{head}{s.first + j}{rest}" for s in part.sources]
                yield f"{head}{before + j}{rest}", part, names, t
        before += length


def _common(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """What any of the rows has, without buffers of some that transformers makes anew."""
    items = dict.fromkeys(item for row in rows for item in row)
    return [
        item
        for item in items
        if "rotary_emb.inv_freq" not in "".join(item) or all(item in row for row in rows)
    ]


def _stored(model: Opened, name: str) -> str:
    """Where a model holds a tensor: a tied head is the embedding table."""
    if name in model.specs:
        return name
    tables = [table for table in model.specs if _folders.TABLE.fullmatch(table)]
    config = _folders.config_of(model.checkpoint)
    is_tied = config is not None and config.get("tie_word_embeddings") is not False
    if _folders.OUTPUT.fullmatch(name) and len(tables) == 1 and is_tied:
        return tables[0]
    near = trees.nearest(name, list(model.specs))
    raise ValueError(f"{model.name} has no tensor {_text.quoted(name)}; nearest: {near}.")
