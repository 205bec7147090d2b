"""Finds the containers that hold layers, and rebuilds them.

JAX can replace a tree's leaves but not its keys, so changing the number of layers means rebuilding
the dict or list that holds them. This is done for dicts, lists and tuples only.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from kdtl_jax import trees
from kdtl_jax._types import PyTree


class LayerKey(NamedTuple):
    """A container's key that names a layer: text before the number, the number, text after."""

    before: str
    number: int
    after: str


Keys = tuple[Any, ...]
Layers = Mapping[Any, LayerKey]


def compiled(layers: str) -> re.Pattern[str]:
    """The pattern; raises unless it is a regular expression with exactly one group."""
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


def over_layers(
    fn: str, params: PyTree, layers: str, rebuild: Callable[[Any, Layers], Any]
) -> PyTree:
    """Replaces every container that holds layers by `rebuild(container, its layer keys)`."""
    parents = _parents(fn, params, layers)

    def walk(node: Any, keys: Keys) -> Any:
        if not any(parent[: len(keys)] == keys for parent in parents):
            return node
        at = parents.get(keys, {})
        if type(node) is dict:
            node = {k: v if k in at else walk(v, (*keys, k)) for k, v in node.items()}
        elif type(node) in (list, tuple):
            node = type(node)(v if k in at else walk(v, (*keys, k)) for k, v in enumerate(node))
            if at and len(at) != len(node):
                raise ValueError(
                    f"the {type(node).__name__} at {'/'.join(map(str, keys))!r} holds "
                    f"{len(node)} entries of which {len(at)} are layers; it must hold layers only."
                )
        else:
            raise _unreachable(fn, type(node).__name__)
        return rebuild(node, at) if at else node

    return walk(params, ())


def _parents(fn: str, params: PyTree, layers: str) -> dict[Keys, dict[Any, LayerKey]]:
    """The containers of layers by the keys that lead to them."""
    pattern = compiled(layers)
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
            raise _unreachable(fn, type(key_path[depth]).__name__)
        start, stop = (n - offset for n in match.span(1))
        found = LayerKey(key[:start], number, key[stop:])
        parents.setdefault(keys[:depth], {})[keys[depth]] = found
    if not parents:
        trees.mask(params, layers)  # raises, listing the nearest paths
    for keys, path in unmatched:
        if any(keys[: len(p)] == p and keys[len(p)] in at for p, at in parents.items()):
            raise ValueError(
                f"{layers!r} names only a part of a layer: it does not match {path!r}. Let "
                "the pattern match everything in a layer."
            )
    return parents


def _component(key_path: tuple[Any, ...], span: tuple[int, int]) -> tuple[int, str, int]:
    """The key that contains a span of the path: its depth, its text and where it starts."""
    offset = 0
    for depth, entry in enumerate(key_path):
        text = jax.tree_util.keystr((entry,), simple=True)
        if offset <= span[0] and span[1] <= offset + len(text):
            return depth, text, offset
        offset += len(text) + 1
    raise AssertionError("a number lies within one key")


def _unreachable(fn: str, kind: str) -> ValueError:
    return ValueError(
        f"{fn}: only dicts, lists and tuples can be rebuilt with other layers, not {kind}. Use "
        "transfer(source, target, rename=layer_map(...)) with a target of the wanted depth."
    )
