"""Plans a transfer from names and shapes, in Python, on abstract values."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import PyTree, Scalar
from kdtl_jax.transforms import _codes, _leaves, _mismatch
from kdtl_jax.transforms._leaves import Coefficient
from kdtl_jax.transforms._mismatch import Policy, Shape
from kdtl_jax.transforms._rename import Rename, destinations
from kdtl_jax.transforms._report import Adapted, Cast, Kept, Report

OnMismatch = Policy | Sequence[tuple[trees.Selector, Policy]]
OnMissing = Literal["error", "keep"]
OnExtra = Literal["error", "ignore"]


class LeafStep(NamedTuple):
    """One target leaf and its source; if `source` is None, it keeps its own value."""

    path: str
    source: str | None = None
    policy: Policy | None = None
    alpha: Scalar | None = None


class Plan(NamedTuple):
    """A checked transfer: one step per target leaf, in tree order, and a report of what it will do.

    Close over it: it holds strings and functions and cannot be an argument of `jit`.
    """

    steps: tuple[LeafStep, ...]
    source_shapes: Mapping[str, Shape]
    target_shapes: Mapping[str, Shape]
    report: Report


class _Missing(NamedTuple):
    path: str
    reason: str


class _Misfit(NamedTuple):
    path: str
    reason: str


def plan_transfer(
    source: PyTree,
    target: PyTree,
    *,
    where: trees.Selector = trees.everything,
    rename: Rename = (),
    alpha: Coefficient = 1.0,
    on_missing: OnMissing = "error",
    on_extra: OnExtra = "error",
    on_mismatch: OnMismatch = _mismatch.raise_on_mismatch,
) -> Plan:
    """Plans a transfer from names and shapes alone, without arithmetic or memory.

    Both trees may be abstract, e.g. from `jax.eval_shape(model.init, key, inputs)`. Arguments and
    errors are those of `transfer`. `plan_transfer(...).report` is a dry run to print or to write
    assertions about; `apply_plan(plan, source, target)` carries it out.
    """
    _check_option("on_missing", on_missing, ("error", "keep"))
    _check_option("on_extra", on_extra, ("error", "ignore"))
    source_leaves, target_leaves = trees.flatten(source), trees.flatten(target)
    sources = {
        new: old for old, news in destinations(list(source_leaves), rename).items() for new in news
    }
    flags = jax.tree.leaves(trees.mask(target, where))
    selected = [path for path, is_selected in zip(target_leaves, flags, strict=True) if is_selected]
    _codes.refuse_codes(target_leaves, selected)
    matched = [sources[path] for path in selected if path in sources]
    # Integers of the source are reported as missing, together with the other missing leaves.
    _codes.refuse_codes(
        source_leaves, [path for path in matched if trees.is_inexact(source_leaves[path])]
    )
    policies = _policy_per_leaf(target, on_mismatch)
    verified: set[Any] = set()
    decisions = [
        _decide(path, leaf, is_selected, sources.get(path), source_leaves, policy, verified)
        for (path, leaf), is_selected, policy in zip(
            target_leaves.items(), flags, policies, strict=True
        )
    ]
    decisions = _refuse_ambiguous_kernels(decisions, policies, source_leaves, target_leaves)
    extra, unused = _leftovers(source_leaves, target_leaves, sources, where)
    _raise_problems(decisions, extra, list(source_leaves), on_missing, on_extra)
    is_filled = [isinstance(decision, LeafStep) for decision in decisions]
    alphas = _leaves.coefficients(alpha, target, is_filled)
    steps = tuple(
        decision._replace(alpha=None if _as_number(value) == 1 else value)
        if isinstance(decision, LeafStep)
        else LeafStep(decision.path)
        for decision, value in zip(decisions, alphas, strict=True)
    )
    report = _report(steps, source_leaves, target_leaves)._replace(
        kept=tuple(d for d in decisions if isinstance(d, Kept)),
        missing=tuple(d.path for d in decisions if isinstance(d, _Missing)),
        extra=tuple(extra),
        unused=tuple(unused),
    )
    return Plan(
        steps=steps,
        source_shapes={
            s.source: np.shape(source_leaves[s.source]) for s in steps if s.source is not None
        },
        target_shapes={path: np.shape(leaf) for path, leaf in target_leaves.items()},
        report=report,
    )


def _decide(
    path: str,
    leaf: Any,
    is_selected: bool,
    source_path: str | None,
    source_leaves: Mapping[str, Any],
    policy: Policy,
    verified: set[Any],
) -> LeafStep | Kept | _Missing | _Misfit:
    if not trees.is_inexact(leaf):
        return Kept(path, "not a floating-point array")
    if not is_selected:
        return Kept(path, "outside where")
    if source_path is None:
        return _Missing(path, "not in the source")
    value = source_leaves[source_path]
    if not trees.is_inexact(value):
        return _Missing(path, f"the source's is {getattr(value, 'dtype', type(value).__name__)}")
    if jnp.issubdtype(_dtype(value), jnp.complexfloating) and not jnp.issubdtype(
        _dtype(leaf), jnp.complexfloating
    ):
        return _Misfit(path, f"{path}: {_dtype(value)} cannot become {_dtype(leaf)}")
    shape = np.shape(leaf)
    fits = np.shape(value) == shape
    if fits and _mismatch.keeps_fitting_leaves(policy):
        return LeafStep(path, source_path)
    dtype = _leaves.canonical_dtype(value)
    trial = (policy, np.shape(value), dtype, shape)
    if trial in verified:
        return LeafStep(path, source_path, policy)
    try:
        # Shapes only: what the policy returns is checked before anything is computed.
        abstract = jax.ShapeDtypeStruct(np.shape(value), dtype)
        result = jax.eval_shape(lambda x: policy(x, shape, path), abstract)
    except ValueError as problem:
        return _Misfit(path, str(problem))
    if result is None and fits:
        return LeafStep(path, source_path)
    if result is None:
        return Kept(path, f"source{list(np.shape(value))} has another shape")
    if getattr(result, "shape", None) != shape:
        return _Misfit(
            path,
            f"{path}: the policy {_name(policy)} made {getattr(result, 'shape', result)} from "
            f"source{list(np.shape(value))}, not target{list(shape)}.",
        )
    if policy in _mismatch.PATH_FREE:
        verified.add(trial)
    return LeafStep(path, source_path, policy)


def _refuse_ambiguous_kernels(
    decisions: Sequence[LeafStep | Kept | _Missing | _Misfit],
    policies: Sequence[Policy],
    source_leaves: Mapping[str, Any],
    target_leaves: Mapping[str, Any],
) -> list[LeafStep | Kept | _Missing | _Misfit]:
    """Refuses a `weight` for a `kernel` that would fit with and without transposing it.

    PyTorch and Equinox store outputs first, Flax stores them last. A leaf that only fits without
    transposing shows that the source needs no transposition.
    """

    def crosses(decision: Any, policy: Policy) -> bool:
        if not isinstance(decision, LeafStep) or not _mismatch.keeps_fitting_leaves(policy):
            return False
        if decision.source is None or decision.policy is not None:
            return False
        names = {re.split("[./]", name)[-1] for name in (decision.source, decision.path)}
        return names == {"weight", "kernel"} and np.ndim(source_leaves[decision.source]) > 1

    def fits_either_way(decision: Any) -> bool:
        lengths = [length for length in np.shape(target_leaves[decision.path]) if length > 1]
        return len(set(lengths)) < len(lengths)

    pairs = zip(decisions, policies, strict=True)
    crossing = [decision for decision, policy in pairs if crosses(decision, policy)]
    if not all(map(fits_either_way, crossing)):
        return list(decisions)
    misfits = {
        decision.path: _Misfit(
            decision.path,
            f"{decision.path}: source{list(np.shape(target_leaves[decision.path]))} fits both as "
            "it is and transposed, and a 'weight' is stored [out, in], a 'kernel' [in, out]. "
            "Transpose the source (interop.naming.from_torch), or pass on_mismatch= a function "
            "that returns the leaf as it should be (None keeps it as it is).",
        )
        for decision in crossing
    }
    return [misfits.get(decision.path, decision) for decision in decisions]


def _policy_per_leaf(target: PyTree, on_mismatch: OnMismatch) -> list[Policy]:
    if callable(on_mismatch):
        return [on_mismatch] * len(jax.tree.leaves(target))
    if not _leaves.is_rules(on_mismatch) or not all(callable(p) for _, p in on_mismatch):
        raise ValueError(
            "on_mismatch must be a policy such as transforms.crop, a function "
            "(source_leaf, target_shape, path) -> array, or rules [(selector, policy), ...], "
            f"got {on_mismatch!r}."
        )
    return _leaves.by_rules(target, on_mismatch, default=_mismatch.raise_on_mismatch)


def _leftovers(
    source_leaves: Mapping[str, Any],
    target_leaves: Mapping[str, Any],
    sources: Mapping[str, str],
    where: trees.Selector,
) -> tuple[list[str], list[str]]:
    """Source leaves without a destination: those that `where` selects, and all others."""
    try:
        selects = trees.any_of(where)
    except ValueError:  # a tree of bools only covers paths of the target
        selects = trees.any_of(trees.everything)
    # A leaf that goes to more than one place needs each of them.
    unplaced = {
        old
        for new, old in sources.items()
        if new not in target_leaves and selects(new, source_leaves[old])
    }
    candidates = [path for path, leaf in source_leaves.items() if trees.is_inexact(leaf)]
    extra = [path for path in candidates if path in unplaced]
    used = {
        old
        for new, old in sources.items()
        if new in target_leaves and selects(new, target_leaves[new])
    }
    return extra, [path for path in candidates if path not in unplaced and path not in used]


def _raise_problems(
    decisions: Sequence[LeafStep | Kept | _Missing | _Misfit],
    extra: Sequence[str],
    names: Sequence[str],
    on_missing: OnMissing,
    on_extra: OnExtra,
) -> None:
    missing = [d for d in decisions if isinstance(d, _Missing)]
    misfits = [d for d in decisions if isinstance(d, _Misfit)]
    lines: list[str] = []
    if missing and on_missing == "error":
        candidates = list(extra) or list(names)
        lines.append(
            f"the source lacks {len(missing)} leaves of the target (rename=, or on_missing='keep' "
            "to let them be):"
        )
        lines += _listed(
            [
                f"{d.path} ({d.reason}; nearest: {', '.join(trees.nearest(d.path, candidates))})"
                for d in missing[:10]
            ],
            len(missing),
        )
    if extra and on_extra == "error":
        lines.append(
            f"the target has no place for {len(extra)} leaves of the source (rename=, a rename to "
            "None, where=, or on_extra='ignore' to leave them out):"
        )
        lines += _listed(extra[:10], len(extra))
    if misfits:
        lines.append(f"{len(misfits)} leaves do not fit:")
        lines += _listed([d.reason for d in misfits[:10]], len(misfits))
    if lines:
        raise ValueError("\n".join(["source and target do not match.", *lines]))


def _listed(lines: Sequence[str], total: int) -> list[str]:
    remainder = [f"  and {total - len(lines)} more"] if total > len(lines) else []
    return [f"  {line}" for line in lines] + remainder


def _report(
    steps: Sequence[LeafStep], source_leaves: Mapping[str, Any], target_leaves: Mapping[str, Any]
) -> Report:
    pairs = [(step, source_leaves[step.source]) for step in steps if step.source is not None]
    arrays = {path: leaf for path, leaf in target_leaves.items() if hasattr(leaf, "shape")}
    inexact = {path: leaf for path, leaf in target_leaves.items() if trees.is_inexact(leaf)}
    return Report(
        copied=tuple(s.path for s, _ in pairs if s.policy is None and s.alpha is None),
        scaled=tuple(s.path for s, _ in pairs if s.policy is None and s.alpha is not None),
        adapted=tuple(
            Adapted(s.path, np.shape(value), np.shape(target_leaves[s.path]), _name(s.policy))
            for s, value in pairs
            if s.policy is not None
        ),
        cast=tuple(
            Cast(s.path, str(_dtype(value)), str(_dtype(target_leaves[s.path])))
            for s, value in pairs
            if _dtype(value) != _dtype(target_leaves[s.path])
        ),
        shapes={path: tuple(leaf.shape) for path, leaf in arrays.items()},
        sizes={path: int(np.prod(np.shape(x), dtype=np.int64)) for path, x in inexact.items()},
        factors={s.path: _as_number(s.alpha) for s, _ in pairs if s.alpha is not None},
    )


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def _name(policy: Any) -> str:
    return getattr(policy, "__name__", type(policy).__name__)


def _as_number(alpha: Any) -> float | None:
    """The value of a Python or NumPy number, else None: reading other values may block or fail."""
    number_types = (int, float, np.integer, np.floating)
    return float(alpha) if isinstance(alpha, number_types) else None


def _check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {list(options)}, got {value!r}.")
