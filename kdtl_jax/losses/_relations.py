"""Relations between examples of a batch: one value per anchor, from its relations to the others.

All take float arrays `[B, ...]`, flattened per example, student first; student and teacher may have
different widths, since only the relations are compared. They return `[B]` in float32 or wider.
Everything is computed from Gram matrices, never from a `[B, B, D]` array. Under `jit` with a batch
sharded over devices, the values are those of the whole batch.

`where` (bool `[B]`) marks the real examples. The others have the value 0, and no row is related to
them, so a padded batch gives the same numbers as its real rows alone.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def sp(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean_j (G_S - G_T)_ij^2` of row-normalized Gram matrices `G = f f^T`: similarity-preserving.

    `.mean()` is the paper's and RepDistiller's number (weight 3000). Takes `[B, ...]` of any two
    widths and `where` `[B]`; returns `[B]`.

    References:
      Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019 (1907.09682).
    """
    sides = (_numerics.rescaled(x) for x in _flat(student, teacher, where))
    grams = (_numerics.gram(x, x) for x in sides)
    difference = jnp.subtract(*(_numerics.normalize(gram) for gram in grams))
    return _mean_over_others(jnp.square(difference), where)


def pkt(student: Array, teacher: Array, *, eps: Scalar = 1e-7, where: Array | None = None) -> Array:
    """`sum_j p_ij log(p_ij / q_ij)` over rows of the teacher's and the student's affinities: PKT.

    Affinities are `(1 + cosine) / 2` divided by the sum of their row; p is the teacher's, q the
    student's. `.mean() / B` is RepDistiller's number (weight 30000; the code averages over B^2).

    Args:
      student: `[B, ...]`.
      teacher: `[B, ...]`, any width.
      eps: added to norms (in feature units) and to both probabilities inside the logarithm.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, nats; at least 0 up to `B eps`.

    References:
      Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
      2018 (1803.10837).
    """
    _checks.positive(eps=eps)
    q, p = (_affinities(x, eps, where) for x in _flat(student, teacher, where))
    low = _numerics.scalar(eps, q, "eps")
    # log1p of the relative difference, plus q - p, which sums to 0: no cancellation between terms.
    relative_gap = (q - p) / (p + low)
    is_near = jnp.abs(relative_gap) < 0.5
    far_log = jnp.log(q + low) - jnp.log(p + low)
    terms = (q - p) - p * jnp.where(
        is_near, jnp.log1p(jnp.where(is_near, relative_gap, 0)), far_log
    )
    return _numerics.kept(jnp.sum(terms, axis=-1), where)


def _affinities(x: Array, eps: Scalar, where: Array | None) -> Array:
    unit = x / (_numerics.safe_norm(x, keepdims=True) + _numerics.scalar(eps, x, "eps"))
    # Rounding may leave a cosine below -1, and so the logarithm of a negative number.
    cosines = jnp.maximum(0.5 * (_numerics.gram(unit, unit) + 1), 0)
    if where is not None:
        cosines = jnp.where(where[None, :], cosines, 0)
        # Without any real example there is nothing to normalize.
        return cosines / jnp.where(jnp.any(where), jnp.sum(cosines, -1, keepdims=True), 1)
    return cosines / jnp.sum(cosines, axis=-1, keepdims=True)


def gaussian_taylor_kernel(x: Array, *, gamma: Scalar = 0.4, order: int = 2) -> Array:
    """`e^(-2 gamma) sum_p (2 gamma)^p / p! (x_i . x_j)^p`: a Gaussian kernel for unit rows.

    The Taylor polynomial of `exp(-gamma |x_i - x_j|^2)` where `|x_i| = |x_j| = 1`.

    Args:
      x: `[B, D]`; rows are used as given.
      gamma: the Gaussian's exponent, > 0.
      order: degree of the polynomial.

    Returns:
      `[B, B]`.

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, 2019 (1904.01802).
    """
    x = _sides.single(x, "x", at_least=2, at_most=2)
    _checks.positive(gamma=gamma)
    _checks.count(0, order=order)
    scaled = 2 * _numerics.scalar(gamma, x, "gamma") * _numerics.gram(x, x)
    total = jnp.full_like(scaled, 1 / math.factorial(order))
    for power in range(order - 1, -1, -1):  # Horner
        total = total * scaled + 1 / math.factorial(power)
    return jnp.exp(-2 * _numerics.scalar(gamma, x, "gamma")) * total


def cc(
    student: Array,
    teacher: Array,
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
    where: Array | None = None,
) -> Array:
    """`mean_j (K_S - K_T)_ij^2`, K the Gaussian Taylor kernel of unit embeddings: CC.

    `.mean()` is the paper's number. torchdistill uses the unsquared Frobenius norm of kernels of
    embeddings that it does not normalize; RepDistiller's `Correlation` is a different function
    (products of consecutive rows) that is 0 for some large mismatches. Takes `[B, ...]` of any two
    widths and `where` `[B]`; returns `[B]`.

    Args:
      gamma: the Gaussian's exponent, > 0.
      order: degree of its Taylor polynomial.

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, 2019 (1904.01802).
    """
    _checks.positive(gamma=gamma)
    _checks.count(0, order=order)
    units = (_numerics.normalize(x) for x in _flat(student, teacher, where))
    kernels = (gaussian_taylor_kernel(x, gamma=gamma, order=order) for x in units)
    return _mean_over_others(jnp.square(jnp.subtract(*kernels)), where)


