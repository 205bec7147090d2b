"""Sequences of tokens: shifts and interpolated teachers.

Every divergence in the package maps `[B, L, V]` to `[B, L]`; mask it in the objective with
`Masked(values, where)`, which keeps sum and count exact over microbatches. Nothing here is a loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


class Shifted(NamedTuple):
    """Logits and the token that each predicts: `[B, L-1, V]`, `[B, L-1]`, bool `[B, L-1]`."""

    logits: Array
    labels: Array
    where: Array


def causal_shift(logits: Array, labels: Array, *, ignore: int = -100) -> Shifted:
    """Pairs position l's logits with label l + 1, which they predict.

    Shift student and teacher in the same way; otherwise divergences are taken at positions that the
    labels mask.

    Args:
      logits: `[B, L, V]`.
      labels: int `[B, L]`, the tokens themselves.
      ignore: label of the positions that do not count.

    Returns:
      `Shifted`; ignored labels are replaced by 0, and `where` is false there.
    """
    _checks.floating(logits=logits)
    _checks.integers(labels=labels)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or labels.shape[-1] < 2:
        raise ValueError(
            "needs logits [..., L, V] and labels [..., L] with L > 1, got "
            f"{_checks.described(logits=logits, labels=labels)}."
        )
    next_labels = labels[..., 1:]
    where = next_labels != ignore
    return Shifted(logits[..., :-1, :], jnp.where(where, next_labels, 0), where)


def token_log_probs(logits: Array, tokens: Array, *, where: Array | None = None) -> Array:
    """`log softmax(logits)[token]`.

    Args:
      logits: `[..., V]`.
      tokens: int `[...]`; tokens out of range raise, or give NaN with gradient 0 under `jit`.
      where: bool `[...]`, positions that count; the tokens of the others may be anything.

    Returns:
      `[...]`, nats, <= 0; 0 at positions that do not count.
    """
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.several_classes(logits=logits)
    _checks.labels(tokens, logits, where)
    tokens, usable = _numerics.usable_labels(tokens, logits.shape[-1], where)
    log_p = _softmax.log_softmax(_numerics.kept(logits, where))
    return _numerics.at_usable(_logspace.at_label(log_p, tokens), usable, where)


def answers_first(values: Array, labels: Array, *, ignore: int = -100) -> tuple[Array, Array]:
    """Rotates each row so that its first labeled position comes first.

    Aligns the answers of two models whose prompts differ in length.

    Args:
      values: `[B, L, ...]`.
      labels: int `[B, L]`.
      ignore: label of the positions that do not count.

    Returns:
      The rotated values, and bool `[B, L]`: true where the rotated labels are not `ignore`.
    """
    _checks.integers(labels=labels)
    _checks.rank(2, 2, labels=labels)
    if values.shape[:2] != labels.shape:
        raise ValueError(
            "values must begin with the labels' shape, got "
            f"{_checks.described(values=values, labels=labels)}."
        )
    counts = labels != ignore
    first = jnp.argmax(counts, axis=1)
    length = labels.shape[1]
    index = (jax.lax.broadcasted_iota(first.dtype, labels.shape, 1) + first[:, None]) % length
    rows = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return (
        jnp.take_along_axis(values, rows, axis=1),
        jnp.take_along_axis(counts, index, axis=1),
    )


def taid_teacher(student_logits: Array, teacher_logits: Array, *, progress: Scalar) -> Array:
    """`(1 - t) z_S + t z_T`: a teacher on the way from the student to the teacher.

    TAID is `forward_kl(student_logits, jax.lax.stop_gradient(taid_teacher(...)))`; the authors'
    code uses the cross-entropy form, which has the same gradient.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: the same shape.
      progress: t, in [0, 1] (see `taid_advance`); a scalar or one value per example.

    Returns:
      `[..., V]` logits.

    References:
      Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
      Transfer in Language Models, 2025 (2501.16937).
    """
    _checks.within(0, 1, progress=progress)
    student, teacher = _logspace.soften(student_logits, teacher_logits, progress=progress)
    t = _numerics.per_example(progress, student, "progress")
    # 0 * inf at the ends, and -inf - -inf, are NaN, so a class absent from either side is absent.
    present = (student != -jnp.inf) & (teacher != -jnp.inf)
    mixed = (1 - t) * jnp.where(present, student, 0) + t * jnp.where(present, teacher, 0)
    return jnp.where(present, mixed, -jnp.inf)


class TaidProgress(NamedTuple):
    """State of TAID's schedule, all scalars: t, the momentum, the last loss, updates so far."""

    progress: Array
    momentum: Array
    last_loss: Array
    step: Array


