"""Draft models of speculative decoding: losses on what the target model accepts.

A token that the draft proposes is accepted with probability `alpha = sum_v min(p_T(v), p_S(v))`,
which is `1 - total_variation`. `draft_logits` are `[..., draft_vocabulary]` and `target_logits` are
`[..., vocabulary]`; `draft_ids`, int `[draft_vocabulary]`, lists the tokens that the draft knows,
by default all. Results are `[...]`, float32 or wider.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._divergences import forward_kl


def acceptance(
    draft_logits: Array, target_logits: Array, *, draft_ids: Array | None = None
) -> Array:
    """`sum_v min(p_T(v), p_S(v))`, the probability that the target takes the draft's token.

    `[..., draft_vocabulary]` and `[..., vocabulary]` logits, `[...]` in [0, 1].

    References:
      Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative Decoding, 2022
      (2211.17192).
    """
    return 1 - _rejection(*_log_probs_and_ratio(draft_logits, target_logits, draft_ids))


def lk_alpha(draft_logits: Array, target_logits: Array, *, draft_ids: Array | None = None) -> Array:
    """`-log alpha`, minus the log-probability of acceptance: 0 at equality.

    Unlike the KL, it is the quantity that speeds up decoding; unlike `1 - alpha`, it has a useful
    gradient where draft and target are far apart. Takes `[..., draft_vocabulary]` and
    `[..., vocabulary]` logits; returns `[...]`, in nats.

    References:
      Samarin et al., LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding, 2026
      (2602.23881), the alpha form; SpecForge.
    """
    log_q, log_p, ratio = _log_probs_and_ratio(draft_logits, target_logits, draft_ids)
    rejection = _rejection(log_q, log_p, ratio)
    is_small = rejection < 0.5
    log_acceptance = _logspace.logsumexp(jnp.minimum(log_q, log_p))
    return -jnp.where(is_small, jnp.log1p(-jnp.where(is_small, rejection, 0)), log_acceptance)


def lk_lambda(
    draft_logits: Array,
    target_logits: Array,
    *,
    weight: Scalar,
    draft_ids: Array | None = None,
) -> Array:
    """`weight KL(p_T || p_S) + (1 - weight) (1 - alpha)`, with the KL on the draft's tokens alone.

    Takes `[..., draft_vocabulary]` and `[..., vocabulary]` logits; returns `[...]`, in nats.

    Args:
      weight: in [0, 1], a scalar or one value per example. In the paper it is
        `scale exp(-decay mean(acceptance))` with scale and decay 1, held constant, so the KL
        dominates while little is accepted.

    References:
      Samarin et al., 2026 (2602.23881), the lambda form. SpecForge uses the cross-entropy in place
      of the KL and divides it by the number of all positions, padding included.
    """
    _checks.within(0, 1, weight=weight)
    rejection = _rejection(*_log_probs_and_ratio(draft_logits, target_logits, draft_ids))
    _checks.per_example(rejection.shape, weight=weight)
    share = _numerics.per_example(weight, rejection, "weight")
    kl = forward_kl(draft_logits, known_to_draft(target_logits, draft_ids=draft_ids))
    return share * kl + (1 - share) * rejection


def known_to_draft(target_logits: Array, *, draft_ids: Array | None = None) -> Array:
    """The target's logits at the draft's tokens: `[..., draft_vocabulary]`, to be renormalized."""
    if draft_ids is None:
        return jnp.asarray(target_logits)
    _checks.rank(1, target_logits=target_logits)
    _checks.rank(1, 1, draft_ids=draft_ids)
    _checks.indices(jnp.shape(target_logits)[-1], draft_ids=draft_ids)
    return _logspace.columns(target_logits, draft_ids)


def draft_targets(
    target_logits: Array, where: Array, *, step: int, draft_ids: Array | None = None
) -> tuple[Array, Array]:
    """The targets for step number `step` of the draft, as in EAGLE-3's test-time training.

    In step i the draft's entry l, fed with its own guesses, predicts the target's output at
    position l + i. A position counts if the target's most likely token is one that the draft knows.
    EAGLE-3's loss is `sum_i 0.8^i` of the mean `soft_cross_entropy` over the counted positions.

    Args:
      target_logits: `[B, T, vocabulary]`.
      where: bool `[B, T]`, aligned with the target.
      step: >= 0, static; from T on nothing counts.
      draft_ids: int `[draft_vocabulary]`.

    Returns:
      The target's logits `[B, T, draft_vocabulary]` and bool `[B, T]`, False past the end.

    References:
      Li et al., EAGLE-3, 2025 (2503.01840). SpecForge averages over masked positions too.
    """
    _checks.floating(target_logits=target_logits)
    _checks.rank(3, 3, target_logits=target_logits)
    _checks.mask(where, target_logits.shape[:-1])
    _checks.count(0, step=step)
    targets = known_to_draft(target_logits, draft_ids=draft_ids)
    if draft_ids is not None:
        favorite = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
        is_known = jnp.zeros(target_logits.shape[-1], jnp.bool_).at[draft_ids].set(True)
        where = where & is_known[favorite]
    length = where.shape[1]
    count = max(length - step, 0)
    targets = jnp.pad(targets[:, length - count :], ((0, 0), (0, length - count), (0, 0)))
    return targets, jnp.pad(where[:, length - count :], ((0, 0), (0, length - count)))


def _log_probs_and_ratio(
    draft: Array, target: Array, draft_ids: Array | None
) -> tuple[Array, Array, Array]:
    """`log p_S`, the unnormalized target `log p_T` at the draft's tokens, and their difference.

    If the draft knows all tokens, both are normalized and the difference is relatively accurate.
    """
    _checks.floating(draft_logits=draft, target_logits=target)
    _checks.rank(1, draft_logits=draft, target_logits=target)
    _checks.nonempty(draft_logits=draft)
    log_p = known_to_draft(_softmax.log_softmax(target), draft_ids=draft_ids)
    if jnp.shape(draft) != log_p.shape:
        raise ValueError(
            "draft_logits must be the target's, or have one class per draft id, got "
            f"{_checks.described(draft_logits=draft, target_logits=target)}."
        )
    _checks.several_classes(draft_logits=draft, target_logits=target)
    log_q = _softmax.log_softmax(draft)
    if draft_ids is not None:
        return log_q, log_p, _softmax.masked_difference(log_q, log_p)
    return log_q, log_p, _softmax.log_ratio(_numerics.upcast(draft), _numerics.upcast(target))


def _rejection(log_q: Array, log_p: Array, ratio: Array) -> Array:
    """`1 - alpha = sum_v max(p_S - p_T, 0)`, as accurate as `ratio`, `log p_S - log p_T`."""
    in_both = (log_q != -jnp.inf) & (log_p != -jnp.inf)
    p = jnp.exp(log_p)
    is_near = in_both & (jnp.abs(ratio) < 1)
    gap = jnp.where(is_near, p * jnp.expm1(jnp.where(is_near, ratio, 0)), jnp.exp(log_q) - p)
    return jnp.sum(jax.nn.relu(gap), axis=-1)
