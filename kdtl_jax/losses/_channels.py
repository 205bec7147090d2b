"""Losses on relations between the channels of one example: Gram matrices, flows, singular vectors.

Maps are float `[B, ..., C]`, channels last, student first, and of one shape unless stated
otherwise. All return `[B]` in float32 or wider.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def cwd(student: Array, teacher: Array, *, temperature: Scalar = 1.0) -> Array:
    """`T^2 mean_c KL(softmax_hw(t_c / T) || softmax_hw(s_c / T))`: channel-wise distillation.

    `.mean()` is mmrazor's number at weight 1 (its configurations: 5 for score maps, 10 for each
    level of a pyramid, at T = 1). The authors' script for score maps uses weight 3 and T = 4.

    Args:
      student: `[B, ..., C]`.
      teacher: the same shape.
      temperature: `T > 0`, a scalar or one value per example.

    Returns:
      `[B]`, nats times `T^2`.

    References:
      Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, 2021 (2011.13256).
    """
    student, teacher = _sides.same_shape(student, teacher, at_least=3)
    _checks.positive(temperature=temperature)
    t = _numerics.per_example(temperature, _by_channel(student), "temperature")
    kl = _softmax.kl_from_logits(_by_channel(teacher) / t, _by_channel(student) / t)
    return jnp.mean(jnp.square(_numerics.per_example(temperature, kl, "temperature")) * kl, axis=-1)


def ickd(student: Array, teacher: Array) -> Array:
    """`mean_cc' (G_S - G_T)^2` of row-normalized channel Gram matrices `G = f^T f`: ICKD.

    `.mean()` times `C / B` is torchdistill's number (it divides by B once more than the paper);
    the student goes through `connectors.conv1x1` and `connectors.batch_norm`.

    Args:
      student: `[B, ..., C]`.
      teacher: `[B, ..., C]`; the number of positions may differ.

    Returns:
      `[B]`.

    References:
      Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
      Distillation, 2021.
    """
    student, teacher = _sides.same_channels(student, teacher)
    difference = _row_unit_gram(_by_channel(student)) - _row_unit_gram(_by_channel(teacher))
    return jnp.mean(jnp.square(difference), axis=(1, 2))


def _row_unit_gram(x: Array) -> Array:
    x = _numerics.rescaled(x, axis=(1, 2))
    return _numerics.normalize(_numerics.gram(x, x))


def nst(student: Array, teacher: Array) -> Array:
    """Squared MMD of unit channel maps under the kernel `(x . y)^2`: neuron selectivity transfer.

    `mean k(s, s') + mean k(t, t') - 2 mean k(s, t)`, with means over pairs of channels of one
    example. `.mean()` is RepDistiller's number (weight 50). The kernel sums are also the squared
    distance of two position-by-position moments; the cheaper of the two forms is computed.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same positions; pool the larger map first (`connectors.pool`).

    Returns:
      `[B]`, 0 where the channels' distributions agree in that kernel.

    References:
      Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017
      (1707.01219).
    """
    student, teacher = _sides.same_positions(student, teacher)
    u, v = (_numerics.normalize(_by_channel(x)) for x in (student, teacher))
    (width, positions), other_width = u.shape[1:], v.shape[1]
    if positions * (width + other_width) <= width**2 + other_width**2 + width * other_width:
        moments = (_numerics.gram(m, m) / m.shape[-1] for m in (u.mT, v.mT))
        return jnp.sum(jnp.square(jnp.subtract(*moments)), axis=(1, 2))
    pairs = ((u, u), (v, v), (u, v))
    kernels = [jnp.mean(jnp.square(_numerics.gram(x, y)), axis=(1, 2)) for x, y in pairs]
    return kernels[0] + kernels[1] - 2 * kernels[2]


def flow_matrix(first: Array, second: Array, *, where: Array | None = None) -> Array:
    """`mean over positions of f_1^T f_2`: how features flow from one layer to the next.

    Args:
      first: `[B, ..., C1]`, a map or tokens.
      second: `[B, ..., C2]`, the same positions; pool the larger map first (`connectors.pool`).
      where: bool, `first.shape[:-1]`; positions (tokens) to include.

    Returns:
      `[B, C1, C2]`; 0 where no position is included.

    References:
      Yim et al., A Gift from Knowledge Distillation, 2017.
    """
    first, second = _sides.same_positions(first, second, names=("first", "second"))
    _checks.mask(where, first.shape[:-1])
    first, second = (_by_channel(_numerics.kept(x, where)) for x in (first, second))
    total = _numerics.gram(first, second)
    if where is None:
        return total / first.shape[-1]
    count = jnp.sum(where.reshape(len(where), -1), axis=-1, dtype=first.dtype)
    return total / jnp.maximum(count, 1)[:, None, None]


def fsp(
    student: tuple[Array, Array], teacher: tuple[Array, Array], *, where: Array | None = None
) -> Array:
    """`mean (F_S - F_T)^2` of flow matrices between two layers: the flow of solution procedure.

    `.mean()`, summed over pairs of layers, is RepDistiller's number (weight 50, an initial
    stage), and TextBrewer's `fsp_loss` on tokens.

    Args:
      student: two maps `[B, ..., C1]`, `[B, ..., C2]` with the same positions.
      teacher: two maps with the same channels; positions may differ from the student's.
      where: bool `[B, ...]`, positions to include on both sides (then positions must agree).

    Returns:
      `[B]`, fourth power of feature units.

    References:
      Yim et al., A Gift from Knowledge Distillation, 2017.
    """
    _sides.check_sequences(2, student=student, teacher=teacher)
    for maps in zip(student, teacher, strict=True):
        _sides.same_channels(*maps)
    difference = flow_matrix(*student, where=where) - flow_matrix(*teacher, where=where)
    return jnp.mean(jnp.square(difference), axis=(1, 2))


def affinity(student: Array, teacher: Array) -> Array:
    """`sum_c || x x^T - y y^T ||_F / positions` of unit channel maps x, y: affinity distillation.

    `x x^T` is never formed: the squared norm is `1/2 |x - y|^2 |x + y|^2 + 1/2 (|x|^2 - |y|^2)^2`,
    which is linear in the positions and exact near equality. `.mean()` is torchdistill's
    `AffinityLoss`. The gradient at equality is set to 0.

    Args:
      student: `[B, ..., C]`, adapted to the teacher's factors.
      teacher: the same shape.

    Returns:
      `[B]`.

    References:
      He et al., Knowledge Adaptation for Efficient Semantic Segmentation, 2019 (1903.04688).
    """
    student, teacher = _sides.same_shape(student, teacher, at_least=3)
    x, y = (_numerics.normalize(_by_channel(side)) for side in (student, teacher))
    squared_differences, squared_sums = (jnp.sum(jnp.square(z), axis=-1) for z in (x - y, x + y))
    lengths = jnp.sum(jnp.square(x), axis=-1) - jnp.sum(jnp.square(y), axis=-1)
    norms = _numerics.safe_sqrt(0.5 * (squared_differences * squared_sums + jnp.square(lengths)))
    return jnp.sum(norms, axis=-1) / x.shape[-1]


def _by_channel(x: Array) -> Array:
    """`[B, ..., C] -> [B, C, positions]`."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 2)


