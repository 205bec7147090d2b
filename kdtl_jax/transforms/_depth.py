r"""Depth: select, map, stack and unstack layers.

Layers are named by a regular expression that matches the whole paths of their leaves and has one
group, the layer's number: `r"encoder/layer_(\d+)/.*"`. Trees are dicts, lists and tuples, nested or
flat. A layer may be one entry, or many entries with its number in their names
(`"model.layers.3.mlp.weight"` of a state dict, Haiku's `"net/layer_3/mlp"`). For other containers
use `transfer(source, target, rename=layer_map(...))`, which only needs paths. For scanned layers,
stacked along their first axis, name that axis and use `select_width`.

Errors are ValueErrors: a pattern that matches nothing, does not have exactly one group or names
only part of a layer; a position out of range; a container of another kind.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax._types import Params, PyTree


class LayerKey(NamedTuple):
    """A container's key that names a layer: text before the number, the number, text after."""

    prefix: str
    number: int
    suffix: str


Keys = tuple[Any, ...]
Layers = Mapping[Any, LayerKey]


def compile_pattern(layers: str) -> re.Pattern[str]:
    """Compiles the pattern; raises unless it is a regular expression with exactly one group."""
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(f"layers: {layers!r} is not a regular expression ({error}).") from None
    if pattern.groups != 1:
        raise ValueError(
            f"layers: {layers!r} must have exactly one group, the layer's number, as in "
            r"'encoder/layer_(\d+)/.*'; use (?:...) for other groups."
        )
    return pattern


def number_of(match: re.Match[str]) -> int:
    """The layer's number; raises if the group did not match digits."""
    text = match.group(1)
    if text is None or not text.isdecimal():
        raise ValueError(
            f"layers: the group of {match.re.pattern!r} must match the layer's number, but matches "
            f"{text!r} in {match.string!r}."
        )
    return int(text)


def over_layers(params: PyTree, layers: str, rebuild: Callable[[Any, Layers], Any]) -> PyTree:
    """Replaces every container of layers by `rebuild(container, its layer keys)`."""
    parents = _parents(params, layers)

    def walk(node: Any, keys: Keys) -> Any:
        if not any(parent[: len(keys)] == keys for parent in parents):
            return node
        layer_keys = parents.get(keys, {})
        if type(node) is dict:
            node = {k: v if k in layer_keys else walk(v, (*keys, k)) for k, v in node.items()}
        elif type(node) in (list, tuple):
            node = type(node)(
                v if k in layer_keys else walk(v, (*keys, k)) for k, v in enumerate(node)
            )
            if layer_keys and len(layer_keys) != len(node):
                raise ValueError(
                    f"the {type(node).__name__} at {'/'.join(map(str, keys))!r} holds "
                    f"{len(node)} entries of which {len(layer_keys)} are layers; it must hold "
                    "layers only."
                )
        else:
            raise _unsupported_container(type(node).__name__)
        return rebuild(node, layer_keys) if layer_keys else node

    return walk(params, ())


def _parents(params: PyTree, layers: str) -> dict[Keys, dict[Any, LayerKey]]:
    """The containers of layers, by their keys from the root."""
    pattern = compile_pattern(layers)
    parents: dict[Keys, dict[Any, LayerKey]] = {}
    unmatched: list[tuple[Keys, str]] = []
    for key_path, _ in jax.tree_util.tree_leaves_with_path(params):
        path = trees.path_string(key_path)
        keys = tuple(getattr(k, "key", getattr(k, "idx", None)) for k in key_path)
        match = pattern.fullmatch(path)
        if match is None:
            unmatched.append((keys, path))
            continue
        number = number_of(match)
        depth, key, offset = _component(key_path, match.span(1))
        if any(k is None for k in keys[: depth + 1]):
            raise _unsupported_container(type(key_path[depth]).__name__)
        start, stop = (n - offset for n in match.span(1))
        layer_key = LayerKey(key[:start], number, key[stop:])
        parents.setdefault(keys[:depth], {})[keys[depth]] = layer_key
    if not parents:
        trees.mask(params, layers)  # raises, listing the nearest paths
    for keys, path in unmatched:
        if any(
            keys[: len(p)] == p and _is_in_layer(keys[len(p)], layer_keys)
            for p, layer_keys in parents.items()
        ):
            raise ValueError(
                f"{layers!r} names only a part of a layer: it does not match {path!r}. Let "
                "the pattern match everything in a layer."
            )
    return parents


def _is_in_layer(key: Any, layers: Layers) -> bool:
    """Whether an entry is a layer, or has the name of a part of one."""
    parts = {(layer.prefix, layer.suffix[0]) for layer in layers.values() if layer.suffix}
    return key in layers or any(
        re.match(rf"{re.escape(prefix)}\d+{re.escape(separator)}", str(key))
        for prefix, separator in parts
    )


