"""Planning a transfer: everything that names and shapes decide, in Python, on abstract values."""

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


class Step(NamedTuple):
    """How one target leaf is filled; if `source` is None, it keeps its own value."""

    path: str
    source: str | None = None
    policy: Policy | None = None
    alpha: Scalar | None = None


class Plan(NamedTuple):
    """A checked transfer: one step per target leaf, in tree order, and a report of what it will do.

    Close over it: it holds strings and functions and cannot be an argument of `jit`.
    """

    steps: tuple[Step, ...]
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
    _one_of("on_missing", on_missing, ("error", "keep"))
    _one_of("on_extra", on_extra, ("error", "ignore"))
    have, want = trees.flatten(source), trees.flatten(target)
    sources = {new: old for old, news in destinations(list(have), rename).items() for new in news}
    chosen = jax.tree.leaves(trees.mask(target, where))
    aims = [path for path, is_chosen in zip(want, chosen, strict=True) if is_chosen]
    _codes.refuse_codes(want, aims)
    found = [sources[path] for path in aims if path in sources]
    # Integers of the source are reported as missing, together with the other missing leaves.
    _codes.refuse_codes(have, [path for path in found if trees.is_inexact(have[path])])
    policies = _policy_per_leaf(target, on_mismatch)
    tried: set[Any] = set()
    decisions = [
        _decide(path, leaf, is_chosen, sources.get(path), have, policy, tried)
        for (path, leaf), is_chosen, policy in zip(want.items(), chosen, policies, strict=True)
    ]
    decisions = _refuse_either_way(decisions, policies, have, want)
    extra, unused = _leftovers(have, want, sources, where)
    _raise_problems(decisions, extra, list(have), on_missing, on_extra)
    filled = [isinstance(decision, Step) for decision in decisions]
    alphas = _leaves.coefficients(alpha, target, filled)
    steps = tuple(
        decision._replace(alpha=None if _is_one(value) else value)
        if isinstance(decision, Step)
        else Step(decision.path)
        for decision, value in zip(decisions, alphas, strict=True)
    )
    report = _report(steps, have, want)._replace(
        kept=tuple(d for d in decisions if isinstance(d, Kept)),
        missing=tuple(d.path for d in decisions if isinstance(d, _Missing)),
        extra=tuple(extra),
        unused=tuple(unused),
    )
    return Plan(
        steps=steps,
        source_shapes={s.source: np.shape(have[s.source]) for s in steps if s.source is not None},
        target_shapes={path: np.shape(leaf) for path, leaf in want.items()},
        report=report,
    )


def _decide(
    path: str,
    leaf: Any,
    is_chosen: bool,
    old: str | None,
    have: Mapping[str, Any],
    policy: Policy,
    tried: set[Any],
) -> Step | Kept | _Missing | _Misfit:
    if not trees.is_inexact(leaf):
        return Kept(path, "not a floating-point array")
    if not is_chosen:
        return Kept(path, "outside where")
    if old is None:
        return _Missing(path, "not in the source")
    value = have[old]
    if not trees.is_inexact(value):
        return _Missing(path, f"the source's is {getattr(value, 'dtype', type(value).__name__)}")
    if jnp.issubdtype(_dtype(value), jnp.complexfloating) and not jnp.issubdtype(
        _dtype(leaf), jnp.complexfloating
    ):
        return _Misfit(path, f"{path}: {_dtype(value)} cannot become {_dtype(leaf)}")
    shape = np.shape(leaf)
    fits = np.shape(value) == shape
    if fits and _mismatch.leaves_fitting_alone(policy):
        return Step(path, old)
    dtype = _leaves.canonical_dtype(value)
    trial = (policy, np.shape(value), dtype, shape)
    if trial in tried:
        return Step(path, old, policy)
    try:
        # Shapes only: what the policy returns is checked before anything is computed.
        abstract = jax.ShapeDtypeStruct(np.shape(value), dtype)
        result = jax.eval_shape(lambda x: policy(x, shape, path), abstract)
    except ValueError as problem:
        return _Misfit(path, str(problem))
    if result is None and fits:
        return Step(path, old)
    if result is None:
        return Kept(path, f"source{list(np.shape(value))} has another shape")
    if getattr(result, "shape", None) != shape:
        return _Misfit(
            path,
            f"{path}: the policy {_name(policy)} made {getattr(result, 'shape', result)} from "
            f"source{list(np.shape(value))}, not target{list(shape)}.",
        )
    if policy in _mismatch.PATH_FREE:
        tried.add(trial)
    return Step(path, old, policy)