def taid_start(*, start: Scalar = 0.4) -> TaidProgress:
    """The state before the first step: t is `start`, a scalar in [0, 1].

    Its fields are `[]`.
    """
    _checks.scalar(start=start)
    _checks.within(0, 1, start=start)
    progress = _numerics.upcast(jnp.asarray(start, jnp.result_type(start, float)))
    zero = jnp.zeros_like(progress)
    return TaidProgress(progress, zero, zero, jnp.zeros((), jnp.int32))


def taid_advance(
    state: TaidProgress,
    loss: Array,
    *,
    num_steps: int,
    start: Scalar = 0.4,
    end: Scalar = 1.0,
    alpha: Scalar = 5e-4,
    beta: Scalar = 0.99,
) -> TaidProgress:
    """t after a step: ahead of the linear schedule when the loss falls fast.

    With r the relative decrease of the loss and m its running mean,
    `t <- min(end, max(linear, t + alpha sigmoid(m) (1 - t)))`. The first call records the loss.

    Args:
      state: from `taid_start` or the last call; all its fields are scalars `[]`.
      loss: `[]`, this step's distillation loss.
      num_steps: length of the whole run.
      start: t at step 0.
      end: t at the last step.
      alpha: largest step ahead.
      beta: decay of the running mean.

    Returns:
      The new state, with the same dtypes.

    References:
      Shing et al., 2025 (2501.16937), algorithm 1.
    """
    _checks.count(1, num_steps=num_steps)
    _checks.within(0, 1, start=start, end=end, beta=beta)
    _checks.non_negative(alpha=alpha)
    current = state.progress
    loss = _numerics.scalar(loss, current, "loss")
    alpha, beta = _numerics.scalar(alpha, current, "alpha"), _numerics.scalar(beta, current, "beta")
    fall = (state.last_loss - loss) / (state.last_loss + _numerics.scalar(1e-15, current))
    first = state.step == 0
    momentum = jnp.where(first, state.momentum, beta * state.momentum + (1 - beta) * fall)
    proposal = current + alpha * jax.nn.sigmoid(momentum) * (1 - current)
    start, end = _numerics.scalar(start, current, "start"), _numerics.scalar(end, current, "end")
    linear = start + (end - start) * state.step.astype(current.dtype) / num_steps
    progress = jnp.minimum(end, jnp.maximum(linear, proposal))
    return TaidProgress(jnp.where(first, current, progress), momentum, loss, state.step + 1)


def distillm2_alpha(
    log_prob: Array, reference_log_prob: Array, *, anchor: Scalar, base: Scalar = 0.1
) -> Array:
    """DistiLLM-2's skew per example: `clip(1 - (1 - base) anchor / (p - p_ref + 1e-5), .01, base)`.

    Args:
      log_prob: `[B]`, mean log-probability of the answer's tokens under the side that is skewed
        from (the teacher for forward, the student for reverse).
      reference_log_prob: `[B]`, under the other side.
      anchor: the running value of the same difference of probabilities.
      base: the largest skew, in [0, 1].

    Returns:
      `[B]`, an `alpha` for `skew_forward_kl` or `skew_reverse_kl`.

    References:
      Ko et al., DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs, 2025
      (2503.07067).
    """
    _checks.floating(log_prob=log_prob, reference_log_prob=reference_log_prob)
    _checks.same_shape(log_prob=log_prob, reference_log_prob=reference_log_prob)
    _checks.finite(anchor=anchor)
    _checks.within(0, 1, base=base)
    log_prob, reference = _numerics.upcast(log_prob), _numerics.upcast(reference_log_prob)
    low, base = _numerics.scalar(0.01, log_prob), _numerics.scalar(base, log_prob, "base")
    gap = jnp.exp(log_prob) - jnp.exp(reference) + _numerics.scalar(1e-5, log_prob)
    alpha = 1 - (1 - base) * _numerics.scalar(anchor, log_prob, "anchor") / jnp.where(
        gap == 0, 1e-5, gap
    )
    return jnp.clip(alpha, low, base)
