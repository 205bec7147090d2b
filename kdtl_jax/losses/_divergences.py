"""Divergences between class distributions given by logits, and the losses on them: KD's family.

What all functions here share:

- `student_logits` and `teacher_logits` are `[..., num_classes]`, of one shape, at least two
  classes.
- `temperature > 0` softens both sides (`p = softmax(z / T)`); it and every other hyper-parameter is
  a scalar or one value per example.
- `where`, bool of the logits' shape, marks the classes that count; logits of -inf never count.
- The result is `[...]`, in nats, float32 or wider, without `T^2` unless the equation shows it.

KLs are sums of non-negative terms: they are never negative, and stay relatively accurate when the
two sides are close. Log-probabilities are logits too, so stored ones or the buckets of
`top_k_buckets` can be compared directly. The Jensen-Shannon family follows below.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def forward_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_T || p_S) = sum_c p_T log(p_T / p_S)` of softened distributions.

    Takes `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      Kullback and Leibler, On information and sufficiency, 1951. TRL's `GKDTrainer` gives this at
      beta=0; DistiLLM's `forward_kl` is the cross-entropy form (`soft_cross_entropy`).
    """
    student, teacher = _logspace.soften(student_logits, teacher_logits, temperature, where)
    difference = _logspace.softened_difference(teacher_logits, student_logits, temperature)
    return _softmax.kl_from_logits(teacher, student, where=where, difference=difference)


def kd_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 4.0,
    where: Array | None = None,
) -> Array:
    """Hinton's distillation loss `T^2 KL(softmax(z_T / T) || softmax(z_S / T))`.

    The `T^2` keeps the scale of the gradient as the temperature grows. `.mean()` gives
    RepDistiller's and mdistiller's number (sum over classes, mean over the batch); divide by
    `num_classes` for Model-Optimizer's default, or by `T^2` for TRL's and Liger's convention. Takes
    `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015 (1503.02531).
    """
    kl = forward_kl(student_logits, teacher_logits, temperature=temperature, where=where)
    return jnp.square(_numerics.per_example(temperature, kl, "temperature")) * kl


def binary_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    class_weights: Array | None = None,
    where: Array | None = None,
) -> Array:
    """`T^2 sum_k w_k KL(Bernoulli(sigmoid(z_T / T)) || Bernoulli(sigmoid(z_S / T)))`.

    The distillation loss for heads whose outputs are not mutually exclusive: a binary head with one
    logit, or one logit per label. Divide by the number of labels to get the mean over labels.

    Args:
      student_logits: `[..., num_labels]`, at least `[B, 1]`; one label is fine.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.
      class_weights: `[num_labels]`, >= 0: a weight per label, 1 by default; 0 leaves a label out.
      where: bool, the logits' shape; marks the labels that are known.

    Returns:
      `[...]`, nats times `T^2`.

    References:
      Yang et al., Multi-Label Knowledge Distillation, 2023 (2308.06453), its multi-label logits
      distillation.
    """
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    _checks.floating(**logits)
    _checks.same_shape(**logits)
    _checks.rank(2, student_logits=student_logits)
    _checks.nonempty(student_logits=student_logits)
    _checks.positive(temperature=temperature)
    _checks.per_example(jnp.shape(student_logits)[:-1], temperature=temperature)
    shape = jnp.shape(student_logits)
    _checks.mask(where, shape)
    if class_weights is not None:
        _checks.floating(class_weights=class_weights)
        _checks.non_negative(class_weights=class_weights)
        if jnp.shape(class_weights) != shape[-1:]:
            shapes = _checks.described(class_weights=class_weights, student_logits=student_logits)
            raise ValueError(f"class_weights must be [num_labels], got {shapes}.")
        # Left out beforehand: 0 times an infinite divergence is NaN.
        where = jnp.broadcast_to(jnp.asarray(class_weights) != 0, shape) & (where is None or where)
    student, teacher = (_numerics.kept(_numerics.upcast(z), where) for z in logits.values())
    t = _numerics.per_example(temperature, student, "temperature")
    student, teacher, difference = (
        jnp.stack([z / t, jnp.zeros_like(z)], axis=-1)
        for z in (student, teacher, _softmax.masked_difference(teacher, student))
    )
    kl = _softmax.kl_from_logits(teacher, student, difference=difference)
    if class_weights is not None:
        kl *= _numerics.cast(class_weights, kl).reshape((1,) * (kl.ndim - 1) + (-1,))
    total = jnp.sum(kl, axis=-1)  # a masked label has the logits 0 and 0
    return jnp.square(_numerics.per_example(temperature, total, "temperature")) * total


