"""Parameter trees by path: selectors, masks, labels, partition and combine.

A *selector* (called `where` throughout this library, always meaning "act here") is one of

- a regular expression that must match a whole canonical path, `"encoder/.*/kernel"`;
- `Glob("**/kernel")`, where `*` stays within a segment and `**` crosses segments;
- a predicate `(path, leaf) -> bool`;
- a tree of bools with the structure of the parameters;
- a combination of these with `any_of`, `all_of` or `none_of`.

A selector that matches nothing raises an error: a misspelled pattern is the most common silent
error in transfer learning. Canonical paths join keys with "/" and print ints plainly. The ".value"
that NNX variables and Linen's boxes add is not part of a path; an entry or field called "value" is.
A Haiku key that itself contains "/" is not split.
"""

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax._types import PyTree

MAX_COMPARED, MAX_NAME_LENGTH = 2000, 200  # names that messages compare, and their maximum length
MAX_NAMES = 8  # listed in a message


class Glob(NamedTuple):
    """A shell-style pattern over canonical paths: `*` within a segment, `**` across segments."""

    pattern: str


Predicate = Callable[[str, Any], bool]  # (path, leaf) -> whether it is selected
# The leaves to act on: a regular expression for whole paths, or one of these.
Selector = str | Glob | Predicate | PyTree
# Selectors with one value each; the first match wins.
Rules = Sequence[tuple[Selector, Any]]

everything = ".*"  # the selector that matches every path


def path_string(key_path: Sequence[Any]) -> str:
    """A JAX key path as text, `"block3/kernel"`; `leaf_paths` also drops parts that boxes add."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def leaf_paths(tree: PyTree) -> list[str]:
    """The canonical path of every leaf, in tree order; two leaves may share one (0 and "0")."""
    return [path_string(key_path) for key_path in _key_paths(tree)]


def natural_key(path: str) -> tuple[tuple[int, int, str, str], ...]:
    """Sort key that puts `layer_2` before `layer_10`; a total order of strings."""
    pieces = re.split(r"(\d+)", path)  # numbers at the odd places; `0` comes before `00`
    return tuple(_number_key(p) if i % 2 else (1, 0, "", p) for i, p in enumerate(pieces))


def flatten(tree: PyTree) -> dict[str, Any]:
    """`{canonical path: leaf}` in tree order.

    Raises:
      ValueError: if two leaves share a canonical path, or a dict mixes ints and strings as keys.
    """
    flat: dict[str, Any] = {}
    try:
        leaves = jax.tree.leaves(tree)
    except ValueError as error:
        raise ValueError(
            "a dict's keys must be of one type, because JAX sorts them; ints with "
            f"strings, as after a checkpoint, cannot be sorted. Make them all strings ({error})"
        ) from None
    for path, leaf in zip(leaf_paths(tree), leaves, strict=True):
        if path in flat:
            raise ValueError(
                f"two leaves have the path {path!r} (keys that differ only in type, "
                "such as 0 and '0'?). Rename one of them."
            )
        flat[path] = leaf
    return flat


def paths(tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by its canonical path."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaf_paths(tree))


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map`, but `fn` receives the canonical path first."""
    return jax.tree.map(fn, paths(tree), tree, *rest)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a real or complex floating array (or its abstract shape).

    Counters, PRNG keys, booleans, strings and functions are not: transforms and gradients do not
    change them.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (float, complex))
    return jnp.issubdtype(dtype, jnp.inexact)


def nearest(path: str, candidates: Sequence[str], n: int = 3) -> list[str]:
    """The `n` candidates most similar to `path`, for "did you mean" messages.

    Only the first `MAX_COMPARED` candidates are compared, and none longer than `MAX_NAME_LENGTH`.
    """
    names = [name for name in candidates[:MAX_COMPARED] if len(name) <= MAX_NAME_LENGTH]
    matches = difflib.get_close_matches(path[:MAX_NAME_LENGTH], names, n=n, cutoff=0.0)
    return matches or sorted(names, key=natural_key)[:n]


def is_bool_tree(where: Selector) -> bool:
    """Whether a selector is a tree of bools, callable (an Equinox module) or not.

    Raises:
      ValueError: if it is not a selector at all.
    """
    if isinstance(where, (str, Glob)):
        return False
    _refuse_nnx_filter(where)
    leaves, treedef = jax.tree.flatten(where)
    is_node = not jax.tree_util.treedef_is_leaf(treedef)
    bools = bool(leaves) and all(isinstance(leaf, (bool, np.bool_)) for leaf in leaves)
    if bools and (is_node or not callable(where)):
        return True
    if callable(where):
        return False
    raise ValueError(
        "expected a regex string, Glob, (path, leaf) -> bool or a tree of Python "
        f"bools, got {type(where).__name__}. Combine several with any_of(...)."
    )


