"""Initializations for LoRA.

A *start* is a function `(key, kernel, rank, scale, gradient) -> (a, b)` with `a [..., in, r]` and
`b [..., r, out]` for a kernel `[..., in, out]`. Whatever a start returns, `init` subtracts
`scale a b` from the base, so every start preserves the function exactly; with `b = 0` the base is
unchanged, bit for bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdtl_jax import _checks
from kdtl_jax._types import Array

Start = Callable[[Array, Array, int, Array, Array | None], tuple[Array, Array]]


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
