"""Losses on sampled tokens: the student writes, the teacher judges one token per position.

On-policy distillation minimizes `KL(p_S || p_T)` over the student's own text. If the teacher gives
more than one log-probability per token, `reverse_kl` (for all classes) and
`top_k_reverse_kl_sampled_tail` (for some) have the same expected gradient and less variance.

| tokens drawn from the student | expected value | expected gradient |
|---|---|---|
| `sampled_reverse_kl` | reverse KL | of the reverse KL |
| `kl_k2` | about the reverse KL | of the reverse KL |
| `kl_k3` | reverse KL | of the *forward* KL |
| `log p_S - log p_T` itself | reverse KL | zero: do not differentiate it |

All log-probabilities have the same shape, e.g. `[B, L]`; `sampler_log_probs` are those under the
distribution that was sampled from, after temperature and filtering (`language.Samples.log_probs`).
Everything but the student's log-probabilities is a constant. Ratios are bounded at `exp(20)`.
`where`, bool of the same shape, marks the positions that count; the others may hold anything (even
-inf) and give 0. The result has the arguments' shape, float32 or wider: losses and returns in nats,
weights without a unit, gates as bool.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar

MAX_LOG_RATIO = 20.0


def sampled_reverse_kl(
    student_log_probs: Array,
    teacher_log_probs: Array,
    sampler_log_probs: Array,
    *,
    where: Array | None = None,
) -> Array:
    """`-rho sg(log p_T - log p_S)` with `rho = p_S / p_sampler`: the score-function reverse KL.

    The expected gradient of its sum over a text from the sampler is that of the reverse KL at each
    position, given the text before it. Some implementations multiply it by a gate (`drop_gate`,
    `ratio_gate`) or bound the ratio (`clipped_policy_gradient`). Takes and returns `[B, L]`, in
    nats.

    References:
      Thinking Machines, On-Policy Distillation, 2025. Tinker's and slime's advantages are
      `log p_T - log p_sampler`: `policy_gradient` gives their numbers.
    """
    arrays = {"student_log_probs": student_log_probs, "teacher_log_probs": teacher_log_probs}
    student, teacher = _prepare(where, **arrays)
    advantages = jax.lax.stop_gradient(teacher - student)
    return policy_gradient(student_log_probs, advantages, sampler_log_probs, where=where)


def policy_gradient(
    log_probs: Array, advantages: Array, sampler_log_probs: Array, *, where: Array | None = None
) -> Array:
    """`-rho A` with `rho = p / p_sampler`; the advantages A and the sampler are constants.

    Takes and returns `[B, L]`, in nats.

    References:
      Tinker's "importance_sampling" loss is its sum over tokens; SkyRL uses various means of it.
    """
    log_probs, advantages, sampler = _prepare(
        where, log_probs=log_probs, advantages=advantages, sampler_log_probs=sampler_log_probs
    )
    return -_ratio(log_probs, sampler) * jax.lax.stop_gradient(advantages)


def clipped_policy_gradient(
    log_probs: Array,
    advantages: Array,
    sampler_log_probs: Array,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
    where: Array | None = None,
) -> Array:
    """`max(-rho A, -clip(rho, 1 - clip_low, 1 + clip_high) A)`: PPO's bound on a step.

    A token whose ratio has left the interval in the direction of its advantage has gradient 0.
    `dual_clip` c, >= 1, also bounds the loss at `-c A` where A is negative.

    For text sampled from a mixture with the teacher (MiniLLM), `sampler_log_probs` are the
    mixture's. Takes and returns `[B, L]`, in nats.

    References:
      Schulman et al., Proximal Policy Optimization Algorithms, 2017 (1707.06347); Ye et al.,
      Mastering Complex Control in MOBA Games with Deep Reinforcement Learning, 2020 (1912.09729)
      for the dual clip. slime's and verl's on-policy distillation.
    """
    _checks.non_negative(clip_low=clip_low, clip_high=clip_high)
    log_probs, advantages, sampler = _prepare(
        where, log_probs=log_probs, advantages=advantages, sampler_log_probs=sampler_log_probs
    )
    advantages = jax.lax.stop_gradient(advantages)
    ratio = _ratio(log_probs, sampler)
    low = 1 - _numerics.per_example(clip_low, ratio, "clip_low")
    high = 1 + _numerics.per_example(clip_high, ratio, "clip_high")
    loss = jnp.maximum(-ratio * advantages, -jnp.clip(ratio, low, high) * advantages)
    if dual_clip is None:
        return loss
    _checks.within(1, float("inf"), dual_clip=dual_clip)
    bound = -_numerics.per_example(dual_clip, loss, "dual_clip") * advantages
    return jnp.where(advantages < 0, jnp.minimum(bound, loss), loss)


def kl_k2(
    student_log_probs: Array, teacher_log_probs: Array, *, where: Array | None = None
) -> Array:
    """`(log p_S - log p_T)^2 / 2`: a biased value, but the gradient of the reverse KL.

    For tokens from the current student; for those of an older one, multiply by `truncated_ratio`.
    Takes and returns `[B, L]`.

    References:
      Schulman, Approximating KL Divergence, 2020. verl's "k2" ("mse").
    """
    student, teacher = _pair(student_log_probs, teacher_log_probs, where)
    return jnp.square(student - teacher) / 2


def kl_k3(
    student_log_probs: Array, teacher_log_probs: Array, *, where: Array | None = None
) -> Array:
    """`p_T / p_S - 1 - log(p_T / p_S)`: never negative, with the value of the reverse KL.

    In expectation over the student's tokens, its gradient is that of the *forward* KL. Takes and
    returns `[B, L]`, in nats.

    References:
      Schulman, Approximating KL Divergence, 2020. verl's "k3" ("low_var_kl") bounds it at 10.
    """
    student, teacher = _pair(student_log_probs, teacher_log_probs, where)
    log_ratio = jnp.clip(teacher - student, -_log_bound(student), _log_bound(student))
    # `expm1(a) - a`, in which nothing cancels.
    return _softmax.kl_terms(jnp.zeros_like(log_ratio), log_ratio)


def truncated_ratio(
    log_probs: Array,
    sampler_log_probs: Array,
    *,
    max_ratio: Scalar = 2.0,
    where: Array | None = None,
) -> Array:
    """`min(p / p_sampler, max_ratio)`, a constant: the weight of a token in another loss.

    Takes and returns `[B, L]`.

    References:
      Truncated importance sampling, as in SDPO (2601.20802) and TRL's trainer for it.
    """
    _checks.positive(max_ratio=max_ratio)
    student, sampler = _prepare(where, log_probs=log_probs, sampler_log_probs=sampler_log_probs)
    ratio = _ratio(student, sampler)
    bounded = jnp.minimum(ratio, _numerics.per_example(max_ratio, ratio, "max_ratio"))
    return jax.lax.stop_gradient(_numerics.kept(bounded, where))


def drop_gate(
    log_probs: Array,
    sampler_log_probs: Array,
    *,
    max_drop: Scalar = 0.2,
    where: Array | None = None,
) -> Array:
    """False where the token's probability has fallen by more than `max_drop` since it was sampled.

    `p_sampler - p <= max_drop`, all `[B, L]`.

    References:
      prime-rl's reference KL, which adds `1e-3 (log p - log p_sampler)^2` on every token.
    """
    _checks.within(0, 1, max_drop=max_drop)
    student, sampler = _prepare(where, log_probs=log_probs, sampler_log_probs=sampler_log_probs)
    drop = jnp.exp(sampler) - jnp.exp(student)
    is_kept = drop <= _numerics.per_example(max_drop, drop, "max_drop")
    return is_kept if where is None else is_kept & where


def ratio_gate(
    log_probs: Array,
    sampler_log_probs: Array,
    *,
    low: Scalar = 0.5,
    high: Scalar = 5.0,
    where: Array | None = None,
) -> Array:
    """False where `p / p_sampler` has left `[low, high]`.

    Takes `[B, L]`; returns bool `[B, L]`.

    References:
      IcePop (Ling Team, 2025), as in NeMo-RL's multi-teacher on-policy distillation.
    """
    _checks.positive(low=low, high=high)
    _checks.ordered(low=low, high=high)
    student, sampler = _prepare(where, log_probs=log_probs, sampler_log_probs=sampler_log_probs)
    ratio = _ratio(student, sampler)
    is_inside = ratio >= _numerics.per_example(low, ratio, "low")
    is_inside &= ratio <= _numerics.per_example(high, ratio, "high")
    return is_inside if where is None else is_inside & where


def reward_to_go(rewards: Array, *, gamma: Scalar = 1.0, where: Array | None = None) -> Array:
    """`sum_{i >= l} gamma^(i - l) r_i` over the counted positions of a row; 0 at other positions.

    MiniLLM's advantage is this function of `log p_T - log p_S` under the sampling policy, divided
    by the number of tokens left (`reward_to_go` of ones), and whitened. Gamma 0 returns the
    rewards.

    Args:
      rewards: `[..., L]`.
      gamma: in [0, 1].
      where: bool `[..., L]`.

    Returns:
      `[..., L]`.

    References:
      Gu et al., MiniLLM, 2023 (2306.08543). TRL's version has an additional factor `gamma^l`.
    """
    _checks.within(0, 1, gamma=gamma)
    (rewards,) = _prepare(where, rewards=rewards)
    discount = _numerics.scalar(gamma, rewards, "gamma")

    def add(later_return: Array, reward: Array) -> tuple[Array, Array]:
        total = reward + discount * later_return
        return total, total

    rows = jnp.moveaxis(rewards, -1, 0)
    _, totals = jax.lax.scan(add, jnp.zeros_like(rows[0]), rows, reverse=True)
    return _numerics.kept(jnp.moveaxis(totals, 0, -1), where)


def whitened(values: Array, *, where: Array | None = None) -> Array:
    """`(a - mean) / sqrt(var + 1e-8)` over all counted entries, with the unbiased variance.

    The statistics are those of the whole batch: whiten before splitting it into microbatches. The
    1e-8 has the squared units of the values.

    Args:
      values: advantages or rewards, any shape such as `[B, L]`.
      where: bool, the same shape, entries that count; the others become 0.

    Returns:
      The same shape, in float32 or wider.

    References:
      MiniLLM's PPO, which includes padding in the mean and variance.
    """
    (values,) = _prepare(where, values=values)
    count = values.size if where is None else jnp.sum(where, dtype=values.dtype)
    deviation = _numerics.kept(values - _numerics.masked_mean(values, where), where)
    variance = jnp.sum(jnp.square(deviation)) / jnp.maximum(count - 1, 1)
    return deviation * jax.lax.rsqrt(variance + 1e-8)


def iw_opd_weight(advantages: Array, *, gamma: Scalar = 0.5, where: Array | None = None) -> Array:
    """`1 + gamma (1 - sum_{i < l} |A_i| / sum_i |A_i|)`: early tokens count for more.

    Args:
      advantages: `[..., L]`, `log p_T - log p_sampler` of the sampled tokens.
      gamma: >= 0.
      where: bool `[..., L]`.

    Returns:
      `[..., L]`, in [1, 1 + gamma], a constant that multiplies the advantages of `policy_gradient`.

    References:
      Xie et al., On the Position Bias of On-Policy Distillation (IW-OPD), 2026 (2606.22600). TRL's
      trainer weights `-log p_S` times the advantage.
    """
    _checks.non_negative(gamma=gamma)
    (advantages,) = _prepare(where, advantages=advantages)
    magnitude = jnp.abs(advantages)
    earlier = jnp.cumsum(magnitude, axis=-1) - magnitude
    total = jnp.sum(magnitude, axis=-1, keepdims=True)
    share = earlier / jnp.where(total == 0, 1, total)
    return jax.lax.stop_gradient(1 + _numerics.scalar(gamma, share, "gamma") * (1 - share))


def _prepare(where: Array | None, **arrays: Array) -> list[Array]:
    """Checks and upcasts arrays, and zeros masked entries."""
    _checks.floating(**arrays)
    _checks.rank(1, None, **arrays)
    _checks.same_shape(**arrays)
    for array in arrays.values():
        _checks.mask(where, jnp.shape(array))
    return [_numerics.kept(_numerics.upcast(a), where) for a in arrays.values()]


def _pair(student: Array, teacher: Array, where: Array | None) -> list[Array]:
    return _prepare(where, student_log_probs=student, teacher_log_probs=teacher)


def _log_bound(array: Array) -> Array:
    return _numerics.scalar(MAX_LOG_RATIO, array)


def _ratio(log_probs: Array, sampler_log_probs: Array) -> Array:
    log_ratio = log_probs - jax.lax.stop_gradient(sampler_log_probs)
    return jnp.exp(jnp.clip(log_ratio, -_log_bound(log_ratio), _log_bound(log_ratio)))
