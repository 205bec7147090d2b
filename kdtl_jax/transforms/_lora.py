"""LoRA and DoRA: low-rank additions to kernels, their initializations and exact combination.

A *start* is a function `(key, kernel, rank, scale, gradient) -> (a, b)` with `a [..., in, r]` and
`b [..., r, out]` for a kernel `[..., in, out]`. Whatever a start returns, `init` subtracts
`scale a b` from the base, so every start preserves the function exactly; with `b = 0` the base is
unchanged, bit for bit.

ValueError: a rank is below 1 or too high for a kernel, or a selected leaf lacks the axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, Params, PyTree, Scalar
from kdtl_jax.transforms import _adapters, _blocks, _leaves
from kdtl_jax.transforms._adapters import AdaptedParams, Adapter, AdapterWeights, Axes

Scaling = Callable[[Scalar, int], Scalar]  # (alpha, rank) -> factor of a b
Start = Callable[[Array, Array, int, Array, Array | None], tuple[Array, Array]]


class LoraWeights(NamedTuple):
    """`a [..., in, r]`, `b [..., r, out]`."""

    a: Array
    b: Array


class DoraWeights(NamedTuple):
    """`a [..., in, r]`, `b [..., r, out]`, `magnitude [..., out]`."""

    a: Array
    b: Array
    magnitude: Array


def scale_by_rank(alpha: Scalar, rank: int) -> Scalar:
    """`alpha / r`: LoRA."""
    return alpha / rank


def scale_by_root_rank(alpha: Scalar, rank: int) -> Scalar:
    """`alpha / sqrt(r)`: rsLoRA (2312.03732), stable at high rank."""
    return alpha / math.sqrt(rank)


def kaiming_start(
    key: Array, kernel: Array, rank: int, scale: Array, gradient: Array | None = None
) -> tuple[Array, Array]:
    """`a ~ U(+-1/sqrt(in))`, `b = 0`: PEFT's initialization of LoRA."""
    *lead, fan_in, fan_out = kernel.shape
    bound = 1 / fan_in**0.5
    a = jax.random.uniform(key, (*lead, fan_in, rank), kernel.dtype, -bound, bound)
    return a, jnp.zeros((*lead, rank, fan_out), kernel.dtype)


def gaussian_start(
    key: Array, kernel: Array, rank: int, scale: Array, gradient: Array | None = None
) -> tuple[Array, Array]:
    """`a ~ N(0, 1/r^2)`, `b = 0`."""
    *lead, fan_in, fan_out = kernel.shape
    a = jax.random.normal(key, (*lead, fan_in, rank), kernel.dtype) / rank
    return a, jnp.zeros((*lead, rank, fan_out), kernel.dtype)


def orthogonal_start(
    key: Array, kernel: Array, rank: int, scale: Array, gradient: Array | None = None
) -> tuple[Array, Array]:
    """`a b = 0` with both factors non-zero, so both learn from the first step. Even ranks only.

    The rows of one orthogonal `[r, r]` matrix are divided between the two factors.

    Raises:
      ValueError: if the rank is odd.
    """
    *lead, fan_in, fan_out = kernel.shape
    if rank % 2:
        raise ValueError(f"the rank must be even, got {rank}.")
    key_basis, key_a, key_b = jax.random.split(key, 3)
    basis, _ = jnp.linalg.qr(jax.random.normal(key_basis, (*lead, rank, rank), kernel.dtype))
    half = rank // 2
    in_factor = jax.random.normal(key_a, (*lead, fan_in, half), kernel.dtype) / fan_in**0.5
    out_factor = jax.random.normal(key_b, (*lead, fan_out, half), kernel.dtype) / fan_out**0.5
    a = in_factor @ basis[..., 0::2, :]
    return a, jnp.swapaxes(out_factor @ basis[..., 1::2, :], -1, -2)


