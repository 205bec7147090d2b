"""Adapters that scale or rotate: IA3, VeRA, OFT. (BitFit needs no adapter: train `".*bias"`.)

`in_axis` and `out_axis` are a kernel's input and output axis, or axes; `init` and `apply` raise
ValueError if a selected leaf lacks them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _adapters, _leaves
from kdtl_jax.transforms._adapters import Adapter, AdapterWeights, Axes

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
    *, in_axis: Axes = -2, out_axis: Axes = -1, bias: Sequence[str] = ("bias", "b")
) -> Adapter:
    """`y' = (x W + b) * l`: one learned factor per output, for keys and values.

    Args:
      in_axis: the kernel's input axis, or axes.
      out_axis: the kernel's output axis, or axes.
      bias: last path segments (after "/" or, in flat names, ".") of the bias beside a kernel,
        which is scaled with it if there is one; `()` scales no bias.

    Returns:
      The adapter; weights are `{kernel's path: ScaleWeights}`. `combine` is
      `1 + sum_i w_i (l_i - 1)`.

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper, 2022
      (2205.05638).
    """
    kernels = _scaling_adapter(in_axis, out_axis, -1)

    def apply(params: Params, weights: AdapterWeights) -> Params:
        flat, factors = trees.flatten(params), {}
        for path, scale in weights.items():
            stem = re.sub(r"[^/.]*$", "", path)
            beside = {stem + name for name in bias}
            factors |= {p: scale.vector for p in beside if p in flat and p not in weights}

        def multiply(path: str, leaf: PyTree, vector: Array) -> Array:
            upcast = _leaves.widen(leaf)
            return upcast * vector.reshape(upcast.shape).astype(upcast.dtype)

        return _adapters.rewrite(kernels.apply(params, weights), factors, multiply)

    return kernels._replace(apply=apply, merge=apply)


def ia3_input(*, in_axis: Axes = -2, out_axis: Axes = -1) -> Adapter:
    """`y' = (x * l) W + b`: one learned factor per input, for feed-forward layers.

    Otherwise as `ia3_output`; biases are not changed.
    """
    return _scaling_adapter(in_axis, out_axis, -2)


def vera(
    projections: Array,
    rank: int = 256,
    *,
    start: float = 0.1,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
) -> Adapter:
    """`W' = W + (A * d) (B * b)` with A and B random, frozen, and the same for every layer.

    A and B are drawn from a key instead of stored: a layer uses their first `in` rows and `out`
    columns, which do not depend on any other layer's size.

    Args:
      projections: the PRNG key of A and B; part of the model, so keep it with the weights.
      rank: r; can be high, since a rank costs one number per layer.
      start: the initial value of d; b starts at 0.
      in_axis: the kernel's input axis, or axes.
      out_axis: the kernel's output axis, or axes.

    Returns:
      The adapter; weights are `{path: VeraWeights}`. `combine` stacks terms, which is exact.

    References:
      Kopiczko, Blankevoort and Asano, VeRA, 2023 (2310.11454). Bounds `sqrt(6 / in)` of A and
      `sqrt(6 / r)` of B as in PEFT, with each layer's own `in`.
    """

    def initial(path: str, matrix: Array) -> VeraWeights:
        *lead, _, fan_out = matrix.shape
        d = jnp.full((1, *lead, rank), start, matrix.dtype)
        return VeraWeights(d, jnp.zeros((1, *lead, fan_out), matrix.dtype))

    def add(path: str, matrix: Array, weights: VeraWeights) -> Array:
        *lead, fan_in, fan_out = matrix.shape
        terms, dtype = weights.d.shape[0], matrix.dtype
        expected = {"d": (terms, *lead, rank), "b": (terms, *lead, fan_out)}
        _adapters.check_fits(path, expected, d=weights.d, b=weights.b)
        key_a, key_b = jax.random.split(projections)
        a = _rows(key_a, fan_in, rank, (6 / fan_in) ** 0.5, dtype)
        b = _rows(key_b, fan_out, rank, (6 / rank) ** 0.5, dtype).T
        stacked_a = a.reshape(*(1,) * (weights.d.ndim - 1), *a.shape)
        scaled = stacked_a * weights.d[..., None, :].astype(dtype)
        product = jnp.matmul(scaled, b, precision=_HIGHEST)
        return matrix + jnp.sum(product * weights.b[..., None, :].astype(dtype), axis=0)

    def join(members: Sequence[VeraWeights], shares: Sequence[Scalar]) -> VeraWeights:
        pairs = zip(shares, members, strict=True)
        scaled = [_numerics.scalar(share, member.b) * member.b for share, member in pairs]
        return VeraWeights(jnp.concatenate([m.d for m in members]), jnp.concatenate(scaled))

    return _adapters.per_matrix(initial, add, join, in_axis, out_axis)


def oft(block_size: int = 32, *, in_axis: Axes = -2, out_axis: Axes = -1) -> Adapter:
    """`W' = R W`, R block-diagonal and orthogonal: rotates inputs, keeping angles and norms.

    `R = (I + Q)(I - Q)^-1` with Q skew (Cayley), solved exactly.

    Args:
      block_size: n; the number of inputs must be a multiple of it.
      in_axis: the kernel's input axis, or axes.
      out_axis: the kernel's output axis, or axes.

    Returns:
      The adapter; weights are `{path: RotationWeights}`. `combine` adds the skew matrices, which
      is exact for one member and approximate for several, even if they rotate the same planes.

    References:
      Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023
      (2306.07280). PEFT's default is a truncated Neumann series of this R; its exact branch is
      the inverse rotation, i.e. this one with the sign of Q flipped.
    """
    _checks.count(1, block_size=block_size)
    size = block_size * (block_size - 1) // 2
    rows, columns = np.triu_indices(block_size, 1)

    def blocks_of(path: str, matrix: Array) -> int:
        blocks, remainder = divmod(matrix.shape[-2], block_size)
        if remainder:
            raise ValueError(
                f"the {matrix.shape[-2]} inputs of {path!r} are not a multiple of "
                f"block_size={block_size}."
            )
        return blocks

    def initial(path: str, matrix: Array) -> RotationWeights:
        shape = (*matrix.shape[:-2], blocks_of(path, matrix), size)
        return RotationWeights(jnp.zeros(shape, matrix.dtype))

    def rotate(path: str, matrix: Array, weights: RotationWeights) -> Array:
        *lead, _, fan_out = matrix.shape
        blocks, dtype = blocks_of(path, matrix), matrix.dtype
        _adapters.check_fits(path, {"skew": (*lead, blocks, size)}, skew=weights.skew)
        upper = jnp.zeros((*lead, blocks, block_size, block_size), dtype)
        upper = upper.at[..., rows, columns].set(weights.skew.astype(dtype))
        skew = upper - jnp.swapaxes(upper, -1, -2)
        eye = jnp.broadcast_to(jnp.eye(block_size, dtype=dtype), skew.shape)
        # The two factors commute, so their order does not matter.
        rotation = jnp.linalg.solve(eye - skew, eye + skew)
        inputs = matrix.reshape(*lead, blocks, block_size, fan_out)
        return jnp.matmul(rotation, inputs, precision=_HIGHEST).reshape(matrix.shape)

    def join(members: Sequence[RotationWeights], shares: Sequence[Scalar]) -> RotationWeights:
        return RotationWeights(_adapters.weighted_sum(shares, [m.skew for m in members]))

    return _adapters.per_matrix(initial, rotate, join, in_axis, out_axis)


def _scaling_adapter(in_axis: Axes, out_axis: Axes, side: int) -> Adapter:
    """An adapter of factors along one side of the matrix (-1 outputs, -2 inputs)."""

    def shape_of(matrix: Array) -> tuple[int, ...]:
        return (*matrix.shape[:-2], matrix.shape[side])

    def initial(path: str, matrix: Array) -> ScaleWeights:
        return ScaleWeights(jnp.ones(shape_of(matrix), matrix.dtype))

    def multiply(path: str, matrix: Array, weights: ScaleWeights) -> Array:
        _adapters.check_fits(path, {"vector": shape_of(matrix)}, vector=weights.vector)
        other_side = -3 - side
        return matrix * jnp.expand_dims(weights.vector, other_side).astype(matrix.dtype)

    def join(members: Sequence[ScaleWeights], shares: Sequence[Scalar]) -> ScaleWeights:
        return ScaleWeights(1 + _adapters.weighted_sum(shares, [m.vector - 1 for m in members]))

    return _adapters.per_matrix(initial, multiply, join, in_axis, out_axis)


def _rows(key: Array, count: int, width: int, bound: float, dtype: jnp.dtype) -> Array:
    """Uniform rows `[count, width]`, one key each, so adding rows does not change earlier ones."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    return jax.vmap(lambda k: jax.random.uniform(k, (width,), dtype, -bound, bound))(keys)
