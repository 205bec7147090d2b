"""Divergences for the student's own text, with the teacher's whole distribution or part of it.

As in `forward_kl`: logits `[..., num_classes]` of one shape, temperatures > 0 that soften both
sides, a scalar or one value per example; results `[...]`, in nats, float32 or wider; TypeError for
anything but real floating point, ValueError for what does not fit.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _divergences, _logspace, _topk


def student_top_k_reverse_kl(
    student_logits: Array, teacher_logits: Array, *, k: int, temperature: Scalar = 1.0
) -> Array:
    """`KL(p_S || p_T)` over the *student's* k most likely classes and one tail bucket.

    The student's classes are where the reverse KL has its mass; a teacher's own k may miss them.
    Zero at equality, never negative, at most the reverse KL, whose gradient it does not have: over
    the tail's classes it moves their sum alone. A teacher elsewhere is asked for its
    log-probabilities at `top_k_targets(student_logits, k=k).indices`; with its answer it is
    `reverse_kl(*top_k_buckets(student_logits, stored_top_k(indices, log_probs)))`. k is static, at
    least 1 and at most the number of classes. `[..., num_classes]` logits, `[...]` nats.

    References:
      SDPO (2601.20802) and SDFT (2601.19897) with `alpha=1`, their tails included.
    """
    student, _ = _logspace.softened(student_logits, teacher_logits, temperature)
    indices = jax.lax.stop_gradient(_topk.top_k_targets(student, k=k).indices)
    targets = _topk.top_k_at(teacher_logits, indices, temperature=temperature)
    buckets = _topk.top_k_buckets(student_logits, targets, temperature=temperature)
    return _divergences.reverse_kl(*buckets)


def entropy_aware_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    threshold: Scalar = 0.8,
    weight: Scalar = 1.0,
    k: int | None = None,
    temperature: Scalar = 1.0,
) -> Array:
    """`KL(p_S || p_T)`, plus `weight KL(p_T || p_S)` where the teacher is unsure.

    Unsure is an entropy above `threshold`. Reverse KL alone picks one of the teacher's
    continuations; where the teacher sees several, the forward KL keeps them.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      threshold: of the teacher's entropy, nats; a scalar or one value per example.
      weight: >= 0, of the forward part.
      k: takes the forward part over the teacher's k most likely classes, renormalized
        (`top_k_kl_teacher_renormalized`; then not 0 at equality); None takes them all.
      temperature: softens both.

    References:
      Entropy-aware on-policy distillation, 2026 (2603.07079), equations 9 and 10, the reverse part
      exact where the paper samples it.
    """
    _checks.non_negative(weight=weight)
    reverse = _divergences.reverse_kl(student_logits, teacher_logits, temperature=temperature)
    if k is None:
        forward = _divergences.forward_kl(student_logits, teacher_logits, temperature=temperature)
    else:
        targets = _topk.top_k_targets(teacher_logits, k=k, temperature=temperature)
        forward = _topk.top_k_kl_teacher_renormalized(
            student_logits, targets, temperature=temperature
        )
    entropy = _divergences.soft_cross_entropy(
        teacher_logits, teacher_logits, temperature=temperature
    )
    _checks.per_example(entropy.shape, threshold=threshold, weight=weight)
    unsure = jax.lax.stop_gradient(entropy) > _numerics.per_example(threshold, entropy)
    return reverse + _numerics.per_example(weight, forward) * jnp.where(unsure, forward, 0)


def top_k_overlap(student_logits: Array, targets: _topk.TopK) -> Array:
    """How many of the teacher's k classes are among the student's own k: int `[...]`, 0 to k.

    With the masses of both on the teacher's classes (`top_k_buckets`), what on-policy runs watch.

    References:
      verl's diagnostics (2604.13016).
    """
    return jnp.sum(in_student_top_k(student_logits, targets), axis=-1, dtype=jnp.int32)


def in_student_top_k(student_logits: Array, targets: _topk.TopK) -> Array:
    """Which of the teacher's k classes are among the student's own k: bool `[..., k]`."""
    own = _topk.top_k_targets(student_logits, k=jnp.shape(targets.indices)[-1]).indices
    return jnp.any(targets.indices[..., :, None] == own[..., None, :], axis=-1)
