"""Arithmetic over several trees: names and shapes checked, leaves widened, dtypes kept.

Every function of weight-space arithmetic is "this formula, leaf by leaf"; here is what comes before
and after the formula. The first tree is authoritative: its structure, its dtypes, and its leaves
wherever they are not inexact.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, PyTree
from kdtl_jax.transforms import _leaves
from kdtl_jax.transforms._leaves import Coefficient

# A number or traced array per tree, or anything that gives one number per leaf.
Weights = Array | Sequence[Coefficient]
Formula = Callable[..., Array]  # (leaf number, path, leaf of each tree ...) -> leaf


def numbered(fn: str, name: str, members: Sequence[PyTree]) -> dict[str, PyTree]:
    """`{"models[0]": ..., "models[1]": ...}`: how messages call the members of a list."""
    if not isinstance(members, (list, tuple)) or not members:
        came = "an empty one" if isinstance(members, (list, tuple)) else type(members).__name__
        raise ValueError(f"{name} must be a non-empty list of parameter trees, got {came}.")
    return {f"{name}[{i}]": member for i, member in enumerate(members)}


def leafwise(
    fn: str, formula: Formula, named: Mapping[str, PyTree], *, keep_dtype: bool = True
) -> PyTree:
    """`formula(leaf number, path, *leaves)` on the inexact leaves of all trees side by side.

    Leaves come in one dtype, float32 or wider; results are cast to the first tree's dtype
    unless `keep_dtype` is false. Other leaves are the first tree's.

    Raises:
      ValueError: if the trees differ in names or shapes; all differences are listed.
    """
    flats = {name: trees.flatten(tree) for name, tree in named.items()}
    if len(flats) > 1:
        _checks.same_leaves(**flats)
    first, *others = flats.values()
    out = []
    for i, (path, leaf) in enumerate(first.items()):
        if not trees.is_inexact(leaf):
            out.append(leaf)
            continue
        aligned = one_dtype([leaf, *(flat[path] for flat in others)])
        result = formula(i, path, *aligned)
        out.append(result.astype(_leaves.canonical_dtype(leaf)) if keep_dtype else result)
    return jax.tree.unflatten(jax.tree.structure(next(iter(named.values()))), out)


def one_dtype(leaves: Sequence[Any]) -> list[Array]:
    """Leaves as arrays of one dtype, float32 or wider; masks and counts become numbers."""
    wide = [
        _leaves.widen(leaf) if trees.is_inexact(leaf) else jnp.asarray(leaf, jnp.float32)
        for leaf in leaves
    ]
    dtype = np.result_type(*[leaf.dtype for leaf in wide])
    return [leaf.astype(dtype) for leaf in wide]


def coefficients(fn: str, alpha: Coefficient, tree: PyTree) -> list[Any]:
    """One coefficient per leaf of `tree`; None where a leaf is not inexact or no rule names it."""
    inexact = [trees.is_inexact(leaf) for leaf in jax.tree.leaves(tree)]
    return _leaves.coefficients(fn, alpha, tree, inexact)


def weights_by_leaf(fn: str, weights: Weights | None, count: int, tree: PyTree) -> list[list[Any]]:
    """`[leaf][member]` weights; 1 each when `weights` is None.

    Raises:
      ValueError: if there is not one weight per member, or rules leave a leaf uncovered.
    """
    if weights is None:
        weights = [1.0] * count
    if len(weights) != count:
        raise ValueError(f"expected {count} weights, one per tree, got {len(weights)}.")
    columns = [coefficients(fn, weights[i], tree) for i in range(count)]
    flat = trees.flatten(tree)
    for path, leaf, *row in zip(flat, flat.values(), *columns, strict=True):
        if trees.is_inexact(leaf) and any(weight is None for weight in row):
            raise ValueError(
                f"the weights' rules do not cover {path!r}. End them with ('.*', weight)."
            )
    return [list(row) for row in zip(*columns, strict=True)]


def nonzero_total(fn: str, path: str, weights: Sequence[Any]) -> None:
    """Raises ValueError where the (concrete) weights of a leaf, which divide it, sum to 0."""
    known = [w for weight in weights if (w := _checks.concrete(weight)) is not None]
    if len(known) < len(weights):
        return
    total = sum(known)
    if not np.all(np.isfinite(total) & (total != 0)):
        raise ValueError(
            f"the weights of {path!r} must have a finite sum other than 0, which divides "
            f"them, got {[w.tolist() for w in known]}. weighted_sum does not divide."
        )


def scaled(weight: Any, leaf: Array) -> Array:
    """`weight * leaf` in the leaf's dtype."""
    return _numerics.scalar(weight, leaf) * leaf


def fold_path(key: Array, path: str) -> Array:
    """A key of the path's own: merging a subset draws what merging everything draws."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def flat_norm(x: Array, axis: int | None = None, *, keepdims: bool = False) -> Array:
    """Euclidean norm of a leaf as one vector, or along one axis; gradient 0 at 0."""
    axes = tuple(range(x.ndim)) if axis is None else axis
    return jnp.abs(x) if x.ndim == 0 else _numerics.safe_norm(x, axis=axes, keepdims=keepdims)
