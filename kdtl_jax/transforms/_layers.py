"""Depth: select, map, stack and unstack layers.

Layers are named by a regular expression that matches their leaves' whole paths and has one group,
the number: `r"encoder/layer_(\\d+)/.*"`. Trees are nested dicts, lists and tuples; for other
containers use `transfer(source, target, rename=layer_map(...))`, which works on paths alone. For
scanned layers, whose first axis is the layer, name that axis and use `select_width`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import Params
from kdtl_jax.transforms import _containers
from kdtl_jax.transforms._containers import Layers

# The layers of 12 that DistilBERT starts from: not every second one, as the paper says.
# Sanh et al., DistilBERT, 2019 (1910.01108).
DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)


def layer_of(layers: str, path: str) -> int | None:
    """The layer's number in a path; None if the path belongs to no layer."""
    match = _containers.compiled(layers).fullmatch(path)
    return None if match is None else _containers.number_of(match)


def layer_numbers(params: Params, layers: str) -> list[int]:
    """The numbers of the layers that a pattern finds, in order.

    Raises:
      ValueError: if the pattern matches nothing or has not exactly one group.
    """
    trees.mask(params, layers)  # raises if nothing matches, listing the nearest paths
    found = {layer_of(layers, path) for path in trees.flatten(params)}
    return sorted(number for number in found if number is not None)


def layer_map(layers: str, indices: Sequence[int]) -> Callable[[str], tuple[str, ...]]:
    """A `rename` for `transfer`: layer `j` of the target is layer `indices[j]` of the source.

    Numbers count from 0 on both sides. Layers that are not chosen are dropped, a layer may be
    chosen several times, and other leaves keep their paths.

    Raises:
      ValueError: if the pattern has not exactly one group.
    """
    pattern = _containers.compiled(layers)

    def rename(path: str) -> tuple[str, ...]:
        match = pattern.fullmatch(path)
        if match is None:
            return (path,)
        number = _containers.number_of(match)
        start, stop = match.span(1)
        return tuple(
            f"{path[:start]}{new}{path[stop:]}" for new, old in enumerate(indices) if old == number
        )

    return rename


def select_layers(params: Params, layers: str, indices: Sequence[int]) -> Params:
    """Keeps the layers at these positions, renumbered: layer `j` is what layer `indices[j]` was.

    Args:
      params: nested dicts, lists and tuples.
      layers: a regular expression for the layers' leaves with one group, the number.
      indices: positions among the layers in natural order; repetitions copy a layer.

    Returns:
      The tree with `len(indices)` layers, numbered from the first number that was used.

    Raises:
      ValueError: if the pattern matches nothing, names only a part of a layer or has not one
        group, a position is out of range, or the containers are of another kind.
    """
    numbers = layer_numbers(params, layers)
    if not len(indices) or any(not 0 <= i < len(numbers) for i in indices):
        raise ValueError(
            f"positions must lie in 0..{len(numbers) - 1} (layers {numbers}), got {list(indices)}."
        )
    chosen = [(numbers[0] + new, numbers[old]) for new, old in enumerate(indices)]

    def rebuild(node: Any, at: Layers) -> Any:
        by_number = {layer.number: key for key, layer in at.items()}
        # A layer that only some collections hold (no batch statistics, say) is left out there.
        here = [(new, by_number[old]) for new, old in chosen if old in by_number]
        values = _distinct([node[key] for _, key in here])
        if isinstance(node, (list, tuple)):
            return type(node)(values)
        renamed = {_renumbered(key, at, new): v for (new, key), v in zip(here, values, strict=True)}
        return _replaced(node, at, renamed)

    return _containers.over_layers("select_layers", params, layers, rebuild)


def stack_layers(params: Params, layers: str) -> Params:
    """Layers as one subtree with a leading layer axis, as `scan` over layers wants them.

    `{"layer_0": …, "layer_1": …}` becomes `{"layer": …}`; a list, or a dict of bare numbers,
    becomes the subtree itself. Order is by number, so that 10 follows 9.

    Raises:
      ValueError: as `select_layers`; if layers differ in structure, shapes, dtypes, or in what
        cannot be stacked.
    """

    def rebuild(node: Any, at: Layers) -> Any:
        order = sorted(at, key=lambda key: at[key].number)
        stacked = _stacked({key: node[key] for key in order})
        name = (at[order[0]].before + at[order[0]].after).strip("_-. ")
        if isinstance(node, (list, tuple)) or (not name and len(at) == len(node)):
            return stacked
        if not name or name in node:
            raise ValueError(
                f"the layers cannot be stored under {name!r} beside "
                f"{sorted(map(str, node))[:8]}. Move them into a dict of their own first."
            )
        return _replaced(node, at, {name: stacked})

    return _containers.over_layers("stack_layers", params, layers, rebuild)


