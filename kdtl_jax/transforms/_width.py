r"""Named axes: with them, selecting, pruning, permuting or padding units is one gather.

An *axis spec* is ordered rules `[(selector, names)]`, one name per axis of the leaf:

    spec = [
        (r"block_\d+/up/kernel", ("embed", "mlp")),
        (r"block_\d+/up/bias", ("mlp",)),
        (r"block_\d+/down/kernel", (Axis("mlp", summed=True), "embed")),
        (".*", None),  # no named axes
    ]

All axes with one name are one set of units and change together. An axis without a name (None) is
not changed. A leaf that no rule covers raises an error, because a forgotten bias silently breaks a
network. Errors are ValueErrors: those of `axis_sizes`, an unknown name, an index or a size out of
range; TypeError if indices are not integers. Dtypes are kept.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, trees
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import _codes, _leaves


class Axis(NamedTuple):
    """A named axis with a structure; a plain string is `Axis(name)`.

    The axis has length `outer * size * inner`, laid out in this order, where `size` is the number
    of units. A fused query-key-value projection of `h` heads of width `d` is
    `Axis("heads", inner=d, outer=3)`; channels flattened after height and width are
    `Axis("channels", outer=height * width)`.

    `summed` marks the input side of a layer: an axis that the layer sums over. `widen` needs it.
    """

    name: str | None
    inner: int = 1
    outer: int = 1
    summed: bool = False


# The names of a leaf's axes, by selector; None for an axis, or a whole leaf, without names.
AxisSpec = Sequence[tuple[trees.Selector, Sequence[str | Axis | None] | None]]
_NONAMES: Any = object()


def axis_sizes(params: Params, spec: AxisSpec) -> dict[str, int]:
    """`{name: number of units}` of every named axis.

    Raises:
      ValueError: if a rule is unused, the number of names is not that of a leaf's axes, a
        floating-point leaf is not covered, or axes of one name differ in size.
    """
    return axes_and_sizes(params, spec)[1]


def select_width(params: Params, spec: AxisSpec, indices: Mapping[str, Any]) -> Params:
    """Keeps the units `indices[name]` of every axis of that name, for narrower layers.

    Args:
      params: any pytree.
      spec: the names of the axes.
      indices: `{name: [n] integers}`, e.g. from `uniform_indices` or `top_indices`; may be
        traced. Repeated indices are allowed.

    Returns:
      The tree with the selected units, in the given order; dtypes are kept.
    """
    axes, sizes = axes_and_sizes(params, spec)
    index = {
        name: _check_index(name, value, size_of_name(name, sizes))
        for name, value in indices.items()
    }
    return over_axes(params, axes, index, take_units)


def prune_heads(
    params: Params, spec: AxisSpec, dropped: Sequence[int], *, name: str = "heads"
) -> Params:
    """Removes whole units of an axis, attention heads by default, from every leaf that has it."""
    size = size_of_name(name, axis_sizes(params, spec))
    return select_width(params, spec, {name: remaining_indices(size, dropped)})


def remaining_indices(size: int, dropped: Sequence[int] | np.ndarray) -> np.ndarray:
    """The indices of an axis of length `size` that are not in `dropped`: int64, in order.

    Raises:
      ValueError: if an index is out of range or repeated, or nothing is left.
    """
    indices = np.asarray(dropped, np.int64).reshape(-1)
    out_of_range = indices[(indices < 0) | (indices >= size)]
    if out_of_range.size or len(set(indices.tolist())) != indices.size or indices.size >= size:
        raise ValueError(
            f"the dropped indices must be distinct, lie in 0..{size - 1} and leave "
            f"something, got {indices.tolist()}."
        )
    return np.setdiff1d(np.arange(size, dtype=np.int64), indices)


def permute_units(params: Params, spec: AxisSpec, permutations: Mapping[str, Any]) -> Params:
    """Reorders units: unit `i` becomes what unit `permutations[name][i]` was.

    Hidden units have no order, so a permutation of a hidden axis leaves the function unchanged.

    Raises:
      ValueError: as in `select_width`; also if a (concrete) value is not a permutation of its axis.
    """
    sizes = axis_sizes(params, spec)
    for name, value in permutations.items():
        order, size = _checks.concrete(value), size_of_name(name, sizes)
        if np.shape(value) != (size,) or (
            order is not None and not np.array_equal(np.sort(order), np.arange(size))
        ):
            raise ValueError(
                f"{name!r} needs every index of 0..{size - 1} once, got {value!r}. "
                "Use select_width to keep some units only."
            )
    return select_width(params, spec, permutations)


def pad_width(params: Params, spec: AxisSpec, widths: Mapping[str, int]) -> Params:
    """Appends units of zeros: `{name: new number of units}`.

    A hidden unit of zeros has no effect if its activation maps 0 to 0. Such units do not learn
    until something breaks the tie, since their incoming and outgoing gradients are both zero. To
    grow with units that learn, use `widen`.
    """
    axes, sizes = axes_and_sizes(params, spec)
    for name, width in widths.items():
        if width < size_of_name(name, sizes):
            raise ValueError(
                f"{name!r} cannot shrink from {sizes[name]} to {width} units. Use select_width."
            )

    def pad(leaf: Array, position: int, axis: Axis, width: int) -> Array:
        split = split_axis(leaf, position, axis)
        edges = [(0, 0)] * split.ndim
        edges[position + 1] = (0, width - split.shape[position + 1])
        return join_axis(jnp.pad(split, edges), position)

    return over_axes(params, axes, widths, pad)


def axis_spec_from_metadata(tree: Any) -> list[tuple[str, tuple[str | None, ...] | None]]:
    """The axis names that boxed leaves carry: Linen's `Partitioned`, NNX variables' sharding.

    Args:
      tree: boxed Linen variables or an NNX state, with values or abstract.

    Returns:
      One rule per leaf. Leaves without names get None. The boxes do not record which axes are
      summed over; `widen` needs rules that do.

    Raises:
      ValueError: if no leaf carries names.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: _names(x) is not None)
    spec = [(re.escape(trees.path_string(path)), _names(leaf)) for path, leaf in leaves]
    if all(names is None for _, names in spec):
        raise ValueError(
            "no leaf carries axis names. Box parameters with "
            "nn.with_partitioning (Linen) or give nnx.Param its sharding, or write the spec out."
        )
    return spec


