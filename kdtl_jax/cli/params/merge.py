"""`kdtl params merge`: merges several models into one, by the published methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdtl_jax import _checks, transforms, trees
from kdtl_jax._text import quoted
from kdtl_jax.cli.params import _checkpoints, _merging
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite, TensorSelection, Writing
from kdtl_jax.cli.params._formulas import Options
from kdtl_jax.cli.params._merging import Part
from kdtl_jax.cli.params._methods import METHODS
from kdtl_jax.recipes.settings import UsageError, numbers, setting
from kdtl_jax.transforms import Kept, Report

SHARES = ("density", "epsilon", "outliers")  # options from 0 to 1, one or one per model
EXAMPLES = f"""
kdtl params merge a.safetensors b.safetensors --method ties --base base.safetensors --density 0.2 \\
    --write merged.safetensors
kdtl params merge --recipe mergekit.yaml --write merged/

Methods:
{chr(10).join(f"  {name:16} {method.summary}" for name, method in METHODS.items())}
{_checkpoints.SELECTORS}"""


def _method(value: Any) -> str:
    name = str(value).lower().replace("-", "_")
    if name not in METHODS:
        raise ValueError(f"{quoted(value)} is not one of {', '.join(METHODS)}")
    return name


def _shares(value: Any) -> tuple[float, ...] | None:
    return None if value is None else numbers(value)


def _yes_or_no(value: Any) -> bool | None:
    answers = {"yes": True, "true": True, "no": False, "false": False}
    if value is None or isinstance(value, bool):
        return value
    if str(value).lower() not in answers:
        raise ValueError(f"expected yes or no, got {value!r}")
    return answers[str(value).lower()]


@dataclass(frozen=True)
class Several:
    """What `merge` and `average` share."""

    models: tuple[str, ...] = setting((), "checkpoints of the same structure", positional="*")
    weights: tuple[float, ...] | None = setting(
        None, "one per model (default: 1 each)", metavar="W,W", parse=_shares
    )
    on_mismatch: Literal["error", "keep"] = setting(
        "error", "if a model lacks a tensor or has it in another shape: stop, or keep the base's"
    )


@dataclass(frozen=True)
class Settings(Several, TensorSelection, Writing):
    """Merges several models into one."""

    method: str = setting("linear", "how to merge; see below", metavar="NAME", parse=_method)
    base: str | None = setting(
        None, "the checkpoint that the models were fine-tuned from", metavar="BASE"
    )
    as_: Literal["paper", "mergekit"] = setting(
        "paper", "follow the method's paper, or reproduce mergekit's results"
    )
    recipe: str | None = setting(
        None, "a mergekit YAML file instead of models and options", metavar="FILE"
    )
    normalize: bool | None = setting(
        None,
        "divide by the weights (yes, no; default: the method's)",
        metavar="YES",
        parse=_yes_or_no,
    )
    scale: float | None = setting(None, "factor of the added change (default: 1)", metavar="S")
    density: tuple[float, ...] | None = setting(
        None, "fraction of entries kept, one or one per model (ties: 0.2, as mergekit 1)",
        metavar="D", parse=_shares,
    )  # fmt: skip
    rescale: bool | None = setting(
        None, "with --as mergekit: restore the L1 norm after dropping (yes, no; "
        "default: if drops are random)",
        metavar="YES", parse=_yes_or_no,
    )  # fmt: skip
    scope: Literal["model", "tensor"] | None = setting(
        None,
        "ties: rank entries of the whole model (default; reads everything four times) or of "
        "each tensor",
    )
    epsilon: tuple[float, ...] | None = setting(
        None, "spread of della (default: 0.15)", metavar="E", parse=_shares
    )
    outliers: tuple[float, ...] | None = setting(
        None,
        "fraction of the largest entries that breadcrumbs drops (default: 0.01)",
        metavar="O",
        parse=_shares,
    )
    t: float | None = setting(
        None,
        "position between first and second, 0 to 1; near_swap: the distance within which the "
        "model's entry is used",
        metavar="T",
    )
    rule: tuple[str, ...] = setting(
        (), "another --t for these tensors; repeat for more, the first match wins",
        metavar="SELECTOR=T", repeat=True,
    )  # fmt: skip
    axis: int | None = setting(None, "spherical methods: rows along this axis", metavar="A")
    gain: float | None = setting(None, "ram: 0, or 0.1 for RAM+ (default: 0)", metavar="R")
    seed: int | None = setting(None, "seed of random draws (default: 0)", metavar="N", least=0)
    statistics: tuple[str, ...] = setting(
        (),
        "one per model, in order: Fisher information (the model's names and shapes) for "
        "fisher, or Gram matrices {kernel: [in, in]} for regmean; repeat",
        metavar="FILE",
        repeat=True,
    )


def run(settings: Settings) -> int:
    """Prints a report and, with `--write`, writes the result."""
    from kdtl_jax.cli.params import _recipes

    is_direct = settings.recipe is None
    rewrite = merged(settings, EXAMPLES) if is_direct else _recipes.merged(settings)
    return _checkpoints.finish(settings, "merge", rewrite)


def merged(settings: Settings, examples: str) -> Rewrite:
    """A merge of whole models, checked by name and shape.

    Raises:
      UsageError: if there are too few models, or an option is missing, unused or not one per model.
      ValueError: if names or shapes differ and `--on-mismatch keep` was not given, or a tensor
        holds integer codes.
    """
    method, name = METHODS[settings.method], settings.method
    is_paper = settings.as_ == "paper"
    options = _options(settings)
    if (settings.base is None) == (method.base == "needs") and method.base != "takes":
        needs = "needs --base" if method.base == "needs" else "has no --base"
        raise UsageError(f"--method {name} {needs}")
    if len(settings.statistics) != len(settings.models) * method.has_statistics:
        reads = "needs one" if method.has_statistics else "reads no"
        suffix = " per model" if method.has_statistics else ""
        raise UsageError(f"--method {name} {reads} --statistics{suffix}")

    def opened(what: str, paths: Sequence[str | None]) -> list[Opened]:
        return [_checkpoints.opened(path, what, examples) for path in paths]

    models = opened("MODELS", settings.models or [None])
    base = [] if settings.base is None else opened("BASE", [settings.base])
    statistics = opened("STATISTICS", settings.statistics)
    if not method.fewest <= len(models) <= (method.most or len(models)):
        expected = f"{method.fewest}" + (" or more" if method.most is None else "")
        raise UsageError(f"--method needs {expected} models, got {len(models)}")
    for flag in ("weights", *SHARES):
        shares = getattr(options, flag)
        if isinstance(shares, (list, tuple)) and len(shares) != len(models):
            raise UsageError(f"--{flag}: expected {len(models)}, one per model, got {len(shares)}")
    if name == "sce" and isinstance(options.density, (list, tuple)):
        raise UsageError(f"--density: sce selects one share, got {len(options.density)}")
    divides = "scale" not in method.options and options.normalize is not False
    if options.weights is not None and divides and not sum(options.weights):
        raise UsageError(f"--weights {options.weights}: their sum, a divisor, is 0")
    inputs = [*base, *models]
    specs = inputs[0].specs
    where = _checkpoints.selected(settings, specs)
    rules = _checkpoints.rules("rule", settings.rule, float)
    report = _report(inputs, where, keeps_mismatches=settings.on_mismatch == "keep")
    if method.has_grams:
        transforms.check_grams([checkpoint.specs for checkpoint in statistics], specs)
    elif statistics:
        _checks.same_leaves(
            models={p: specs[p] for p in report.merged}, **{x.name: x.specs for x in statistics}
        )
    t_by_path = trees.labels(specs, rules, default=options.t) if rules else {}
    parts = {
        path: Part(
            tuple(model.tensors[path] for model in models),
            options._replace(t=t_by_path.get(path, options.t)),
            base[0].tensors[path] if base else None,
            tuple(checkpoint.tensors.get(path) for checkpoint in statistics),
        )
        for path in report.merged
    }
    copies = {path: tensor for path, tensor in inputs[0].tensors.items() if path not in parts}
    if name == "ties" and is_paper and settings.scope != "tensor":
        produce = _merging.ties_of_models(parts, copies)
    else:
        merge = method.merge if is_paper else method.mergekit or method.merge
        produce = _merging.by_tensor(method, merge, parts, copies)
    return Rewrite(specs, produce, report, [*inputs, *statistics])


def _options(settings: Settings) -> Options:
    """The options given, each read by the method."""
    method, is_mergekit = METHODS[settings.method], settings.as_ == "mergekit"
    names = (*Options._fields, "scope")
    settable: dict[str, Any] = {name: getattr(settings, name) for name in names}
    options = {name: value for name, value in settable.items() if value is not None}
    read = [option for option in method.options if option != "rescale" or is_mergekit]
    unread = [name for name in options if name not in read]
    if settings.rule and "t" not in read:
        unread.append("rule")
    if unread:
        raise UsageError(
            f"--method {settings.method} does not read --{unread[0]}; it reads "
            f"{', '.join('--' + name for name in read) or 'no options'}"
        )
    missing = [name for name in method.required if name not in options]
    if missing and not (is_mergekit and missing == ["density"]):
        raise UsageError(f"--method {settings.method} needs --{missing[0]}")
    options.pop("scope", None)
    for name in SHARES:
        if name in options:
            _checks.within(0, 1, **{name: np.asarray(options[name])})
            options[name] = options[name][0] if len(options[name]) == 1 else options[name]
    if is_mergekit:
        options.setdefault("density", 1.0)
    return Options(**options)


def _report(inputs: Sequence[Opened], where: trees.Selector, *, keeps_mismatches: bool) -> Report:
    """What will be merged and what is kept; names every difference, unless it is to be kept."""
    first, *others = inputs
    chosen, is_selected = trees.mask(first.specs, where), trees.any_of(where)
    selected = {p: s for p, s in first.specs.items() if chosen[p] and trees.is_inexact(s)}
    _refuse_codes(inputs, {path for path in first.specs if chosen[path]}, selected)
    if not keeps_mismatches:
        specs_by_model = {first.name: selected}
        for i, model in enumerate(others):
            key = model.name if model.name not in specs_by_model else f"{model.name} ({i + 1})"
            specs_by_model[key] = {
                path: spec
                for path, spec in model.specs.items()
                if path in selected or (is_selected(path, spec) and path not in first.specs)
            }
        try:
            _checks.same_leaves(**specs_by_model)
        except ValueError as error:  # with the flag in place of the Python argument
            raise ValueError(f"{error} Pass --on-mismatch keep to keep the first's.") from None
    missing = [p for p in selected if any(p not in model.specs for model in others)]
    reshaped = {
        path: f"{path!r} is {list(model.specs[path].shape)} elsewhere"
        for model in others
        for path in selected
        if path in model.specs and model.specs[path].shape != selected[path].shape
    }
    kept = {
        p: "outside --where" if not chosen[p] else "not a floating-point array"
        for p in first.specs
        if p not in selected
    } | reshaped
    extra = [p for model in others for p in model.specs if p not in first.specs]
    return Report(
        merged=tuple(p for p in selected if p not in kept and p not in missing),
        kept=tuple(Kept(path, reason) for path, reason in kept.items() if path not in missing),
        missing=tuple(missing),
        extra=tuple(dict.fromkeys(extra)),
        shapes={path: spec.shape for path, spec in first.specs.items()},
        sizes={p: math.prod(s.shape) for p, s in first.specs.items() if trees.is_inexact(s)},
    )


def _refuse_codes(inputs: Sequence[Opened], chosen: set[str], selected: Mapping[str, Any]) -> None:
    """Raises ValueError if a chosen tensor is stored as integer codes in any model."""
    for model in inputs:
        transforms.refuse_codes(model.specs, chosen)
        for path in selected:
            if path in model.specs and not trees.is_inexact(model.specs[path]):
                raise ValueError(
                    f"{path!r} is {model.specs[path].dtype} in {model.name} and "
                    f"{selected[path].dtype} in {inputs[0].name}: integer codes mean nothing "
                    "without their scales. Dequantize them first."
                )
    for path in chosen - selected.keys():
        _merging.common_tensor(
            path, [model.tensors[path] for model in inputs if path in model.tensors]
        )