def soft_cross_entropy(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`-sum_c p_T log p_S`: the cross-entropy form, `forward_kl` plus the teacher's entropy.

    Its gradient is that of the KL, but it is not zero at equality. `.mean()` gives TextBrewer's
    `kd_ce_loss`; divide by `num_classes` for TinyBERT's prediction loss. With the teacher on both
    sides, it is the teacher's entropy. Takes `[..., num_classes]` logits and `where` of their
    shape; returns `[...]`, in nats.

    References:
      Hinton, Vinyals and Dean, 2015 (1503.02531).
    """
    student, teacher = _logspace.soften(student_logits, teacher_logits, temperature, where)
    if where is not None:
        teacher = jnp.where(where, teacher, -jnp.inf)
    log_q = _softmax.log_softmax(student, where=where)
    return _logspace.minus_mean_log(_softmax.softmax(teacher), teacher != -jnp.inf, log_q)


def hard_kd(
    student_logits: Array, teacher_logits: Array, *, label_smoothing: Scalar = 0.0
) -> Array:
    """Cross-entropy with the teacher's decision: `-log p_S(argmax z_T)`.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      label_smoothing: share of the target spread over all classes, in [0, 1].

    Returns:
      `[...]`, nats. Not zero at equality.

    References:
      Touvron et al., Training data-efficient image transformers & distillation through attention,
      2021 (2012.12877).
    """
    _checks.within(0, 1, label_smoothing=label_smoothing)
    student, teacher = _logspace.soften(
        student_logits, teacher_logits, label_smoothing=label_smoothing
    )
    log_p = _softmax.log_softmax(student)
    hard = -_logspace.at_label(log_p, jnp.argmax(teacher, axis=-1))
    hard = _numerics.nan_of(hard, jnp.max(teacher, axis=-1))
    concrete = _checks.concrete(label_smoothing)
    if concrete is not None and not concrete.any():
        return hard
    smoothing = _numerics.per_example(label_smoothing, hard, "label_smoothing")
    return (1 - smoothing) * hard - smoothing * _logspace.mean_log(log_p)


def ttm(student_logits: Array, teacher_logits: Array, *, gamma: Scalar = 0.1) -> Array:
    """Transformed teacher matching: `KL(softmax(gamma z_T) || softmax(z_S))`.

    Only the teacher is softened (`gamma = 1 / T > 0`): the normalized `p^gamma` is
    `softmax(gamma z)`, which does not underflow. Not zero at equality unless gamma is 1. `.mean()`
    is the authors' number. Takes `[..., num_classes]` logits; returns `[...]`, in nats.

    References:
      Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, 2024
      (2402.11148).
    """
    _checks.positive(gamma=gamma)
    student, teacher = _logspace.soften(student_logits, teacher_logits, gamma=gamma)
    power = _numerics.per_example(gamma, teacher, "gamma")
    return _softmax.kl_from_logits(power * teacher, student)


def wttm(student_logits: Array, teacher_logits: Array, *, gamma: Scalar = 0.2) -> Array:
    """Weighted TTM: `(sum_c p_T^gamma) KL(softmax(gamma z_T) || softmax(z_S))`, gamma > 0.

    For gamma < 1 the weight, up to `num_classes^(1 - gamma)`, grows with the teacher's smoothness.
    Takes `[..., num_classes]` logits; returns `[...]`, in nats.

    References:
      Zheng and Yang, 2024 (2402.11148). `.mean()` is the authors' number.
    """
    kl = ttm(student_logits, teacher_logits, gamma=gamma)
    log_p = _softmax.log_softmax(teacher_logits)
    in_p = log_p != -jnp.inf
    power = jnp.where(in_p, log_p, 0) * _numerics.per_example(gamma, log_p, "gamma")
    return jnp.exp(_logspace.logsumexp(power, where=in_p)) * kl


def reverse_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_S || p_T)`: mode-seeking, the divergence of on-policy distillation.

    Takes `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023 (2306.08543).
    """
    student, teacher = _logspace.soften(student_logits, teacher_logits, temperature, where)
    difference = _logspace.softened_difference(student_logits, teacher_logits, temperature)
    return _softmax.kl_from_logits(student, teacher, where=where, difference=difference)


def symmetric_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    weight: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`(1 - weight) KL(p_T || p_S) + weight KL(p_S || p_T)`, with the weight in [0, 1].

    Twice this at `weight=0.5` is Jeffreys' divergence. DistiLLM's `symmetric_kl` uses weight 0.9
    and leaves the teacher's entropy in: add `(1 - weight)` times
    `soft_cross_entropy(teacher, teacher)`. Adaptive KL uses `adaptive_kl_weight` as the weight.
    Takes `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      Jeffreys, An invariant form for the prior probability in estimation problems, 1946.
    """
    _checks.within(0, 1, weight=weight)
    log_s, log_t, ratio = _logspace.compare(
        student_logits, teacher_logits, temperature, where, weight=weight
    )
    forward = jnp.sum(_softmax.kl_terms(log_t, log_s, ratio), axis=-1)
    reverse = jnp.sum(_softmax.kl_terms(log_s, log_t, -ratio), axis=-1)
    share = _numerics.per_example(weight, forward, "weight")
    return (1 - share) * forward + share * reverse


def skew_forward_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_T || alpha p_T + (1 - alpha) p_S)`: bounded by `-log alpha`.

    alpha, in [0, 1], is the teacher's share of the mixture; 0 is the forward KL. DistiLLM's
    `skewed_forward_kl` is the cross-entropy form: add `soft_cross_entropy(teacher, teacher)`, a
    constant. Takes `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in
    nats.

    References:
      Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024
      (2402.03898).
    """
    _checks.within(0, 1, alpha=alpha)
    log_s, log_t, ratio = _logspace.compare(
        student_logits, teacher_logits, temperature, where, alpha=alpha
    )
    student_share = 1 - _numerics.per_example(alpha, log_t, "alpha")
    return _logspace.kl_to_mixture(log_t, log_s, ratio, student_share)


def skew_reverse_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_S || (1 - alpha) p_T + alpha p_S)`: bounded by `-log alpha`.

    alpha, in [0, 1], is the student's share of the mixture; 0 is the reverse KL. Takes
    `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      Ko et al., DistiLLM, 2024 (2402.03898). DistiLLM's `skewed_reverse_kl` is this number.
    """
    _checks.within(0, 1, alpha=alpha)
    log_s, log_t, ratio = _logspace.compare(
        student_logits, teacher_logits, temperature, where, alpha=alpha
    )
    teacher_share = 1 - _numerics.per_example(alpha, log_s, "alpha")
    return _logspace.kl_to_mixture(log_s, log_t, -ratio, teacher_share)


def total_variation(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`1/2 sum_c |p_S - p_T|`, a probability.

    It needs no `T^2`, since its gradient does not fall as `1/T^2`; DistillKit multiplies by it.

    Args:
      student_logits, teacher_logits: `[..., num_classes]`; `where` the same, bool.
      temperature: softens both sides, > 0.

    Returns:
      `[...]`, in [0, 1].

    References:
      Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, 2023
      (2307.15190). DistiLLM's `tv_distance` is this number.
    """
    pair = _logspace.compare(student_logits, teacher_logits, temperature, where)
    return jnp.sum(_absolute_gaps(pair), axis=-1) / 2


def adaptive_kl_weight(
    student_logits: Array,
    teacher_logits: Array,
    *,
    mu: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """The share of the reverse KL in adaptive KL: the teacher-tail gap divided by the whole gap.

    Forward KL learns the teacher's head first, reverse KL its tail; each is weighted by how much is
    left to learn there. The head is the most likely class and those within the teacher's first `mu`
    of mass, in [0, 1]; the gap is `sum |p_T - p_S|`. At equality, where both gaps vanish, it is one
    half.

    Returns:
      `[...]`, in [0, 1]: a `weight` for `symmetric_kl`. The method takes it as a constant
      (`jax.lax.stop_gradient`).

    References:
      Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
      Models, 2024 (2404.02657); the mean of `symmetric_kl` with it is LLM_KD_AKL's number. DSKD
      sorts in ascending order, so its "head" is the tail.
    """
    _checks.within(0, 1, mu=mu)
    pair = _logspace.compare(student_logits, teacher_logits, temperature, where, mu=mu)
    order = jnp.argsort(pair.log_teacher, axis=-1, descending=True)
    mass = jnp.take_along_axis(jnp.exp(pair.log_teacher), order, axis=-1)
    gap = jnp.take_along_axis(_absolute_gaps(pair), order, axis=-1)
    first = jax.lax.broadcasted_iota(jnp.int32, mass.shape, mass.ndim - 1) == 0
    head = first | (jnp.cumsum(mass, axis=-1) <= _numerics.per_example(mu, mass, "mu"))
    total = jnp.sum(gap, axis=-1)
    has_gap = total != 0
    tail = jnp.sum(jnp.where(head, 0, gap), axis=-1)
    return jnp.where(has_gap, tail / jnp.where(has_gap, total, 1), 0.5)


def _absolute_gaps(pair: _logspace.LogPair) -> Array:
    """`|p_T - p_S|`, relatively accurate even where the two nearly agree."""
    p_t, p_s = jnp.exp(pair.log_teacher), jnp.exp(pair.log_student)
    is_near = (p_t > 0) & (p_s > 0) & (jnp.abs(pair.ratio) < 1)
    near_value = p_s * jnp.expm1(jnp.where(is_near, pair.ratio, 0))
    return jnp.abs(jnp.where(is_near, near_value, p_t - p_s))
