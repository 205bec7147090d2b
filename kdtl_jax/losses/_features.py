"""Regression on features and predictions: squares, angles, likelihoods, sides of a ReLU.

All take float arrays `[B, ...]` of one shape, student first; the projection, generator or variance
head that a paper trains together with such a loss is a connector (`kdtl_jax.connectors`). Maps have
their channels last. The losses return one value per example, `[B]`, in float32 or wider;
`last_axis_mse` and `cosine_distance` take `[..., D]` and return one value per vector, `[...]`.

`where` is bool, with the arrays' shape or its leading axes, and marks the entries to include; an
example with no included entries has the value 0.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.scipy.special import log_ndtr

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def mse(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean (s - t)^2` over all but the batch: FitNets' hint, SimKD's loss, plain regression.

    `.mean()` gives the number of RepDistiller, mdistiller, SimKD and torchdistill's MSE; multiply
    by the elements per example for mmrazor's `L2Loss` with `normalize=False`.

    Args:
      student: `[B, ...]`.
      teacher: the same shape; targets, predictions or features.
      where: bool, entries to include.

    Returns:
      `[B]`, squared feature units.

    References:
      Romero et al., FitNets: Hints for Thin Deep Nets, 2015 (1412.6550); Chen et al., Knowledge
      Distillation with the Reused Teacher Classifier, 2022 (2203.14001).
    """
    difference, where = _difference(student, teacher, where)
    return _mean(jnp.square(difference), where)


def last_axis_mse(student: Array, teacher: Array) -> Array:
    """`mean_d (s_d - t_d)^2` over the last axis: one value per token, or per row of logits.

    On hidden states, its mean over real tokens is TextBrewer's `hid_mse_loss`, DistillKit's
    hidden-state loss, and TinyBERT's hidden and embedding terms (which count padding too). On
    logits it is the `T -> inf` limit of KD on centered logits (TextBrewer's `kd_mse_loss` divides
    by `T^2`).

    Args:
      student: `[..., D]`, projected to the teacher's width (`connectors.linear`).

    Returns:
      `[...]`, squared units.

    References:
      Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014 (1312.6184); Jiao et al., TinyBERT,
      2019 (1909.10351).
    """
    student, teacher = _sides.same_shape(student, teacher, at_least=1)
    return jnp.mean(jnp.square(student - teacher), axis=-1)