def kdsvd(student: Sequence[Array], teacher: Sequence[Array], *, k: int = 1) -> Array:
    """`sum_l sum (R_S - R_T)^2`, where R is the RBF between singular vectors of neighboring layers.

    Each map is a matrix `[positions, C]`. The teacher's first k right singular vectors and the
    student's best matches among its first k + 3 (by |cosine|, sign aligned), scaled by the
    teacher's normalized singular values, enter `R = exp(-(v_l[c] - v_{l-1}[c'])^2 / 8)`. The sign
    of a singular vector is arbitrary: here the teacher's largest entry is positive. Gradients at
    repeated singular values are those of the well-defined part. `.mean()` is RepDistiller's number
    with that sign rule; mdistiller decomposes the transposed matrices.

    Args:
      student: at least two maps `[B, ..., C_l]`.
      teacher: the same number of maps with the same `C_l`; positions may differ.
      k: singular vectors per layer.

    Returns:
      `[B]`.

    References:
      Lee, Kim and Song, Self-supervised Knowledge Distillation Using Singular Value
      Decomposition, 2018 (1807.06819).
    """
    _sides.check_sequences(student=student, teacher=teacher)
    _checks.count(1, k=k)
    layers = []
    for maps in zip(student, teacher, strict=True):
        sides = _sides.same_channels(*maps)
        student_map, teacher_map = (
            side.reshape(side.shape[0], -1, side.shape[-1]) for side in sides
        )
        layers.append(_align(student_map, teacher_map, k))
    total = jnp.zeros(student[0].shape[:1], layers[0][0].dtype)
    for (lower_s, lower_t), (upper_s, upper_t) in zip(layers, layers[1:], strict=False):
        difference = _rbf(upper_s, lower_s) - _rbf(upper_t, lower_t)
        total = total + jnp.sum(jnp.square(difference), axis=(1, 2, 3))
    return total


