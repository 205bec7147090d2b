"""Contrastive losses: an example's student must recognize that example's teacher among others.

The others are the rest of the batch, a memory bank or a queue; the last two are values of
`kdtl_jax.memory` that the step carries.
"""

import math

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def crd(log_scores: Array, *, num_data: int, eps: float = 1e-7) -> Array:
    """`-log x_0 / (x_0 + P + eps) - sum_j log P / (x_j + P + eps)`, `P = K / n`: CRD.

    Noise-contrastive estimation with K uniform negatives out of n rows, `x = exp(v . m / T) / Z`.
    Column 0 is the positive. CRD adds two such sides, the student's embedding against the bank of
    teacher embeddings and the reverse; the sum of the two `.mean()`s is RepDistiller's number
    (weight .8). Computed from log scores, so that no score overflows.

    Args:
      log_scores: `[B, 1 + K]`, `log x` from `memory.bank_scores`.
      num_data: n, rows of the bank.
      eps: the published guard.

    Returns:
      `[B]`, nats, at least 0; never exactly 0.

    Raises:
      ValueError: if there is no negative, or `num_data` is not positive.
      TypeError: if the scores are not floating point.

    References:
      Tian, Krishnan and Isola, Contrastive Representation Distillation, 2020 (1910.10699).
    """
    log_scores = _door.one("crd", log_scores, at_least=2, at_most=2)
    _checks.positive(num_data=num_data)
    negatives = log_scores.shape[1] - 1
    if negatives < 1:
        raise ValueError(
            "log_scores needs the positive and at least one negative per row, got "
            f"{_checks.described(log_scores=log_scores)}."
        )
    noise = negatives / num_data
    log_guarded = jnp.log(jnp.asarray(noise + eps, log_scores.dtype))
    over = log_scores - log_guarded
    # log(x + P + eps), short of log(P + eps): a softplus.
    both = jnp.maximum(over, 0) + jnp.log1p(jnp.exp(-jnp.abs(over)))
    guard = negatives * math.log1p(eps / noise)  # published with eps on one side only
    return jnp.sum(both, axis=-1) - over[:, 0] + guard


def info_nce(student: Array, teacher: Array, *, temperature: Scalar = 0.07) -> Array:
    """`-log softmax_j(cos(s_i, t_j) / T)_i`: the rest of the batch are the negatives.

    `.mean()` is the contrastive part of DCD (whose `1 / T` is learned, `min(exp(tau), 10)`).

    Args:
      student: `[B, ...]`, embedded; flattened per example and normalized here.
      teacher: the same shape.
      temperature: T > 0, possibly learned.

    Returns:
      `[B]`, nats, at least 0; 0 for a batch of one.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if an array is not floating point.

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018;
      Giakoumoglou and Stathaki, 2024 (2407.11802).
    """
    logits = _similarities("info_nce", student, teacher, temperature)
    return -jnp.diagonal(_numerics.log_softmax(logits))


def dcd_invariance(student: Array, teacher: Array, *, temperature: Scalar = 0.07) -> Array:
    """`KL(softmax_k(A_ki)_j || softmax_k(A_ik)_j)`, A the similarities of `info_nce`: DCD.

    How the teacher of example i sees the students, against how its student sees the teachers; both
    sides are differentiated. DCD is `info_nce + .5 dcd_invariance`.

    Args:
      student: `[B, ...]`, embedded; flattened per example and normalized here.
      teacher: the same shape.
      temperature: T > 0, possibly learned.

    Returns:
      `[B]`, nats, at least 0.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if an array is not floating point.

    References:
      Giakoumoglou and Stathaki, Discriminative and Consistent Representation Distillation, 2024
      (2407.11802).
    """
    logits = _similarities("dcd_invariance", student, teacher, temperature)
    return _numerics.kl_from_logits(logits.T, logits)


def _similarities(fn: str, student: Array, teacher: Array, temperature: Scalar) -> Array:
    _checks.positive(temperature=temperature)
    sides = _door.same_shape(fn, student, teacher)
    s, t = (_numerics.unit(_numerics.batch_flat(side)) for side in sides)
    return _numerics.gram(s, t) / _numerics.scalar(temperature, s)


def rrd(
    student: Array,
    teacher: Array,
    *,
    queue: Array,
    student_temperature: Scalar = 0.1,
    teacher_temperature: Scalar = 0.02,
) -> Array:
    """`KL(softmax(Q t / T_T) || softmax(Q s / T_S))` over a queue of teacher embeddings: RRD.

    The authors write the cross-entropy: add the teacher's entropy to get their number. Their code
    pushes the current batch before it compares (`memory.queue_push`).

    Args:
      student: `[B, D]`, embedded; normalized here.
      teacher: the same shape.
      queue: `[K, D]`, unit rows, `memory.Queue.rows`.
      student_temperature: T_S > 0.
      teacher_temperature: T_T > 0, smaller: a sharper target.

    Returns:
      `[B]`, nats, at least 0.

    Raises:
      ValueError: if shapes differ or are empty, or a temperature is not positive.
      TypeError: if an array is not floating point.

    References:
      Giakoumoglou and Stathaki, Relational Representation Distillation, 2024 (2407.12073).
    """
    _checks.positive(
        student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    student, teacher = _door.same_shape("rrd", student, teacher, at_most=2)
    if jnp.ndim(queue) != 2 or jnp.shape(queue)[1:] != student.shape[1:]:
        raise ValueError(
            "queue must have shape [K, D] with the embeddings' D, got "
            f"{_checks.described(queue=queue, student=student)}."
        )
    rows = _numerics.scalar(queue, student)
    toward_s = _numerics.gram(_numerics.unit(student), rows)
    toward_t = _numerics.gram(_numerics.unit(teacher), rows)
    toward_s = toward_s / _numerics.scalar(student_temperature, student)
    return _numerics.kl_from_logits(
        toward_t / _numerics.scalar(teacher_temperature, student), toward_s
    )