def squared_distance(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`sum (s - t)^2` over all but the batch: masked generative distillation, behavioral distance.

    MGD masks the student's features, e.g. with
    `jax.random.bernoulli(inputs.key, 1 - ratio, (B, H, W, 1))`, and reconstructs the map from the
    rest (`connectors.generator`); `.mean()` times alpha (2e-5 in mmdetection, 7e-5 in
    classification) is the authors' number. ViTKD's high layer is this sum over the replaced tokens
    alone (`where`), times beta / mask ratio. Half of `.sum()`, summed over layers, is TLL's
    behavioral regularization, which grows with the batch size.

    Args:
      student: `[B, ..., C]`.
      teacher: the same shape.
      where: bool, entries to include.

    Returns:
      `[B]`, squared feature units, summed.

    References:
      Yang et al., Masked Generative Distillation, 2022 (2205.01529); ViTKD, 2022 (2209.02432); Li
      et al., DELTA, 2019 (1901.09229), the baseline without attention.
    """
    difference, _ = _difference(student, teacher, where)
    return _sum(jnp.square(difference))


def huber(
    student: Array, teacher: Array, *, delta: Scalar = 1.0, where: Array | None = None
) -> Array:
    """Mean over all but the batch of `d^2 / 2` where `|d| <= delta`, else `delta (|d| - delta/2)`.

    Takes `[B, ...]` of one shape, with `where` of it or its leading axes; returns `[B]`.

    Args:
      delta: where the loss turns from quadratic to linear, > 0. Torch's smooth L1 is this divided
        by delta.

    References:
      Huber, Robust Estimation of a Location Parameter, 1964.
    """
    _checks.positive(delta=delta)
    difference, where = _difference(student, teacher, where)
    delta = _numerics.scalar(delta, difference, "delta")
    return _mean(optax.losses.huber_loss(difference, delta=delta), where)


def mae(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean |s - t|` over all but the batch: least absolute deviations, L1.

    `.mean()` is torch's L1Loss. Its gradient at equality is 0. Takes `[B, ...]` of one shape, with
    `where` of it or its leading axes; returns `[B]`.

    References:
      He et al., FAKD: Feature-Affinity Based Knowledge Distillation for Efficient Image
      Super-Resolution, ICIP 2020, its distillation of outputs.
    """
    difference, where = _difference(student, teacher, where)
    return _mean(jnp.abs(difference), where)


def teacher_bounded(
    student: Array,
    teacher: Array,
    targets: Array,
    *,
    margin: Scalar = 0.0,
    where: Array | None = None,
) -> Array:
    """`mean (s - y)^2` if it plus `margin` exceeds `mean (t - y)^2`, else 0.

    A student that is closer to the targets than its teacher by at least the margin gets no loss:
    regression outputs are unbounded, and a teacher may point away from the truth. The paper sums
    over the four coordinates of a box and adds half of the loss to the smooth L1 loss on the
    targets. Takes `[B, ...]` of one shape, with `where` of it or its leading axes; returns `[B]`.

    Args:
      targets: the same shape; y.
      margin: >= 0, in squared units.

    References:
      Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation, NeurIPS
      2017.
    """
    _checks.non_negative(margin=margin)
    _checks.same_shape(student=student, teacher=teacher, targets=targets)
    _checks.floating(student=student, teacher=teacher, targets=targets)
    student_error, teacher_error = (mse(x, targets, where=where) for x in (student, teacher))
    is_near = student_error + _numerics.scalar(margin, student_error, "margin") <= teacher_error
    return jnp.where(is_near, 0, jnp.where(jnp.isnan(teacher_error), teacher_error, student_error))


def cosine_distance(student: Array, teacher: Array) -> Array:
    """`1 - cos(s, t)` over the last axis, exactly 0 at equality.

    On hidden states, its mean over real tokens is DistilBERT's, TextBrewer's and DistillKit's
    number; twice its value at the first token is patient distillation, `|| s / |s| - t / |t| ||^2`.
    A zero vector has no direction: its distance is 1. The scale of either side does not matter as
    long as its squares are in float32's range: entries of 1e-18 to 1e18.

    Args:
      student: `[..., D]`.
      teacher: the same shape.

    Returns:
      `[...]`, in `[0, 2]`.

    References:
      Sanh et al., DistilBERT, 2019 (1910.01108); Sun et al., Patient Knowledge Distillation for
      BERT Model Compression, 2019 (1908.09355).
    """
    student, teacher = _sides.same_shape(student, teacher, at_least=1)
    of_student, of_teacher = (jnp.sum(jnp.square(x), axis=-1) for x in (student, teacher))
    positive = (of_student != 0) & (of_teacher != 0)
    squares = of_student * of_teacher
    # One root of the product is exact at equality; if the product leaves the range, scale it to
    # near 1.
    usual = (squares > jnp.finfo(squares.dtype).tiny) & (squares < jnp.inf)
    f, g = (
        jax.lax.stop_gradient(jnp.where(usual | ~positive, 1, jax.lax.rsqrt(x)))
        for x in (of_student, of_teacher)
    )
    squares = jnp.where(positive, (of_student * f * f) * (of_teacher * g * g), 1)
    cosine = jnp.sum(student * teacher, axis=-1) * (f * g) / jnp.sqrt(squares)
    distance = 1 - jnp.where(positive, cosine, 0)
    # Rounding may leave it below 0. The value is clipped; the gradient is not.
    return distance - jax.lax.stop_gradient(jnp.minimum(distance, 0))


def margin_mse(student_scores: Array, teacher_scores: Array) -> Array:
    """Mean over the others of `((s_0 - s_i) - (t_0 - t_i))^2`: how far the positive leads.

    For embedding models and rerankers that learn from a stronger ranker. A query's scores are a
    row, the positive first: dot products or cosines (`1 - cosine_distance`) of embeddings, or a
    reranker's logits. Pass the teacher's logits: sigmoids squash margins (.99 and .95 are .04
    apart, their logits 1.65 apart). The listwise loss on scores is `kd_kl` (sentence-transformers'
    `DistillKLDivLoss` at its own temperature); for a pair's similarity, use `squared_distance`.

    Args:
      student_scores: `[..., n]`, n > 1, the positive first.
      teacher_scores: the same shape. Pass stored margins m as the scores `[0, -m_1, -m_2, …]`.

    Returns:
      `[...]`, float32 or wider; `.mean()` is sentence-transformers' number.

    References:
      Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
      Distillation, 2020 (2010.02666).
    """
    names = "student_scores", "teacher_scores"
    student, teacher = _sides.same_shape(student_scores, teacher_scores, at_least=1, names=names)
    if student.shape[-1] < 2:
        shapes = _checks.described(student_scores=student, teacher_scores=teacher)
        raise ValueError(f"a margin needs two scores, got {shapes}.")
    differences = student - teacher
    return jnp.mean(jnp.square(differences[..., :1] - differences[..., 1:]), axis=-1)


def srd(student: Array, teacher: Array, *, exponent: Scalar = 4.0, floor: Scalar = 1e-12) -> Array:
    """`log sum_d |f_S - f_T|^alpha`: the log-sum distance of "the role of the projector".

    The paper batch-normalizes both sides and projects the student linearly
    (`connectors.batch_norm`, `connectors.linear`). At equality the logarithm is unbounded below, so
    sums below `floor` count as `floor`, with gradient 0. torchdistill sums over the batch before
    the logarithm and doubles the result: `2 logsumexp` of these values.

    Args:
      student: `[B, D]` or `[B, ..., D]`.
      teacher: the same shape.
      exponent: alpha >= 1.
      floor: smallest sum, > 0, in feature units to the power alpha (unitless for batch-normalized
        features).

    Returns:
      `[B]`; not a distance: `log floor` at equality, not 0.

    References:
      Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation,
      2023 (2303.11098).
    """
    student, teacher = _sides.same_shape(student, teacher)
    _checks.within(1, math.inf, exponent=exponent)
    _checks.positive(floor=floor)
    distances = jnp.abs(_numerics.batch_flat(student - teacher))
    powers = distances ** _numerics.scalar(exponent, distances, "exponent")
    return jnp.log(
        jnp.maximum(jnp.sum(powers, axis=-1), _numerics.scalar(floor, distances, "floor"))
    )


def vid(student: Array, teacher: Array, variance: Array) -> Array:
    """`mean 1/2 ((f_T - mu)^2 / v + log v)`: the Gaussian likelihood of variational distillation.

    `mu` is the student's output of `connectors.mlp` (three 1x1 convolutions), and `v` comes from
    `connectors.variance` (softplus + 1e-5, initially 5). The constant `1/2 log 2 pi` is left out,
    as in the authors' code; `.mean()` is RepDistiller's number. PAD is twice this with
    `v = 1e-6 + exp(log_variance)` and `log v` read as `log_variance`.

    Args:
      student: `[B, ..., C]`, the predicted mean.
      teacher: the same shape.
      variance: `[C]`, or the shape of the others; > 0.

    Returns:
      `[B]`, nats; negative where the variance is small and the fit good.

    References:
      Ahn et al., Variational Information Distillation for Knowledge Transfer, 2019 (1904.05835).
    """
    student, teacher = _sides.same_shape(student, teacher)
    _checks.floating(variance=variance)
    _checks.positive(variance=variance)
    variance = jnp.asarray(variance)
    if variance.shape not in (student.shape, student.shape[-1:]):
        raise ValueError(
            f"variance must have one value per channel or the student's shape, got "
            f"{_checks.described(variance=variance, student=student)}."
        )
    v = _numerics.cast(variance, student)
    v = v.reshape((1,) * (student.ndim - v.ndim) + v.shape)
    return 0.5 * _mean(jnp.square(teacher - student) / v + jnp.log(v), None)


def partial_l2(student: Array, teacher: Array, *, margin: Array | None = None) -> Array:
    """`sum (s - t')^2 [s > t' or t > 0]`, with `t' = max(t, margin)`: 0 below a negative response.

    Without margins, `t' = t`: `.mean()` divided by 1000 is mmrazor's `OFDLoss` at its default, and
    the sum over layers is the feature term of "be your own teacher". With margins it is OFD:
    `.mean()` is mdistiller's `feat_loss`; the authors add layers with `1 / 2^(n - i - 1)` and
    weight the sum by .001.

    Args:
      student: `[B, ..., C]`, before the ReLU; for OFD, after a 1x1 convolution and normalization.
      teacher: the same shape, before the ReLU.
      margin: `[C]`, negative, from `ofd_margin` of the teacher's batch normalization.

    Returns:
      `[B]`, squared feature units, summed. Positive at equality where the teacher is below a
      margin.

    References:
      Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019 (1904.01866).
    """
    student, teacher = _sides.same_shape(student, teacher)
    target = teacher
    if margin is not None:
        if jnp.shape(margin) != student.shape[-1:]:
            raise ValueError(
                "margin must have one value per channel, got "
                f"{_checks.described(margin=margin, student=student)}."
            )
        margin = jnp.broadcast_to(_numerics.cast(margin, student), teacher.shape)
        target = jnp.maximum(teacher, margin)
    low = (student <= target) & (teacher <= 0)
    return _sum(jnp.where(low, 0, jnp.square(student - target)))


def activation_boundary(student: Array, teacher: Array, *, margin: Scalar = 1.0) -> Array:
    """`sum (s + m)^2 [s > -m, t <= 0] + (s - m)^2 [s <= m, t > 0]`: activation boundaries (AB).

    A squared hinge that pushes every student neuron to the teacher's side of 0. RepDistiller sums
    layers with `3/1000 * 2^(i - n + 1) * .mean()` and trains the student with it before the task.

    Args:
      student: `[B, ...]`, before the ReLU.
      margin: `m > 0`.

    Returns:
      `[B]`, squared feature units, summed; not 0 at equality, since the student must clear the
      margin.

    References:
      Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons, 2019 (1811.03233).
    """
    student, teacher = _sides.same_shape(student, teacher)
    _checks.positive(margin=margin)
    m = _numerics.scalar(margin, student, "margin")
    short = jnp.where(teacher > 0, m - student, m + student)
    return _sum(_numerics.nan_of(jnp.square(jnp.maximum(short, 0)), teacher))


def ofd_margin(bn_scale: Array, bn_offset: Array) -> Array:
    """`E[x | x < 0]` of a batch-normalized channel `x ~ N(offset, scale^2)`: OFD's margins.

    `offset - |scale| phi(r) / Phi(-r)` with `r = offset / |scale|`, computed in logarithms. If the
    channel is below 0 less than once in a thousand, it is the authors' `-3 |scale|`.

    Args:
      bn_scale: `[C]`, the scale of the teacher's batch normalization before the ReLU.
      bn_offset: `[C]`, its offset.

    Returns:
      `[C]`, <= 0 wherever the scale is not 0.

    References:
      Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019 (1904.01866).
    """
    names = "bn_scale", "bn_offset"
    scale, offset = _sides.same_shape(bn_scale, bn_offset, at_least=1, at_most=1, names=names)
    sigma = jnp.abs(scale)
    flat = sigma == 0  # a constant channel: its conditional mean is its value, or undefined
    ratio = offset / jnp.where(flat, 1, sigma)
    log_below = log_ndtr(-ratio)
    log_density = -0.5 * jnp.square(ratio) - 0.5 * jnp.log(2 * jnp.asarray(jnp.pi, ratio.dtype))
    often = log_below > jnp.log(jnp.asarray(1e-3, ratio.dtype))
    inside = offset - sigma * jnp.exp(jnp.where(often, log_density - log_below, 0))
    return jnp.where(flat, jnp.minimum(offset, 0), jnp.where(often, inside, -3 * sigma))


def _difference(student: Array, teacher: Array, where: Array | None) -> tuple[Array, Array | None]:
    """`student - teacher`, 0 where masked, and the mask in its shape."""
    student, teacher = _sides.same_shape(student, teacher, at_least=1)
    if where is None:
        return student - teacher, None
    rank = jnp.ndim(where)
    _checks.mask(where, student.shape[:rank] if rank else student.shape)
    difference = _numerics.kept(student, where) - _numerics.kept(teacher, where)
    where = where.reshape(where.shape + (1,) * (student.ndim - rank))
    return difference, jnp.broadcast_to(where, student.shape)


def _mean(values: Array, where: Array | None) -> Array:
    flat = None if where is None else _numerics.batch_flat(where)
    return _numerics.masked_mean(_numerics.batch_flat(values), flat, axis=1)


def _sum(x: Array) -> Array:
    return jnp.sum(_numerics.batch_flat(x), axis=-1)
