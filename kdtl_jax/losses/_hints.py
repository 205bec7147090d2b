"""Regression on features: hints and the losses that follow a connector.

The projection, generator or variance head that a paper trains beside such a loss is a connector
(`kdtl_jax.connectors`); here both sides have one shape already. Maps are channel-last.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def _per_example(x: Array, where: Array | None = None) -> Array:
    """Mean over everything but the batch."""
    axes = tuple(range(1, x.ndim))
    return _numerics.masked_mean(x, where, axis=axes) if axes else x


def hint(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean (f_S - f_T)^2` over all elements of an example: FitNets' hint.

    `.mean()` gives the number of RepDistiller, mdistiller and torchdistill's MSE; multiply by the
    elements per example for mmrazor's `L2Loss`.

    Args:
      student: `[B, ...]`, projected to the teacher's shape.
      teacher: the same shape.
      where: bool, the same shape; elements that take part.

    Returns:
      `[B]`, squared feature units.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Romero et al., FitNets: Hints for Thin Deep Nets, 2015 (1412.6550).
    """
    student, teacher = _door.same_shape("hint", student, teacher)
    _checks.mask(where, student.shape)
    apart = _door.kept(student, where) - _door.kept(teacher, where)
    return _per_example(jnp.square(apart), where)


def cosine_distance(student: Array, teacher: Array) -> Array:
    """`1 - cos(f_S, f_T)` over the last axis, exactly 0 at equality; 1 from a zero vector."""
    squares = jnp.sum(jnp.square(student), axis=-1) * jnp.sum(jnp.square(teacher), axis=-1)
    positive = squares != 0
    lengths = jnp.sqrt(jnp.where(positive, squares, 1))
    distance = 1 - jnp.where(positive, jnp.sum(student * teacher, axis=-1) / lengths, 0)
    # Rounding may leave it below 0. The value is clipped, the gradient is not.
    return distance - jax.lax.stop_gradient(jnp.minimum(distance, 0))


def hint_cosine(student: Array, teacher: Array) -> Array:
    """`mean (1 - cos(f_S, f_T))` over positions, cosines over the last axis.

    A zero vector has no direction: its distance is 1.

    Args:
      student: `[B, ..., C]`.
      teacher: the same shape.

    Returns:
      `[B]`, in `[0, 2]`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Sanh et al., DistilBERT, 2019 (1910.01108), on tokens (`hidden_cosine`).
    """
    student, teacher = _door.same_shape("hint_cosine", student, teacher)
    return _per_example(cosine_distance(student, teacher))


def simkd(student: Array, teacher: Array) -> Array:
    """`mean (proj(f_S) - f_T)^2` of the last feature map; the student keeps the teacher's head.

    The projector (`connectors.simkd_projector`) stays at inference, where
    `classifier_T(pool(proj(f_S)))` makes the prediction: count its parameters. `.mean()` is the
    authors' number.

    Args:
      student: `[B, ..., C]`, the projector's output.
      teacher: the same shape.

    Returns:
      `[B]`, squared feature units.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Chen et al., Knowledge Distillation with the Reused Teacher Classifier, 2022 (2203.14001).
    """
    student, teacher = _door.same_shape("simkd", student, teacher)
    return _per_example(jnp.square(student - teacher))


