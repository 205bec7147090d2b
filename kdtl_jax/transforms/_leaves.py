"""The basis of every transform: coefficients by leaf, dtypes, and trees side by side.

Arithmetic is done in float32 (complex64) or wider, and a leaf keeps its own dtype. Leaves that are
not inexact (counters, PRNG keys, functions) pass through, except quantized integer codes, which
mean nothing without their scales and are refused by path. Whatever does not fit raises ValueError:
names, shapes, rules, prefixes, numbers of weights; a coefficient that is no real number, TypeError.

A *coefficient* (`alpha` everywhere in this package) is a number, a traced scalar, a function
`(path) -> number`, ordered rules `[(selector, number), ...]`, or a pytree prefix of numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, PyTree, Scalar
from kdtl_jax.transforms import _codes
from kdtl_jax.transforms._codes import refuse_codes

Coefficient = Scalar | Callable[[str], Scalar] | Sequence[tuple[trees.Selector, Scalar]] | PyTree
# A number or traced array per tree, or anything that gives one number per leaf.
Weights = Array | Sequence[Coefficient]
Formula = Callable[..., Array]  # (leaf number, path, leaf of each tree ...) -> leaf
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


def coefficients(
    alpha: Coefficient,
    tree: PyTree,
    selected: Sequence[bool] | None = None,
    *,
    name: str = "alpha",
) -> list[Any]:
    """One coefficient per leaf; None if a leaf is not selected or matches no rule.

    `selected` defaults to the inexact leaves; `name` is the caller's argument.
    """
    flat = trees.flatten(tree)
    if selected is None:
        selected = [trees.is_inexact(leaf) for leaf in flat.values()]
    if callable(alpha):
        values = [alpha(path) if flag else None for path, flag in zip(flat, selected, strict=True)]
    elif is_rules(alpha):
        values = by_rules(tree, alpha, default=None)
    elif _is_number(alpha):
        values = [alpha] * len(flat)
    else:
        values = _from_prefix(alpha, tree, name)
    out: list[Any] = []
    for (path, leaf), value, is_selected in zip(flat.items(), values, selected, strict=True):
        if not is_selected or value is None:
            out.append(None)
            continue
        _check_coefficient(path, leaf, value, name)
        out.append(value)
    return out


def select_inexact(params: PyTree, where: trees.Selector) -> PyTree:
    """The mask of the inexact leaves that `where` selects."""
    mask = trees.mask(params, where)
    flat = trees.flatten(params)
    pairs = zip(flat, jax.tree.leaves(mask), strict=True)
    refuse_codes(flat, [path for path, is_selected in pairs if is_selected])
    return jax.tree.map(lambda flag, leaf: flag and trees.is_inexact(leaf), mask, params)


def multiply(leaf: Any, alpha: Scalar) -> Array:
    """`alpha * leaf` in float32 or wider, in the leaf's own dtype."""
    upcast = widen(leaf)
    return (_numerics.cast(alpha, upcast) * upcast).astype(canonical_dtype(leaf))


def widen(leaf: Any) -> Array:
    """The leaf as a JAX array of float32 (complex64) or wider."""
    return _numerics.upcast(jnp.asarray(leaf, canonical_dtype(leaf)))


def canonical_dtype(leaf: Any) -> Any:
    """The dtype JAX gives a leaf: its own, but float32 for float64 while x64 is off."""
    return jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))


def name_members(name: str, members: Sequence[PyTree]) -> dict[str, PyTree]:
    """Names the members of a list for messages: `{"models[0]": ..., "models[1]": ...}`."""
    if not isinstance(members, (list, tuple)) or not members:
        received = "an empty one" if isinstance(members, (list, tuple)) else type(members).__name__
        raise ValueError(f"{name} must be a non-empty list of parameter trees, got {received}.")
    return {f"{name}[{i}]": member for i, member in enumerate(members)}


