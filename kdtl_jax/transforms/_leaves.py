"""What every transform does with one leaf: read its coefficient, multiply, cast, keep its dtype.

A *coefficient* (`alpha` everywhere in this package) is a number, a traced scalar, a function
`(path) -> number`, ordered rules `[(selector, number), ...]`, or a pytree prefix of numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _numerics, trees
from kdtl_jax._types import Array, PyTree, Scalar

Coefficient = Scalar | Callable[[str], Scalar] | Sequence[tuple[trees.Selector, Scalar]] | PyTree
_UNCOVERED = object()


def by_rules(tree: PyTree, rules: trees.Rules, *, default: Any) -> list[Any]:
    """One value per leaf, in tree order, by ordered rules; `default` where none matches."""
    labels = trees.labels(tree, rules, default=_UNCOVERED)
    flat = jax.tree.structure(tree).flatten_up_to(labels)
    return [default if label is _UNCOVERED else label for label in flat]


def is_rules(value: Any) -> TypeGuard[trees.Rules]:
    """Whether a value is `[(selector, anything), ...]` and not a pytree prefix."""
    if not isinstance(value, (list, tuple)) or isinstance(value, trees.Glob) or not value:
        return False
    pairs = all(isinstance(item, tuple) and len(item) == 2 for item in value)
    return pairs and all(_is_selector(item[0]) for item in value)


def coefficients(fn: str, alpha: Coefficient, tree: PyTree, chosen: Sequence[bool]) -> list[Any]:
    """One coefficient per leaf; None where a leaf is not chosen or no rule names it.

    Raises:
      ValueError: if a rule is unused, a prefix does not fit the tree, or a coefficient is
        neither a scalar nor broadcastable within its leaf.
      TypeError: if a coefficient is not a real number.
    """
    flat = trees.flatten(tree)
    if callable(alpha):
        values = [alpha(path) if c else None for path, c in zip(flat, chosen, strict=True)]
    elif is_rules(alpha):
        values = by_rules(tree, alpha, default=None)
    elif _is_number(alpha):
        values = [alpha] * len(flat)
    else:
        values = _from_prefix(fn, alpha, tree)
    out: list[Any] = []
    for (path, leaf), value, is_chosen in zip(flat.items(), values, chosen, strict=True):
        if not is_chosen or value is None:
            out.append(None)
            continue
        _check_coefficient(fn, path, leaf, value)
        out.append(value)
    return out


def multiply(leaf: Any, alpha: Scalar) -> Array:
    """`alpha * leaf` in float32 or wider, in the leaf's own dtype."""
    wide = widen(leaf)
    return (_numerics.scalar(alpha, wide) * wide).astype(canonical_dtype(leaf))


def widen(leaf: Any) -> Array:
    """The leaf as a JAX array of float32 (complex64) or wider."""
    return _numerics.upcast(jnp.asarray(leaf, canonical_dtype(leaf)))


def canonical_dtype(leaf: Any) -> Any:
    """The dtype JAX gives a leaf: its own, but float32 for float64 while x64 is off."""
    return jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))


def _is_number(value: Any) -> bool:
    return jax.tree.structure(value) == jax.tree.structure(0) and np.ndim(value) == 0


def _is_selector(value: Any) -> bool:
    if isinstance(value, (str, trees.Glob)) or callable(value):
        return True
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, (bool, np.bool_)) for leaf in leaves)


def _from_prefix(fn: str, alpha: PyTree, tree: PyTree) -> list[Any]:
    # A tree of all the parameters' structure may hold one array per leaf; a shorter prefix
    # repeats its values over whole subtrees.
    try:
        return jax.tree.leaves(jax.tree.broadcast(alpha, tree))
    except ValueError as error:
        raise ValueError(
            f"alpha must be a number, (path) -> number, rules [(selector, number)] or a "
            f"pytree prefix of the parameters, got {type(alpha).__name__}: {error}"
        ) from None


def _check_coefficient(fn: str, path: str, leaf: Any, value: Any) -> None:
    is_number = isinstance(value, (int, float)) or hasattr(value, "dtype")
    dtype = jnp.result_type(value) if is_number else None
    real = dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
    if not real:
        raise TypeError(
            f"the coefficient of {path!r} must be a real number, got "
            f"{type(value).__name__ if dtype is None else dtype}."
        )
    shape, target = np.shape(value), np.shape(leaf)
    within = len(shape) == len(target) and all(
        n in (1, m) for n, m in zip(shape, target, strict=True)
    )
    if shape != () and not within:
        raise ValueError(
            f"the coefficient of {path!r} must be a scalar, or have the leaf's rank with "
            f"lengths 1 or the leaf's own, got alpha{list(shape)} for a leaf{list(target)}."
        )
