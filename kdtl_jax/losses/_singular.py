"""Knowledge distillation by singular value decomposition, with gradients that stay finite."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax.losses import _door


@jax.custom_jvp
def _eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (descending) and eigenvectors of symmetric matrices."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[..., ::-1], vectors[..., ::-1]


@_eigh.defjvp
def _eigh_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """First-order perturbation; directions within one (numerically) repeated value do not move.

    The derivative of an eigenvector divides by gaps between eigenvalues. Where a gap is
    rounding, the vectors of that space are an arbitrary basis and have no derivative.
    """
    values, vectors = _eigh(*primals)
    rotated = jnp.swapaxes(vectors, -1, -2) @ tangents[0] @ vectors
    gaps = values[..., None, :] - values[..., :, None]
    noise = 16 * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=-1)
    apart = jnp.abs(gaps) > noise[..., None, None]
    mixing = jnp.where(apart, rotated / jnp.where(apart, gaps, 1), 0)
    return (values, vectors), (jnp.diagonal(rotated, axis1=-2, axis2=-1), vectors @ mixing)


def _channel_vectors(x: Array, count: int) -> tuple[Array, Array]:
    """Leading singular values and right singular vectors of `[B, positions, C]` maps."""
    top = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    scale = jax.lax.stop_gradient(jnp.where(top != 0, top, 1))
    x = jnp.swapaxes(x / scale, 1, 2)
    squares, vectors = _eigh(_numerics.gram(x, x))
    values = _numerics.safe_sqrt(squares[:, :count]) * scale[:, :, 0]
    return values, vectors[:, :, :count]


def _signed(vectors: Array) -> Array:
    """Each column with its largest entry positive: singular vectors have no sign of their own."""
    largest = jnp.argmax(jnp.abs(vectors), axis=1, keepdims=True)
    return vectors * jnp.where(jnp.take_along_axis(vectors, largest, axis=1) < 0, -1, 1)


def _aligned(student: Array, teacher: Array, k: int) -> tuple[Array, Array]:
    """The student's vectors nearest the teacher's first k; both scaled by the teacher's values."""
    rank_t, rank_s = (min(x.shape[1:]) for x in (teacher, student))
    values, target = _channel_vectors(teacher, min(k, rank_t))
    _, vectors = _channel_vectors(student, min(k + 3, rank_s))
    target, values = _signed(target), _numerics.normalize(values)[:, None, :]
    overlap = _numerics.gram(jnp.swapaxes(vectors, 1, 2), jnp.swapaxes(target, 1, 2))
    best = jnp.argmax(jnp.abs(overlap), axis=1, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(overlap, best, axis=1) < 0, -1, 1)
    matched = jnp.take_along_axis(vectors, best, axis=2) * sign
    return matched * values, target * values


def kdsvd(student: Sequence[Array], teacher: Sequence[Array], *, k: int = 1) -> Array:
    """`sum_l sum (R_S - R_T)^2`, R the RBF between singular vectors of neighboring layers.

    Each map is a matrix `[positions, C]`; its first k right singular vectors (teacher) and the
    student's best matches among its first k + 3 (by |cosine|, sign aligned), scaled by the
    teacher's normalized singular values, enter `R = exp(-(v_l[c] - v_{l-1}[c'])^2 / 8)`. A
    singular vector has no sign: here the teacher's largest entry is positive. Gradients at
    repeated singular values are those of the well-defined part. `.mean()` is RepDistiller's
    number with that sign rule; mdistiller decomposes the transposed matrices.

    Args:
      student: two or more maps `[B, ..., C_l]`.
      teacher: as many maps with the same `C_l`; positions may differ.
      k: singular vectors per layer.

    Returns:
      `[B]`.

    Raises:
      ValueError: if the numbers of maps, batches or channels differ, or there is only one map.
      TypeError: if an array is not floating point.

    References:
      Lee, Kim and Song, Self-supervised Knowledge Distillation Using Singular Value
      Decomposition, 2018 (1807.06819).
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            "student and teacher need the same number of maps, two or more, got "
            f"{len(student)} and {len(teacher)}."
        )
    _checks.positive(k=k)
    layers = []
    for maps in zip(student, teacher, strict=True):
        sides = _door.same_channels("kdsvd", *maps)
        own, target = (side.reshape(side.shape[0], -1, side.shape[-1]) for side in sides)
        layers.append(_aligned(own, target, k))
    total = jnp.zeros(student[0].shape[:1], layers[0][0].dtype)
    for (below_s, below_t), (above_s, above_t) in zip(layers, layers[1:], strict=False):
        apart = _rbf(above_s, below_s) - _rbf(above_t, below_t)
        total = total + jnp.sum(jnp.square(apart), axis=(1, 2, 3))
    return total


def _rbf(above: Array, below: Array) -> Array:
    apart = above[:, :, None, :] - below[:, None, :, :]
    return jnp.exp(-jnp.square(apart) / 8)
