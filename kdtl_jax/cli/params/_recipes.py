"""mergekit's YAML recipes: which tensors of which models are merged how.

Read: `models` or `slices` (layers of several models one after another), `base_model`, and
parameters by model, slice and recipe, by filter and as gradients over a slice's layers. Whatever is
not known here is refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import transforms, trees
from kdtl_jax.cli import _parser
from kdtl_jax.cli.params import _checkpoints, _folders
from kdtl_jax.cli.params._checkpoints import Opened
from kdtl_jax.cli.params._jobs import Job, Part
from kdtl_jax.cli.params._methods import METHODS, Method, Options
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
    "ties": ("ties", (*_GTA, "density")),
    "dare_linear": ("dare", _DROPS),
    "dare_ties": ("dare_ties", _DROPS),
    "della": ("della", (*_DROPS, "epsilon")),
    "della_linear": ("della_linear", (*_DROPS, "epsilon")),
    "breadcrumbs": ("breadcrumbs", (*_GTA, "density", "gamma")),
    "breadcrumbs_ties": ("breadcrumbs_ties", (*_GTA, "density", "gamma")),
    "sce": ("sce", ("select_topk", "int8_mask")),
    "model_stock": ("model_stock", ("filter_wise",)),
    "nearswap": ("near_swap", ("t",)),
    "arcee_fusion": ("arcee_fusion", ()),
    "ram": ("ram", ()),
    "ramplus_tl": ("ram", ("r",)),
    "passthrough": ("passthrough", ("scale",)),
}
_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_NEEDED = ("t", "weight")
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


def job(settings: Settings) -> tuple[Job, Settings]:
    """The job of `settings.recipe`, and the settings with the recipe's dtype.

    Raises:
      UsageError: if the recipe cannot be read, or models or options were given beside it.
      ValueError: naming a key, parameter or tensor that is not understood or missing.
    """
    _refuse_others(settings)
    path = Path(str(settings.recipe))
    recipe = _parser.read_yaml(path, "--recipe")
    _only("the recipe", recipe, _TOP)
    name = recipe.get("merge_method")
    if name not in KNOWN:
        raise ValueError(f"{path}: merge_method {name!r} is none of {', '.join(KNOWN)}.")
    ours, parameters = KNOWN[name]
    method = METHODS[ours]
    base = _reference(recipe.get("base_model"), path)
    slices = _slices(recipe, path)
    shared = _parameters(recipe, f"{path}: parameters", parameters)
    for each in slices:
        for source in each.sources:
            _only(f"{path}: {source.model}: parameters", source.parameters, parameters)
        _only(f"{path}: a slice's parameters", each.parameters, parameters)
    named: list[str] = [*([base] if base else []), *_models(slices)]
    models: list[str] = list(dict.fromkeys(named))
    inputs = [_checkpoints.opened(model, "a model", "") for model in models]
    transforms.refuse_codes({k: v for one in inputs for k, v in one.specs.items()})
    build = _Build(name, method, parameters, shared, base, models, inputs, settings.seed or 0)
    parts, copies, layers = _plan(build, slices)
    shapes = {
        out: inputs[i].specs[source].shape
        for out, (i, source) in {
            **{p: part.base or part.models[0] for p, part in parts.items()},
            **copies,
        }.items()
    }
    report = Report(
        merged=tuple(parts),
        kept=tuple(transforms.Kept(p, "not a floating-point array") for p in copies),
        shapes=shapes,
        sizes={path: math.prod(shapes[path]) for path in parts},
    )
    merge = method.mergekit or method.merge
    dtype = settings.dtype or recipe.get("out_dtype") or recipe.get("dtype")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"{path}: dtype {dtype!r} is none of {', '.join(_DTYPES)}.")
    found = Job(method, merge, inputs, parts, copies, report, layers=layers)
    return found, dataclasses.replace(settings, dtype=dtype)


# --- from YAML to slices -------------------------------------------------------------------------


def _refuse_others(settings: Settings) -> None:
    keep = {"recipe", "seed", "write", "force", "dtype", "shard_bytes", "skip_sha256"}
    for field in dataclasses.fields(settings):
        if field.name not in keep and getattr(settings, field.name) != field.metadata["default"]:
            flag = field.name.removesuffix("_").replace("_", "-")
            raise UsageError(f"--recipe says everything; leave out --{flag}")


def _only(where: str, found: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: expected 'key: value' lines, got {str(found)[:60]!r}.")
    for key, value in found.items():
        if key not in known and value is not None:
            raise ValueError(f"{where}: {key!r} is not understood; known are {', '.join(known)}.")
    return found


def _parameters(found: Mapping[str, Any], where: str, known: Sequence[str]) -> Mapping[str, Any]:
    return _only(where, found.get("parameters") or {}, known)


def _reference(value: Any, recipe: Path) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or "+" in value:
        raise ValueError(f"{recipe}: the model {value!r} must be a path (merge its LoRA first).")
    beside = recipe.parent / value
    found = value if Path(value).exists() or not beside.exists() else str(beside)
    if not Path(found).exists():
        raise FileNotFoundError(f"{recipe}: the model {value!r} does not exist here; download it.")
    return found


def _slices(recipe: Mapping[str, Any], path: Path) -> list[Slice]:
    if ("models" in recipe) == ("slices" in recipe):
        raise ValueError(f"{path}: expected either models or slices.")
    if "models" in recipe:
        sources = [_source(each, path, ("model", "parameters")) for each in _list(recipe, "models")]
        return [Slice(sources, None, {})]
    out = []
    for each in _list(recipe, "slices"):
        _only(f"{path}: a slice", each, ("sources", "parameters"))
        named = ("model", "parameters", "layer_range")
        sources = [_source(source, path, named) for source in _list(each, "sources")]
        lengths = {_range(source, path)[1] for source in each["sources"]}
        if len(lengths) != 1:
            raise ValueError(f"{path}: the sources of a slice must have equally many layers.")
        out.append(Slice(sources, lengths.pop(), each.get("parameters") or {}))
    return out


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list that is not empty, got {str(value)[:60]!r}.")
    return value


def _source(found: Any, path: Path, known: Sequence[str]) -> Source:
    _only(f"{path}: a model", found, known)
    model = _reference(found.get("model"), path)
    if model is None:
        raise ValueError(f"{path}: a model has no 'model'.")
    first = _range(found, path)[0] if "layer_range" in found else 0
    return Source(model, first, found.get("parameters") or {})


def _range(found: Mapping[str, Any], path: Path) -> tuple[int, int]:
    value = found.get("layer_range")
    whole = isinstance(value, list) and len(value) == 2 and all(type(i) is int for i in value)
    if not whole or not 0 <= value[0] < value[1] < 10**5:  # type: ignore[index]
        raise ValueError(f"{path}: layer_range must be [first, end], got {str(value)[:60]!r}.")
    return value[0], value[1] - value[0]  # type: ignore[index]


def _models(slices: Sequence[Slice]) -> list[str]:
    return [source.model for each in slices for source in each.sources]


# --- from slices to tensors ----------------------------------------------------------------------


class _Build(NamedTuple):
    name: str
    method: Method
    known: tuple[str, ...]
    shared: Mapping[str, Any]
    base: str | None
    models: Sequence[str]
    inputs: Sequence[Opened]
    seed: int


def _plan(
    build: _Build, slices: Sequence[Slice]
) -> tuple[dict[str, Part], dict[str, tuple[int, str]], list[int]]:
    """Every tensor of the result; layers are numbered on from slice to slice."""
    first = build.inputs[build.models.index(slices[0].sources[0].model)]
    pattern = _pattern(first)
    depth = len({m[1] for name in first.specs if pattern and (m := pattern.fullmatch(name))})
    parts: dict[str, Part] = {}
    copies: dict[str, tuple[int, str]] = {}
    layers: list[int] = []

    def add(out: str, each: Slice, named: Callable[[Source], str], t: float) -> None:
        places = [(build.models.index(s.model), named(s), s) for s in _with_base(build, each)]
        for i, source, _ in places:
            if source not in build.inputs[i].specs:
                near = trees.nearest(source, list(build.inputs[i].specs))
                raise ValueError(f"{build.models[i]} has no tensor {source!r}; nearest: {near}.")
        specs = [build.inputs[i].specs[source] for i, source, _ in places]
        if len({spec.shape for spec in specs}) > 1:
            shapes = [list(spec.shape) for spec in specs]
            raise ValueError(f"{out!r} has the shapes {shapes} in the models to merge.")
        if all(trees.is_inexact(spec) for spec in specs):
            parts[out] = _part(build, each, places, t)
        else:
            copies[out] = places[0][:2]

    for name in first.specs:
        if pattern is None or pattern.fullmatch(name) is None:
            is_first = re.search(r"embed|wte|wpe", name) is not None
            add(name, slices[0 if is_first else -1], lambda s, name=name: name, 0.0)
    for each in slices:
        length = depth if each.length is None else each.length
        for j in range(length):
            t = j / (length - 1) if length > 1 else 1.0
            start = each.sources[0].first + j
            for name in first.specs:
                match = pattern.fullmatch(name) if pattern else None
                if match is None or match[1] != "0":  # every layer has the tensors of the first
                    continue
                head, rest = name[: match.start(1)], name[match.end(1) :]
                add(
                    f"{head}{len(layers)}{rest}",
                    each,
                    lambda s, head=head, rest=rest, j=j: f"{head}{s.first + j}{rest}",
                    t,
                )
            layers.append(start)
    return parts, copies, layers


def _pattern(one: Opened) -> re.Pattern[str] | None:
    folder = _folders.home(one.checkpoint)
    depth = 0
    if folder is not None:
        depth = _folders.depth(safetensors.json_file(folder / _folders.CONFIG))
    return _folders.layer_pattern(list(one.specs), depth)


def _with_base(build: _Build, each: Slice) -> list[Source]:
    """The sources, the base first; it is added where the method has one."""
    if build.base is None:
        return list(each.sources)
    base = [source for source in each.sources if source.model == build.base]
    others = [source for source in each.sources if source.model != build.base]
    is_model = build.method.base == "has no" and build.name != "slerp"
    if is_model:
        return list(each.sources)
    return [*(base or [Source(build.base, each.sources[0].first, {})]), *others]


def _part(build: _Build, each: Slice, places: Sequence[tuple[int, str, Source]], t: float) -> Part:
    has_base = build.base is not None and build.method.base != "has no"
    if build.method.base == "needs" and not has_base:
        raise ValueError(f"merge_method {build.name} needs base_model.")
    models = places[1:] if has_base else places
    most = build.method.most or len(models)
    if not build.method.fewest <= len(models) <= most:
        raise ValueError(f"merge_method {build.name} cannot merge {len(models)} models.")

    def value(key: str, default: Any, place: tuple[int, str, Source]) -> Any:
        own = place[2].parameters if place is not places[0] or not has_base else {}
        for scope in (own, each.parameters, build.shared):
            if key in scope and (found := _evaluated(scope[key], place[1], t)) is not None:
                return found
        if default is None and key in _NEEDED and key in build.known:
            raise ValueError(f"{place[1]!r} has no {key} in the recipe, and no default.")
        return default

    def number(key: str, default: float | None, place: tuple[int, str, Source]) -> float:
        found = value(key, default, place)
        try:
            return float(1.0 if found is None else found)
        except (TypeError, ValueError):
            raise ValueError(f"{key} of {place[1]!r} must be a number, got {found!r}.") from None

    def by_model(key: str, default: float | None) -> list[float]:
        return [number(key, default, place) for place in models]

    here = places[0]
    axis = None
    if value("nuslerp_flatten", True, here) is False:
        axis = 0 if value("nuslerp_row_wise", False, here) else -1
    if value("filter_wise", False, here):
        axis = -1
    is_top = "select_topk" in build.known
    options = Options(
        weights=by_model("weight", None) if "weight" in build.known else None,
        normalize=value("normalize", None, here),
        scale=number("scale" if "scale" in build.known else "lambda", 1.0, here),
        density=number("select_topk", 1.0, here) if is_top else by_model("density", 1.0),
        epsilon=by_model("epsilon", 0.15),
        outliers=by_model("gamma", 0.01),
        rescale=value("rescale", None, here),
        t=number("t", None, here) if "t" in build.known else 0.5,
        axis=axis,
        gain=number("r", 0.1, here) if build.name == "ramplus_tl" else 0.0,
        seed=build.seed,
    )
    at = [place[:2] for place in models]
    return Part(tuple(at), places[0][:2] if has_base else None, options)


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
            f"a gradient must be a list of numbers, got {str(setting)[:60]}."
        ) from None
    if not values:
        return None
    place = t * (len(values) - 1)
    low = int(place)
    high = min(len(values) - 1, low + 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]
