"""Relations between the examples of a batch: one value per anchor, its relations to all others.

Everything is computed from Gram matrices, never from a `[B, B, D]` array. Student and teacher may
have different widths; only the relations are compared. Under `jit` with a batch sharded over
devices the values are those of the whole batch.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def _flat(fn: str, student: Array, teacher: Array) -> tuple[Array, Array]:
    student, teacher = _door.same_batch(fn, student, teacher)
    return _numerics.batch_flat(student), _numerics.batch_flat(teacher)


def _huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5)


def sp(student: Array, teacher: Array) -> Array:
    """`mean_j (G_S - G_T)_ij^2` of row-normalized Gram matrices `G = f f^T`: similarity-preserving.

    `.mean()` is the paper's and RepDistiller's number (weight 3000).

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: `[B, ...]`, any width.

    Returns:
      `[B]`.

    Raises:
      ValueError: if the batch sizes differ or are 0.
      TypeError: if an array is not floating point.

    References:
      Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019 (1907.09682).
    """
    apart = jnp.subtract(*(_row_unit_gram(x) for x in _flat("sp", student, teacher)))
    return jnp.mean(jnp.square(apart), axis=-1)


def _row_unit_gram(x: Array) -> Array:
    return _numerics.normalize(_numerics.gram(x, x))


def pkt(student: Array, teacher: Array, *, eps: Scalar = 1e-7) -> Array:
    """`sum_j p_ij log(p_ij / q_ij)`, p and q the rows of `(1 + cosine) / 2` over their sums: PKT.

    `.mean() / B` is RepDistiller's number (weight 30000; the code averages over B^2).

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: `[B, ...]`, any width.
      eps: added to norms and to both probabilities within the logarithm.

    Returns:
      `[B]`, nats; at least 0 up to `B eps`.

    Raises:
      ValueError: if the batch sizes differ or are 0, or eps is not positive.
      TypeError: if an array is not floating point.

    References:
      Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
      2018 (1803.10837).
    """
    _checks.positive(eps=eps)
    q, p = (_affinities(x, eps) for x in _flat("pkt", student, teacher))
    low = _numerics.scalar(eps, q)
    # log1p of the relative difference, and q - p which sums to 0: no cancellation between terms.
    apart = (q - p) / (p + low)
    near = jnp.abs(apart) < 0.5
    far_log = jnp.log(q + low) - jnp.log(p + low)
    return jnp.sum((q - p) - p * jnp.where(near, jnp.log1p(jnp.where(near, apart, 0)), far_log), -1)


def _affinities(x: Array, eps: Scalar) -> Array:
    unit = x / (_numerics.safe_norm(x, keepdims=True) + _numerics.scalar(eps, x))
    # Rounding may leave a cosine below -1, and a logarithm of less than nothing.
    cosines = jnp.maximum(0.5 * (_numerics.gram(unit, unit) + 1), 0)
    return cosines / jnp.sum(cosines, axis=-1, keepdims=True)


def gaussian_taylor_kernel(x: Array, *, gamma: Scalar = 0.4, order: int = 2) -> Array:
    """`e^(-2 gamma) sum_p (2 gamma)^p / p! (x_i . x_j)^p`: a Gaussian kernel for unit rows.

    The Taylor polynomial of `exp(-gamma |x_i - x_j|^2)` where `|x_i| = |x_j| = 1`.

    Args:
      x: `[B, D]`, rows as they are.
      gamma: of the Gaussian.
      order: of the polynomial.

    Returns:
      `[B, B]`.

    Raises:
      ValueError: if `x` is not a matrix, gamma not positive or the order negative.
      TypeError: if `x` is not floating point.

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, 2019 (1904.01802), eq. 9.
    """
    x = _door.one("gaussian_taylor_kernel", x, at_least=2, at_most=2)
    _checks.positive(gamma=gamma)
    _checks.count(0, order=order)
    scaled = 2 * _numerics.scalar(gamma, x) * _numerics.gram(x, x)
    total = jnp.full_like(scaled, 1 / math.factorial(order))
    for power in range(order - 1, -1, -1):  # Horner
        total = total * scaled + 1 / math.factorial(power)
    return jnp.exp(-2 * _numerics.scalar(gamma, x)) * total


def cc(student: Array, teacher: Array, *, gamma: Scalar = 0.4, order: int = 2) -> Array:
    """`mean_j (K_S - K_T)_ij^2`, K the Gaussian Taylor kernel of unit embeddings: CC.

    `.mean()` is the paper's number. torchdistill takes the unsquared Frobenius norm of kernels of
    embeddings that it does not normalize; RepDistiller's `Correlation` is another function
    (products of consecutive rows), 0 for some large mismatches.

    Args:
      student: `[B, ...]`, flattened per example and normalized here.
      teacher: `[B, ...]`, any width.
      gamma: of the Gaussian.
      order: of its Taylor polynomial.

    Returns:
      `[B]`.

    Raises:
      ValueError: if the batch sizes differ or are 0, gamma is not positive or the order negative.
      TypeError: if an array is not floating point.

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, 2019 (1904.01802).
    """
    _checks.positive(gamma=gamma)
    _checks.count(0, order=order)
    units = (_numerics.unit(x) for x in _flat("cc", student, teacher))
    kernels = (gaussian_taylor_kernel(x, gamma=gamma, order=order) for x in units)
    return jnp.mean(jnp.square(jnp.subtract(*kernels)), axis=-1)


def _centered_gram(x: Array) -> Array:
    """Products of differences to the mean of the batch: distances lose fewest digits there."""
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    return _numerics.gram(centered, centered)


def _distances(gram: Array) -> Array:
    """Euclidean distances from a Gram matrix; 0 with gradient 0 where only rounding is left."""
    squares = jnp.diagonal(gram)
    total = squares[:, None] + squares[None, :]
    apart = total - 2 * gram
    noise = 8 * jnp.finfo(gram.dtype).eps * total
    distinct = ~(apart <= noise) & ~jnp.eye(len(gram), dtype=jnp.bool_)
    return jnp.where(distinct, jnp.sqrt(jnp.where(distinct, apart, 1)), 0)


def rkd_distance(student: Array, teacher: Array) -> Array:
    """`mean_j huber(D_S - D_T)_ij`, D pairwise distances over their mean: RKD's distance term.

    The mean runs over pairs of distinct examples and is differentiated. `.mean()` is
    RepDistiller's, mdistiller's and mmrazor's number (weight 25). A batch of one gives 0.

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: `[B, ...]`, any width.

    Returns:
      `[B]`.

    Raises:
      ValueError: if the batch sizes differ or are 0.
      TypeError: if an array is not floating point.

    References:
      Park et al., Relational Knowledge Distillation, 2019 (1904.05068).
    """
    relative = (_relative_distances(x) for x in _flat("rkd_distance", student, teacher))
    return jnp.mean(_huber(jnp.subtract(*relative)), axis=-1)


def _relative_distances(x: Array) -> Array:
    distances = _distances(_centered_gram(x))
    mean = jnp.sum(distances) / max(len(x) * (len(x) - 1), 1)
    return jnp.where(mean != 0, distances / jnp.where(mean != 0, mean, 1), 0)


def rkd_angle(student: Array, teacher: Array, *, anchors_at_once: int | None = None) -> Array:
    """`mean_jk huber(cos_S(j, i, k) - cos_T(j, i, k))`: RKD's angle term, i the vertex.

    The cosines of all `B^3` triples follow from the Gram matrix, without a factor of D, a few
    anchors at a time and recomputed in the backward pass: memory is `anchors_at_once * B^2`.
    Degenerate angles count as 0. `.mean()` is RepDistiller's, mdistiller's and mmrazor's
    number (weight 50).

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: `[B, ...]`, any width.
      anchors_at_once: how many vertices are held in memory; by default as many as fit 2^20
        cosines, at least one.

    Returns:
      `[B]`.

    Raises:
      ValueError: if the batch sizes differ or are 0, or `anchors_at_once` is not positive.
      TypeError: if an array is not floating point.

    References:
      Park et al., Relational Knowledge Distillation, 2019 (1904.05068).
    """
    student, teacher = _flat("rkd_angle", student, teacher)
    size = len(student)
    if anchors_at_once is None:
        anchors_at_once = max(2**20 // size**2, 1)
    _checks.positive(anchors_at_once=anchors_at_once)
    sides = [_angle_parts(x) for x in (student, teacher)]

    def anchor(i: Array) -> Array:
        cosines = (_cosines_at(i, *side) for side in sides)
        return jnp.mean(_huber(jnp.subtract(*cosines)))

    step = jax.checkpoint(anchor)
    if anchors_at_once >= size:
        return jax.vmap(step)(jnp.arange(size))
    return jax.lax.map(step, jnp.arange(size), batch_size=anchors_at_once)


def _angle_parts(x: Array) -> tuple[Array, Array]:
    """Gram matrix and inverse distances (0 on the diagonal and between duplicates)."""
    gram = _centered_gram(x)
    distances = _distances(gram)
    apart = distances != 0
    return gram, jnp.where(apart, 1 / jnp.where(apart, distances, 1), 0)


def _cosines_at(i: Array, gram: Array, inverse: Array) -> Array:
    """`(x_j - x_i) . (x_k - x_i) / (|x_j - x_i| |x_k - x_i|)` for all j, k."""
    row, near = gram[i], inverse[i]
    products = gram - row[:, None] - row[None, :] + row[i]
    return products * near[:, None] * near[None, :]