def axes_and_sizes(params: Params, spec: AxisSpec) -> tuple[list[tuple[Axis, ...]], dict[str, int]]:
    """The axes of every leaf, in tree order, and the number of units of every name."""
    axes = _axes_of(params, spec)
    return axes, _sizes_of(params, axes)


def _axes_of(params: Params, spec: AxisSpec) -> list[tuple[Axis, ...]]:
    """The axes of every leaf, in tree order; empty if it has no names."""
    flat = trees.flatten(params)
    labels = _leaves.by_rules(params, spec, default=_NONAMES)
    uncovered = [
        path
        for (path, leaf), names in zip(flat.items(), labels, strict=True)
        if names is _NONAMES and (trees.is_inexact(leaf) or _codes.is_code(leaf))
    ]
    if uncovered:
        raise ValueError(
            f"the axis spec does not cover {uncovered[:8]}. Name their axes, or add "
            "('.*', None) last if they have none that change."
        )
    pairs = zip(flat, labels, strict=True)
    _codes.refuse_codes(flat, [path for path, names in pairs if names not in (None, _NONAMES)])
    out: list[tuple[Axis, ...]] = []
    for (path, leaf), names in zip(flat.items(), labels, strict=True):
        if names is _NONAMES or names is None or not trees.is_inexact(leaf):
            out.append(())
            continue
        axes = tuple(axis if isinstance(axis, Axis) else Axis(axis) for axis in names)
        if len(axes) != np.ndim(leaf):
            raise ValueError(
                f"{path!r} has {np.ndim(leaf)} axes {list(np.shape(leaf))}, but the spec "
                f"names {len(axes)}: {[axis.name for axis in axes]}."
            )
        out.append(axes)
    return out


