"""Parameter transfer `theta_target = alpha * adapt(theta_source)`: checked, reported, pure.

`plan_transfer` decides on names and shapes; `apply_plan` does the arithmetic and composes with
`jit`, `vmap`, `grad` and sharding; `transfer` is both.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kdtl_jax import trees
from kdtl_jax._types import Params
from kdtl_jax.transforms import _leaves, _mismatch
from kdtl_jax.transforms._leaves import Coefficient
from kdtl_jax.transforms._mismatch import Shape
from kdtl_jax.transforms._plan import (
    LeafStep,
    OnExtra,
    OnMismatch,
    OnMissing,
    Plan,
    plan_transfer,
)
from kdtl_jax.transforms._rename import Rename
from kdtl_jax.transforms._report import Report


def transfer(
    source: Params,
    target: Params,
    *,
    where: trees.Selector = trees.everything,
    rename: Rename = (),
    alpha: Coefficient = 1.0,
    on_missing: OnMissing = "error",
    on_extra: OnExtra = "error",
    on_mismatch: OnMismatch = _mismatch.raise_on_mismatch,
    check_finite: bool = True,
) -> tuple[Params, Report]:
    """Fills `target` from `source`: `theta_target = alpha * adapt(theta_source)`.

    Leaves are matched by canonical path, so trees of different frameworks and containers can be
    combined (Linen variables with their collections, boxed leaves, NNX states, Equinox modules,
    Haiku dicts). By default everything must match exactly. The result has the target's structure,
    shapes and dtypes; NumPy leaves of the target stay NumPy. Values are copied, so donating the
    result never deletes the source. Integers, PRNG keys and functions are never transferred and
    keep the target's value.

    Only names and shapes are compared: a square kernel stored `(out, in)` fits one stored
    `(in, out)`, so transpose the source first when conventions differ. A `weight` for a `kernel`
    is refused if no shape shows that this was done.

    Args:
      source: the tree that values come from; any pytree.
      target: the tree to fill. Leaves may be `jax.ShapeDtypeStruct` if they are all filled. The
        result keeps the sharding that they carry, or that arrays are committed to.
      where: selects the target leaves to fill. Source leaves whose (new) path it does not select
        are ignored.
      rename: ordered `[(regex, replacement), ...]` from source to target paths: the regex matches
        a whole path, the first match wins, each rule is applied once, and None drops the leaf.
        Or a function from a path to a path, a sequence of paths, or None.
      alpha: a coefficient as in `scale`, by target path.
      on_missing: `"keep"` lets target leaves that the source lacks keep their value.
      on_extra: `"ignore"` leaves out source leaves that have no place in the target.
      on_mismatch: a policy for leaves of another shape: `raise_on_mismatch`, `keep_on_mismatch`,
        `crop`, `pad`, `crop_or_pad`, `select_uniform`, `select_with(...)`, `resize_linear`, or a
        function `(source_leaf, target_shape, path) -> array or None`, which is called for leaves
        of equal shapes too; or ordered rules `[(selector, policy), ...]`, with `raise_on_mismatch`
        for the rest.
      check_finite: whether to look for NaN and infinity in concrete results (one pass over the
        values).

    Returns:
      `(params, report)`. The report is data and is not printed; it does not pass through `jit`.

    Raises:
      ValueError: naming every leaf that is missing, extra or misshapen (or complex when the
        target is real), every unused rule and rename collision, and every abstract leaf that is
        not filled.
    """
    plan = plan_transfer(
        source,
        target,
        where=where,
        rename=rename,
        alpha=alpha,
        on_missing=on_missing,
        on_extra=on_extra,
        on_mismatch=on_mismatch,
    )
    params = apply_plan(plan, source, target)
    flat = trees.flatten(params)
    filled_paths = plan.report.transferred if check_finite else ()
    report = plan.report._replace(
        nonfinite=tuple(path for path in filled_paths if not _is_finite(flat[path])),
        untied=_untied(trees.flatten(target), flat),
    )
    return params, report


def apply_plan(plan: Plan, source: Params, target: Params) -> Params:
    """Carries out a plan. Pure, so it can be used inside `jit`, `vmap` and `grad`.

    Args:
      plan: from `plan_transfer`; close over it, do not pass it through `jit`.
      target: leaves that the plan fills may be abstract.

    Raises:
      ValueError: if the trees are not those of the plan, or an abstract leaf is not filled.
    """
    source_leaves, target_leaves = trees.flatten(source), trees.flatten(target)
    source_shapes = {
        path: np.shape(source_leaves[path]) for path in plan.source_shapes if path in source_leaves
    }
    _check_shapes("source", plan.source_shapes, source_shapes)
    _check_shapes(
        "target", plan.target_shapes, {p: np.shape(leaf) for p, leaf in target_leaves.items()}
    )
    values = [
        target_leaves[s.path] if s.source is None else source_leaves[s.source] for s in plan.steps
    ]
    abstract = [
        step.path
        for step, value in zip(plan.steps, values, strict=True)
        if isinstance(value, jax.ShapeDtypeStruct)
    ]
    if abstract:
        raise ValueError(
            f"{abstract[:8]} would stay abstract (jax.ShapeDtypeStruct): nothing fills "
            "these target leaves, or the source has no values there. Initialize the target, or "
            "transfer every leaf; integers and PRNG keys are never transferred."
        )
    # Leaves that share one array in both source and target are filled once, so ties survive.
    filled_by_tie: dict[tuple[int, int], Any] = {}
    out: list[Any] = []
    for step, value in zip(plan.steps, values, strict=True):
        tie = (id(value), id(target_leaves[step.path]))
        if step.source is None:
            out.append(value)
        elif step.policy is None and step.alpha is None:
            if tie not in filled_by_tie:
                filled_by_tie[tie] = _fill(step, value, target_leaves[step.path])
            out.append(filled_by_tie[tie])
        else:
            out.append(_fill(step, value, target_leaves[step.path]))
    return jax.tree.unflatten(jax.tree.structure(target), out)


def _fill(step: LeafStep, value: Any, template: Any) -> Any:
    if step.policy is not None:
        value = step.policy(value, np.shape(template), step.path)
    if step.alpha is not None:
        value = _leaves.multiply(value, step.alpha)
    if isinstance(template, np.ndarray) and not isinstance(value, Tracer):
        return np.array(value, template.dtype)
    value = jnp.asarray(value, _leaves.canonical_dtype(template))
    if isinstance(value, Tracer):
        return value
    # A copy, not an alias: a step that donates the student must not delete the teacher.
    is_placed = isinstance(template, jax.ShapeDtypeStruct) or getattr(template, "committed", False)
    sharding = getattr(template, "sharding", None) if is_placed else None
    if sharding is not None and len(sharding.device_set) > 1:
        value = jnp.copy(value)  # one of the devices would share it, whatever may_alias is
    return jax.device_put(value, sharding, may_alias=False)


def _is_finite(leaf: Any) -> bool:
    """Whether a concrete array holds no NaN or infinity; unknown counts as finite."""
    if isinstance(leaf, Tracer):
        return True
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return True
    # NumPy reads a CPU array in place and compiles nothing; elsewhere the device does the work.
    on_host = isinstance(leaf, np.ndarray) or next(iter(leaf.devices())).platform == "cpu"
    return bool(np.isfinite(np.asarray(leaf)).all() if on_host else jnp.isfinite(leaf).all())


def _untied(
    old_leaves: Mapping[str, Any], new_leaves: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Groups of paths that shared one array and hold different ones now."""
    groups: dict[int, list[str]] = {}
    for path, leaf in old_leaves.items():
        if isinstance(leaf, (jax.Array, np.ndarray)) and trees.is_inexact(leaf):
            groups.setdefault(id(leaf), []).append(path)
    return tuple(
        tuple(paths)
        for paths in groups.values()
        if len(paths) > 1 and any(new_leaves[path] is not new_leaves[paths[0]] for path in paths)
    )


def _check_shapes(name: str, planned: Mapping[str, Shape], received: Mapping[str, Shape]) -> None:
    if planned == received:
        return
    different = [
        f"{path}: planned {list(planned[path]) if path in planned else 'nothing'}, got "
        f"{list(received[path]) if path in received else 'nothing'}"
        for path in {**planned, **received}
        if planned.get(path) != received.get(path)
    ]
    raise ValueError(f"the {name} is not the one that was planned for: {'; '.join(different[:8])}.")