def _refuse_either_way(
    decisions: Sequence[Step | Kept | _Missing | _Misfit],
    policies: Sequence[Policy],
    have: Mapping[str, Any],
    want: Mapping[str, Any],
) -> list[Step | Kept | _Missing | _Misfit]:
    """Refuses a `weight` for a `kernel` that would fit both as it is and transposed.

    PyTorch and Equinox store outputs first, Flax stores them last. A leaf that only fits as it is
    shows that the source was transposed already, or never had to be.
    """

    def crosses(decision: Any, policy: Policy) -> bool:
        if not isinstance(decision, Step) or not _mismatch.leaves_fitting_alone(policy):
            return False
        if decision.source is None or decision.policy is not None:
            return False
        ends = {re.split("[./]", name)[-1] for name in (decision.source, decision.path)}
        return ends == {"weight", "kernel"} and np.ndim(have[decision.source]) > 1

    def fits_either_way(decision: Any) -> bool:
        long = [length for length in np.shape(want[decision.path]) if length > 1]
        return len(set(long)) < len(long)

    both = zip(decisions, policies, strict=True)
    crossing = [decision for decision, policy in both if crosses(decision, policy)]
    if not all(map(fits_either_way, crossing)):
        return list(decisions)
    refused = {
        decision.path: _Misfit(
            decision.path,
            f"{decision.path}: source{list(np.shape(want[decision.path]))} fits both as it is and "
            "transposed, and a 'weight' is stored [out, in], a 'kernel' [in, out]. Transpose the "
            "source (interop.naming.from_torch), or pass on_mismatch= a function that returns the "
            "leaf as it should be (None keeps it as it is).",
        )
        for decision in crossing
    }
    return [refused.get(decision.path, decision) for decision in decisions]


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
    have: Mapping[str, Any],
    want: Mapping[str, Any],
    sources: Mapping[str, str],
    where: trees.Selector,
) -> tuple[list[str], list[str]]:
    """Source leaves without a destination: those asked for, and those not asked for."""
    try:
        selects = trees.any_of(where)
    except ValueError:  # a tree of bools says nothing about paths outside the target
        selects = trees.any_of(trees.everything)
    # A leaf that goes to more than one place needs each of them.
    homeless = {old for new, old in sources.items() if new not in want and selects(new, have[old])}
    candidates = [path for path, leaf in have.items() if trees.is_inexact(leaf)]
    extra = [path for path in candidates if path in homeless]
    used = {old for new, old in sources.items() if new in want and selects(new, want[new])}
    return extra, [path for path in candidates if path not in homeless and path not in used]


def _raise_problems(
    decisions: Sequence[Step | Kept | _Missing | _Misfit],
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


def _listed(shown: Sequence[str], total: int) -> list[str]:
    more = [f"  and {total - len(shown)} more"] if total > len(shown) else []
    return [f"  {line}" for line in shown] + more


def _report(steps: Sequence[Step], have: Mapping[str, Any], want: Mapping[str, Any]) -> Report:
    filled = [(step, have[step.source]) for step in steps if step.source is not None]
    arrays = {path: leaf for path, leaf in want.items() if hasattr(leaf, "shape")}
    inexact = {path: leaf for path, leaf in want.items() if trees.is_inexact(leaf)}
    return Report(
        copied=tuple(s.path for s, _ in filled if s.policy is None and s.alpha is None),
        scaled=tuple(s.path for s, _ in filled if s.policy is None and s.alpha is not None),
        adapted=tuple(
            Adapted(s.path, np.shape(value), np.shape(want[s.path]), _name(s.policy))
            for s, value in filled
            if s.policy is not None
        ),
        cast=tuple(
            Cast(s.path, str(_dtype(value)), str(_dtype(want[s.path])))
            for s, value in filled
            if _dtype(value) != _dtype(want[s.path])
        ),
        shapes={path: tuple(leaf.shape) for path, leaf in arrays.items()},
        sizes={path: int(np.prod(np.shape(x), dtype=np.int64)) for path, x in inexact.items()},
        factors={s.path: _known(s.alpha) for s, _ in filled if s.alpha is not None},
    )


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def _name(policy: Any) -> str:
    return getattr(policy, "__name__", type(policy).__name__)


def _is_one(value: Any) -> bool:
    return value is None or _known(value) == 1


def _known(alpha: Any) -> float | None:
    """A plain number, or None; reading traced or device values would block or fail."""
    known = (int, float, np.integer, np.floating)
    return float(alpha) if isinstance(alpha, known) else None


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
