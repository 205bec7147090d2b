"""Correlations of predictions: DIST, multi-level distillation, SKD; and standardized logits.

What all functions here share:

- `student_logits` and `teacher_logits` have one shape: `[..., num_classes]` if each example is
  compared separately, `[B, num_classes]` if examples are compared with each other (flatten a map's
  positions into the batch).
- `temperature > 0` softens both sides and is a scalar or one value per example. No `T^2`.
- A class whose logit is -inf on both sides (vocabulary padding) does not count. If only one side
  has -inf, that side gives the class no probability.
- `where`, bool `[B]`, marks the examples that count, e.g. those that are not padding. The others do
  not affect them and get 0. On more than one device, gather the batch first.
- Losses return `[...]` or `[B]`, float32 or wider.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def dist_inter(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
) -> Array:
    """`1 - rho(p_S[b, :], p_T[b, :])`: Pearson distance of each example's probabilities.

    DIST is `dist_inter + dist_intra`, at temperature 1 for ImageNet and 4 for CIFAR-100. It is
    invariant to the scale and shift of probabilities, so it teaches preferences only. The mean is
    the authors' number at temperature 1; their code for images, torchdistill and mmrazor multiply
    by `temperature^2`.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.
      eps: >= 0, added to the product of the two norms, as in the authors' code. A row without
        variance has correlation 0, hence distance 1.

    Returns:
      `[...]`, in [0, 2]; at equality `eps / (norm^2 + eps)`.

    References:
      Huang et al., Knowledge Distillation from A Stronger Teacher, 2022 (2205.10536).
    """
    _checks.non_negative(eps=eps)
    logits = _logspace.soften(student_logits, teacher_logits, temperature)
    student, teacher = (_softmax.softmax(z) for z in logits)
    terms, remainder = _pearson_terms(student, teacher, -1, eps, _present(*logits))
    return jnp.sum(terms, axis=-1) + jnp.squeeze(remainder, -1)


def dist_intra(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
    where: Array | None = None,
) -> Array:
    """`1 - rho(p_S[:, c], p_T[:, c])` over the batch, averaged over classes: each example's part.

    With unit columns u, v the distance is `1/2 |u - v|^2`. An example's part is `B/C` of what its
    row contributes, so the mean over the batch is the mean distance over classes. `eps` is as in
    `dist_inter`. Takes `[B, num_classes]` logits and `where` `[B]`; returns `[B]`.

    References:
      Huang et al., 2022 (2205.10536).
    """
    _checks.non_negative(eps=eps)
    logits = _rows(student_logits, teacher_logits, temperature, where)
    student, teacher = _probabilities(*logits, where)
    rows = None if where is None else where[:, None]
    terms, remainder = _pearson_terms(student, teacher, 0, eps, rows)
    classes = _classes(*logits, where)
    count = jnp.maximum(jnp.sum(classes, dtype=terms.dtype), 1)
    # For a class that no example has, the terms are 0 and the remainder would be 1.
    values = jnp.sum(terms, axis=1) * (_count(student, where) / count)
    values += jnp.sum(jnp.where(classes, remainder[0], 0)) / count
    return _numerics.kept(values, where)


def class_correlation(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 4.0,
    where: Array | None = None,
) -> Array:
    """`|P_T' P_T - P_S' P_S|^2 / C`: the classes' correlations over the batch.

    `[B, num_classes]` logits. It is one number for the batch, given to every example, `[B]`, so the
    mean is the published value. Multi-level logit distillation sums `kd_kl`, `batch_correlation`
    and this over the temperatures 2, 3, 4, 5 and 6, on a weakly and a strongly augmented view.

    References:
      Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023. `.mean()` is the number of the
      authors' `cc_loss`. The published code departs from the paper: its confidence masks multiply
      losses that are already reduced, its strong view uses weak logits at two temperatures, and
      the strong view's correlations are computed and dropped.
    """
    logits = _rows(student_logits, teacher_logits, temperature, where)
    student, teacher = _probabilities(*logits, where)
    gap = _numerics.gram(teacher.T, teacher.T) - _numerics.gram(student.T, student.T)
    classes = jnp.sum(_classes(*logits, where), dtype=gap.dtype)
    value = jnp.broadcast_to(jnp.sum(jnp.square(gap)) / jnp.maximum(classes, 1), student.shape[:1])
    return _numerics.kept(value, where)


def batch_correlation(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 4.0,
    where: Array | None = None,
) -> Array:
    """`sum_b' (<p_T, p_T'> - <p_S, p_S'>)^2`: an example's similarities to the batch.

    Takes `[B, num_classes]` logits and `where` `[B]`; returns `[B]`.

    References:
      Jin, Wang and Lin, CVPR 2023. `.mean()` is the number of the authors' `bc_loss`.
    """
    logits = _rows(student_logits, teacher_logits, temperature, where)
    student, teacher = _probabilities(*logits, where)
    gap = _numerics.gram(teacher, teacher) - _numerics.gram(student, student)
    return jnp.sum(jnp.square(gap), axis=-1)


def skd_direction(
    student_logits: Array,
    teacher_logits: Array,
    *,
    tikhonov: Scalar = 0.1,
    where: Array | None = None,
) -> Array:
    """`sqrt(d_b' S^-1 d_b)`, `d` the rows of the gap between the similarity matrices.

    `d = Z_S Z_S' - Z_T Z_T'` of unit logits, and `S = cov(d) + tikhonov I` (divisor batch - 1),
    with `tikhonov > 0`. Zero, with gradient zero, at equality. A logit of -inf on only one side has
    no direction, so the value is NaN. Takes `[B, num_classes]` logits and `where` `[B]`; returns
    `[B]`.

    References:
      Jeong, Lee and Choi, Streamlined Knowledge Distillation, CVPR 2026; the instance term is
      `forward_kl(..., temperature=4.0)`. `.mean()` is torchdistill's `SKDDirectionLoss`.
    """
    _checks.positive(tikhonov=tikhonov)
    logits = _rows(student_logits, teacher_logits, 1.0, where)
    present = _present(*logits)
    student, teacher = (_numerics.normalize(_numerics.kept(z, present)) for z in logits)
    # Masked examples are zero vectors: their rows and columns of the gap are 0.
    gap = _numerics.gram(student, student) - _numerics.gram(teacher, teacher)
    count = _count(gap, where)
    mean = jnp.sum(gap, axis=0, keepdims=True) / jnp.maximum(count, 1)
    centered = _numerics.kept(gap - mean, where)
    covariance = _numerics.gram(centered.T, centered.T) / jnp.maximum(count - 1, 1)
    covariance += _numerics.scalar(tikhonov, gap, "tikhonov") * jnp.eye(len(gap), dtype=gap.dtype)
    root = jnp.linalg.cholesky(covariance)
    whitened = jax.scipy.linalg.solve_triangular(root, gap.T, lower=True)
    return _numerics.safe_norm(whitened, axis=0)


def standardize_logits(
    logits: Array, *, ddof: int = 0, eps: Scalar = 1e-7, where: Array | None = None
) -> Array:
    """`(z - mean z) / (std z + eps)` over the classes of each example, for any loss on logits.

    Logit standardization is `kd_kl` of both sides standardized, at temperature 2. A constant row
    becomes 0, with gradient 0; -inf entries stay -inf and do not count.

    Args:
      logits: `[..., num_classes]`.
      ddof: 0 divides the squared deviations by `num_classes`, the paper's population deviation; 1
        divides by `num_classes - 1`, as the authors' code does (with two classes the results differ
        by sqrt(2)).
      eps: added to the deviation, as in the authors' code.
      where: bool, the logits' shape; classes to include.

    Returns:
      `[..., num_classes]`, float32 or wider.

    References:
      Sun et al., Logit Standardization in Knowledge Distillation, 2024 (2403.01427). The authors'
      number is the mean with `ddof=1`, which they weight by 9; torchdistill's `LogitStdKDLoss` is
      the same times beta.
    """
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.nonempty(logits=logits)
    _checks.mask(where, logits.shape)
    _checks.count(0, ddof=ddof)
    _checks.non_negative(eps=eps)
    if logits.shape[-1] <= ddof:
        raise ValueError(
            f"needs more than ddof={ddof} classes, "
            f"got {_checks.described(logits=logits)}. Use ddof=0."
        )
    _checks.several_classes(logits=logits)
    z = _numerics.upcast(logits)
    present = z != -jnp.inf
    if where is not None:
        present &= where
    count = jnp.sum(present, axis=-1, keepdims=True, dtype=z.dtype)
    finite_logits = jnp.where(present, z, 0)
    mean = jnp.sum(finite_logits, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centered = jnp.where(present, finite_logits - mean, 0)
    deviation = _numerics.safe_norm(centered, keepdims=True) / jnp.sqrt(
        jnp.maximum(count - ddof, 1)
    )
    varies = deviation != 0
    scale = jnp.where(varies, deviation, 1) + _numerics.scalar(eps, z, "eps")
    return jnp.where(present, jnp.where(varies, centered, 0) / scale, -jnp.inf)


def _rows(
    student_logits: Array, teacher_logits: Array, temperature: Scalar, where: Array | None
) -> tuple[Array, Array]:
    """Checks and softens logits `[B, num_classes]`; rows that do not count become 0."""
    _checks.rank(2, 2, student_logits=student_logits)
    student, teacher = _logspace.soften(student_logits, teacher_logits, temperature)
    _checks.mask(where, jnp.shape(student_logits)[:1])
    return _numerics.kept(student, where), _numerics.kept(teacher, where)


def _probabilities(student: Array, teacher: Array, where: Array | None) -> tuple[Array, Array]:
    """Softmaxes of the rows, 0 where a row does not count."""
    student, teacher = (_numerics.kept(_softmax.softmax(z), where) for z in (student, teacher))
    return student, teacher


def _present(student: Array, teacher: Array) -> Array:
    """Bool of the logits' shape: which entries at least one side has."""
    return (student != -jnp.inf) | (teacher != -jnp.inf)