def _sizes_of(params: Params, axes: Sequence[tuple[Axis, ...]]) -> dict[str, int]:
    """The number of units of every name; raises if leaves disagree."""
    first_seen: dict[str, tuple[str, int]] = {}
    for (path, leaf), leaf_axes in zip(trees.flatten(params).items(), axes, strict=True):
        for length, axis in zip(np.shape(leaf), leaf_axes, strict=False):
            if axis.name is None:
                continue
            size, remainder = divmod(length, axis.inner * axis.outer)
            if remainder:
                raise ValueError(
                    f"axis {axis.name!r} of {path!r} has length {length}, which is not "
                    f"outer={axis.outer} times a number of units times inner={axis.inner}."
                )
            first_path, known_size = first_seen.setdefault(axis.name, (path, size))
            if size != known_size:
                raise ValueError(
                    f"axis {axis.name!r} has {known_size} units in {first_path!r} but {size} in "
                    f"{path!r}. One name is one set of units; give them different names."
                )
    return {name: size for name, (_, size) in first_seen.items()}


def size_of_name(name: str, sizes: Mapping[str, int]) -> int:
    """The size of a named axis; raises if the spec has no such name."""
    if name not in sizes:
        raise ValueError(f"no axis is named {name!r}; the spec names {sorted(sizes)}.")
    return sizes[name]


def over_axes(
    params: Params,
    axes: Sequence[tuple[Axis, ...]],
    values: Mapping[str, Any],
    change: Callable[[Array, int, Axis, Any], Array],
) -> Params:
    """Applies `change(leaf, position, axis, values[name])` along every axis with a value."""
    leaves, treedef = jax.tree.flatten(params)
    for i, leaf_axes in enumerate(axes):
        for position, axis in enumerate(leaf_axes):
            if axis.name is not None and axis.name in values:
                leaves[i] = change(leaves[i], position, axis, values[axis.name])
    return jax.tree.unflatten(treedef, leaves)


def split_axis(leaf: Any, position: int, axis: Axis) -> Array:
    """Splits the axis into three: `[..., outer, units, inner, ...]`; units at `position + 1`."""
    array = jnp.asarray(leaf, _leaves.canonical_dtype(leaf))
    shape = array.shape
    units = shape[position] // (axis.outer * axis.inner)
    return array.reshape(*shape[:position], axis.outer, units, axis.inner, *shape[position + 1 :])


def join_axis(split: Array, position: int) -> Array:
    """Inverse of `split_axis`."""
    return split.reshape(*split.shape[:position], -1, *split.shape[position + 3 :])


def take_units(leaf: Any, position: int, axis: Axis, index: Any) -> Array:
    """The units `index` along one axis."""
    return join_axis(jnp.take(split_axis(leaf, position, axis), index, axis=position + 1), position)


def _check_index(name: str, value: Any, size: int) -> Any:
    value = np.asarray(value) if isinstance(value, Sequence) else value
    _checks.integers(**{name: value})
    _checks.rank(1, 1, **{name: value})
    known_value = _checks.concrete(value)
    if known_value is not None and known_value.size:
        _checks.within(0, size - 1, **{name: known_value})
    return value


def _names(leaf: Any) -> tuple[str | None, ...] | None:
    """Axis names of a box, by the attributes that flax's boxes have; None if it has none."""
    for attribute in ("names", "out_sharding"):
        names = getattr(leaf, attribute, None)
        is_sequence = isinstance(names, (tuple, list, jax.sharding.PartitionSpec))
        if is_sequence and all(name is None or isinstance(name, str) for name in names):
            return tuple(names)
    return None
