"""`kdtl params merge`: several models into one, by the published methods."""

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, transforms, trees
from kdtl_jax.cli import _config
from kdtl_jax.cli.params import _inputs, _rewrite, _ties
from kdtl_jax.cli.params._inputs import Opened
from kdtl_jax.cli.params._members import PIECE, Stored, pieces, shape, whole
from kdtl_jax.cli.params._methods import METHODS, Method, Options
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import Kept, Report

EXAMPLE = (
    "kdtl params merge a.safetensors b.safetensors --method ties --base base.safetensors "
    "--density 0.2 --write merged.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl params merge`."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints of one structure")
    parser.add_argument("--method", choices=tuple(METHODS), default="linear")
    parser.add_argument("--base", metavar="BASE", help="what the models were fine-tuned from")
    parser.add_argument(
        "--weights", type=_inputs.numbers, metavar="W,W", help="one per model (default: 1 each)"
    )
    parser.add_argument("--scale", type=float, metavar="S", help="of what is added (default: 1)")
    parser.add_argument(
        "--density", type=float, metavar="D", help="share of entries kept (ties: 0.2)"
    )
    parser.add_argument(
        "--scope",
        choices=("model", "tensor"),
        help="ties ranks entries of the whole model (default, reads everything four times) or of "
        "each tensor",
    )
    parser.add_argument("--epsilon", type=float, metavar="E", help="della's spread (default: 0.15)")
    parser.add_argument(
        "--outliers", type=float, metavar="O", help="breadcrumbs' share dropped (default: 0.01)"
    )
    parser.add_argument("--t", type=float, metavar="T", help="place between first and second")
    parser.add_argument("--axis", type=int, metavar="A", help="spherical methods: rows along it")
    parser.add_argument("--seed", type=int, metavar="N", help="of random draws (default: 0)")
    parser.add_argument(
        "--statistics",
        action="append",
        metavar="FILE",
        help="per model, in order: fisher's informations (the model's names and shapes) or "
        "regmean's Gram matrices {kernel: [in, in]}; repeat",
    )
    add_common(parser)
    _inputs.show_example(parser, EXAMPLE)
    lines = [f"  {name:16} {method.summary}" for name, method in METHODS.items()]
    small = [name for name, method in METHODS.items() if method.is_elementwise]
    memory = (
        "Tensors pass in pieces of 4 MB (della: of whole rows). regmean holds whole ones, as do,\n"
        f"in double precision, all but {', '.join(small)}\n"
        "and ties over whole models."
    )
    parser.epilog = "\n".join(["Methods:", *lines, memory, "", parser.epilog or ""])


def add_common(parser: argparse.ArgumentParser) -> None:
    """What `merge` and `average` share."""
    _inputs.add_where(parser, "merge these tensors; the others are the base's or first model's")
    parser.add_argument(
        "--on-mismatch",
        choices=("error", "keep"),
        default="error",
        help="tensors that a model lacks or has in another shape: stop, or keep the base's "
        "(default: error)",
    )
    _rewrite.add_write(parser)


def run(args: argparse.Namespace) -> int:
    """Reports, and writes if asked to."""
    _inputs.required(args, EXAMPLE, "models")
    method = METHODS[args.method]
    options = _options(args, method)
    if method.has_base != (args.base is not None):
        needs = "needs --base" if method.has_base else "has no --base"
        raise _config.UsageError(f"--method {args.method} {needs}")
    statistics = [_inputs.opened(path) for path in args.statistics or []]
    if len(statistics) != (len(args.models) if method.has_statistics else 0):
        raise _config.UsageError(
            f"--method {args.method} needs one --statistics per model"
            if method.has_statistics
            else f"--method {args.method} reads no --statistics"
        )
    base = None if args.base is None else _inputs.opened(args.base)
    is_global = args.method == "ties" and args.scope != "tensor"
    models = [_inputs.opened(path) for path in args.models]
    return merged(args, method, options, base, models, statistics, is_global=is_global)


def merged(
    args: argparse.Namespace,
    method: Method,
    options: Options,
    base: Opened | None,
    models: Sequence[Opened],
    statistics: Sequence[Opened] = (),
    *,
    is_global: bool = False,
) -> int:
    """Checks names and shapes, reports, and streams the merge if asked to write."""
    most = method.most or len(models)
    if not method.fewest <= len(models) <= most:
        wanted = f"{method.fewest}" + (" or more" if method.most is None else "")
        raise _config.UsageError(f"--method needs {wanted} models, got {len(models)}")
    if options.weights is not None and len(options.weights) != len(models):
        raise _config.UsageError(
            f"--weights: expected {len(models)}, one per model, got {len(options.weights)}"
        )
    first = models[0] if base is None else base
    if options.weights is not None and "scale" not in method.options and not sum(options.weights):
        raise _config.UsageError(f"--weights {options.weights}: their sum, a divisor, is 0")
    report = _report(args, first, models)
    if method.is_elementwise and statistics:
        wanted = {one.name: one.specs for one in statistics}
        _checks.same_leaves(**{"models": {p: first.specs[p] for p in report.merged}}, **wanted)
    if is_global:
        make = _globally(first, models, report.merged, options)
    else:
        make = _leafwise(first, models, statistics, method, options)

    def produce(path: str) -> Any:
        if path in chosen:
            return make(path)
        return safetensors.blocks(first.tensors[path], _rewrite.BLOCK)

    # What is empty has nothing to merge, and no norm.
    chosen = frozenset(path for path in report.merged if report.sizes[path])
    everyone = [first, *(one for one in [*models, *statistics] if one is not first)]
    rewrite = _rewrite.Rewrite(first.specs, produce, report, everyone, first.names)
    return _rewrite.finish(args, rewrite)


def _options(args: argparse.Namespace, method: Method) -> Options:
    known = ("weights", "scale", "density", "scope", "epsilon", "outliers", "t", "axis", "seed")
    given = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    unread = [name for name in given if name not in method.options]
    if unread:
        raise _config.UsageError(
            f"--method {args.method} does not read --{unread[0]}; it reads "
            f"{', '.join('--' + name for name in method.options) or 'no options'}"
        )
    lacking = [name for name in method.required if name not in given]
    if lacking:
        raise _config.UsageError(f"--method {args.method} needs --{lacking[0]}")
    given.pop("scope", None)
    _checks.within(0, 1, density=given.get("density", 0), outliers=given.get("outliers", 0))
    return Options(**given)


def _report(args: argparse.Namespace, first: Opened, models: Sequence[Opened]) -> Report:
    """What will be merged and what stays; every difference named unless it is to be kept.

    Raises:
      ValueError: if names or shapes differ and `--on-mismatch keep` was not given.
    """
    chosen = trees.mask(first.specs, _inputs.selected(args, first.specs))
    wanted = {p: s for p, s in first.specs.items() if chosen[p] and trees.is_inexact(s)}
    others = [model for model in models if model is not first]
    if args.on_mismatch == "error":
        where = trees.any_of(_inputs.selected(args, first.specs))
        named = {first.name: wanted}
        for model in others:
            named[model.name] = {
                path: spec
                for path, spec in model.specs.items()
                if path in wanted or (where(path, spec) and path not in first.specs)
            }
        _checks.same_leaves(**named)
    missing = [p for p in wanted if any(p not in model.specs for model in others)]
    misshapen = {
        path: model.specs[path].shape
        for model in others
        for path in wanted
        if path in model.specs and model.specs[path].shape != wanted[path].shape
    }
    left = {p: f"{p!r} is {list(shape)} elsewhere" for p, shape in misshapen.items()}
    kept = {
        p: "outside --where" if not chosen[p] else "not a floating-point array"
        for p in first.specs
        if p not in wanted
    } | left
    merged = [p for p in wanted if p not in kept and p not in missing]
    extra = [p for model in others for p in model.specs if p not in first.specs]
    return Report(
        merged=tuple(merged),
        kept=tuple(Kept(path, reason) for path, reason in kept.items() if path not in missing),
        missing=tuple(missing),
        extra=tuple(dict.fromkeys(extra)),
        shapes={path: spec.shape for path, spec in first.specs.items()},
        sizes={p: math.prod(s.shape) for p, s in first.specs.items() if trees.is_inexact(s)},
    )


def _leafwise(
    first: Opened,
    models: Sequence[Opened],
    statistics: Sequence[Opened],
    method: Method,
    options: Options,
) -> Callable[[str], Any]:
    # One program per size: pieces of one length, whatever tensor they are of, share it.
    piecewise = jax.jit(lambda x: method.merge(x, options)[PIECE])
    stream = None if method.stream is None else method.stream(options)

    def produce(path: str) -> Any:
        tensors = [one.tensors[path] for one in models]
        if all(one is not first for one in models):
            tensors.insert(0, first.tensors[path])
        given = [one.tensors.get(path) for one in statistics]
        x = Stored(path, tensors, len(models), given)
        if method.is_elementwise:
            return (np.asarray(piecewise(piece)) for piece in pieces(x, _rewrite.BLOCK))
        if stream is not None and _is_large(x):
            return stream(x)
        return np.asarray(method.merge(whole(x), options)[path])

    return produce


def _is_large(x: Stored) -> bool:
    """More than a piece. Streams work in single precision, so double precision is merged whole."""
    is_double = any(tensor.dtype in ("F64", "C64") for tensor in x.tensors)
    return math.prod(shape(x)) > _rewrite.BLOCK and not is_double


def _globally(
    base: Opened, models: Sequence[Opened], paths: Sequence[str], options: Options
) -> Callable[[str], Any]:
    """TIES of whole models; the passes begin when the first tensor is asked for."""
    difference = jax.jit(lambda after, before: transforms.task_vector(after, before))
    total = sum(math.prod(base.specs[path].shape) for path in paths)

    def taus(path: str) -> Iterator[list[np.ndarray]]:
        for start, *rest in _pieces([one.tensors[path] for one in [base, *models]]):
            yield [np.asarray(difference(one, start)) for one in rest]

    @jax.jit
    def combined(start: jax.Array, kept: list[jax.Array], majority: jax.Array) -> jax.Array:
        summed = sum(kept[1:], kept[0])
        signs = jnp.where(summed == 0, majority.astype(summed.dtype), jnp.sign(summed))
        merged = transforms.disjoint_merge(kept, signs, options.weights)
        return transforms.apply_task_vectors(start, [merged], scale=options.scale)

    @functools.cache
    def trim() -> _ties.Trim:
        done = _rewrite.progress(_ties.PASSES * 4 * total, "ranking: ")

        def counted(path: str) -> Iterator[list[np.ndarray]]:
            for piece in taus(path):
                yield piece
                done(piece[0].nbytes)

        return _ties.measure(paths, counted, len(models), total, options.density)

    def produce(path: str) -> Iterator[np.ndarray]:
        found = trim()
        seen = found.before[path].copy()
        starts = safetensors.blocks(base.tensors[path], _rewrite.BLOCK)
        for start, piece in zip(starts, taus(path), strict=True):
            kept = [_ties.trimmed(found, tau, i, seen) for i, tau in enumerate(piece)]
            yield np.asarray(combined(start, kept, np.int32(found.majority)))

    return produce


def _pieces(tensors: Sequence[safetensors.Tensor]) -> Iterator[tuple[np.ndarray, ...]]:
    return zip(*(safetensors.blocks(tensor, _rewrite.BLOCK) for tensor in tensors), strict=True)
