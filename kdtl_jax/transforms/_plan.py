"""Planning a transfer: all that names and shapes decide, in Python and on abstract values."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import PyTree, Scalar
from kdtl_jax.transforms import _leaves, _mismatch
from kdtl_jax.transforms._leaves import Coefficient
from kdtl_jax.transforms._mismatch import Policy, Shape
from kdtl_jax.transforms._report import Adapted, Cast, Kept, Report

Rename = Sequence[tuple[str, str | None]] | Callable[[str], str | Sequence[str] | None]


def destinations(names: Sequence[str], rename: Rename) -> dict[str, tuple[str, ...]]:
    """`{source path: target paths}`; a dropped leaf has none.

    Raises:
      ValueError: if two source leaves get one target path, a rule is never used or is no
        regular expression, or following the rules leads back to where it began.
    """
    if callable(rename):
        found = {name: _as_paths(name, rename(name)) for name in names}
    else:
        found = _by_rules(names, rename)
    taken: dict[str, str] = {}
    for source, targets in found.items():
        for target in targets:
            if target in taken:
                raise ValueError(
                    f"rename sends both {taken[target]!r} and {source!r} to {target!r}. "
                    "Rename one of them elsewhere, or drop it with the rule (path, None)."
                )
            taken[target] = source
    return found


def _by_rules(
    names: Sequence[str], rules: Sequence[tuple[str, str | None]]
) -> dict[str, tuple[str, ...]]:
    patterns = [_compiled(pattern) for pattern, _ in rules]
    used = [False] * len(rules)

    def renamed(name: str) -> str | None:
        for i, (pattern, (_, replacement)) in enumerate(zip(patterns, rules, strict=True)):
            match = pattern.fullmatch(name)
            if match:
                used[i] = True
                return None if replacement is None else _expanded(match, replacement)
        return name

    single = {name: renamed(name) for name in names}
    for (pattern, _), was_used in zip(rules, used, strict=True):
        if not was_used:
            near = ", ".join(map(repr, trees.nearest(pattern, list(names))))
            raise ValueError(
                f"the rename rule {pattern!r} matches no path of the source, or earlier "
                f"rules take all it matches. It must match a whole path; nearest: {near}."
            )
    _no_cycles(single)
    return {name: () if new is None else (new,) for name, new in single.items()}


def _no_cycles(renamed: dict[str, str | None]) -> None:
    # Every rule is applied once, so a swap would be well defined; but a reader cannot tell it
    # from two rules that undo each other, and the commonest cause is the latter.
    for start in renamed:
        seen, here = [start], renamed[start]
        while here is not None and here in renamed and here not in seen:
            seen.append(here)
            here = renamed[here]
        if here == start and len(seen) > 1:
            raise ValueError(
                f"the rename rules form a cycle: {' -> '.join([*seen, start])}. If a swap is "
                "meant, pass a function path -> path instead of rules."
            )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the rename rule {pattern!r} is not a regular expression ({error})."
        ) from None


def _expanded(match: re.Match[str], replacement: str) -> str:
    try:
        return match.expand(replacement)
    except (re.error, IndexError) as error:
        raise ValueError(
            f"the replacement {replacement!r} of the rename rule {match.re.pattern!r} "
            f"cannot be filled in ({error})."
        ) from None


def _as_paths(name: str, result: str | Sequence[str] | None) -> tuple[str, ...]:
    paths = (result,) if isinstance(result, str) else () if result is None else result
    if not isinstance(paths, Sequence) or not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f"rename must return a path, several paths or None, got {result!r} for {name!r}."
        )
    return tuple(paths)


OnMismatch = Policy | Sequence[tuple[trees.Selector, Policy]]
OnMissing = Literal["error", "keep"]
OnExtra = Literal["error", "ignore"]


class Step(NamedTuple):
    """How one target leaf is filled; `source` None keeps the target's own value."""

    path: str
    source: str | None = None
    policy: Policy | None = None
    alpha: Scalar | None = None


class Plan(NamedTuple):
    """A checked transfer: one step per target leaf, in tree order, and what it will do.

    Close over it; it holds strings and functions and is not an argument of `jit`.
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
    """Everything about a transfer that names and shapes decide; no arithmetic, no memory.

    Both trees may be abstract, e.g. from `jax.eval_shape(model.init, key, inputs)`. Arguments and
    errors are those of `transfer`. `plan_transfer(...).report` is a dry run, to be printed or
    asserted on; `apply_plan(plan, source, target)` carries it out.
    """
    _one_of("on_missing", on_missing, ("error", "keep"))
    _one_of("on_extra", on_extra, ("error", "ignore"))
    have, want = trees.flatten(source), trees.flatten(target)
    sources = {new: old for old, news in destinations(list(have), rename).items() for new in news}
    chosen = jax.tree.leaves(trees.mask(target, where))
    policies = _policy_per_leaf(target, on_mismatch)
    tried: set[Any] = set()
    decisions = [
        _decide(path, leaf, is_chosen, sources.get(path), have, policy, tried)
        for (path, leaf), is_chosen, policy in zip(want.items(), chosen, policies, strict=True)
    ]
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
    """Source leaves that go nowhere: asked for but without a place; not asked for."""
    try:
        selects = trees.any_of(where)
    except ValueError:  # a tree of bools says nothing about paths outside the target
        selects = trees.any_of(trees.everything)
    # A leaf that goes to several places needs each of them.
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
        raise ValueError("\n".join(["transfer: source and target do not match.", *lines]))


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
    """A plain number; traced and device values are not read, which would wait, or fail."""
    known = (int, float, np.integer, np.floating)
    return float(alpha) if isinstance(alpha, known) else None


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
