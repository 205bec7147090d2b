"""`kdtl params merge`: several models into one, by the published methods.

Tensors are merged one after another by `transforms`, in pieces of about 4 MB by methods that work
entry by entry or row by row. Others hold several times the largest tensor (slerp 4, breadcrumbs
12), never the models.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, transforms, trees
from kdtl_jax.cli.params import _checkpoints, _folders, _methods
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite, Selection, Writing
from kdtl_jax.cli.params._methods import METHODS, Members, Merge, Method, Options
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes.settings import UsageError, numbers, setting
from kdtl_jax.transforms import Kept, Report

EXAMPLES = f"""
kdtl params merge a.safetensors b.safetensors --method ties --base base.safetensors --density 0.2 \\
    --write merged.safetensors
kdtl params merge --recipe mergekit.yaml --write merged/

Methods:
{chr(10).join(f"  {name:16} {method.summary}" for name, method in METHODS.items())}
{_checkpoints.SELECTORS}"""
PIECE = "x"  # the path of every piece


def _method(value: Any) -> str:
    if value not in METHODS:
        raise ValueError(f"{value!r} is none of {', '.join(METHODS)}")
    return value


def _shares(value: Any) -> tuple[float, ...] | None:
    return None if value is None else numbers(value)


def _truth(value: Any) -> bool | None:
    known = {"yes": True, "true": True, "no": False, "false": False}
    if value is None or isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise ValueError(f"expected yes or no, got {value!r}")
    return known[str(value).lower()]


@dataclass(frozen=True)
class Several:
    """What `merge` and `average` share."""

    models: tuple[str, ...] = setting((), "checkpoints of one structure", positional="*")
    weights: tuple[float, ...] | None = setting(
        None, "one per model (default: 1 each)", metavar="W,W", parse=_shares
    )
    on_mismatch: Literal["error", "keep"] = setting(
        "error", "tensors that a model lacks or has in another shape: stop, or keep the base's"
    )


@dataclass(frozen=True)
class Settings(Several, Selection, Writing):
    """Several models into one."""

    method: str = setting("linear", "how to merge; see below", metavar="NAME", parse=_method)
    base: str | None = setting(None, "what the models were fine-tuned from", metavar="BASE")
    as_: Literal["paper", "mergekit"] = setting(
        "paper", "whose conventions: the method's paper's, or mergekit's numbers"
    )
    recipe: str | None = setting(
        None, "a mergekit YAML file instead of models and options", metavar="FILE"
    )
    normalize: bool | None = setting(
        None, "divide by the weights (yes, no; default: the method's)", metavar="YES", parse=_truth
    )
    scale: float | None = setting(None, "of what is added (default: 1)", metavar="S")
    density: tuple[float, ...] | None = setting(
        None, "share of entries kept, one or one per model (ties: 0.2, as mergekit 1)",
        metavar="D", parse=_shares,
    )  # fmt: skip
    rescale: bool | None = setting(
        None, "as mergekit: restore the L1 norm after dropping (yes, no; default: yes)",
        metavar="YES", parse=_truth,
    )  # fmt: skip
    scope: Literal["model", "tensor"] | None = setting(
        None,
        "ties ranks entries of the whole model (default; reads everything four times) or of each "
        "tensor",
    )
    epsilon: tuple[float, ...] | None = setting(
        None, "della's spread (default: 0.15)", metavar="E", parse=_shares
    )
    outliers: tuple[float, ...] | None = setting(
        None, "breadcrumbs' share dropped (default: 0.01)", metavar="O", parse=_shares
    )
    t: float | None = setting(None, "place between first and second", metavar="T")
    rule: tuple[str, ...] = setting(
        (), "another --t for these tensors; repeat for more, the first match wins",
        metavar="SELECTOR=T", repeat=True,
    )  # fmt: skip
    axis: int | None = setting(None, "spherical methods: rows along it", metavar="A")
    gain: float | None = setting(None, "ram: 0, or 0.1 for RAM+ (default: 0)", metavar="R")
    seed: int | None = setting(None, "of random draws (default: 0)", metavar="N", least=0)
    statistics: tuple[str, ...] = setting(
        (),
        "per model, in order: fisher's informations (the model's names and shapes) or regmean's "
        "Gram matrices {kernel: [in, in]}; repeat",
        metavar="FILE",
        repeat=True,
    )


class Part(NamedTuple):
    """One tensor to merge: where every model has it, and how."""

    models: tuple[tuple[int, str], ...]  # (which input, the tensor's path there)
    base: tuple[int, str] | None
    options: Options


class Job(NamedTuple):
    """A merge that was found possible: by name and shape alone."""

    method: Method
    merge: Merge
    inputs: Sequence[Opened]  # the first names what is written
    parts: Mapping[str, Part]
    copies: Mapping[str, tuple[int, str]]  # what is not merged
    report: Report
    statistics: Sequence[Opened] = ()
    is_global: bool = False
    layers: Sequence[int] | None = None


def run(settings: Settings) -> int:
    """Reports, and writes if asked to."""
    if settings.recipe is not None:
        from kdtl_jax.cli.params import _recipes

        job, settings = _recipes.job(settings)
    else:
        job = _job(settings)
    return _checkpoints.finish(settings, "merge", rewrite(job))


def rewrite(job: Job) -> Rewrite:
    """What the job writes, tensor by tensor."""
    specs = {
        path: job.inputs[i].specs[source]
        for path, (i, source) in {
            **{path: part.base or part.models[0] for path, part in job.parts.items()},
            **job.copies,
        }.items()
    }
    make = _whole_models(job) if job.is_global else _by_tensor(job)

    def produce(path: str) -> Any:
        # What is empty has nothing to merge, and no norm.
        if path in job.parts and math.prod(specs[path].shape):
            return make(path)
        part = job.parts.get(path)
        i, source = (part.base or part.models[0]) if part else job.copies[path]
        return safetensors.blocks(job.inputs[i].tensors[source], _checkpoints.BLOCK)

    order = {path: specs[path] for path in sorted(specs, key=trees.natural_key)}
    names = {path: job.inputs[0].names.get(path, path) for path in order}
    inputs = [*job.inputs, *job.statistics]
    return Rewrite(order, produce, job.report, inputs, names, job.layers)


# --- the merge, tensor by tensor -----------------------------------------------------------------


def _by_tensor(job: Job) -> Callable[[str], Any]:
    first = _ties(job) if "seed" in job.method.options else {}

    def produce(path: str) -> Any:
        part = job.parts[path]
        if job.method.is_elementwise:
            return (
                np.asarray(job.merge(piece, part.options)[PIECE])
                for piece in _pieces(job, path, [part.base, *part.models])
            )
        # Tied tensors share the draws of the first one's path, and so stay equal.
        name = first.get(path, path)
        if job.method.is_rowwise and job.merge is job.method.merge:
            return (
                np.asarray(job.merge(rows, part.options)[name]).ravel()
                for rows in _rows(job, name, [part.base, *part.models])
            )
        trees_ = [
            {} if at is None else {name: jnp.asarray(safetensors.read(_tensor(job, at)))}
            for at in (part.base, *part.models)
        ]
        given = [one.tensors.get(path) for one in job.statistics]
        statistics = [
            {} if one is None else {name: jnp.asarray(safetensors.read(one))} for one in given
        ]
        members = Members(trees_[0], trees_[1:], statistics)
        return np.asarray(job.merge(members, part.options)[name])

    return produce


def _pieces(job: Job, path: str, places: Sequence[tuple[int, str] | None]) -> Iterator[Members]:
    """Vectors of at most `BLOCK` entries under the path `PIECE`, from the first entry on."""
    statistics = [one.tensors[path] for one in job.statistics]
    tensors = [_tensor(job, at) for at in places if at is not None] + statistics
    count = len(tensors) - len(statistics)
    for piece in zip(
        *(safetensors.blocks(tensor, _checkpoints.BLOCK) for tensor in tensors), strict=True
    ):
        trees_ = [{PIECE: jnp.asarray(x)} for x in piece]
        base = {} if places[0] is None else trees_[0]
        models = trees_[:count] if places[0] is None else trees_[1:count]
        yield Members(base, models, trees_[count:])


def _rows(job: Job, name: str, places: Sequence[tuple[int, str] | None]) -> Iterator[Members]:
    """The blocks of rows in which `transforms` draws, under the path `name`; vectors whole."""
    tensors = [_tensor(job, at) for at in places if at is not None]
    shape = tensors[0].shape
    size = math.prod(shape)
    if len(shape) > 1:
        shape, size = (-1, shape[-1]), transforms.block_rows(shape) * shape[-1]
    pieces = zip(*(safetensors.blocks(tensor, size) for tensor in tensors), strict=True)
    for block, piece in enumerate(pieces):
        base, *models = [{name: jnp.asarray(x).reshape(shape)} for x in piece]
        yield Members(base, models, [], block)


def _whole_models(job: Job) -> Callable[[str], Any]:
    """TIES over whole models, whose passes begin when the first tensor is asked for.

    Two passes find every model's cut, a third counts signs and how many of the cut's equals come
    before each tensor. Writing is the fourth.
    """
    options = next(iter(job.parts.values())).options if job.parts else Options()
    first = _ties(job)
    paths = sorted(path for path in job.parts if path not in first)
    sizes = [math.prod(_tensor(job, job.parts[path].models[0]).shape) for path in paths]
    count = len(next(iter(job.parts.values())).models) if job.parts else 0
    is_double = any(spec.dtype == np.float64 for one in job.inputs for spec in one.specs.values())
    dtype = jnp.float64 if is_double else jnp.float32
    given = options.density
    densities = [given] * count if isinstance(given, (int, float)) else given
    found: dict[str, Any] = {}

    def measure() -> None:
        done = _checkpoints.progress(4 * sum(sizes) * (2 * count + 1), "ranking: ")

        def read(i: int) -> Iterator[Any]:
            for path in paths:
                part = job.parts[path]
                for x in _pieces(job, path, [part.base, part.models[i]]):
                    (tau,) = _methods.taus(x)
                    yield tau[PIECE]
                    done(4 * tau[PIECE].size)

        kept = [math.floor(density * sum(sizes)) for density in densities]
        found["cuts"] = [
            transforms.magnitude_cut(lambda i=i: read(i), kept[i], dtype) for i in range(count)
        ]
        before, balance = [0] * count, 0
        for path in paths:
            found[f"before {path}"] = before
            for _, trimmed, seen in trim(path, before):
                balance, before = balance + int(transforms.sign_balance(trimmed)), seen
                done(4 * trimmed[0][PIECE].size)
        found["majority"] = 1 if balance >= 0 else -1

    def trim(path: str, before: list[Any]) -> Iterator[tuple[Members, list[Any], list[Any]]]:
        part = job.parts[path]
        for x in _pieces(job, path, [part.base, *part.models]):
            pairs = [
                transforms.trim_to_cut(tau[PIECE], cut, seen)
                for tau, cut, seen in zip(_methods.taus(x), found["cuts"], before, strict=True)
            ]
            before = [seen for _, seen in pairs]
            yield x, [{PIECE: leaf} for leaf, _ in pairs], before

    def produce(path: str) -> Iterator[np.ndarray]:
        if not found:
            measure()
        path = first.get(path, path)
        for x, trimmed, _ in trim(path, found[f"before {path}"]):
            signs = transforms.elect_sign_global(trimmed, majority=found["majority"])
            merged = transforms.disjoint_merge(trimmed, signs, options.weights)
            out = transforms.apply_task_vectors(x.base, [merged], scale=options.scale)
            yield np.asarray(out[PIECE])

    return produce


def _ties(job: Job) -> dict[str, str]:
    """Tensors that are equal in every model, to the first of them."""
    places = {path: [at for at in (p.base, *p.models) if at] for path, p in job.parts.items()}
    count = max(map(len, places.values()), default=0)
    columns = [{path: _tensor(job, at[i]) for path, at in places.items()} for i in range(count)]
    return _folders.tied(columns) if columns else {}


def _tensor(job: Job, at: tuple[int, str]) -> safetensors.Tensor:
    return job.inputs[at[0]].tensors[at[1]]


# --- from settings to a job ----------------------------------------------------------------------


def _job(settings: Settings) -> Job:
    method = METHODS[settings.method]
    options = options_of(settings, method)
    if (settings.base is None) == (method.base == "needs") and method.base != "takes":
        needs = "needs --base" if method.base == "needs" else "has no --base"
        raise UsageError(f"--method {settings.method} {needs}")
    wanted = len(settings.models) if method.has_statistics else 0
    if len(settings.statistics) != wanted:
        raise UsageError(
            f"--method {settings.method} needs one --statistics per model"
            if method.has_statistics
            else f"--method {settings.method} reads no --statistics"
        )
    is_paper = settings.as_ == "paper"
    job = several(settings, settings.method, options, EXAMPLES, settings.base, settings.rule)
    return job._replace(
        merge=method.merge if is_paper else method.mergekit or method.merge,
        is_global=settings.method == "ties" and is_paper and settings.scope != "tensor",
    )


def several(
    settings: Any,
    name: str,
    options: Options,
    examples: str,
    base: str | None = None,
    rule: Sequence[str] = (),
) -> Job:
    """A merge of whole models, checked by name and shape.

    Raises:
      UsageError: if there are too few models or weights.
      ValueError: if names or shapes differ and `--on-mismatch keep` was not given, or a tensor
        holds integer codes.
    """
    method = METHODS[name]
    models = [_checkpoints.opened(path, "MODELS", examples) for path in settings.models or [None]]
    most = method.most or len(models)
    if not method.fewest <= len(models) <= most:
        wanted = f"{method.fewest}" + (" or more" if method.most is None else "")
        raise UsageError(f"--method needs {wanted} models, got {len(models)}")
    for flag in ("weights", "density", "epsilon", "outliers"):
        shares = getattr(options, flag)
        if isinstance(shares, (list, tuple)) and len(shares) != len(models):
            raise UsageError(f"--{flag}: expected {len(models)}, one per model, got {len(shares)}")
    divides = "scale" not in method.options and options.normalize is not False
    if options.weights is not None and divides and not sum(options.weights):
        raise UsageError(f"--weights {options.weights}: their sum, a divisor, is 0")
    inputs = models if base is None else [_checkpoints.opened(base, "BASE", examples), *models]
    statistics = [
        _checkpoints.opened(path, "STATISTICS", examples)
        for path in getattr(settings, "statistics", ())
    ]
    report = _report(settings, inputs)
    if method.is_elementwise and statistics:
        named = {one.name: one.specs for one in statistics}
        merged = {p: inputs[0].specs[p] for p in report.merged}
        _checks.same_leaves(**{"models": merged}, **named)
    found = _checkpoints.rules("rule", rule, float)
    places = trees.labels(inputs[0].specs, found, default=options.t) if found else {}
    start = 0 if base is None else 1
    parts = {
        path: Part(
            models=tuple((i, path) for i in range(start, len(inputs))),
            base=(0, path) if start else None,
            options=options._replace(t=places.get(path, options.t)),
        )
        for path in report.merged
    }
    copies = {path: (0, path) for path in inputs[0].specs if path not in parts}
    return Job(method, method.merge, inputs, parts, copies, report, statistics)


def options_of(settings: Settings, method: Method) -> Options:
    """The options given, each read by the method.

    Raises:
      UsageError: naming the first that it does not read, or needs and does not have.
      ValueError: if a share lies outside `[0, 1]`.
    """
    known = ("weights", "normalize", "scale", "density", "rescale", "scope", "epsilon", "outliers")
    known += ("t", "axis", "gain", "seed")
    given = {name: getattr(settings, name) for name in known if getattr(settings, name) is not None}
    read = [o for o in method.options if o != "rescale" or settings.as_ == "mergekit"]
    unread = [name for name in given if name not in read] + ["rule"] * (
        bool(settings.rule) and "t" not in read
    )
    if unread:
        raise UsageError(
            f"--method {settings.method} does not read --{unread[0]}; it reads "
            f"{', '.join('--' + name for name in read) or 'no options'}"
        )
    lacking = [name for name in method.required if name not in given]
    if lacking and not (settings.as_ == "mergekit" and lacking == ["density"]):
        raise UsageError(f"--method {settings.method} needs --{lacking[0]}")
    given.pop("scope", None)
    for name in ("density", "epsilon", "outliers"):
        if name in given:
            _checks.within(0, 1, **{name: np.asarray(given[name])})
            given[name] = given[name][0] if len(given[name]) == 1 else given[name]
    if settings.as_ == "mergekit":
        given.setdefault("density", 1.0)
    return Options(**given)


def _report(settings: Any, inputs: Sequence[Opened]) -> Report:
    """What will be merged and what stays; every difference named unless it is to be kept."""
    first, *others = inputs
    chosen = trees.mask(first.specs, _checkpoints.selected(settings, first.specs))
    wanted = {p: s for p, s in first.specs.items() if chosen[p] and trees.is_inexact(s)}
    _refuse_codes(inputs, {path for path in first.specs if chosen[path]}, wanted)
    if settings.on_mismatch == "error":
        where = trees.any_of(_checkpoints.selected(settings, first.specs))
        named = {first.name: wanted}
        for i, model in enumerate(others):
            key = model.name if model.name not in named else f"{model.name} ({i + 1})"
            named[key] = {
                path: spec
                for path, spec in model.specs.items()
                if path in wanted or (where(path, spec) and path not in first.specs)
            }
        _check_leaves(named)
    missing = [p for p in wanted if any(p not in model.specs for model in others)]
    left = {
        path: f"{path!r} is {list(model.specs[path].shape)} elsewhere"
        for model in others
        for path in wanted
        if path in model.specs and model.specs[path].shape != wanted[path].shape
    }
    kept = {
        p: "outside --where" if not chosen[p] else "not a floating-point array"
        for p in first.specs
        if p not in wanted
    } | left
    extra = [p for model in others for p in model.specs if p not in first.specs]
    return Report(
        merged=tuple(p for p in wanted if p not in kept and p not in missing),
        kept=tuple(Kept(path, reason) for path, reason in kept.items() if path not in missing),
        missing=tuple(missing),
        extra=tuple(dict.fromkeys(extra)),
        shapes={path: spec.shape for path, spec in first.specs.items()},
        sizes={p: math.prod(s.shape) for p, s in first.specs.items() if trees.is_inexact(s)},
    )


def _check_leaves(named: Mapping[str, Any]) -> None:
    """Raises ValueError as the library does, with the flag for what it says in Python."""
    try:
        _checks.same_leaves(**named)
    except ValueError as error:
        raise ValueError(f"{error} Pass --on-mismatch keep to keep the first's.") from None


def _refuse_codes(inputs: Sequence[Opened], chosen: set[str], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if a chosen tensor is stored as integer codes in any model."""
    for one in inputs:
        transforms.refuse_codes({path: one.specs[path] for path in chosen if path in one.specs})
        for path in wanted:
            if path in one.specs and not trees.is_inexact(one.specs[path]):
                raise ValueError(
                    f"{path!r} is {one.specs[path].dtype} in {one.name} and "
                    f"{wanted[path].dtype} in {inputs[0].name}: integer codes mean nothing without "
                    "their scales. Dequantize them first."
                )
