"""Adapters that scale or rotate: IA3, VeRA, OFT. (BitFit needs no adapter: train `".*bias"`.)

`in_axis` and `out_axis` are a kernel's input and output axis, or axes; `init` and `apply` raise
ValueError if a selected leaf lacks them.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _adapters, _leaves
from kdtl_jax.transforms._adapters import (
    AdaptedParams,
    Adapter,
    AdapterWeights,
    AxisSpec,
    MatrixView,
)

Apply = Callable[[Params, AdapterWeights], Params]

_HIGHEST = jax.lax.Precision.HIGHEST


class ScaleWeights(NamedTuple):
    """`vector [..., out]` or `[..., in]`: one factor per output or input; starts at 1."""

    vector: Array


class VeraWeights(NamedTuple):
    """`d [K, ..., r]` and `b [K, ..., out]`: K terms over the shared random projections."""

    d: Array
    b: Array


class RotationWeights(NamedTuple):
    """`skew [..., blocks, n (n - 1) / 2]`: upper triangles of skew matrices; start at 0."""

    skew: Array


def ia3_output(
    *, in_axis: AxisSpec = -2, out_axis: AxisSpec = -1, bias: Sequence[str] = ("bias", "b")
) -> Adapter:
    """`y' = (x W + b) * l`: one learned factor per output, for keys and values.

    Args:
      bias: last path segments (after "/" or, in flat names, ".") of the bias beside a kernel,
        which is scaled with it if there is one; `()` scales no bias.

    Returns:
      The adapter; weights are `{kernel's path: ScaleWeights}`. `combine` is
      `1 + sum_i w_i (l_i - 1)`.

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper, 2022
      (2205.05638).
    """

    def apply(params: Params, weights: AdapterWeights) -> Params:
        flat, edits = trees.flatten(params), {}
        for path, scale in weights.items():
            edits[path] = (scale.vector, True)
            stem = re.sub(r"[^/.]*$", "", path)
            for bias_path in (stem + name for name in bias):
                if bias_path in flat and bias_path not in weights:
                    edits[bias_path] = (scale.vector, False)

        def edit(path: str, leaf: PyTree, scaling: tuple[Array, bool]) -> Array:
            vector, is_kernel = scaling
            if not is_kernel:
                upcast = _leaves.widen(leaf)
                return upcast * vector.reshape(upcast.shape).astype(upcast.dtype)
            kernel = _adapters.matrix_view(path, leaf, in_axis, out_axis)
            shape = (*kernel.matrix.shape[:-2], kernel.matrix.shape[-1])
            _adapters.check_fits(path, {"vector": shape}, vector=vector)
            return kernel.restore(kernel.matrix * vector[..., None, :].astype(kernel.matrix.dtype))

        return _adapters.rewrite(params, edits, edit)

    return _scaling_adapter(apply, in_axis, out_axis, -1)


def ia3_input(*, in_axis: AxisSpec = -2, out_axis: AxisSpec = -1) -> Adapter:
    """`y' = (x * l) W + b`: one learned factor per input, for feed-forward layers.

    Otherwise as `ia3_output`; biases are not changed.
    """

    def apply(params: Params, weights: AdapterWeights) -> Params:
        def edit(path: str, leaf: PyTree, scale: ScaleWeights) -> Array:
            kernel = _adapters.matrix_view(path, leaf, in_axis, out_axis)
            shape = kernel.matrix.shape[:-1]
            _adapters.check_fits(path, {"vector": shape}, vector=scale.vector)
            vector = scale.vector.astype(kernel.matrix.dtype)
            return kernel.restore(kernel.matrix * vector[..., :, None])

        return _adapters.rewrite(params, weights, edit)

    return _scaling_adapter(apply, in_axis, out_axis, -2)


def vera(
    projections: Array,
    rank: int = 256,
    *,
    start: float = 0.1,
    in_axis: AxisSpec = -2,
    out_axis: AxisSpec = -1,
) -> Adapter:
    """`W' = W + (A * d) (B * b)` with A and B random, frozen, and the same for every layer.

    A and B are drawn from a key instead of stored: a layer uses their first `in` rows and `out`
    columns, which do not depend on any other layer's size.

    Args:
      projections: the PRNG key of A and B; part of the model, so keep it with the weights.
      rank: r; can be high, since a rank costs one number per layer.
      start: the initial value of d; b starts at 0.

    Returns:
      The adapter; weights are `{path: VeraWeights}`. `combine` stacks terms, which is exact.

    References:
      Kopiczko, Blankevoort and Asano, VeRA, 2023 (2310.11454). Bounds `sqrt(6 / in)` of A and
      `sqrt(6 / r)` of B as in PEFT, with each layer's own `in`.
    """

    def view(path: str, leaf: PyTree) -> MatrixView:
        return _adapters.matrix_view(path, leaf, in_axis, out_axis)

    def init(
        key: Array, params: Params, *, where: trees.Selector, gradients: PyTree | None = None
    ) -> AdaptedParams:
        weights = {}
        for path, leaf in _adapters.selected_matrices(params, where).items():
            *lead, _, fan_out = view(path, leaf).matrix.shape
            dtype = _leaves.widen(leaf).dtype
            d = jnp.full((1, *lead, rank), start, dtype)
            weights[path] = VeraWeights(d, jnp.zeros((1, *lead, fan_out), dtype))
        return AdaptedParams(params, weights)

    def apply(params: Params, weights: AdapterWeights) -> Params:
        def edit(path: str, leaf: PyTree, vera_weights: VeraWeights) -> Array:
            kernel = view(path, leaf)
            *lead, fan_in, fan_out = kernel.matrix.shape
            terms, dtype = vera_weights.d.shape[0], kernel.matrix.dtype
            expected = {"d": (terms, *lead, rank), "b": (terms, *lead, fan_out)}
            _adapters.check_fits(path, expected, d=vera_weights.d, b=vera_weights.b)
            key_a, key_b = jax.random.split(projections)
            a = _rows(key_a, fan_in, rank, (6 / fan_in) ** 0.5, dtype)
            b = _rows(key_b, fan_out, rank, (6 / rank) ** 0.5, dtype).T
            stacked_a = a.reshape(*(1,) * (vera_weights.d.ndim - 1), *a.shape)
            scaled = stacked_a * vera_weights.d[..., None, :].astype(dtype)
            product = jnp.matmul(scaled, b, precision=_HIGHEST)
            delta = jnp.sum(product * vera_weights.b[..., None, :].astype(dtype), axis=0)
            return kernel.restore(kernel.matrix + delta)

        return _adapters.rewrite(params, weights, edit)

    def combine(
        members: Sequence[AdapterWeights], weights: Sequence[Scalar] | Array | None = None
    ) -> AdapterWeights:
        shares = _adapters.check_members(members, weights)
        return {
            path: VeraWeights(
                jnp.concatenate([member[path].d for member in members]),
                jnp.concatenate(
                    [
                        _numerics.scalar(share, member[path].b) * member[path].b
                        for share, member in zip(shares, members, strict=True)
                    ]
                ),
            )
            for path in members[0]
        }

    return Adapter(init, apply, apply, combine)


def oft(block_size: int = 32, *, in_axis: AxisSpec = -2, out_axis: AxisSpec = -1) -> Adapter:
    """`W' = R W`, R block-diagonal and orthogonal: rotates inputs, keeping angles and norms.

    `R = (I + Q)(I - Q)^-1` with Q skew (Cayley), solved exactly.

    Args:
      block_size: n; the number of inputs must be a multiple of it.

    Returns:
      The adapter; weights are `{path: RotationWeights}`. `combine` adds the skew matrices, which
      is exact for one member and approximate for several, even if they rotate the same planes.

    Raises:
      ValueError: if a selected leaf lacks the axes, or its inputs do not divide into blocks.

    References:
      Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023
      (2306.07280). PEFT's default is a truncated Neumann series of this R; its exact branch is
      the inverse rotation, i.e. this one with the sign of Q flipped.
    """
    _checks.count(1, block_size=block_size)
    size = block_size * (block_size - 1) // 2
    rows, columns = np.triu_indices(block_size, 1)

    def view(path: str, leaf: PyTree) -> MatrixView:
        kernel = _adapters.matrix_view(path, leaf, in_axis, out_axis)
        if kernel.matrix.shape[-2] % block_size:
            raise ValueError(
                f"the {kernel.matrix.shape[-2]} inputs of {path!r} are not a multiple of "
                f"block_size={block_size}."
            )
        return kernel

    def init(
        key: Array, params: Params, *, where: trees.Selector, gradients: PyTree | None = None
    ) -> AdaptedParams:
        weights = {}
        for path, leaf in _adapters.selected_matrices(params, where).items():
            *lead, fan_in, _ = view(path, leaf).matrix.shape
            shape = (*lead, fan_in // block_size, size)
            weights[path] = RotationWeights(jnp.zeros(shape, _leaves.widen(leaf).dtype))
        return AdaptedParams(params, weights)

    def apply(params: Params, weights: AdapterWeights) -> Params:
        def edit(path: str, leaf: PyTree, rotation_weights: RotationWeights) -> Array:
            kernel = view(path, leaf)
            *lead, fan_in, fan_out = kernel.matrix.shape
            blocks = fan_in // block_size
            _adapters.check_fits(path, {"skew": (*lead, blocks, size)}, skew=rotation_weights.skew)
            dtype = kernel.matrix.dtype
            upper = jnp.zeros((*lead, blocks, block_size, block_size), dtype)
            upper = upper.at[..., rows, columns].set(rotation_weights.skew.astype(dtype))
            skew = upper - jnp.swapaxes(upper, -1, -2)
            eye = jnp.broadcast_to(jnp.eye(block_size, dtype=dtype), skew.shape)
            # The two factors commute, so their order does not matter.
            rotation = jnp.linalg.solve(eye - skew, eye + skew)
            inputs = kernel.matrix.reshape(*lead, blocks, block_size, fan_out)
            rotated = jnp.matmul(rotation, inputs, precision=_HIGHEST)
            return kernel.restore(rotated.reshape(kernel.matrix.shape))

        return _adapters.rewrite(params, weights, edit)

    def combine(
        members: Sequence[AdapterWeights], weights: Sequence[Scalar] | Array | None = None
    ) -> AdapterWeights:
        shares = _adapters.check_members(members, weights)
        return {
            path: RotationWeights(_adapters.weighted_sum(shares, [m[path].skew for m in members]))
            for path in members[0]
        }

    return Adapter(init, apply, apply, combine)


def _scaling_adapter(apply: Apply, in_axis: AxisSpec, out_axis: AxisSpec, side: int) -> Adapter:
    """An adapter of factors along one side of the matrix (-1 outputs, -2 inputs)."""

    def init(
        key: Array, params: Params, *, where: trees.Selector, gradients: PyTree | None = None
    ) -> AdaptedParams:
        weights = {}
        for path, leaf in _adapters.selected_matrices(params, where).items():
            matrix = _adapters.matrix_view(path, leaf, in_axis, out_axis).matrix
            shape = (*matrix.shape[:-2], matrix.shape[side])
            weights[path] = ScaleWeights(jnp.ones(shape, matrix.dtype))
        return AdaptedParams(params, weights)

    def combine(
        members: Sequence[AdapterWeights], weights: Sequence[Scalar] | Array | None = None
    ) -> AdapterWeights:
        shares = _adapters.check_members(members, weights)
        return {
            path: ScaleWeights(
                1 + _adapters.weighted_sum(shares, [member[path].vector - 1 for member in members])
            )
            for path in members[0]
        }

    return Adapter(init, apply, apply, combine)


def _rows(key: Array, count: int, width: int, bound: float, dtype: jnp.dtype) -> Array:
    """Uniform rows `[count, width]`, one key each, so adding rows does not change earlier ones."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    return jax.vmap(lambda k: jax.random.uniform(k, (width,), dtype, -bound, bound))(keys)
