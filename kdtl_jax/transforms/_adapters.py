"""Adapters as pure functions of parameters: `init`, `apply`, `merge`, `combine`.

An adapter combines base parameters with a few weights of its own into parameters of the base's
shapes, so the model does not change: call `apply` inside the loss and differentiate with respect to
the weights

    base, weights = adapter.init(key, params, where=".*/kernel")
    loss = lambda weights: task_loss(adapter.apply(base, weights), batch)

Weights are a flat dict `{path: arrays}`: selectors, optimizers and checkpoints see
`"encoder/kernel/a"`. `jax.vmap(adapter.apply, in_axes=(None, 0))` applies many adapters at once.
Kernels of scanned layers `[L, in, out]` have one adapter per layer. Different kinds are combined by
nesting `apply`. Dropout of the adapter's *inputs* is not a function of parameters and is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, ModelFn, Outputs, Params, PyTree, Scalar
from kdtl_jax.transforms import _leaves

AdapterWeights = dict[str, Any]  # path of the adapted leaf -> NamedTuple of arrays
Axes = int | tuple[int, ...]


class AdaptedParams(NamedTuple):
    """Parameters of an adapted model, from `init`: paths begin with `base/` or `adapter/`."""

    base: Params
    adapter: AdapterWeights


class AdapterInit(Protocol):
    """`(key, params, *, where, gradients) -> (base, weights)`, `apply(base, weights) == params`.

    The base differs from the parameters only if a start moves part of the kernel into the adapter
    (PiSSA, OLoRA, LoRA-GA). Only gradient starts read `gradients`.
    """

    def __call__(
        self,
        key: Array,
        params: Params,
        *,
        where: trees.Selector,
        gradients: PyTree | None = None,
    ) -> AdaptedParams: ...


class Adapter(NamedTuple):
    """The functions of one kind of adapter; hyper-parameters are fixed when it is made."""

    init: AdapterInit
    apply: Callable[[Params, AdapterWeights], Params]
    merge: Callable[[Params, AdapterWeights], Params]
    """The same values as `apply`, cast once to the leaves' dtypes, as plain parameters."""
    combine: Callable[..., AdapterWeights]
    """`(members, weights=None) -> AdapterWeights`; one member of weight 1 is returned as it is."""


def adapted_model(model: ModelFn, adapter: Adapter) -> ModelFn:
    """A model function over adapted parameters; train it with `trainable="adapter/.*"`.

    Its parameters are what `adapter.init` returns, or a dict `{"base": ..., "adapter": ...}`:

        start = adapter.init(key, params, where=".*/kernel")
        ... train adapted_model(model, adapter) from start to tuned ...
        params = adapter.merge(*tuned)
    """

    def run(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        pair = AdaptedParams(**params) if isinstance(params, Mapping) else AdaptedParams(*params)
        merged = adapter.apply(pair.base, pair.adapter)
        return model(merged, model_state, inputs, key=key, train=train)

    return run


class MatrixView(NamedTuple):
    """A leaf as a stack of matrices `[..., in, out]`, and the way back."""

    matrix: Array
    restore: Callable[[Array], Array]


def matrix_view(path: str, leaf: Any, in_axis: Axes, out_axis: Axes) -> MatrixView:
    """`leaf` in float32 or wider as `[..., in, out]`; several axes on a side are flattened.

    Axes on neither side come first: each of their entries is a separate matrix. Which axes are
    inputs is never guessed from a shape.
    """
    ndim = jnp.ndim(leaf)
    sides = [(axis,) if isinstance(axis, int) else tuple(axis) for axis in (in_axis, out_axis)]
    if any(not -ndim <= axis < ndim for side in sides for axis in side):
        raise ValueError(
            f"{path!r} has shape {list(jnp.shape(leaf))}, which lacks in_axis={in_axis} or "
            f"out_axis={out_axis}. Select matrices only (where=), or name their axes."
        )
    ins, outs = ([axis % ndim for axis in side] for side in sides)
    if len({*ins, *outs}) != len(ins) + len(outs):
        raise ValueError(f"in_axis={in_axis} and out_axis={out_axis} of {path!r} overlap.")
    lead = [axis for axis in range(ndim) if axis not in ins and axis not in outs]
    order = [*lead, *ins, *outs]
    transposed = jnp.transpose(_leaves.widen(leaf), order)
    shape = transposed.shape
    after_lead, after_inputs = len(lead), len(lead) + len(ins)
    flat = (
        *shape[:after_lead],
        math.prod(shape[after_lead:after_inputs]),
        math.prod(shape[after_inputs:]),
    )
    inverse = [order.index(axis) for axis in range(ndim)]

    def restore(matrix: Array) -> Array:
        return jnp.transpose(matrix.reshape(shape), inverse)

    return MatrixView(transposed.reshape(flat), restore)


def selected_matrices(params: Params, where: trees.Selector) -> dict[str, Any]:
    """The inexact leaves that `where` selects for an adapter."""
    flags = jax.tree.leaves(_leaves.select_inexact(params, where))
    pairs = zip(trees.flatten(params).items(), flags, strict=True)
    matrices = {path: leaf for (path, leaf), is_selected in pairs if is_selected}
    if not matrices:
        raise ValueError("adapter: the selected leaves hold no floating-point array.")
    return matrices


def rewrite(
    params: Params, edits: Mapping[str, Any], edit: Callable[[str, Any, Any], Array]
) -> Params:
    """`edit(path, leaf, edits[path])` at every path of `edits`, cast to the leaf's dtype."""
    flat = trees.flatten(params)
    for path in edits:
        if path not in flat:
            raise ValueError(
                f"the adapter's {path!r} is not in the parameters; nearest paths: "
                f"{trees.nearest(path, list(flat))}. Adapters belong to one architecture."
            )
    out = [
        edit(path, leaf, edits[path]).astype(_leaves.canonical_dtype(leaf))
        if path in edits
        else leaf
        for path, leaf in flat.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), out)