def pissa_start(
    key: Array, kernel: Array, rank: int, scale: Array, gradient: Array | None = None
) -> tuple[Array, Array]:
    """The kernel's r principal components, `scale a b = U_r S_r V_r^T`; the base keeps the others.

    References:
      Meng et al., PiSSA, 2024 (2404.02948).
    """
    u, s, vt = _svd(kernel, rank)
    root = jnp.sqrt(s[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def olora_start(
    key: Array, kernel: Array, rank: int, scale: Array, gradient: Array | None = None
) -> tuple[Array, Array]:
    """The first r columns of Q and rows of R of `kernel^T = Q R`: `b = Q_r^T` is orthonormal.

    As in the published code, `scale` is not divided out; the base absorbs it.

    References:
      Büyükakyüz, OLoRA, 2024 (2406.01775).
    """
    _check_rank(kernel, rank)
    q, r = jnp.linalg.qr(jnp.swapaxes(kernel, -1, -2))
    return jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :, :rank], -1, -2)


def lora_ga_start(gamma: float = 16.0) -> Start:
    """LoRA-GA: singular vectors of the loss's gradient; the first step follows full fine-tuning.

    `a` takes the input side's vectors `0:r` and `b` the output side's `r:2r`, both multiplied by
    `out^(1/4) / sqrt(gamma)`. Pass `gradients=` to `init`, which otherwise raises ValueError.

    References:
      Wang, Yu and Li, LoRA-GA, 2024 (2407.05000), algorithm 1.
    """
    _checks.scalar(gamma=gamma)
    _checks.positive(gamma=gamma)

    def start(
        key: Array, kernel: Array, rank: int, scale: Array, gradient: Array | None = None
    ) -> tuple[Array, Array]:
        if gradient is None:
            raise ValueError("pass gradients= (a tree like params) to init.")
        u, _, vt = _svd(gradient, 2 * rank)
        size = kernel.shape[-1] ** 0.25 / gamma**0.5
        return size * u[..., :rank], size * vt[..., rank : 2 * rank, :]

    return start