def combine_leaves(
    formula: Formula,
    trees_by_name: Mapping[str, PyTree],
    columns: Sequence[Sequence[Any]],
    *,
    keep_dtype: bool = True,
) -> PyTree:
    """`formula(leaf number, path, *leaves)` on the inexact leaves of all trees side by side.

    The first tree gives the structure, the dtypes, and all leaves that are not inexact. The formula
    gets leaves of one dtype, float32 or wider; its results are cast to the first tree's dtypes
    unless `keep_dtype` is false.

    Tied leaves (one array under several paths, in every tree) stay tied: the first path's result,
    drawn with that path's key, is used for all. `columns` lists the coefficients that the formula
    reads, one entry per leaf; if they differ between tied leaves, only the key is shared.
    """
    flats = {name: trees.flatten(tree) for name, tree in trees_by_name.items()}
    if len(flats) > 1:
        _checks.same_leaves(**flats)
    first, *others = flats.values()
    refuse_codes(first)
    out: list[Any] = []
    # The leaves' identities -> their first position and path.
    first_of_tie: dict[tuple[int, ...], tuple[int, str]] = {}
    for i, (path, leaf) in enumerate(first.items()):
        beside = [flat[path] for flat in others]
        if not trees.is_inexact(leaf):
            _codes.check_integers(path, leaf, beside)
            out.append(leaf)
            continue
        for other in beside:
            if _codes.is_integers(other):
                raise ValueError(_codes.beside_numbers(path))
        j, first_path = first_of_tie.setdefault(tuple(map(id, [leaf, *beside])), (i, path))
        if j < i and all(_same(column[i], column[j]) for column in columns):
            out.append(out[j])
            continue
        result = formula(i, first_path, *one_dtype([leaf, *beside]))
        out.append(result.astype(canonical_dtype(leaf)) if keep_dtype else result)
    return jax.tree.unflatten(jax.tree.structure(next(iter(trees_by_name.values()))), out)


def one_dtype(leaves: Sequence[Any]) -> list[Array]:
    """Leaves as arrays of one dtype, float32 or wider; masks and counts become numbers."""
    upcast = [
        widen(leaf) if trees.is_inexact(leaf) else jnp.asarray(leaf, jnp.float32) for leaf in leaves
    ]
    dtype = np.result_type(*[leaf.dtype for leaf in upcast])
    return [leaf.astype(dtype) for leaf in upcast]


def weights_by_leaf(weights: Weights | None, count: int, tree: PyTree) -> list[list[Any]]:
    """`[leaf][member]` weights; all 1 when `weights` is None."""
    if weights is None:
        weights = [1.0] * count
    if not isinstance(weights, (list, tuple)) and len(getattr(weights, "shape", ())) != 1:
        raise ValueError(f"weights must be {count} numbers, one per tree, got {weights!r:.80}.")
    if len(weights) != count:
        raise ValueError(f"expected {count} weights, one per tree, got {len(weights)}.")
    columns = [coefficients(weights[i], tree, name=f"weights[{i}]") for i in range(count)]
    flat = trees.flatten(tree)
    for path, leaf, *row in zip(flat, flat.values(), *columns, strict=True):
        if trees.is_inexact(leaf) and any(weight is None for weight in row):
            raise ValueError(
                f"the weights' rules do not cover {path!r}. End them with ('.*', weight)."
            )
    return [list(row) for row in zip(*columns, strict=True)]


def nonzero_total(path: str, weights: Sequence[Any]) -> None:
    """Raises ValueError if the (concrete) weights of a leaf, whose sum divides it, sum to 0.

    Weights such as .3, -.1, -.2 sum to 0 up to rounding, and dividing by the noise is refused too.
    """
    concrete = [w for weight in weights if (w := _checks.concrete(weight)) is not None]
    if len(concrete) < len(weights):
        return
    total, size = sum(concrete), sum(map(np.abs, concrete))
    noise = np.finfo(np.float32).eps * size
    if not np.all(np.isfinite(total) & (np.abs(total) > noise)):
        raise ValueError(
            f"the weights of {path!r} must have a finite sum other than 0, which divides "
            f"them, got {[w.tolist() for w in concrete]}. weighted_sum does not divide."
        )


def scaled(weight: Any, leaf: Array) -> Array:
    """`weight * leaf` in the leaf's dtype."""
    return _numerics.cast(weight, leaf) * leaf


