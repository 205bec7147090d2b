"""Transport between class distributions, with a cost between classes or along sorted probabilities.

Sorted probabilities (universal logit distillation) need no common vocabulary: student and teacher,
`[..., student_vocabulary]` and `[..., teacher_vocabulary]` with other dimensions equal, may differ
in the number and the meaning of their classes. Temperatures are > 0, a scalar or one value per
example. Results are `[...]`, float32 or wider.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def sinkhorn_cost(
    student_logits: Array,
    teacher_logits: Array,
    cost: Array,
    *,
    temperature: Scalar = 1.0,
    regularization: Scalar = 0.05,
    iterations: int = 10,
    eps: Scalar = 0.0,
) -> Array:
    """`sum_ij F_ij cost_ij` of the entropic transport plan F from student to teacher.

    Moving mass to a related class may cost less than to a distant one. The plan comes from
    alternating scalings of `exp(-cost / regularization)`, all in log space, so no kernel entry
    underflows even for a small regularization. The gradient flows through the iterations, which are
    recomputed in the backward pass. Classes with a logit of -inf take no part.

    WKD-L is `target_cross_entropy` plus this cost of the `non_target_logits`, weighted by 25 or 30
    at temperature 2 (ImageNet) or 600 at temperature 8 (ResNet-32x4 to 8x4 on CIFAR-100). Its cost
    matrix is `1 - exp(-kappa (1 - similarity))` of the teacher's class weights or features.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      cost: `[num_classes, num_classes]`, >= 0; `cost[i, j]` moves student class i to
        teacher class j.
      regularization: weight of the entropy, > 0.
      iterations: number of pairs of scalings.
      eps: added to the denominators of the scalings; 1e-8 in the authors' code, unnecessary here.

    Returns:
      `[...]`, units of the cost; with finite regularization, not zero at equality.

    References:
      Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013 (1306.0895).
      Lv, Yang and Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
      Distillation, 2024 (2412.08139), whose number it gives with cost `relu(M) + 1e-8` and
      `eps=1e-8`.
    """
    _checks.floating(cost=cost)
    _checks.positive(regularization=regularization)
    _checks.non_negative(eps=eps)
    _checks.count(1, iterations=iterations)
    logits = _logspace.soften(student_logits, teacher_logits, temperature)
    log_a, log_b = (_softmax.log_softmax(z) for z in logits)
    classes = log_a.shape[-1]
    if jnp.shape(cost) != (classes, classes):
        raise ValueError(
            f"cost must be [{classes}, {classes}] for "
            f"{_checks.described(student_logits=student_logits, cost=cost)}."
        )
    cost = cost.astype(log_a.dtype)
    cost = cost.reshape((1,) * (log_a.ndim - 1) + cost.shape)
    log_kernel = -cost / _numerics.scalar(regularization, cost, "regularization")
    floor = _numerics.scalar(eps, cost, "eps")
    floor = jnp.where(floor > 0, jnp.log(jnp.where(floor > 0, floor, 1)), -jnp.inf)

    def scaled(log_mass: Array, log_other: Array, axis: int) -> Array:
        """`log(mass / (kernel @ other + eps))`, -inf where there is no mass."""
        others = jnp.expand_dims(log_other, -1 if axis == -2 else -2)
        reached = _logspace.logsumexp(_plus(log_kernel, others), axis=axis)
        reached = _logspace.logsumexp(
            jnp.stack([reached, jnp.broadcast_to(floor, reached.shape)], axis=-1)
        )
        inside = (log_mass != -jnp.inf) & (reached != -jnp.inf)
        return jnp.where(
            inside, jnp.where(inside, log_mass, 0) - jnp.where(inside, reached, 0), -jnp.inf
        )

    @jax.checkpoint
    def iterate(log_u: Array, _: None) -> tuple[Array, Array]:
        log_v = scaled(log_b, log_u, -2)
        return scaled(log_a, log_v, -1), log_v

    present = log_a != -jnp.inf
    count = jnp.sum(present, axis=-1, keepdims=True, dtype=log_a.dtype)
    log_u = jnp.where(present, -jnp.log(jnp.maximum(count, 1)), -jnp.inf)
    log_u, log_vs = jax.lax.scan(iterate, log_u, length=iterations)
    plan = _plus(_plus(log_kernel, log_u[..., :, None]), log_vs[-1][..., None, :])
    return jnp.sum(jnp.exp(plan) * cost, axis=(-2, -1))


def uld(
    student_logits: Array,
    teacher_logits: Array,
    *,
    student_temperature: Scalar = 1.0,
    teacher_temperature: Scalar = 1.0,
) -> Array:
    """`sum_r |p_S(r) - p_T(r)|` of descending sorted probabilities, the shorter padded with 0.

    The Wasserstein distance when moving mass between any two classes costs the same.

    Args:
      student_logits: `[..., student_vocabulary]`.
      teacher_logits: `[..., teacher_vocabulary]`, other dimensions equal.
      student_temperature: a scalar or one value per example.
      teacher_temperature: a scalar or one value per example.

    Returns:
      `[...]`, in [0, 2].

    References:
      Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
      for LLMs, 2024 (2402.12030).
    """
    return sorted_l1(
        *_probabilities(student_logits, teacher_logits, student_temperature, teacher_temperature)
    )


def uld_w1(
    student_logits: Array,
    teacher_logits: Array,
    *,
    student_temperature: Scalar = 1.0,
    teacher_temperature: Scalar = 1.0,
) -> Array:
    """`sum_r |F_S(r) - F_T(r)|`, F the cumulative sums of the sorted probabilities.

    The Wasserstein-1 distance along ranks: moving mass by one rank costs 1, so mass deep in the
    tail counts for more than in `uld`.

    Args:
      student_logits: `[..., student_vocabulary]`.
      teacher_logits: `[..., teacher_vocabulary]`, other dimensions equal.
      student_temperature: a scalar or one value per example.
      teacher_temperature: a scalar or one value per example.

    Returns:
      `[...]`, in ranks.

    References:
      Boizard et al., 2024 (2402.12030), with ranks as the ground distance.
    """
    student, teacher = _probabilities(
        student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return jnp.sum(jnp.abs(jnp.cumsum(_sorted_gaps(student, teacher), axis=-1)), axis=-1)


def sorted_l1(student_probs: Array, teacher_probs: Array) -> Array:
    """`sum_r |s(r) - t(r)|` of descending sorted non-negative vectors, the shorter padded with 0.

    Args:
      student_probs: `[..., student_vocabulary]`; need not sum to 1 (merged tokens do not).
      teacher_probs: `[..., teacher_vocabulary]`, other dimensions equal.

    Returns:
      `[...]`.
    """
    student, teacher = _checked(student_probs=student_probs, teacher_probs=teacher_probs)
    return jnp.sum(jnp.abs(_sorted_gaps(student, teacher)), axis=-1)


def _plus(x: Array, y: Array) -> Array:
    """`x + y` broadcast over equal ranks; -inf, with gradient 0, where either is."""
    finite = (x != -jnp.inf) & (y != -jnp.inf)
    return jnp.where(
        finite, jnp.where(x != -jnp.inf, x, 0) + jnp.where(y != -jnp.inf, y, 0), -jnp.inf
    )


def _checked(**sides: Array) -> tuple[Array, Array]:
    """The student and the teacher under their arguments' names, float32 or wider."""
    _checks.floating(**sides)
    _checks.rank(1, None, **sides)
    _checks.nonempty(**sides)
    student, teacher = sides.values()
    if jnp.shape(student)[:-1] != jnp.shape(teacher)[:-1]:
        raise ValueError(
            f"all dimensions but the vocabulary must be equal, got {_checks.described(**sides)}. "
            "Align the positions first (answers_first, align_tokens)."
        )
    return _numerics.upcast(student), _numerics.upcast(teacher)


def _probabilities(
    student_logits: Array,
    teacher_logits: Array,
    student_temperature: Scalar,
    teacher_temperature: Scalar,
) -> tuple[Array, Array]:
    student, teacher = _checked(student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.several_classes(student_logits=student, teacher_logits=teacher)
    temperatures = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
    }
    _checks.positive(**temperatures)
    _checks.per_example(student.shape[:-1], **temperatures)
    student = student / _numerics.per_example(student_temperature, student, "student_temperature")
    teacher = teacher / _numerics.per_example(teacher_temperature, teacher, "teacher_temperature")
    return _softmax.softmax(student), _softmax.softmax(teacher)


def _sorted_gaps(student: Array, teacher: Array) -> Array:
    student = jnp.sort(student, axis=-1, descending=True)
    teacher = jnp.sort(teacher, axis=-1, descending=True)
    size = max(student.shape[-1], teacher.shape[-1])

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])

    return padded(student) - padded(teacher)