def over_matrices(
    change: Callable[[str, Array, Any], Array], in_axis: Axes, out_axis: Axes
) -> Callable[[Params, AdapterWeights], Params]:
    """`apply` that makes each matrix `change(path, matrix, its weights)`."""

    def edit(path: str, leaf: Any, weights: Any) -> Array:
        view = matrix_view(path, leaf, in_axis, out_axis)
        return view.restore(change(path, view.matrix, weights))

    return lambda params, weights: rewrite(params, weights, edit)


def per_matrix(
    start: Callable[[str, Array], Any],
    change: Callable[[str, Array, Any], Array],
    join: Callable[[Sequence[Any], Sequence[Scalar]], Any],
    in_axis: Axes,
    out_axis: Axes,
) -> Adapter:
    """An adapter of weights `start(path, matrix)`, combined by `join(members' weights, shares)`."""

    def init(
        key: Array, params: Params, *, where: trees.Selector, gradients: PyTree | None = None
    ) -> AdaptedParams:
        leaves = selected_matrices(params, where)
        views = {path: matrix_view(path, leaf, in_axis, out_axis) for path, leaf in leaves.items()}
        return AdaptedParams(params, {path: start(path, v.matrix) for path, v in views.items()})

    def combine(
        members: Sequence[AdapterWeights], weights: Sequence[Scalar] | Array | None = None
    ) -> AdapterWeights:
        shares = check_members(members, weights)
        return {path: join([member[path] for member in members], shares) for path in members[0]}

    apply = over_matrices(change, in_axis, out_axis)
    return Adapter(init, apply, apply, combine)


def check_fits(path: str, expected: Mapping[str, tuple[int, ...]], **arrays: Array) -> None:
    """Raises ValueError unless every array has its expected shape."""
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise ValueError(
                f"the adapter of {path!r} does not fit: expected {name}"
                f"{list(expected[name])}, got {_checks.described(**{name: array})}. Was it made "
                "for other parameters, or with other in_axis and out_axis?"
            )


def check_members(
    members: Sequence[AdapterWeights], weights: Sequence[Scalar] | Array | None
) -> list[Scalar]:
    """Checks that the members adapt the same paths, and returns one weight per member."""
    if not members:
        raise ValueError("expected a non-empty list of adapters' weights.")
    _checks.same_keys(**{f"members[{i}]": member for i, member in enumerate(members)})
    if weights is None:
        return [1.0] * len(members)
    if len(weights) != len(members):
        raise ValueError(f"expected {len(members)} weights, got {len(weights)}.")
    return [weights[i] for i in range(len(members))]


def weighted_sum(weights: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    """`sum_i w_i x_i`; equal shapes."""
    pairs = zip(weights, arrays, strict=True)
    return _leaves.total([_numerics.scalar(w, x) * x for w, x in pairs])
