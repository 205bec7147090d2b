"""Divergences on the student's own text, given all or part of the teacher's distribution.

As in `forward_kl`, logits are `[..., num_classes]` of one shape; temperatures > 0 soften both sides
and are a scalar or one value per example; results are `[...]`, in nats, float32 or wider.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _divergences, _logspace, _sampled, _topk


def student_top_k_reverse_kl(
    student_logits: Array, teacher_logits: Array, *, k: int, temperature: Scalar = 1.0
) -> Array:
    """`KL(p_S || p_T)` over the *student's* k most likely classes and one tail bucket.

    The reverse KL has its mass on the student's classes; a teacher's own k may miss them. The loss
    is zero at equality, never negative and at most the reverse KL. Its gradient differs from that
    of the reverse KL: it moves only the sum over the tail's classes. Ask a remote teacher for its
    log-probabilities at `top_k_targets(student_logits, k=k).indices`; the loss is then
    `reverse_kl(*top_k_buckets(student_logits, stored_top_k(indices, log_probs)))`. k is static, at
    least 1 and at most the number of classes. `top_k_reverse_kl_sampled_tail` has no such bias.
    Takes `[..., num_classes]` logits; returns `[...]`, in nats.

    References:
      Hübotter et al., Reinforcement Learning via Self-Distillation (SDPO), 2026 (2601.20802), and
      Shenfeld et al., Self-Distillation Enables Continual Learning (SDFT), 2026 (2601.19897), in
      TRL with `distillation_alpha=1` and `distillation_add_tail=True`.
    """
    student, _ = _logspace.soften(student_logits, teacher_logits, temperature)
    indices = jax.lax.stop_gradient(_topk.top_k_targets(student, k=k).indices)
    targets = _topk.top_k_at(teacher_logits, indices, temperature=temperature)
    buckets = _topk.top_k_buckets(student_logits, targets, temperature=temperature)
    return _divergences.reverse_kl(*buckets)


def top_k_reverse_kl_sampled_tail(
    student_logits: Array,
    targets: _topk.TopK,
    tokens: Array,
    teacher_log_probs: Array,
    sampler_log_probs: Array,
    *,
    where: Array | None = None,
) -> Array:
    """`sum_{v in K} p_S(v) sg[g_v]`, plus `rho sg[g_y]` if the drawn token y is outside K.

    Here `g = log p_S - log p_T` and `rho = p_S / p_sampler`, bounded at `exp(20)`. On average over
    tokens from the sampler, value and gradient are those of the reverse KL for any K: the sample
    covers what the sum does not. With the student's most likely classes as K, the variance is lower
    than that of `sampled_reverse_kl`; `student_top_k_reverse_kl` has no variance but is biased. A
    remote teacher only needs to return its log-probabilities at K and at the token.

    Args:
      targets: the teacher on K, e.g. `stored_top_k(ids, answer)` with
        `ids = top_k_targets(student_logits, k=k).indices`; its tail is not used.
      tokens: int `[...]`, drawn by the sampler.
      teacher_log_probs: `[...]`, of the tokens.
      sampler_log_probs: `[...]`, of the tokens, at the time they were drawn.
      where: bool `[...]`, positions that count; the others may hold anything, and give 0.

    Returns:
      `[...]`, nats, of either sign; +inf, with the gradient of the finite terms, where the student
      gives probability to a class that the teacher excludes.
    """
    _checks.floating(teacher_log_probs=teacher_log_probs, sampler_log_probs=sampler_log_probs)
    _checks.labels(tokens, student_logits, where)
    of_tokens = {"teacher_log_probs": teacher_log_probs, "sampler_log_probs": sampler_log_probs}
    _checks.same_shape(tokens=tokens, **of_tokens)
    safe_targets = _topk.TopK(*(_numerics.kept(x, where) for x in targets))
    log_s, safe_targets, has_targets = _topk.check_targets(
        _numerics.kept(student_logits, where), safe_targets, 1.0
    )
    tokens, usable = _numerics.usable_labels(tokens, log_s.shape[-1], where)
    teacher, sampler = (_numerics.kept(_numerics.upcast(x), where) for x in of_tokens.values())
    log_s_on_k = jnp.take_along_axis(log_s, safe_targets.indices, axis=-1)
    log_s_on_token = _logspace.at_label(log_s, tokens)
    gap, is_infinite = _gap(log_s_on_k, _numerics.upcast(safe_targets.log_probs))
    token_gap, is_token_infinite = _gap(log_s_on_token, teacher)
    # The two may have different widths; both are in range.
    is_token = safe_targets.indices.astype(jnp.int32) == tokens.astype(jnp.int32)[..., None]
    is_outside = ~jnp.any(is_token, axis=-1)
    sampled_inputs = (x[..., None] for x in (log_s_on_token, -token_gap, sampler))
    sampled_loss = jnp.squeeze(_sampled.policy_gradient(*sampled_inputs), axis=-1)
    value = jnp.sum(jnp.exp(log_s_on_k) * gap, axis=-1)
    value += jnp.where(is_outside, sampled_loss, 0)
    is_infinite = jnp.any(is_infinite, axis=-1) | (is_outside & is_token_infinite)
    value = jnp.where(is_infinite, jax.lax.stop_gradient(value) + jnp.inf, value)
    return _numerics.at_usable(value, usable & has_targets, where)


def entropy_aware_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    threshold: Scalar = 0.8,
    weight: Scalar = 1.0,
    k: int | None = None,
    temperature: Scalar = 1.0,
) -> Array:
    """`KL(p_S || p_T)`, plus `weight KL(p_T || p_S)` where the teacher is uncertain.

    Uncertain means that its entropy is above `threshold`. The reverse KL alone picks one of the
    teacher's continuations; where the teacher allows more than one, the forward KL keeps them all.
    Takes `[..., num_classes]` logits; returns `[...]`, in nats.

    Args:
      threshold: >= 0, of the teacher's entropy, nats; a scalar or one value per example.
      weight: >= 0, of the forward part.
      k: computes the forward part over the teacher's k most likely classes, renormalized
        (`top_k_kl_teacher_renormalized`; then not 0 at equality); None uses all classes.

    References:
      Jin et al., Entropy-Aware On-Policy Distillation of Language Models, 2026 (2603.07079). The
      reverse part is exact here; the paper samples it.
    """
    _checks.non_negative(weight=weight, threshold=threshold)
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
    unsure = jax.lax.stop_gradient(entropy) > _numerics.per_example(threshold, entropy, "threshold")
    return reverse + _numerics.per_example(weight, forward, "weight") * jnp.where(
        unsure, forward, 0
    )


def top_k_overlap(student_logits: Array, targets: _topk.TopK) -> Array:
    """How many of the teacher's k classes are among the student's own k: int `[...]`, 0 to k.

    A diagnostic of on-policy runs, along with both masses on these classes (`top_k_buckets`).

    References:
      Li et al., Rethinking On-Policy Distillation of Large Language Models, 2026 (2604.13016).
    """
    return jnp.sum(in_student_top_k(student_logits, targets), axis=-1, dtype=jnp.int32)


def in_student_top_k(student_logits: Array, targets: _topk.TopK) -> Array:
    """Which of the teacher's k classes are among the student's own k: bool `[..., k]`."""
    _checks.instance(_topk.TopK, targets=targets)
    student_indices = _topk.top_k_targets(student_logits, k=jnp.shape(targets.indices)[-1]).indices
    return jnp.any(targets.indices[..., :, None] == student_indices[..., None, :], axis=-1)


def _gap(student: Array, teacher: Array) -> tuple[Array, Array]:
    """`log p_S - log p_T`, a constant, 0 outside either support; and where it is infinite."""
    gap = jax.lax.stop_gradient(_softmax.masked_difference(student, teacher))
    return gap, (student != -jnp.inf) & (teacher == -jnp.inf)