def _refuse_nnx_filter(where: Any) -> None:
    """Refuses Flax NNX's filters: they take two arguments, too, but a tuple and a Variable."""
    if isinstance(where, type):
        description = f"the class {where.__name__}"
    elif type(where).__module__ == "flax.nnx.filterlib":
        description = f"Flax NNX's filter {where}"
    else:
        return
    raise ValueError(
        f"{description} is not a selector: paths are text here. Write a regular expression of "
        "whole paths, such as 'conv/.*' for nnx.PathContains('conv') at the top, or "
        "(path, leaf) -> bool."
    )


def any_of(*selectors: Selector) -> Predicate:
    """Selects where at least one selector does."""
    return _combination("any_of", any, selectors)


def all_of(*selectors: Selector) -> Predicate:
    """Selects where every selector does."""
    return _combination("all_of", all, selectors)


def none_of(*selectors: Selector) -> Predicate:
    """Selects where no selector does."""
    return _combination("none_of", lambda matches: not any(matches), selectors)


def _combination(
    name: str, decide: Callable[[Iterator[bool]], bool], selectors: Sequence[Selector]
) -> Predicate:
    tests = [_predicate(selector) for selector in selectors]

    def combination(path: str, leaf: Any) -> bool:
        return decide(test(path, leaf) for test in tests)

    combination.__name__ = f"{name}({', '.join(map(_describe, selectors))})"  # for messages
    return combination


def mask(tree: PyTree, where: Selector, *, expect: int | str | None = "some") -> PyTree:
    """A tree of Python bools that are True where the selector acts.

    Args:
      tree: any pytree, concrete or abstract.
      where: a selector (see the module's first lines).
      expect: `"some"` (at least one leaf, the default), `"all"`, an exact count, or None.

    Raises:
      ValueError: if the count is not as expected, listing the nearest paths; or if a tree of bools
        has a different structure than `tree`.
    """
    flat = flatten(tree)
    treedef = jax.tree.structure(tree)
    if is_bool_tree(where):
        if jax.tree.structure(where) != treedef:
            raise ValueError(
                "a tree of bools must have the structure of the parameters, got "
                f"{jax.tree.structure(where)} for {treedef}."
            )
        selected = [bool(leaf) for leaf in jax.tree.leaves(where)]
    else:
        test = _predicate(where)
        selected = [test(path, leaf) for path, leaf in flat.items()]
    _check_count(where, expect, sum(selected), list(flat))
    return jax.tree.unflatten(treedef, selected)


def labels(tree: PyTree, rules: Rules, *, default: Any = None) -> PyTree:
    """One label per leaf from ordered rules: the first selector that matches wins.

    Args:
      tree: any pytree.
      rules: `[(selector, label), ...]`.
      default: label of leaves that no rule matches; None means every leaf must be covered.

    Raises:
      ValueError: if a rule is never used (shadowed or matching nothing), or a leaf is uncovered.
    """
    flat = flatten(tree)
    tests = [_leaf_test(tree, selector) for selector, _ in rules]
    matches = [
        next((k for k, test in enumerate(tests) if test(i, path, leaf)), None)
        for i, (path, leaf) in enumerate(flat.items())
    ]
    for k, (selector, _) in enumerate(rules):
        if k not in matches:
            raise ValueError(
                f"rule {_describe(selector)} labels no leaf: it matches nothing, or earlier "
                f"rules take all it matches. {_did_you_mean(selector, list(flat))}"
            )
    if None in matches and default is None:
        uncovered = [path for path, k in zip(flat, matches, strict=True) if k is None]
        raise ValueError(
            f"no rule covers {_name_list(uncovered)}. Add a rule (for example "
            "('.*', label) last) or pass default=."
        )
    result = [default if k is None else rules[k][1] for k in matches]
    return jax.tree.unflatten(jax.tree.structure(tree), result)


def partition(tree: PyTree, where: Selector) -> tuple[PyTree, PyTree]:
    """Splits a tree into `(selected, rest)`, with None where a leaf is in the other half.

    Only inexact leaves can be selected; counters and keys always stay in `rest`. Both halves are
    pytrees that `jax.grad`, optax and `jax.tree.map` accept directly.
    """
    is_selected = mask(tree, where)
    moves = jax.tree.map(lambda flag, x: flag and is_inexact(x), is_selected, tree)
    selected = jax.tree.map(lambda move, x: x if move else None, moves, tree)
    return selected, jax.tree.map(lambda move, x: None if move else x, moves, tree)