def _svd(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    _check_rank(matrix, rank)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _check_rank(matrix: Array, rank: int) -> None:
    if rank > min(matrix.shape[-2:]):
        raise ValueError(
            f"a matrix {list(matrix.shape[-2:])} has no {rank} singular directions. "
            "Lower the rank, or leave small leaves out (where=)."
        )


def lora(
    rank: int = 8,
    alpha: Scalar = 8.0,
    *,
    scaling: Scaling = scale_by_rank,
    start: Start = kaiming_start,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
) -> Adapter:
    """`W' = W + s a b` with `s = scaling(alpha, r)`.

    LoRA+ is a learning-rate rule: `[(".*/b", 16.0), (".*/a", 1.0)]`.

    Args:
      rank: r >= 1.
      alpha: the scale's numerator; with `scale_by_rank` and `alpha = rank` the scale is 1.
      scaling: `scale_by_rank` or `scale_by_root_rank` (rsLoRA), evaluated at the rank of the
        weights, which `combine` changes.
      start: `kaiming_start`, `gaussian_start`, `orthogonal_start`, `pissa_start`,
        `olora_start` or `lora_ga_start()`.
      in_axis: the kernel's input axis, or axes: -2 in flax and haiku, -1 in equinox.
      out_axis: the kernel's output axis, or axes: -1 in flax and haiku, -2 in equinox. Flax's
        attention projections `[embed, heads, head_dim]` have `in_axis=-3, out_axis=(-2, -1)`.

    Returns:
      The adapter; weights are `{path: LoraWeights}`. `combine(members, weights=None, *, rank=None)`
      concatenates ranks, which is exact: the result adds `sum_i w_i s_i a_i b_i`. With `rank`, the
      sum is then cut to its best approximation of that rank.

    References:
      Hu et al., LoRA, 2021 (2106.09685).
    """
    _checks.count(1, rank=rank)
    _checks.scalar(alpha=alpha)
    _checks.finite(alpha=alpha)

    def matrix(path: str, leaf: PyTree) -> Array:
        return _adapters.matrix_view(path, leaf, in_axis, out_axis).matrix

    def init(
        key: Array, params: Params, *, where: trees.Selector, gradients: PyTree | None = None
    ) -> AdaptedParams:
        leaves = _adapters.selected_matrices(params, where)
        pairs = _start_weights(key, leaves, matrix, rank, scaling(alpha, rank), start, gradients)
        base = _adapters.over_matrices(subtract, in_axis, out_axis)(params, pairs)
        weights = {path: _cast_weights(pair, leaves[path]) for path, pair in pairs.items()}
        return AdaptedParams(base, weights)

    def add(path: str, matrix: Array, pair: LoraWeights) -> Array:
        return matrix + _product(path, matrix, pair, scaling, alpha)

    def subtract(path: str, matrix: Array, pair: LoraWeights) -> Array:
        return matrix - _product(path, matrix, pair, scaling, alpha)

    def combine(
        members: Sequence[AdapterWeights],
        weights: Sequence[Scalar] | Array | None = None,
        *,
        rank: int | None = None,
    ) -> AdapterWeights:
        shares = _adapters.check_members(members, weights)
        return {
            path: _concatenate([m[path] for m in members], shares, scaling, alpha, rank)
            for path in members[0]
        }

    apply = _adapters.over_matrices(add, in_axis, out_axis)
    return Adapter(init, apply, apply, combine)


def dora(
    rank: int = 8,
    alpha: Scalar = 8.0,
    *,
    scaling: Scaling = scale_by_rank,
    start: Start = kaiming_start,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
) -> Adapter:
    """`W' = m V / ||V||`, `V = W + s a b`, one length per output; the norm is held constant.

    The gradient does not pass through `||V||` (section 4.3 of the paper), so it costs the same as
    LoRA's; the value is not affected. The arguments are those of `lora`.

    Returns:
      The adapter; weights are `{path: DoraWeights}`. `combine` concatenates ranks as `lora` does
      and averages the lengths with the given weights: exact for one member of weight 1, a
      convention for more, since DoRA is not additive.

    References:
      Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024 (2402.09353).
    """
    lora_adapter = lora(
        rank, alpha, scaling=scaling, start=start, in_axis=in_axis, out_axis=out_axis
    )

    def init(
        key: Array, params: Params, *, where: trees.Selector, gradients: PyTree | None = None
    ) -> AdaptedParams:
        base, pairs = lora_adapter.init(key, params, where=where, gradients=gradients)
        weights = {}
        for path, leaf in _adapters.selected_matrices(params, where).items():
            # At the start V is the kernel itself, no matter which part of it the adapter holds.
            matrix = _adapters.matrix_view(path, leaf, in_axis, out_axis).matrix
            length = _numerics.safe_norm(matrix, axis=-2)
            weights[path] = _cast_weights(DoraWeights(pairs[path].a, pairs[path].b, length), leaf)
        return AdaptedParams(base, weights)

    def add(path: str, matrix: Array, weights: DoraWeights) -> Array:
        shape = (*matrix.shape[:-2], matrix.shape[-1])
        _adapters.check_fits(path, {"magnitude": shape}, magnitude=weights.magnitude)
        pair = LoraWeights(weights.a, weights.b)
        direction = matrix + _product(path, matrix, pair, scaling, alpha)
        norm = jax.lax.stop_gradient(_numerics.safe_norm(direction, axis=-2))
        ratio = weights.magnitude.astype(norm.dtype) / jnp.where(norm > 0, norm, 1)
        return ratio[..., None, :] * direction

    def combine(
        members: Sequence[AdapterWeights],
        weights: Sequence[Scalar] | Array | None = None,
        *,
        rank: int | None = None,
    ) -> AdapterWeights:
        shares = _adapters.check_members(members, weights)
        total_weight = sum((jnp.asarray(s) for s in shares[1:]), jnp.asarray(shares[0]))
        pairs = [{path: LoraWeights(w.a, w.b) for path, w in m.items()} for m in members]
        out = {}
        for path, pair in lora_adapter.combine(pairs, weights, rank=rank).items():
            lengths = _adapters.weighted_sum(shares, [member[path].magnitude for member in members])
            out[path] = DoraWeights(
                pair.a, pair.b, lengths / _numerics.scalar(total_weight, lengths)
            )
        return out

    apply = _adapters.over_matrices(add, in_axis, out_axis)
    return Adapter(init, apply, apply, combine)


def _start_weights(
    key: Array,
    leaves: dict[str, PyTree],
    matrix: Callable[[str, PyTree], Array],
    rank: int,
    scale: Scalar,
    start: Start,
    gradients: PyTree | None,
) -> dict[str, LoraWeights]:
    grads = None if gradients is None else trees.flatten(gradients)
    if grads is not None:
        selected_gradients = {path: grads[path] for path in leaves if path in grads}
        _checks.same_leaves(params=leaves, gradients=selected_gradients)
    pairs = {}
    for path, leaf in leaves.items():
        kernel = matrix(path, leaf)
        gradient = None if grads is None else matrix(path, grads[path])
        factor = _numerics.scalar(scale, kernel, "scale")
        pairs[path] = LoraWeights(
            *start(_blocks.fold_path(key, path), kernel, rank, factor, gradient)
        )
    return pairs


def _cast_weights(weights: NamedTuple, leaf: PyTree) -> NamedTuple:
    """Weights in the kernel's dtype, but float32 for half precision: small updates must count."""
    dtype = _leaves.widen(leaf).dtype
    return jax.tree.map(lambda x: x.astype(dtype), weights)


def _product(path: str, matrix: Array, pair: LoraWeights, scaling: Scaling, alpha: Scalar) -> Array:
    """`s a b`, scaled for the rank of the weights."""
    *lead, fan_in, fan_out = matrix.shape
    rank = pair.a.shape[-1]
    expected = {"a": (*lead, fan_in, rank), "b": (*lead, rank, fan_out)}
    _adapters.check_fits(path, expected, a=pair.a, b=pair.b)
    dtype = matrix.dtype
    a, b = pair.a.astype(dtype), pair.b.astype(dtype)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return _numerics.scalar(scaling(alpha, rank), product) * product


def _concatenate(
    pairs: Sequence[LoraWeights],
    shares: Sequence[Scalar],
    scaling: Scaling,
    alpha: Scalar,
    rank: int | None,
) -> LoraWeights:
    """Concatenates pairs to one whose product, scaled at its rank, is `sum_i w_i s_i a_i b_i`."""
    total = sum(pair.a.shape[-1] for pair in pairs)
    factors = [
        share * (scaling(alpha, pair.a.shape[-1]) / scaling(alpha, total))
        for share, pair in zip(shares, pairs, strict=True)
    ]
    a = jnp.concatenate([pair.a for pair in pairs], axis=-1)
    b = jnp.concatenate(
        [_numerics.scalar(f, pair.b) * pair.b for f, pair in zip(factors, pairs, strict=True)],
        axis=-2,
    )
    if rank is None:
        return LoraWeights(a, b)
    return _truncate(a, b, rank, scaling(alpha, total) / scaling(alpha, rank))


def _truncate(a: Array, b: Array, rank: int, factor: Scalar) -> LoraWeights:
    """Finds the best approximation of rank r from the factors, without an `[in, out]` matrix."""
    _checks.count(1, rank=rank)
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vt = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    if rank > s.shape[-1]:
        raise ValueError(f"the sum has rank {s.shape[-1]} at most, asked for {rank}.")
    root = jnp.sqrt(s[..., :rank] * _numerics.scalar(factor, s))
    new_a = q_a @ (u[..., :rank] * root[..., None, :])
    new_b = (root[..., :, None] * vt[..., :rank, :]) @ jnp.swapaxes(q_b, -1, -2)
    return LoraWeights(new_a, new_b)
