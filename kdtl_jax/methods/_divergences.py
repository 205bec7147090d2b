"""Divergences between the student's and the teacher's class distributions, at temperature 1.

Their papers distill language models from the divergence alone. Beside labels each shares the loss
with the task half and half (task 0.5), as fused distillation kernels do.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import Scalar
from kdtl_jax.methods._logits import Logits, of_logits
from kdtl_jax.methods._setup import Method, Setup


def _half(setup: Setup, name: str, divergence: Callable[..., Array], temperature: Scalar) -> Method:
    def terms(x: Logits) -> dict[str, Array]:
        return {name: divergence(x.student, x.teacher, temperature=temperature)}

    return of_logits(setup, terms, {"task": 0.5, name: 0.5})


def forward_kl(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`KL(p_T || p_S)`, without the `T^2` of `kd`.

    Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    return _half(setup, "forward_kl", losses.forward_kl, temperature)


def reverse_kl(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`KL(p_S || p_T)`, mode seeking; MiniLLM's divergence.

    Gu et al., 2023 (2306.08543).
    """
    return _half(setup, "reverse_kl", losses.reverse_kl, temperature)


def symmetric_kl(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`1/2 KL(p_T || p_S) + 1/2 KL(p_S || p_T)`, half of Jeffreys' divergence.

    Jeffreys, 1946.
    """
    return _half(setup, "symmetric_kl", losses.symmetric_kl, temperature)


def js(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """The Jensen-Shannon divergence.

    Lin, 1991.
    """
    return _half(setup, "js", losses.jensen_shannon, temperature)


def jsd_gkd(setup: Setup, *, temperature: Scalar = 1.0, beta: Scalar = 0.1) -> Method:
    """`beta KL(p_T || M) + (1 - beta) KL(p_S || M)`, `M = beta p_T + (1 - beta) p_S`: GKD's.

    Agarwal et al., 2023 (2306.13649). Beta 0.1, the paper's smallest between the ends.
    """
    return _half(setup, "jsd_gkd", partial(losses.jsd_gkd, beta=beta), temperature)


def jsd_continuous(setup: Setup, *, temperature: Scalar = 1.0, beta: Scalar = 0.1) -> Method:
    """`jsd_gkd` with `M = (1 - beta) p_T + beta p_S`: its ends are reached continuously.

    Agarwal et al., 2023 (2306.13649), in EasyDeL's convention.
    """
    return _half(setup, "jsd_continuous", partial(losses.jsd_continuous, beta=beta), temperature)


def jsd_normalized(setup: Setup, *, temperature: Scalar = 1.0, beta: Scalar = 0.1) -> Method:
    """`jsd_gkd / (beta (1 - beta))`: forward KL at beta 0, reverse KL at 1, smooth between.

    Huszar, 2015 (1511.05101).
    """
    return _half(setup, "jsd_normalized", partial(losses.jsd_normalized, beta=beta), temperature)


def skew_forward_kl(setup: Setup, *, temperature: Scalar = 1.0, alpha: Scalar = 0.1) -> Method:
    """`KL(p_T || alpha p_T + (1 - alpha) p_S)`, alpha 0.1 as in DistiLLM's code.

    Ko et al., 2024 (2402.03898).
    """
    skewed = partial(losses.skew_forward_kl, alpha=alpha)
    return _half(setup, "skew_forward_kl", skewed, temperature)


def skew_reverse_kl(setup: Setup, *, temperature: Scalar = 1.0, alpha: Scalar = 0.1) -> Method:
    """`KL(p_S || (1 - alpha) p_T + alpha p_S)`, alpha 0.1 as in DistiLLM's code.

    Ko et al., 2024 (2402.03898).
    """
    skewed = partial(losses.skew_reverse_kl, alpha=alpha)
    return _half(setup, "skew_reverse_kl", skewed, temperature)


def total_variation(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`1/2 sum_c |p_S - p_T|`.

    Wen et al., 2023 (2307.15190).
    """
    return _half(setup, "total_variation", losses.total_variation, temperature)


def adaptive_kl(setup: Setup, *, temperature: Scalar = 1.0, mu: Scalar = 0.5) -> Method:
    """Forward KL for the teacher's head of mass mu, reverse KL for its tail, weighted by the gaps.

    Wu et al., 2024 (2404.02657). No gradient passes through the weights.
    """

    def divergence(student: Array, teacher: Array, *, temperature: Scalar) -> Array:
        weight = losses.adaptive_kl_weight(student, teacher, mu=mu, temperature=temperature)
        weight = jax.lax.stop_gradient(weight)
        return losses.symmetric_kl(student, teacher, weight=weight, temperature=temperature)

    return _half(setup, "adaptive_kl", divergence, temperature)