def _component(key_path: tuple[Any, ...], span: tuple[int, int]) -> tuple[int, str, int]:
    """The key that contains a span of the path: its depth, its text and where it starts."""
    offset = 0
    for depth, entry in enumerate(key_path):
        text = jax.tree_util.keystr((entry,), simple=True)
        if offset <= span[0] and span[1] <= offset + len(text):
            return depth, text, offset
        offset += len(text) + 1
    raise AssertionError("a number lies within one key")


def _unsupported_container(kind: str) -> ValueError:
    return ValueError(
        f"only dicts, lists and tuples can be rebuilt with other layers, not {kind}. Use "
        "transfer(source, target, rename=layer_map(...)) with a target of the wanted depth."
    )


# The layers (of 12) that DistilBERT starts from; the paper says every second one.
# Sanh et al., DistilBERT, 2019 (1910.01108).
DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)


def layer_of(layers: str, path: str) -> int | None:
    """The layer's number in a path; None if the path belongs to no layer."""
    match = compile_pattern(layers).fullmatch(path)
    return None if match is None else number_of(match)


def layer_numbers(params: Params, layers: str) -> list[int]:
    """The numbers of the layers that a pattern finds, in order."""
    trees.mask(params, layers)  # raises if nothing matches, listing the nearest paths
    numbers = {layer_of(layers, path) for path in trees.flatten(params)}
    return sorted(number for number in numbers if number is not None)


def layer_map(layers: str, indices: Sequence[int]) -> Callable[[str], tuple[str, ...]]:
    """A `rename` for `transfer`: layer `j` of the target is layer `indices[j]` of the source.

    Numbers count from 0 on both sides. Layers that are not chosen are dropped, a layer may be
    chosen more than once, and all other leaves keep their paths.
    """
    pattern = compile_pattern(layers)

    def rename(path: str) -> tuple[str, ...]:
        match = pattern.fullmatch(path)
        if match is None:
            return (path,)
        number = number_of(match)
        start, stop = match.span(1)
        return tuple(
            f"{path[:start]}{new}{path[stop:]}" for new, old in enumerate(indices) if old == number
        )

    return rename


def select_layers(params: Params, layers: str, indices: Sequence[int]) -> Params:
    """Keeps the layers at these positions and renumbers them: layer `j` is old `indices[j]`.

    Args:
      layers: a regular expression for the layers' leaves with one group, the number.
      indices: positions among the layers in natural order; a repeated one copies its layer.

    Returns:
      The tree with `len(indices)` layers, numbered from the lowest number in `params`.
    """
    numbers = layer_numbers(params, layers)
    if not len(indices) or any(not 0 <= i < len(numbers) for i in indices):
        raise ValueError(
            f"positions must lie in 0..{len(numbers) - 1} (layers {numbers}), got {list(indices)}."
        )
    renumbering = [(numbers[0] + new, numbers[old]) for new, old in enumerate(indices)]

    def rebuild(node: Any, layer_keys: Layers) -> Any:
        by_number: dict[int, list[Any]] = {}
        for key, layer in layer_keys.items():
            by_number.setdefault(layer.number, []).append(key)
        # A layer may be missing from some collections (batch statistics, say) and stays missing.
        entries = [(new, key) for new, old in renumbering for key in by_number.get(old, ())]
        values = _copy_repeated([node[key] for _, key in entries])
        if isinstance(node, (list, tuple)):
            return type(node)(values)
        new_keys = [
            new
            if isinstance(key, int)
            else f"{layer_keys[key].prefix}{new}{layer_keys[key].suffix}"
            for new, key in entries
        ]
        return _replace_entries(node, layer_keys, list(zip(new_keys, values, strict=True)))

    return over_layers(params, layers, rebuild)


def stack_layers(params: Params, layers: str) -> Params:
    """Stacks layers into one subtree with a leading layer axis, as `scan` over layers expects.

    `{"layer_0": …, "layer_1": …}` becomes `{"layer": …}`, and flat names lose their number:
    `"layers.0.mlp.weight"` … becomes `"layers.mlp.weight"`. A list, or a dict of bare numbers,
    becomes the subtree itself. Layers are ordered by number, so 10 follows 9.

    Raises:
      ValueError: also if layers differ in structure, shapes, dtypes, or non-array leaves.
    """

    def rebuild(node: Any, layer_keys: Layers) -> Any:
        series: dict[tuple[str, str], list[Any]] = {}
        for key in sorted(layer_keys, key=lambda key: layer_keys[key].number):
            series.setdefault((layer_keys[key].prefix, layer_keys[key].suffix), []).append(key)
        numbers = {name: [layer_keys[key].number for key in keys] for name, keys in series.items()}
        _same_numbers(numbers)
        stacked = []
        for (prefix, suffix), keys in series.items():
            name = (prefix.rstrip("_-. /") + suffix).strip("_-. /")
            value = _stack({key: node[key] for key in keys})
            if isinstance(node, (list, tuple)) or (not name and len(layer_keys) == len(node)):
                return value
            if not name or name in node:
                raise ValueError(
                    f"the layers cannot be stored under {name!r} beside "
                    f"{sorted(map(str, node))[:8]}. Move them into a dict of their own first."
                )
            stacked.append((name, value))
        return _replace_entries(node, layer_keys, stacked)

    return over_layers(params, layers, rebuild)