def combine(*trees: PyTree) -> PyTree:
    """Inverse of `partition`: each leaf comes from the first tree that has it."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def count(tree: PyTree, where: Selector = everything) -> int:
    """Number of selected parameters (scalars in inexact leaves)."""
    flags = jax.tree.leaves(mask(tree, where, expect=None))
    pairs = zip(flags, jax.tree.leaves(tree), strict=True)
    return sum(math.prod(np.shape(leaf)) for flag, leaf in pairs if flag and is_inexact(leaf))


def _key_paths(tree: PyTree) -> list[tuple[Any, ...]]:
    """The key path of every leaf, without the attribute in which a box holds its value."""
    boxes = _box_types()
    if not boxes:
        return [key_path for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    result: list[tuple[Any, ...]] = []
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, boxes))
    for key_path, node in nodes:
        if not isinstance(node, boxes):
            result.append(key_path)
            continue
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child, node=node: child is not node
        )
        for (key, *_), child in children:
            is_value = getattr(key, "name", None) == "value"
            prefix = key_path if is_value else (*key_path, key)
            result += [(*prefix, *subpath) for subpath in _key_paths(child)]
    return result


def _box_types() -> tuple[type, ...]:
    """Flax's containers of one value, which exist only if flax has been imported."""
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    return (*((nnx.Variable,) if nnx else ()), *((meta.AxisMetadata,) if meta else ()))


def _number_key(digits: str) -> tuple[int, int, str, str]:
    # By length, then by digits: int() reads every script's digits, but not 5,000 of them.
    stripped = "".join(str(int(digit)) for digit in digits).lstrip("0")
    return (0, len(stripped), stripped, digits)


def _predicate(where: Selector) -> Predicate:
    if isinstance(where, (str, Glob)):
        text = where if isinstance(where, str) else _glob_to_regex(where.pattern)
        try:
            pattern = re.compile(text, re.DOTALL)  # a name may hold anything
        except re.error as error:
            kind, repair = "regular expression", f" For shell patterns use Glob({where!r})."
            if isinstance(where, Glob):
                kind, repair = "shell pattern", ""
            raise ValueError(f"{where!r} is not a {kind} ({error}).{repair}") from None
        return lambda path, leaf: pattern.fullmatch(path) is not None
    if callable(where) and not is_bool_tree(where):
        return lambda path, leaf: bool(where(path, leaf))
    raise ValueError(
        "a tree of bools can only be used on its own; expected a regex string, Glob or "
        f"(path, leaf) -> bool, got {type(where).__name__}."
    )


def _leaf_test(tree: PyTree, where: Selector) -> Callable[[int, str, Any], bool]:
    """Converts a selector to a test of (leaf number, path, leaf), so rules may be bool trees."""
    if is_bool_tree(where):
        selected = jax.tree.leaves(mask(tree, where, expect=None))
        return lambda i, path, leaf: selected[i]
    test = _predicate(where)
    return lambda i, path, leaf: test(path, leaf)


def _glob_to_regex(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        wildcards.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p))
        for p in pieces
    )


def _check_count(where: Selector, expect: int | str | None, count: int, names: list[str]) -> None:
    if expect is None:
        return
    expected = len(names) if expect == "all" else expect
    if expect == "some" and count == 0:
        raise ValueError(
            f"selector {_describe(where)} matches no leaf. {_did_you_mean(where, names)}"
        )
    if expect != "some" and count != expected:
        raise ValueError(
            f"selector {_describe(where)} matches {count} of {len(names)} leaves, "
            f"expected {'all of them' if expect == 'all' else expected}."
        )


def _describe(where: Selector) -> str:
    if isinstance(where, (str, Glob)):
        return repr(where)
    return getattr(where, "__name__", type(where).__name__)


def _did_you_mean(where: Selector, names: list[str]) -> str:
    if not names:
        return "The tree has no leaves."
    text = where.pattern if isinstance(where, Glob) else where if isinstance(where, str) else ""
    return (
        f"Nearest paths: {_name_list(nearest(text, names))}. "
        "A string is a regular expression for the whole path; Glob('**/kernel') is a shell pattern."
    )


def _name_list(names: Sequence[str]) -> str:
    quoted = ", ".join(map(repr, names[:MAX_NAMES]))
    return quoted + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
