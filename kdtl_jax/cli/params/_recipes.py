"""mergekit's YAML recipes: which tensors of which models are merged how.

Read: `models` or `slices` (layers of several models one after another), `base_model`, and
parameters by model, slice and recipe, by filter and as gradients over a slice's layers. The rest is
refused by name. We compute in float32, mergekit in `dtype`, and write `out_dtype` or `dtype`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import _text, transforms, trees
from kdtl_jax.cli import _parser
from kdtl_jax.cli.params import _checkpoints, _folders, _merging
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite
from kdtl_jax.cli.params._formulas import Options
from kdtl_jax.cli.params._merging import Part
from kdtl_jax.cli.params._methods import METHODS
from kdtl_jax.cli.params.merge import Settings
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.transforms import Report

_GTA = ("weight", "normalize", "lambda", "int8_mask")
_DROPS = (*_GTA, "density", "rescale")
# mergekit's name -> ours, and the parameters it reads.
KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear": ("linear", ("weight", "normalize")),
    "slerp": ("slerp", ("t",)),
    "nuslerp": ("nuslerp", ("weight", "nuslerp_flatten", "nuslerp_row_wise")),
    "multislerp": ("multi_slerp", ("weight",)),
    "karcher": ("karcher", ()),
    "task_arithmetic": ("task_arithmetic", _GTA),
    "ties": ("ties", _DROPS),
    "dare_linear": ("dare", _DROPS),
    "dare_ties": ("dare_ties", _DROPS),
    "della": ("della", (*_DROPS, "epsilon")),
    "della_linear": ("della_linear", (*_DROPS, "epsilon")),
    "breadcrumbs": ("breadcrumbs", (*_DROPS, "gamma")),
    "breadcrumbs_ties": ("breadcrumbs_ties", (*_DROPS, "gamma")),
    "sce": ("sce", ("select_topk", "int8_mask")),
    "model_stock": ("model_stock", ("filter_wise",)),
    "nearswap": ("near_swap", ("t",)),
    "arcee_fusion": ("arcee_fusion", ()),
    "ram": ("ram", ()),
    "ramplus_tl": ("ram", ("r",)),
    "passthrough": ("passthrough", ("scale",)),
}
_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
# A parameter that is a number -> our option, its default (None: it must be given), whether each
# model has its own.
_NUMBERS: dict[str, tuple[str, float | None, bool]] = {
    "weight": ("weights", None, True),
    "density": ("density", 1.0, True),
    "select_topk": ("density", 1.0, False),
    "epsilon": ("epsilon", 0.15, True),
    "gamma": ("outliers", 0.01, True),
    "lambda": ("scale", 1.0, False),
    "scale": ("scale", 1.0, False),
    "t": ("t", None, False),
    "r": ("gain", 0.1, False),
}
_DTYPES = ("float32", "bfloat16", "float16")


class Source(NamedTuple):
    """A model in a slice, its first layer there, and its own parameters."""

    model: str
    first: int
    parameters: Mapping[str, Any]


class Slice(NamedTuple):
    """Layers that are merged side by side."""

    sources: Sequence[Source]
    length: int | None  # None: all layers of every model
    parameters: Mapping[str, Any]


class Place(NamedTuple):
    """A tensor of one model, which meets those of others."""

    path: str
    tensor: safetensors.Tensor
    spec: Any
    parameters: Sequence[Mapping[str, Any]]  # the model's, the slice's, the recipe's


def merged(settings: Settings) -> tuple[Rewrite, Settings]:
    """The merge that `settings.recipe` describes, and the settings with the recipe's dtype.

    Raises:
      UsageError: if the recipe cannot be read, or models or options were given beside it.
      ValueError: naming a key, parameter or tensor that is not understood or missing.
    """
    _refuse_others(settings)
    path = Path(str(settings.recipe))
    recipe = _parser.read_yaml(path, "--recipe")
    _only("the recipe", recipe, _TOP)
    name = recipe.get("merge_method")
    if not isinstance(name, str) or name not in KNOWN:
        raise ValueError(
            f"{path}: merge_method {_text.quoted(name)} is not one of {', '.join(KNOWN)}."
        )
    ours, known = KNOWN[name]
    method = METHODS[ours]
    base = _reference(recipe.get("base_model"), path)
    slices = _slices(recipe, path, known)
    shared = _parameters(recipe, f"{path}: parameters", known)
    named = [source.model for each in slices for source in each.sources]
    models: list[str] = [*([base] if base else []), *named]
    inputs = {m: _checkpoints.opened(m, "a model", "") for m in dict.fromkeys(models)}
    for one in inputs.values():
        transforms.refuse_codes(one.specs)
    if method.base == "needs" and base is None:
        raise ValueError(f"merge_method {name} needs base_model.")
    has_base = base is not None and method.base != "has no"
    from_base = base if has_base or name == "slerp" else None  # slerp starts at the base

    specs: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    copies: dict[str, safetensors.Tensor] = {}
    layout = _layout(inputs[named[0]])
    for out, each, named_there, t in _tensors(layout, slices):
        places = []
        for source in _sources(each, from_base, has_base):
            one, there = inputs[source.model], named_there(source)
            if there not in one.specs:
                near = trees.nearest(there, list(one.specs))
                raise ValueError(
                    f"{source.model} has no tensor {_text.quoted(there)}; nearest: {near}."
                )
            own = (source.parameters, each.parameters, shared)
            places.append(Place(there, one.tensors[there], one.specs[there], own))
        if len({place.spec.shape for place in places}) > 1:
            shapes = [list(place.spec.shape) for place in places]
            raise ValueError(f"{_text.quoted(out)} has the shapes {shapes} in the models to merge.")
        specs[out] = places[0].spec
        if not all(trees.is_inexact(place.spec) for place in places):
            copies[out] = _merging.one_of(out, [place.tensor for place in places])
            continue
        of_models = places[has_base:]
        if not method.fewest <= len(of_models) <= (method.most or len(of_models)):
            raise ValueError(f"merge_method {name} cannot merge {len(of_models)} models.")
        options = _options(known, places[0], of_models, t)._replace(seed=settings.seed or 0)
        base_tensor = places[0].tensor if has_base else None
        parts[out] = Part(tuple(place.tensor for place in of_models), options, base_tensor)
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
    specs = {out: specs[out] for out in sorted(specs, key=trees.natural_key)}
    names = next(iter(inputs.values())).names
    layers = _layers(layout, slices)
    rewrite = Rewrite(specs, produce, report, list(inputs.values()), names, layers)
    return rewrite, dataclasses.replace(settings, dtype=dtype)


# --- from YAML to slices -------------------------------------------------------------------------


def _refuse_others(settings: Settings) -> None:
    keep = {"recipe", "seed", "write", "force", "dtype", "shard_bytes", "skip_sha256"}
    for field in dataclasses.fields(settings):
        if field.name not in keep and getattr(settings, field.name) != field.metadata["default"]:
            flag = field.name.removesuffix("_").replace("_", "-")
            raise UsageError(f"--recipe says everything; leave out --{flag}")


def _only(where: str, found: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: expected 'key: value' lines, got {_text.quoted(found)}.")
    for key, value in found.items():
        if key not in known and value is not None:
            read = f"known are {', '.join(known)}" if known else "nothing is read here"
            raise ValueError(f"{where}: {_text.quoted(key)} is not understood; {read}.")
    return found


def _parameters(found: Mapping[str, Any], where: str, known: Sequence[str]) -> Mapping[str, Any]:
    return _only(where, found.get("parameters") or {}, known)


def _reference(value: Any, recipe: Path) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) < 1000 or "+" in value:
        raise ValueError(
            f"{recipe}: the model {_text.quoted(value)} must be a path (merge its LoRA first)."
        )
    beside = recipe.parent / value
    found = value if Path(value).exists() or not beside.exists() else str(beside)
    if not Path(found).exists():
        raise FileNotFoundError(
            f"{recipe}: the model {_text.quoted(value)} does not exist here; download it."
        )
    return found


def _slices(recipe: Mapping[str, Any], path: Path, known: Sequence[str]) -> list[Slice]:
    if ("models" in recipe) == ("slices" in recipe):
        raise ValueError(f"{path}: expected either models or slices.")
    if "models" in recipe:
        keys = ("model", "parameters")
        return [
            Slice([_source(each, path, keys, known) for each in _list(recipe, "models")], None, {})
        ]
    out = []
    for each in _list(recipe, "slices"):
        _only(f"{path}: a slice", each, ("sources", "parameters"))
        keys = ("model", "parameters", "layer_range")
        sources = [_source(source, path, keys, known) for source in _list(each, "sources")]
        lengths = {_range(source, path)[1] for source in each["sources"]}
        if len(lengths) != 1:
            raise ValueError(f"{path}: the sources of a slice must have equally many layers.")
        own = _parameters(each, f"{path}: a slice's parameters", known)
        out.append(Slice(sources, lengths.pop(), own))
    return out


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list that is not empty, got {_text.quoted(value)}.")
    return value


def _source(found: Any, path: Path, keys: Sequence[str], known: Sequence[str]) -> Source:
    _only(f"{path}: a model", found, keys)
    model = _reference(found.get("model"), path)
    if model is None:
        raise ValueError(f"{path}: a model has no 'model'.")
    first = _range(found, path)[0] if "layer_range" in found else 0
    return Source(model, first, _parameters(found, f"{path}: {model}: parameters", known))


def _range(found: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """The first of a range of layers, and how many there are."""
    value = found.get("layer_range")
    if isinstance(value, list) and [type(i) for i in value] == [int, int]:
        first, end = value
        if 0 <= first < end < 10**5:
            return first, end - first
    raise ValueError(f"{path}: layer_range must be [first, end], got {_text.quoted(value)}.")


# --- from slices to tensors ----------------------------------------------------------------------


class Layout(NamedTuple):
    """How a model names its tensors."""

    outside: list[str]  # of the layers
    ends: list[tuple[str, str]]  # what stands before and after a layer's number
    depth: int


def _layout(first: Opened) -> Layout:
    folder = _folders.home(first.checkpoint)
    config = {} if folder is None else safetensors.json_file(folder / _folders.CONFIG)
    pattern = _folders.layer_pattern(list(first.specs), _folders.depth(config))
    matches = {name: pattern.fullmatch(name) if pattern else None for name in first.specs}
    found = [match for match in matches.values() if match]
    # Every layer has the tensors of the first.
    ends = [(m.string[: m.start(1)], m.string[m.end(1) :]) for m in found if m[1] == "0"]
    outside = [name for name, match in matches.items() if match is None]
    return Layout(outside, ends, len({match[1] for match in found}))


def _length(each: Slice, layout: Layout) -> int:
    return layout.depth if each.length is None else each.length


def _layers(layout: Layout, slices: Sequence[Slice]) -> list[int]:
    """For each layer of the result, its number in the first source."""
    return [each.sources[0].first + j for each in slices for j in range(_length(each, layout))]


def _tensors(
    layout: Layout, slices: Sequence[Slice]
) -> Iterator[tuple[str, Slice, Callable[[Source], str], float]]:
    """Every tensor of the result: its name, slice, name in a source, place in the slice, 0 to 1.

    Layers are numbered on from slice to slice.
    """
    for name in layout.outside:
        is_first = re.search(r"embed|wte|wpe", name) is not None
        yield name, slices[0 if is_first else -1], lambda s, name=name: name, 0.0
    before = 0
    for each in slices:
        length = _length(each, layout)
        for j in range(length):
            t = j / (length - 1) if length > 1 else 1.0
            for head, rest in layout.ends:

                def named(s: Source, head: str = head, rest: str = rest, j: int = j) -> str:
                    return f"{head}{s.first + j}{rest}"

                yield f"{head}{before + j}{rest}", each, named, t
        before += length


def _sources(each: Slice, base: str | None, has_base: bool) -> list[Source]:
    """The sources, the base first: where it is not a model to merge, without its own parameters."""
    if base is None:
        return list(each.sources)
    found = [source for source in each.sources if source.model == base]
    if not found and len({source.first for source in each.sources}) > 1:
        raise ValueError(
            f"the base {base} is not a source of a slice whose sources begin at different layers: "
            "name it there with its layer_range."
        )
    found = found or [Source(base, each.sources[0].first, {})]
    found = [source._replace(parameters={}) for source in found] if has_base else found
    return [*found, *(source for source in each.sources if source.model != base)]


def _options(known: Sequence[str], here: Place, models: Sequence[Place], t: float) -> Options:
    """The options of one tensor; `here` is the base or the first model."""

    def value(key: str, place: Place, default: Any = None) -> Any:
        for scope in place.parameters:
            if key in scope and (found := _evaluated(scope[key], place.path, t)) is not None:
                return found
        return default

    def number(key: str, place: Place, default: float | None) -> float:
        found = value(key, place, default)
        if found is None:
            raise ValueError(
                f"{_text.quoted(place.path)} has no {key} in the recipe, and no default."
            )
        try:
            return float(found)
        except (TypeError, ValueError):
            raise ValueError(
                f"{key} of {_text.quoted(place.path)} must be a number, got {_text.quoted(found)}."
            ) from None

    given: dict[str, Any] = {
        ours: [number(key, place, default) for place in models]
        if is_by_model
        else number(key, here, default)
        for key, (ours, default, is_by_model) in _NUMBERS.items()
        if key in known
    }

    def truth(key: str, default: bool | None = None) -> bool | None:
        found = value(key, here, default)
        if found not in (None, True, False):  # 0 and 1 are equal to these
            raise ValueError(
                f"{key} of {_text.quoted(here.path)} must be true or false, got "
                f"{_text.quoted(found)}."
            )
        return None if found is None else bool(found)

    axis = -1 if truth("filter_wise", False) else None
    if not truth("nuslerp_flatten", True):
        axis = 0 if truth("nuslerp_row_wise", False) else -1
    given |= {key: truth(key) for key in ("normalize", "rescale")}
    return Options(axis=axis, **given)


def _evaluated(setting: Any, name: str, t: float) -> Any:
    """A parameter of one tensor: a value, a gradient over layers, or the first fitting filter."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(each, Mapping) for each in setting):
        for each in setting:
            _only("a filter", each, ("filter", "value"))
            wanted = each.get("filter")
            if wanted is None or wanted == "*" or str(wanted) in name:
                return _evaluated(each.get("value"), name, t)
        return None
    try:
        values = [float(each) for each in setting]
    except (TypeError, ValueError):
        raise ValueError(
            f"a gradient must be a list of numbers, got {_text.shown(setting)}."
        ) from None
    if not values:
        return None
    place = t * (len(values) - 1)
    low = int(place)
    high = min(len(values) - 1, low + 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]
