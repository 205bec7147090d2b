"""Spatial attention maps, paraphrased factors and class activation maps.

Each compares normalized maps, so that only *where* the response is matters, not how strong.
"""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax.losses import _door


def _power(x: Array, p: float) -> Array:
    """`|x|^p`; even integers need no absolute value and stay smooth at 0."""
    even = isinstance(p, int) and p % 2 == 0
    return x**p if even else jnp.abs(x) ** p


def _unit(x: Array, q: float) -> Array:
    """Rows over their q-norm; a zero row stays zero."""
    norm = _vector_norm(x, q)[:, None]
    return x * jnp.where(norm != 0, 1 / jnp.where(norm != 0, norm, 1), 0)


def _vector_norm(x: Array, p: float) -> Array:
    """p-norm of rows, gradient 0 at 0."""
    total = jnp.sum(jnp.abs(x) if p == 1 else _power(x, p), axis=-1)
    if p == 1:
        return total
    return jnp.where(total != 0, jnp.where(total != 0, total, 1) ** (1 / p), 0)


def attention_map(x: Array, *, power: int | float = 2) -> Array:
    """`mean_c |f|^p`, flattened over positions and divided by its L2 norm.

    Args:
      x: `[B, ..., C]`, channels last.
      power: `p > 0`, a Python number.

    Returns:
      `[B, positions]` of unit length; a zero map stays zero.

    Raises:
      ValueError: if the array is empty or has fewer than three axes, or the power is not positive.
      TypeError: if the array is not floating point.

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017 (1612.03928).
    """
    x = _door.one("attention_map", x, at_least=3)
    _checks.positive(power=power)
    return _numerics.normalize(_numerics.batch_flat(jnp.mean(_power(x, power), axis=-1)))


def attention_transfer(student: Array, teacher: Array, *, power: int | float = 2) -> Array:
    """`mean_i (a_S - a_T)_i^2` of unit attention maps: attention transfer as its code has it.

    `.mean()` is RepDistiller's and mdistiller's number (they weight it by 1000); see
    `attention_transfer_paper` for the paper's.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same positions; pool the larger map first (`connectors.pool`).
      power: `p` of `attention_map`.

    Returns:
      `[B]`.

    Raises:
      ValueError: if positions differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017 (1612.03928), and code.
    """
    student, teacher = _door.same_positions("attention_transfer", student, teacher)
    apart = attention_map(student, power=power) - attention_map(teacher, power=power)
    return jnp.mean(jnp.square(apart), axis=-1)


def attention_transfer_paper(student: Array, teacher: Array, *, power: int | float = 2) -> Array:
    """`||a_S - a_T||_2` of unit attention maps: attention transfer as its paper has it (eq. 2).

    `.mean()` is torchdistill's number with `mode="paper"`. Its gradient at equality is set to 0.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same positions; pool the larger map first (`connectors.pool`).
      power: `p` of `attention_map`.

    Returns:
      `[B]`, in `[0, 2]`.

    Raises:
      ValueError: if positions differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017 (1612.03928).
    """
    student, teacher = _door.same_positions("attention_transfer_paper", student, teacher)
    apart = attention_map(student, power=power) - attention_map(teacher, power=power)
    return _numerics.safe_norm(apart)


def factor_transfer(
    student: Array, teacher: Array, *, p: int | float = 1, q: int | float = 2
) -> Array:
    """`|| f_S / ||f_S||_q - f_T / ||f_T||_q ||_p` of flattened factors: factor transfer (FT).

    The factors come from `connectors.translator` (student) and a trained
    `connectors.paraphraser` (teacher). With p = 1 torchdistill and mmrazor average over
    elements: divide `.mean()` by the elements per example. Knowledge adaptation (1903.04688) is
    the same formula on adapted features.

    Args:
      student: `[B, ...]`.
      teacher: the same shape.
      p: norm of the difference, a Python number >= 1.
      q: norm that scales each factor, a Python number >= 1.

    Returns:
      `[B]`.

    Raises:
      ValueError: if shapes differ or are empty, or a norm is below 1.
      TypeError: if an array is not floating point.

    References:
      Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, 2018
      (1802.04977).
    """
    student, teacher = _door.same_shape("factor_transfer", student, teacher)
    if p < 1 or q < 1:
        raise ValueError(f"norms need p >= 1 and q >= 1, got p={p}, q={q}.")
    student, teacher = _numerics.batch_flat(student), _numerics.batch_flat(teacher)
    return _vector_norm(_unit(student, q) - _unit(teacher, q), p)


def catkd(student: Array, teacher: Array, *, resolution: int = 2) -> Array:
    """`mean (c_S - c_T)^2` of class activation maps, pooled and normalized per class.

    The last layer must be a 1x1 convolution before the global average pooling, so that it has one
    map per class. `.mean()` is the authors' number (weight 400 on CIFAR).

    Args:
      student: `[B, Hs, Ws, classes]`.
      teacher: `[B, Ht, Wt, classes]`.
      resolution: side of the pooled maps.

    Returns:
      `[B]`.

    Raises:
      ValueError: if batch or classes differ, or an array is empty.
      TypeError: if an array is not floating point.

    References:
      Guo et al., Class Attention Transfer Based Knowledge Distillation, 2023.
    """
    student, teacher = _door.same_channels("catkd", student, teacher, at_least=4, at_most=4)
    size = (resolution, resolution)
    apart = _pooled_unit(student, size) - _pooled_unit(teacher, size)
    return jnp.mean(jnp.square(apart), axis=(1, 2, 3))


def _pooled_unit(x: Array, size: tuple[int, int]) -> Array:
    return _numerics.unit(_numerics.pool_to(x, size), axis=(1, 2))