def _same_numbers(numbers: Mapping[tuple[str, str], list[int]]) -> None:
    first = next(iter(numbers.values()))
    for (prefix, suffix), present in numbers.items():
        if present != first:
            raise ValueError(
                f"the layers differ in what they hold: {f'{prefix}*{suffix}'!r} exists for layers "
                f"{present}, other names for {first}. Only equal layers can be stacked."
            )


def unstack_layers(params: Params, at: str, *, keys: str | None = None) -> Params:
    """Inverse of `stack_layers`: one subtree per entry of the leading axis.

    Args:
      at: path of the stacked subtree, such as `"encoder/layer"`.
      keys: names of the layers that replace it, such as `"layer_{}"`; None makes the subtree a
        list of layers.

    Raises:
      ValueError: if there is no subtree at the path, its leaves have different lengths, or `keys`
        has no `{}`.
    """
    if keys is not None and "{}" not in keys:
        raise ValueError(f"keys must contain {{}} for the number, got {keys!r}.")

    def walk(node: Any, subpath: str) -> Any:
        entries = node.items() if isinstance(node, dict) else ()
        for key, child in sorted(entries, key=lambda entry: -len(str(entry[0]))):
            if subpath == str(key):
                layers = _unstack(at, child)
                names = [key] if keys is None else map(keys.format, range(len(layers)))
                values = [layers] if keys is None else layers
                return _replace_entries(node, {key: None}, list(zip(names, values, strict=True)))
            if subpath.startswith(f"{key}/"):
                return {**node, key: walk(child, subpath.removeprefix(f"{key}/"))}
        nearest = trees.nearest(at, list(trees.flatten(params)))
        raise ValueError(f"no dict entry at {at!r}; nearest leaves: {nearest}.")

    return walk(params, at)


def _replace_entries(
    node: Mapping[Any, Any], old_keys: Container[Any], new_entries: Sequence[tuple[Any, Any]]
) -> dict[Any, Any]:
    """Replaces the keys `old_keys` by `new_entries`, at the place of the first of them."""
    remaining_keys = {key for key in node if key not in old_keys}
    for key, _ in new_entries:
        if key in remaining_keys:
            raise ValueError(f"layers: two entries would have the name {key!r}. Rename one first.")
        remaining_keys.add(key)
    out: dict[Any, Any] = {}
    for key, value in node.items():
        out |= dict(new_entries) if key in old_keys else {key: value}
    return out


def _copy_repeated(values: Sequence[Any]) -> list[Any]:
    """Copies repeated values, because one array in two places cannot be donated."""
    seen_ids: set[int] = set()
    out: list[Any] = []
    for value in values:
        out.append(jax.tree.map(_copy, value) if id(value) in seen_ids else value)
        seen_ids.add(id(value))
    return out


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, may_alias=False)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _stack(layers: Mapping[Any, Any]) -> Any:
    (first_key, first_layer), *other_layers = layers.items()
    expected = {path: _signature(leaf) for path, leaf in trees.flatten(first_layer).items()}
    for key, layer in other_layers:
        received = {path: _signature(leaf) for path, leaf in trees.flatten(layer).items()}
        if received != expected or jax.tree.structure(layer) != jax.tree.structure(first_layer):
            different = [p for p in {**expected, **received} if expected.get(p) != received.get(p)]
            raise ValueError(
                f"layers {first_key!r} and {key!r} differ at {different[:8]} (structure, "
                "shape or dtype). Only equal layers can be stacked."
            )
    return jax.tree.map(_stack_leaves, *layers.values())


def _stack_leaves(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        return np.stack(leaves)
    return jnp.stack(leaves) if hasattr(leaves[0], "dtype") else leaves[0]


def _signature(leaf: Any) -> Any:
    # Leaves that are not arrays (functions, names) cannot be stacked: all layers must share them.
    return (np.shape(leaf), leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _unstack(at: str, stacked: Any) -> list[Any]:
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