def _classes(student: Array, teacher: Array, where: Array | None) -> Array:
    """Bool `[num_classes]`: the classes that at least one counted example has."""
    present = _present(student, teacher)
    return jnp.any(present if where is None else present & where[:, None], axis=0)


def _count(rows: Array, where: Array | None) -> Array:
    """The number of examples that count."""
    if where is None:
        return jnp.asarray(rows.shape[0], rows.dtype)
    return jnp.sum(where, dtype=rows.dtype)


def _pearson_terms(
    x: Array, y: Array, axis: int, eps: Scalar, where: Array | None
) -> tuple[Array, Array]:
    """Terms >= 0 along `axis` and a remainder; their sum is `1 - <x', y'> / (|x'| |y'| + eps)`.

    x' and y' are centered.

    `1 - rho = 1/2 |u - v|^2` of the unit vectors does not cancel where the two nearly agree.
    `where` broadcasts to x and y, which are 0 wherever it is false.
    """
    if where is None:
        count = jnp.asarray(x.shape[axis], x.dtype)
    else:
        where = jnp.broadcast_to(where, x.shape)
        weights = jnp.where(where, jnp.ones((), x.dtype), 0)
        count = jnp.maximum(jnp.sum(weights, axis=axis, keepdims=True), 1)

    def center(z: Array) -> Array:
        deviation = z - jnp.sum(z, axis=axis, keepdims=True) / count
        return deviation if where is None else jnp.where(where, deviation, 0)

    x, y = center(x), center(y)
    # Probabilities: their squares are in range.
    square_x = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    square_y = jnp.sum(jnp.square(y), axis=axis, keepdims=True)
    has_variance = (square_x != 0) & (square_y != 0)
    norm_x = jnp.sqrt(jnp.where(has_variance, square_x, 1))
    norm_y = jnp.sqrt(jnp.where(has_variance, square_y, 1))
    floor = _numerics.scalar(eps, norm_x, "eps")
    denominator = norm_x * norm_y + floor
    # `product / whole` of half the squared distance of the unit vectors, and `floor / whole`; as
    # much as possible is done per row. Without variance the distance is 1, even for eps = 0.
    scale = jnp.where(has_variance, jnp.sqrt(0.5 / denominator), 0)
    root_x, root_y = jnp.sqrt(norm_y / norm_x), jnp.sqrt(norm_x / norm_y)
    terms = jnp.square(x * (scale * root_x) - y * (scale * root_y))
    return terms, jnp.where(has_variance, floor / denominator, 1)