def _rbf(upper: Array, lower: Array) -> Array:
    difference = upper[:, :, None, :] - lower[:, None, :, :]
    return jnp.exp(-jnp.square(difference) / 8)


def _align(student: Array, teacher: Array, k: int) -> tuple[Array, Array]:
    """The student's vectors nearest the teacher's first k; both scaled by the teacher's values."""
    rank_t, rank_s = (min(x.shape[1:]) for x in (teacher, student))
    values, target = _channel_vectors(teacher, min(k, rank_t))
    _, vectors = _channel_vectors(student, min(k + 3, rank_s))
    target, values = _fix_signs(target), _numerics.normalize(values)[:, None, :]
    overlap = _numerics.gram(jnp.swapaxes(vectors, 1, 2), jnp.swapaxes(target, 1, 2))
    best = jnp.argmax(jnp.abs(overlap), axis=1, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(overlap, best, axis=1) < 0, -1, 1)
    matched = jnp.take_along_axis(vectors, best, axis=2) * sign
    return matched * values, target * values


def _fix_signs(vectors: Array) -> Array:
    """Flips columns so that their largest entry is positive: the sign is otherwise arbitrary."""
    largest = jnp.argmax(jnp.abs(vectors), axis=1, keepdims=True)
    return vectors * jnp.where(jnp.take_along_axis(vectors, largest, axis=1) < 0, -1, 1)


def _channel_vectors(x: Array, count: int) -> tuple[Array, Array]:
    """Leading singular values and right singular vectors of `[B, positions, C]` maps."""
    top = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    scale = jax.lax.stop_gradient(jnp.where(top != 0, top, 1))
    x = jnp.swapaxes(x / scale, 1, 2)
    squares, vectors = _eigh(_numerics.gram(x, x))
    values = _numerics.safe_sqrt(squares[:, :count]) * scale[:, :, 0]
    return values, vectors[:, :, :count]


@jax.custom_jvp
def _eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (descending) and eigenvectors of symmetric matrices."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[..., ::-1], vectors[..., ::-1]


@_eigh.defjvp
def _eigh_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """First-order perturbation, without the directions of (numerically) repeated values.

    The derivative of an eigenvector divides by gaps between eigenvalues. If a gap is only rounding
    error, the vectors of that space are an arbitrary basis and have no derivative.
    """
    values, vectors = _eigh(*primals)
    rotated = jnp.swapaxes(vectors, -1, -2) @ tangents[0] @ vectors
    gaps = values[..., None, :] - values[..., :, None]
    noise = 16 * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), axis=-1)
    is_distinct = jnp.abs(gaps) > noise[..., None, None]
    mixing = jnp.where(is_distinct, rotated / jnp.where(is_distinct, gaps, 1), 0)
    return (values, vectors), (jnp.diagonal(rotated, axis1=-2, axis2=-1), vectors @ mixing)
