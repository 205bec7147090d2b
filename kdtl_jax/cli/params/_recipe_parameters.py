"""The parameters of mergekit recipes: by model, slice and recipe, by filter and by layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdtl_jax import _text
from kdtl_jax.cli.params._formulas import Options
from kdtl_jax.interop import safetensors

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
# A numeric parameter -> our option and its default (None: required).
_BY_MODEL: dict[str, tuple[str, float | None]] = {
    "weight": ("weights", None),
    "density": ("density", 1.0),
    "epsilon": ("epsilon", 0.15),
    "gamma": ("outliers", 0.01),
}
_OF_ALL: dict[str, tuple[str, float | None]] = {
    "select_topk": ("density", 1.0),
    "lambda": ("scale", 1.0),
    "t": ("t", None),
    "r": ("gain", 0.1),
}
_OWN = (*_BY_MODEL, "scale")  # what a model may have; passthrough scales its single model


class Place(NamedTuple):
    """A tensor of one model, to be merged with those of others."""

    path: str
    tensor: safetensors.Tensor
    spec: Any
    parameters: Sequence[Mapping[str, Any]]  # the model's, the slice's, the recipe's


def only(where: str, entry: Any, known: Sequence[str]) -> Mapping[str, Any]:
    """A mapping whose keys are all known, but for those without a value."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected 'key: value' lines, got {_text.quoted(entry)}.")
    for key, value in entry.items():
        if key not in known and value is not None:
            hint = f"known are {', '.join(known)}" if known else "nothing is read here"
            raise ValueError(f"{where}: {_text.quoted(key)} is not understood; {hint}.")
    return entry


def parameters(
    entry: Mapping[str, Any], where: str, known: Sequence[str], *, of_model: bool = False
) -> Mapping[str, Any]:
    """The `parameters` of a recipe, a slice or a model."""
    values = only(where, entry.get("parameters") or {}, known)
    for key, value in values.items():
        if of_model and value is not None and key not in (*_OWN, "int8_mask"):
            raise ValueError(
                f"{where}: {_text.quoted(key)} is read for all models together: move it to the "
                "parameters of the recipe or of a slice."
            )
    return values


def options(
    known: Sequence[str], out: str, models: Sequence[Place], common: Sequence[Any], t: float
) -> Options:
    """The options of one tensor of the result.

    Args:
      known: the parameters that the method reads.
      out: the tensor's name in the result, to which filters of `common` parameters apply.
      models: the models' tensors; filters of a model's parameters apply to the name there.
      common: the parameters of the slice and of the recipe.
      t: the position in the slice, 0 to 1.
    """

    def value(key: str, path: str, scopes: Sequence[Mapping[str, Any]], default: Any = None) -> Any:
        for scope in scopes:
            if key in scope and (result := _evaluated(scope[key], path, t)) is not None:
                return result
        return default

    def number(key: str, path: str, scopes: Sequence[Any], default: float | None) -> float:
        result = value(key, path, scopes, default)
        if result is None:
            raise ValueError(f"{_text.quoted(path)} has no {key} in the recipe, and no default.")
        try:
            return float(result)
        except (TypeError, ValueError):
            raise ValueError(
                f"{key} of {_text.quoted(path)} must be a number, got {_text.quoted(result)}."
            ) from None

    values: dict[str, Any] = {
        option: [number(key, place.path, place.parameters, default) for place in models]
        for key, (option, default) in _BY_MODEL.items()
        if key in known
    }
    values |= {
        option: number(key, out, common, default)
        for key, (option, default) in _OF_ALL.items()
        if key in known
    }
    if "scale" in known:
        values["scale"] = number("scale", models[0].path, models[0].parameters, 1.0)

    def boolean(key: str, default: bool | None = None) -> bool | None:
        result = value(key, out, common, default)
        if result not in (None, True, False):  # 0 and 1 are equal to these
            raise ValueError(
                f"{key} of {_text.quoted(out)} must be true or false, got {_text.quoted(result)}."
            )
        return None if result is None else bool(result)

    axis = -1 if boolean("filter_wise", False) else None
    if not boolean("nuslerp_flatten", True):
        axis = 0 if boolean("nuslerp_row_wise", False) else -1
    values |= {key: boolean(key) for key in ("normalize", "rescale")}
    return Options(axis=axis, **values)


def _evaluated(setting: Any, name: str, t: float) -> Any:
    """A parameter of one tensor: a value, a gradient over layers, or the first matching filter."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(item, Mapping) for item in setting):
        for item in setting:
            only("a filter", item, ("filter", "value"))
            pattern = item.get("filter")
            if pattern is None or pattern == "*" or str(pattern) in name:
                return _evaluated(item.get("value"), name, t)
        return None
    if setting and all(isinstance(item, bool) for item in setting):
        return setting[int(t * (len(setting) - 1))]
    try:
        values = [float(item) for item in setting]
    except (TypeError, ValueError):
        raise ValueError(
            f"a gradient must be a list of numbers, got {_text.shown(setting)}."
        ) from None
    if not values:
        return None
    position = t * (len(values) - 1)
    low = int(position)
    high = min(len(values) - 1, low + 1)
    return (1 - (position - low)) * values[low] + (position - low) * values[high]