def mgd(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`sum (G(f_S * mask) - f_T)^2`: masked generative distillation.

    The caller masks the student's features, e.g. with
    `jax.random.bernoulli(inputs.key, 1 - ratio, (B, H, W, 1))`, and generates from what is left
    (`connectors.generator`). `.mean()` times alpha (2e-5 in mmdetection, 7e-5 in classification)
    is the authors' number. ViTKD's high layer is this sum over the replaced tokens alone
    (`where`), times beta / mask ratio.

    Args:
      student: `[B, ..., C]`, generated from masked features.
      teacher: the same shape.
      where: bool, `student.shape[:-1]`; positions that count. All by default.

    Returns:
      `[B]`, squared feature units, summed.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Yang et al., Masked Generative Distillation, 2022 (2205.01529); ViTKD, 2022 (2209.02432).
    """
    student, teacher = _door.same_shape("mgd", student, teacher)
    _checks.mask(where, student.shape[:-1])
    apart = _door.kept(student, where) - _door.kept(teacher, where)
    return jnp.sum(_numerics.batch_flat(jnp.square(apart)), axis=-1)


def srrl(
    student: Array,
    teacher: Array,
    *,
    classifier: Callable[[Array], Array],
    feature_weight: Scalar = 1.0,
    classifier_weight: Scalar = 5.0,
) -> Array:
    """`alpha mean (f_S - f_T)^2 + beta mean (W_T f_S - W_T f_T)^2`: softmax regression features.

    The teacher's own classifier judges the student's features; pass it as a function of features,
    e.g. `lambda f: f @ head["kernel"] + head["bias"]`, with frozen parameters.

    Args:
      student: `[B, C]`, or `[B, ..., C]`, connected to the teacher's width.
      teacher: the same shape.
      classifier: maps features (float32 or wider) to logits, example by example.
      feature_weight: alpha.
      classifier_weight: beta.

    Returns:
      `[B]`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, 2021.
    """
    student, teacher = _door.same_shape("srrl", student, teacher)
    features = _per_example(jnp.square(student - teacher))
    logits = _per_example(jnp.square(classifier(student) - classifier(teacher)))
    alpha, beta = (_numerics.scalar(w, features) for w in (feature_weight, classifier_weight))
    return alpha * features + beta * logits


def srd(student: Array, teacher: Array, *, exponent: Scalar = 4.0, floor: Scalar = 1e-12) -> Array:
    """`log sum_d |f_S - f_T|^alpha`: the log-sum distance of "the role of the projector".

    The paper batch-normalizes both sides and projects the student linearly
    (`connectors.batch_norm`, `connectors.linear`). At equality the logarithm has no floor of its
    own: sums below `floor` count as `floor`, with gradient 0. torchdistill sums over the batch
    before the logarithm and doubles it: `2 logsumexp` of these values.

    Args:
      student: `[B, D]` or `[B, ..., D]`.
      teacher: the same shape.
      exponent: alpha >= 1.
      floor: smallest sum, > 0.

    Returns:
      `[B]`; not a distance: `log floor` at equality, not 0.

    Raises:
      ValueError: if shapes differ or are empty, the exponent is below 1 or the floor not positive.
      TypeError: if an array is not floating point.

    References:
      Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation,
      2023 (2303.11098).
    """
    student, teacher = _door.same_shape("srd", student, teacher)
    _checks.within(1, math.inf, exponent=exponent)
    _checks.positive(floor=floor)
    apart = jnp.abs(_numerics.batch_flat(student - teacher))
    powers = apart ** _numerics.scalar(exponent, apart)
    return jnp.log(jnp.maximum(jnp.sum(powers, axis=-1), _numerics.scalar(floor, apart)))


def vid(student: Array, teacher: Array, variance: Array) -> Array:
    """`mean 1/2 ((f_T - mu)^2 / v + log v)`: the Gaussian likelihood of variational distillation.

    `mu` is the student through `connectors.mlp` (three 1x1 convolutions), `v` comes from
    `connectors.variance` (softplus + 1e-5, initially 5). The constant `1/2 log 2 pi` is left out,
    as in the authors' code; `.mean()` is RepDistiller's number. PAD is twice this with
    `v = 1e-6 + exp(log_variance)` and `log v` read as `log_variance`.

    Args:
      student: `[B, ..., C]`, the predicted mean.
      teacher: the same shape.
      variance: `[C]`, or the shape of the others; > 0.

    Returns:
      `[B]`, nats; negative where the variance is small and the fit good.

    Raises:
      ValueError: if shapes differ or are empty, or a variance is not positive.
      TypeError: if an array is not floating point.

    References:
      Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019 (1904.05835).
    """
    student, teacher = _door.same_shape("vid", student, teacher)
    _checks.floating(variance=variance)
    _checks.positive(variance=variance)
    if variance.shape not in (student.shape, student.shape[-1:]):
        raise ValueError(
            f"variance must have one value per channel or the student's shape, got "
            f"{_checks.described(variance=variance, student=student)}."
        )
    v = _numerics.scalar(variance, student)
    v = v.reshape((1,) * (student.ndim - v.ndim) + v.shape)
    return 0.5 * _per_example(jnp.square(teacher - student) / v + jnp.log(v))


def ridge_hint(student: Array, teacher: Array, *, ridge: Scalar = 1e-3) -> Array:
    """`mean (f_S W* + b* - f_T)^2` with `W*, b*` the ridge regression of this very batch.

    A hint without a regressor to train: the best linear map is solved for inside the loss
    (variable projection) and the gradient runs through the solve, so the loss is invariant to
    invertible linear maps of the student's features up to the ridge. All positions of the batch
    are rows of one regression; have more of them than student channels. Relational: a value
    depends on the whole batch. The penalty is `ridge` times the mean square of the centered
    student features, so the loss does not depend on their scale.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same leading axes.
      ridge: relative penalty, > 0.

    Returns:
      `[B]`, squared teacher units.

    Raises:
      ValueError: if leading axes differ or are empty, or the ridge is not positive.
      TypeError: if an array is not floating point.

    References:
      Golub and Pereyra, Separable nonlinear least squares: the variable projection method, 2003.
    """
    student, teacher = _door.same_positions("ridge_hint", student, teacher, at_least=2)
    _checks.positive(ridge=ridge)
    x, y = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    x, y = x - jnp.mean(x, axis=0, keepdims=True), y - jnp.mean(y, axis=0, keepdims=True)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))  # it cancels
    x = x / jnp.where(scale != 0, scale, 1)
    covariance, cross = _numerics.gram(x.T, x.T) / len(x), _numerics.gram(x.T, y.T) / len(x)
    penalty = _numerics.scalar(ridge, x) * jnp.trace(covariance) / x.shape[-1]
    penalty = penalty + jnp.finfo(x.dtype).tiny ** 0.5
    damped = covariance + penalty * jnp.eye(x.shape[-1], dtype=x.dtype)
    weights = jax.scipy.linalg.solve(damped, cross, assume_a="pos")
    residual = y - jnp.matmul(x, weights, precision="highest")
    return _per_example(jnp.square(residual).reshape(teacher.shape))