def total(terms: Sequence[Array]) -> Array:
    """The sum of one or more arrays, in order."""
    return sum(terms[1:], terms[0])


def weighted_sum(weights: Sequence[Any], leaves: Sequence[Array]) -> Array:
    """`sum_i w_i x_i` of leaves of one dtype, which the weights are cast to."""
    return total([scaled(w, x) for w, x in zip(weights, leaves, strict=True)])


def equal_paths(tree: PyTree) -> dict[str, str]:
    """`{path: first path with an equal leaf}`, for ties that are stored twice.

    Random draws for a tied leaf use the first one's path. Costs reading one row per leaf that
    shares its shape: only leaves with the same first row are compared whole. Scalars are never
    tied, nor are leaves whose values are unknown here: tracers, and arrays that are partly in
    other processes.
    """
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for path, leaf in trees.flatten(tree).items():
        if np.ndim(leaf) and np.size(leaf) and trees.is_inexact(leaf) and _is_known(leaf):
            groups.setdefault((leaf.shape, str(leaf.dtype)), []).append((path, leaf))
    first_paths: dict[str, str] = {}
    for group in groups.values():
        same_start: dict[bytes, list[tuple[str, Any]]] = {}
        for path, leaf in group if len(group) > 1 else ():
            start = np.asarray(leaf[(0,) * (leaf.ndim - 1)])
            earlier = same_start.setdefault(start.tobytes(), [])
            same = [p for p, other in earlier if other is leaf or np.array_equal(other, leaf)]
            if same:
                first_paths[path] = same[0]
            else:
                earlier.append((path, leaf))
    return first_paths


def _is_known(leaf: Any) -> bool:
    """Whether the leaf's values can be read in this process."""
    if isinstance(leaf, Tracer):
        return False
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _same(a: Any, b: Any) -> bool:
    """Whether two coefficients, or lists of them, are known to be equal."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    number_types = (int, float, np.integer, np.floating)
    return a is b or (isinstance(a, number_types) and isinstance(b, number_types) and a == b)


def _is_number(value: Any) -> bool:
    return jax.tree.structure(value) == jax.tree.structure(0) and np.ndim(value) == 0


def _is_selector(value: Any) -> bool:
    if isinstance(value, (str, trees.Glob)) or callable(value):
        return True
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, (bool, np.bool_)) for leaf in leaves)


def _from_prefix(alpha: PyTree, tree: PyTree, name: str) -> list[Any]:
    # A tree of all the parameters' structure may hold one array per leaf; a shorter prefix
    # repeats its values over whole subtrees.
    try:
        return jax.tree.leaves(jax.tree.broadcast(alpha, tree))
    except ValueError as error:
        raise ValueError(
            f"{name} must be a number, (path) -> number, rules [(selector, number)] or a "
            f"pytree prefix of the parameters, got {type(alpha).__name__}: {error}"
        ) from None


def _check_coefficient(path: str, leaf: Any, value: Any, name: str) -> None:
    is_number = isinstance(value, (int, float)) or hasattr(value, "dtype")
    dtype = jnp.result_type(value) if is_number else None
    is_real = dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
    if not is_real:
        raise TypeError(
            f"{name}, the coefficient of {path!r}, must be a real number, got "
            f"{type(value).__name__ if dtype is None else dtype}."
        )
    shape, target = np.shape(value), np.shape(leaf)
    is_broadcastable = len(shape) == len(target) and all(
        n in (1, m) for n, m in zip(shape, target, strict=True)
    )
    if shape != () and not is_broadcastable:
        raise ValueError(
            f"{name}, the coefficient of {path!r}, must be a scalar, or have the leaf's rank with "
            f"lengths 1 or the leaf's own, got {name}{list(shape)} for a leaf{list(target)}."
        )
    # An array on a device may have been computed from leaves, and is NaN where they are.
    if not isinstance(value, jax.Array) and not np.isfinite(value).all():
        raise ValueError(f"{name}, the coefficient of {path!r}, must be finite, got {value!r:.80}.")
