"""Heads and vocabularies: replaces a head, and carries classes and tokens over by name."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import _width
from kdtl_jax.transforms._rename import Rename
from kdtl_jax.transforms._report import Report
from kdtl_jax.transforms._transfer import transfer
from kdtl_jax.transforms._width import Axis, AxisSpec


def replace_head(
    source: Params,
    target: Params,
    head: trees.Selector,
    *,
    expect: int | str | None = "some",
    rename: Rename = (),
) -> tuple[Params, Report]:
    """Takes everything from the source except the head, which keeps the target's initialization.

    The leaves that keep their initialization are verified to be exactly those that `head` selects:
    a leaf of the body that does not match raises an error instead of silently staying random.

    Args:
      source: the pretrained parameters, with their own head.
      target: freshly initialized parameters of the new model.
      head: selects the leaves of the target that are the new head. The source's own head is
        dropped if it has the same paths; otherwise drop it by renaming it to None.
      expect: the number of leaves selected, as in `trees.mask`.
      rename: as in `transfer`.

    Returns:
      `(params, report)`; `report.kept` names the head.

    Raises:
      ValueError: if `head` matches nothing or everything, a leaf of the body is missing, extra
        or misshapen, or one of the head's leaves is abstract.
    """
    is_head = trees.mask(target, head, expect=expect)
    body = jax.tree.map(lambda h: not h, is_head)
    if not any(jax.tree.leaves(body)):
        raise ValueError("head selects every leaf of the target; nothing is left.")
    selects = None if trees.is_bool_tree(head) else trees.none_of(head)
    params, report = transfer(
        source, target, where=body if selects is None else selects, rename=rename
    )
    fresh = {
        path
        for (path, leaf), h in zip(
            trees.flatten(target).items(), jax.tree.leaves(is_head), strict=True
        )
        if h and trees.is_inexact(leaf)
    }
    kept = {k.path for k in report.kept if k.path in report.sizes}
    if kept != fresh:
        raise ValueError(
            f"re-initialized {sorted(kept - fresh)} beyond the head, and not "
            f"{sorted(fresh - kept)} of it."
        )
    return params, report


def index_map(old: Sequence[Hashable], new: Sequence[Hashable]) -> np.ndarray:
    """The old position of each new class or token: `[len(new)]` int64, -1 if `old` lacks it.

    Raises:
      ValueError: if a name occurs twice in either.
    """
    for name, entries in (("old", old), ("new", new)):
        if len(set(entries)) != len(entries):
            twice = [entry for entry in dict.fromkeys(entries) if entries.count(entry) > 1]
            raise ValueError(f"{name} names must be distinct, got {twice[:8]} twice.")
    position = {entry: i for i, entry in enumerate(old)}
    return np.array([position.get(entry, -1) for entry in new], np.int64)


def remap_units(
    params: Params,
    spec: AxisSpec,
    indices: Mapping[str, Any],
    *,
    fresh: Params | None = None,
) -> Params:
    """Reorders classes or tokens along named axes: new unit `j` is old unit `indices[name][j]`.

    Args:
      spec: the names of the axes, e.g. `("head/kernel", (None, "class"))`.
      indices: `{name: [n] integers}` from `index_map`; -1 marks a new unit.
      fresh: the values of new units: a tree of the resulting shapes, e.g. the new model's
        initialization. None gives them the mean over the old units.

    Raises:
      ValueError: as in `axis_sizes`; also if a name is unknown, an index is out of range, or
        `fresh` has another structure or other shapes.
    """
    axes, sizes = _width.axes_and_sizes(params, spec)
    index: dict[str, np.ndarray] = {}
    for name, value in indices.items():
        size = _width.size_of_name(name, sizes)
        value = np.asarray(value)
        _checks.integers(**{name: value})
        _checks.rank(1, 1, **{name: value})
        _checks.within(-1, size - 1, **{name: value})
        index[name] = value

    def carry(leaf: Array, position: int, axis: Axis, units: np.ndarray) -> Array:
        split = _width.split_axis(leaf, position, axis)
        taken = jnp.take(split, np.maximum(units, 0), axis=position + 1)
        mean = jnp.mean(_numerics.upcast(split), axis=position + 1, keepdims=True)
        is_new = _along(units < 0, position + 1, split.ndim)
        return _width.join_axis(jnp.where(is_new, mean.astype(split.dtype), taken), position)

    mapped = _width.over_axes(params, axes, index, carry)
    return mapped if fresh is None else _filled_from(mapped, fresh, axes, index)


def _filled_from(
    mapped: Params, fresh: Params, axes: Sequence[tuple[Axis, ...]], index: Mapping[str, np.ndarray]
) -> Params:
    """Entries that belong to a new unit along any axis, from `fresh`."""
    if jax.tree.structure(fresh) != jax.tree.structure(mapped):
        raise ValueError("fresh must have the structure of the parameters.")
    out: list[Any] = []
    for (path, leaf), new, leaf_axes in zip(
        trees.flatten(mapped).items(), jax.tree.leaves(fresh), axes, strict=True
    ):
        is_new = None
        for position, axis in enumerate(leaf_axes):
            if axis.name is None or axis.name not in index:
                continue
            units = np.tile(np.repeat(index[axis.name] < 0, axis.inner), axis.outer)
            along = _along(units, position, len(leaf_axes))
            is_new = along if is_new is None else is_new | along
        if is_new is None:
            out.append(leaf)
            continue
        if np.shape(new) != np.shape(leaf):
            raise ValueError(
                f"fresh must have the new shapes, got {list(np.shape(new))} at {path!r}, "
                f"expected {list(np.shape(leaf))}."
            )
        is_new = np.broadcast_to(is_new, np.shape(leaf))
        out.append(jnp.where(is_new, jnp.asarray(new, leaf.dtype), leaf))
    return jax.tree.unflatten(jax.tree.structure(mapped), out)


def _along(flags: np.ndarray, position: int, ndim: int) -> np.ndarray:
    shape = [1] * ndim
    shape[position] = len(flags)
    return flags.reshape(shape)
