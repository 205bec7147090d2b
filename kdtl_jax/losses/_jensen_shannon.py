"""The Jensen-Shannon family: three published conventions, as three functions.

Arguments and results are those of `forward_kl`. Each mixes student and teacher into `M` and adds up
the KLs to it. They differ in what beta weights (ValueError unless it is in [0, 1]), and therefore
in the limits as it goes to 0 and 1:

| function | beta -> 0 | beta -> 1 |
|---|---|---|
| `jsd_gkd` | 0, but at 0 itself `KL(T || S)` | 0, but at 1 itself `KL(S || T)` |
| `jsd_continuous` | `KL(S || T)` | `KL(T || S)` |
| `jsd_normalized` | `KL(T || S)` | `KL(S || T)` |

Use `jsd_normalized` with a schedule for beta: it is smooth in beta and never vanishes.
"""

import math

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._divergences import forward_kl, reverse_kl


def jensen_shannon(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`1/2 KL(p_T || M) + 1/2 KL(p_S || M)`, `M = (p_T + p_S) / 2`; in [0, log 2].

    Takes `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    pair = _logspace.compare(student_logits, teacher_logits, temperature, where)
    return _interior(pair, jnp.asarray(0.5, pair.ratio.dtype))


def jsd_gkd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`beta KL(p_T || M) + (1 - beta) KL(p_S || M)`, `M = beta p_T + (1 - beta) p_S`; ends special.

    At beta 0 it is `KL(p_T || p_S)` and at 1 `KL(p_S || p_T)`, but values in between tend to 0
    toward both ends: `beta = 1e-4` gives a loss (and a gradient) thousands of times smaller than
    `beta = 0`. For values in between, prefer `jsd_normalized`. Takes `[..., num_classes]` logits
    and `where` of their shape; returns `[...]`, in nats.

    References:
      Agarwal et al., On-Policy Distillation of Language Models, 2023 (2306.13649). This is TRL's
      `GKDTrainer.generalized_jsd_loss` (which sums and divides by the number of kept tokens), and
      DistiLLM's `js_distance` at `beta = 1 - lam`.
    """
    _checks.within(0, 1, beta=beta)
    concrete = _checks.concrete(beta)
    if concrete is not None and concrete.ndim == 0 and float(concrete) in (0.0, 1.0):
        end = reverse_kl if concrete else forward_kl
        return end(student_logits, teacher_logits, temperature=temperature, where=where)
    pair = _logspace.compare(student_logits, teacher_logits, temperature, where, beta=beta)
    share = _numerics.per_example(beta, pair.ratio, "beta")
    interior = _interior(pair, share)
    if concrete is not None and not ((concrete == 0) | (concrete == 1)).any():
        return interior
    beta = _numerics.per_example(beta, interior, "beta")
    forward = jnp.sum(_softmax.kl_terms(pair.log_teacher, pair.log_student, pair.ratio), axis=-1)
    reverse = jnp.sum(_softmax.kl_terms(pair.log_student, pair.log_teacher, -pair.ratio), axis=-1)
    return jnp.where(beta <= 0, forward, jnp.where(beta >= 1, reverse, interior))


def jsd_continuous(
    student_logits: Array,
    teacher_logits: Array,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`beta KL(p_T || M) + (1 - beta) KL(p_S || M)`, `M = (1 - beta) p_T + beta p_S`.

    The mixture is weighted the opposite way from `jsd_gkd`: each side is compared with a mixture
    that is mostly the *other* one, and the limits at both ends are continuous. Takes
    `[..., num_classes]` logits and `where` of their shape; returns `[...]`, in nats.

    References:
      The convention of EasyDeL's generalized knowledge distillation trainer.
    """
    _checks.within(0, 1, beta=beta)
    log_s, log_t, ratio = _logspace.compare(
        student_logits, teacher_logits, temperature, where, beta=beta
    )
    share = _numerics.per_example(beta, ratio, "beta")
    teacher_side = _logspace.kl_to_mixture(log_t, log_s, ratio, share)
    student_side = _logspace.kl_to_mixture(log_s, log_t, -ratio, 1 - share)
    beta = _numerics.per_example(beta, teacher_side, "beta")
    return beta * teacher_side + (1 - beta) * student_side


def jsd_normalized(
    student_logits: Array,
    teacher_logits: Array,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`(beta KL(p_T || M) + (1 - beta) KL(p_S || M)) / (beta (1 - beta))`, GKD's `M`, with limits.

    `M = beta p_T + (1 - beta) p_S`. It tends smoothly to `KL(p_T || p_S)` as beta goes to 0 and to
    `KL(p_S || p_T)` as it goes to 1, and reaches both: a schedule from 0 to 1 moves from
    mean-seeking to mode-seeking without the loss vanishing on the way. At 1/2 it is four times the
    Jensen-Shannon divergence. Takes `[..., num_classes]` logits and `where` of their shape; returns
    `[...]`, in nats.

    References:
      Huszár, How (not) to Train your Generative Model, 2015 (1511.05101), for the limits of the
      generalized Jensen-Shannon divergence. Times `beta (1 - beta)` it is `jsd_gkd` between the
      ends.
    """
    _checks.within(0, 1, beta=beta)
    log_s, log_t, ratio = _logspace.compare(
        student_logits, teacher_logits, temperature, where, beta=beta
    )
    share = _numerics.per_example(beta, ratio, "beta")
    teacher_side = _scaled_terms(log_t, log_s, ratio, 1 - share)
    student_side = _scaled_terms(log_s, log_t, -ratio, share)
    return jnp.sum(teacher_side + student_side, axis=-1)


def _interior(pair: _logspace.LogPair, beta: Array) -> Array:
    """`beta KL(T || M) + (1 - beta) KL(S || M)`, `M = beta T + (1 - beta) S`."""
    log_s, log_t, ratio = pair
    teacher_side = _logspace.kl_to_mixture(log_t, log_s, ratio, 1 - beta)
    student_side = _logspace.kl_to_mixture(log_s, log_t, -ratio, beta)
    weight = beta.reshape(beta.shape[: teacher_side.ndim])
    return weight * teacher_side + (1 - weight) * student_side


def _scaled_terms(log_p: Array, log_q: Array, ratio: Array, weight: Array) -> Array:
    """Terms >= 0 of `KL(p || (1 - w) p + w q) / w`, exact down to `w = 0`, where all are 0.

    With `y = w (q/p - 1)` a term is `p (y - log1p(y)) / w = (q - p) y h(y)`, where
    `h(y) = (y - log1p(y)) / y^2` is smooth: nothing is divided by w. Where `log1p(y)` is not small,
    `(q - p) + p log(p / m) / w` is safe, since w cannot be small relative to `p/q` there.
    """
    in_p, in_q = log_p != -jnp.inf, log_q != -jnp.inf
    in_both = in_p & in_q
    is_positive = weight > 0
    safe_weight = jnp.where(is_positive, weight, 1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    d = jnp.where(in_both, -ratio, 0)
    # w exp(d), without overflow of exp(d): beyond e^1 the terms are far for any y.
    moderate = d < math.log(float(jnp.finfo(p.dtype).max)) / 2
    grown = jnp.where(moderate, 0, jnp.minimum(jnp.log(safe_weight) + d, 1))
    y = jnp.where(moderate, weight * jnp.expm1(jnp.where(moderate, d, 0)), jnp.exp(grown))
    y = jnp.where(moderate | is_positive, y, 0)
    is_near = in_both & (y > -0.632) & (y < 1.718)
    close_pair = jnp.abs(d) < 1
    gap = jnp.where(close_pair, p * jnp.expm1(jnp.where(close_pair, d, 0)), q - p)
    near_value = gap * y * _log1p_remainder(jnp.where(is_near, y, 0))
    to_mixture = _logspace.ratio_to_mixture(log_p, log_q, ratio, weight)
    far_value = (q - p) + p * jnp.where(in_both, to_mixture, 0) / safe_weight
    # Absent from q: m = (1 - w) p, so the term is -p (1 + log(1 - w) / w), infinite at w = 1.
    all_q = weight >= 1
    only_p = -jnp.log1p(-jnp.where(all_q, 0, weight)) / safe_weight - 1
    only_p = jnp.where(all_q, jnp.inf, p * only_p)
    one_sided = jnp.where(is_positive, jnp.where(in_p, only_p, q), 0)
    return jnp.where(
        in_both, jnp.where(is_near, near_value, far_value), jnp.where(in_p | in_q, one_sided, 0)
    )


def _log1p_remainder(y: Array) -> Array:
    """`(y - log1p(y)) / y^2`, 1/2 at 0."""
    is_small = jnp.abs(y) < 0.03
    series = jnp.zeros_like(y)
    for k in range(10, 1, -1):
        series = 1 / k - y * series
    safe_y = jnp.where(is_small, 1, y)
    return jnp.where(is_small, series, (safe_y - jnp.log1p(safe_y)) / jnp.square(safe_y))