def rkd_distance(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean_j huber(D_S - D_T)_ij`, with D pairwise distances over their mean: RKD's distance term.

    The mean distance is over pairs of distinct examples and is differentiated. `.mean()` is
    RepDistiller's, mdistiller's and mmrazor's number (weight 25). A batch of one gives 0. Takes
    `[B, ...]` of any two widths and `where` `[B]`; returns `[B]`.

    References:
      Park et al., Relational Knowledge Distillation, 2019 (1904.05068).
    """
    relative = (_relative_distances(x, where) for x in _flat(student, teacher, where))
    return _mean_over_others(optax.losses.huber_loss(jnp.subtract(*relative)), where)


def _relative_distances(x: Array, where: Array | None) -> Array:
    distances = _distances(_centered_gram(x, where), where)
    count = _numerics.row_count(x, where)
    mean = jnp.sum(distances) / jnp.maximum(count * (count - 1), 1)
    return _numerics.ratio(distances, mean)


def rkd_angle(
    student: Array,
    teacher: Array,
    *,
    anchors_at_once: int | None = None,
    where: Array | None = None,
) -> Array:
    """`mean_jk huber(cos_S(j, i, k) - cos_T(j, i, k))`: RKD's angle term, i the vertex.

    The cosines of all `B^3` triples follow from the Gram matrix, without a factor of D. They are
    computed for a few anchors at a time and recomputed in the backward pass, so memory is
    `anchors_at_once * B^2`. Degenerate angles count as 0. `.mean()` is RepDistiller's, mdistiller's
    and mmrazor's number (weight 50). Takes `[B, ...]` of any two widths and `where` `[B]`; returns
    `[B]`.

    Args:
      anchors_at_once: how many vertices are held in memory, at least one; by default as many as fit
        2^20 cosines.

    References:
      Park et al., Relational Knowledge Distillation, 2019 (1904.05068).
    """
    student, teacher = _flat(student, teacher, where)
    size = len(student)
    if anchors_at_once is None:
        anchors_at_once = max(2**20 // size**2, 1)
    _checks.positive(anchors_at_once=anchors_at_once)
    sides = [_angle_parts(x, where) for x in (student, teacher)]

    def anchor(i: Array) -> Array:
        cosines = (_cosines_at(i, *side) for side in sides)
        return jnp.mean(optax.losses.huber_loss(jnp.subtract(*cosines)))

    step = jax.checkpoint(anchor)
    if anchors_at_once >= size:
        values = jax.vmap(step)(jnp.arange(size))
    else:
        values = jax.lax.map(step, jnp.arange(size), batch_size=anchors_at_once)
    # Angles with a masked example count as 0: only their share of the mean must be removed.
    return values if where is None else values * (size / _numerics.row_count(student, where)) ** 2


def _angle_parts(x: Array, where: Array | None) -> tuple[Array, Array]:
    """Gram matrix and inverse distances (0 on the diagonal and between duplicates)."""
    gram = _centered_gram(x, where)
    distances = _distances(gram, where)
    is_distinct = distances != 0
    return gram, jnp.where(is_distinct, 1 / jnp.where(is_distinct, distances, 1), 0)


def _cosines_at(i: Array, gram: Array, inverse: Array) -> Array:
    """`(x_j - x_i) . (x_k - x_i) / (|x_j - x_i| |x_k - x_i|)` for all j, k."""
    row, inverse_row = gram[i], inverse[i]
    products = gram - row[:, None] - row[None, :] + row[i]
    return products * inverse_row[:, None] * inverse_row[None, :]


def _centered_gram(x: Array, where: Array | None) -> Array:
    """Products of differences from the batch mean, where distances lose the fewest digits.

    Correct up to a scale, which affects neither relative distances nor angles.
    """
    centered = _numerics.rescaled(_numerics.centered(x, where))
    return _numerics.gram(centered, centered)


def _distances(gram: Array, where: Array | None) -> Array:
    """Euclidean distances from a Gram matrix; 0 with gradient 0 if only rounding error is left."""
    squares = jnp.diagonal(gram)
    total = squares[:, None] + squares[None, :]
    squared_distances = total - 2 * gram
    noise = 8 * jnp.finfo(gram.dtype).eps * total
    distinct = ~(squared_distances <= noise) & ~jnp.eye(len(gram), dtype=jnp.bool_)
    if where is not None:
        distinct &= where[:, None] & where[None, :]
    return jnp.where(distinct, jnp.sqrt(jnp.where(distinct, squared_distances, 1)), 0)


def _flat(student: Array, teacher: Array, where: Array | None) -> tuple[Array, ...]:
    return _sides.flat(where, *_sides.same_batch(student, teacher))


def _mean_over_others(pairs: Array, where: Array | None) -> Array:
    """`[B, B] -> [B]`: the mean over the real examples, 0 for the others."""
    if where is None:
        return jnp.mean(pairs, axis=-1)
    return _numerics.kept(_numerics.masked_mean(pairs, where[None, :], axis=-1), where)