def unstack_layers(params: Params, at: str, *, keys: str | None = None) -> Params:
    """Inverse of `stack_layers`: one subtree per entry of the leading axis.

    Args:
      params: nested dicts.
      at: path of the stacked subtree, `"encoder/layer"`.
      keys: names of the layers in its place, `"layer_{}"`; None makes the subtree a list of
        layers.

    Raises:
      ValueError: if there is no subtree at the path, its leaves disagree in length, or `keys` has
        no `{}`.
    """
    if keys is not None and "{}" not in keys:
        raise ValueError(f"keys must contain {{}} for the number, got {keys!r}.")

    def walk(node: Any, rest: str) -> Any:
        for key, child in node.items() if isinstance(node, dict) else ():
            if rest == str(key):
                parts = _unstacked(at, child)
                new = (
                    {key: parts}
                    if keys is None
                    else {keys.format(i): p for i, p in enumerate(parts)}
                )
                return _replaced(node, {key: None}, new)
            if rest.startswith(f"{key}/"):
                return {**node, key: walk(child, rest.removeprefix(f"{key}/"))}
        near = trees.nearest(at, list(trees.flatten(params)))
        raise ValueError(f"no dict entry at {at!r}; nearest leaves: {near}.")

    return walk(params, at)


def _replaced(node: Mapping[Any, Any], old: Mapping[Any, Any], new: Mapping[Any, Any]) -> Any:
    """The dict with the keys `old` replaced, at the first one's place, by the entries `new`."""
    kept = set(node) - set(old)
    clash = kept & set(new)
    if clash:
        raise ValueError(f"layers: {sorted(map(str, clash))} would overwrite entries of that name.")
    out: dict[Any, Any] = {}
    for key, value in node.items():
        out |= {key: value} if key in kept else dict(new)
    return out


def _renumbered(key: Any, at: Layers, number: int) -> Any:
    layer = at[key]
    return number if isinstance(key, int) else f"{layer.before}{number}{layer.after}"


def _distinct(values: Sequence[Any]) -> list[Any]:
    """Copies what occurs again: one array in two places cannot be donated."""
    seen: set[int] = set()
    out: list[Any] = []
    for value in values:
        out.append(jax.tree.map(_copy, value) if id(value) in seen else value)
        seen.add(id(value))
    return out


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, may_alias=False)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _stacked(layers: Mapping[Any, Any]) -> Any:
    (first, model), *others = layers.items()
    want = {path: _signature(leaf) for path, leaf in trees.flatten(model).items()}
    for key, layer in others:
        got = {path: _signature(leaf) for path, leaf in trees.flatten(layer).items()}
        if got != want or jax.tree.structure(layer) != jax.tree.structure(model):
            different = [p for p in {**want, **got} if want.get(p) != got.get(p)]
            raise ValueError(
                f"layers {first!r} and {key!r} differ at {different[:8]} (structure, "
                "shape or dtype). Only equal layers can be stacked."
            )
    return jax.tree.map(_stacked_leaf, *layers.values())


def _stacked_leaf(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        return np.stack(leaves)
    return jnp.stack(leaves) if hasattr(leaves[0], "dtype") else leaves[0]


def _signature(leaf: Any) -> Any:
    # What is no array (a function, a name) cannot be stacked: all layers must hold the same.
    return (np.shape(leaf), leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _unstacked(at: str, stacked: Any) -> list[Any]:
    lengths = {
        path: np.shape(leaf)[0] if np.ndim(leaf) else None
        for path, leaf in trees.flatten(stacked).items()
        if hasattr(leaf, "dtype")
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(
            f"the leaves at {at!r} must have one leading layer axis, got lengths {lengths}."
        )
    number = next(n for n in lengths.values() if n is not None)
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i] if hasattr(leaf, "dtype") else leaf, stacked)
        for i in range(number)
    ]
