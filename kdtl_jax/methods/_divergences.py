"""Divergences between student's and teacher's class distributions, at temperature 1.

Their papers distill language models from the divergence alone. Beside labels they share the loss
with the cross-entropy half and half, as fused distillation kernels do.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import Scalar
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import Method

Divergence = Callable[..., Array]  # (student logits, teacher logits, *, temperature) -> [B]


def _adaptive_kl(student: Array, teacher: Array, *, temperature: Scalar) -> Array:
    weight = losses.adaptive_kl_weight(student, teacher, temperature=temperature)
    weight = jax.lax.stop_gradient(weight)
    return losses.symmetric_kl(student, teacher, weight=weight, temperature=temperature)


def _method(name: str, title: str, paper: str, divergence: Divergence) -> Method:
    def loss(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
        return divergence(student, teacher, temperature=temperature)

    build = _builders.of_logits(name, loss, task=0.5, weight=0.5)
    return Method(name, title, paper, "logits", False, build, _views.always)


METHODS = (
    _method("forward_kl", "Forward KL", "Kullback, Leibler, 1951", losses.forward_kl),
    _method("reverse_kl", "Reverse KL (MiniLLM)", "Gu et al., 2306.08543, 2023", losses.reverse_kl),
    _method("symmetric_kl", "Symmetric KL (Jeffreys)", "Jeffreys, 1946", losses.symmetric_kl),
    _method("js", "Jensen-Shannon divergence", "Lin, 1991", losses.jensen_shannon),
    _method(
        "jsd_gkd",
        "Generalized JSD, GKD's convention, beta .1",
        "Agarwal et al., 2306.13649, 2023",
        partial(losses.jsd_gkd, beta=0.1),
    ),
    _method(
        "jsd_continuous",
        "Generalized JSD, continuous ends, beta .1",
        "Agarwal et al., 2306.13649, 2023",
        partial(losses.jsd_continuous, beta=0.1),
    ),
    _method(
        "jsd_normalized",
        "Generalized JSD over beta (1 - beta), beta .1",
        "Huszar, 1511.05101, 2015",
        partial(losses.jsd_normalized, beta=0.1),
    ),
    _method(
        "skew_forward_kl",
        "Skew forward KL (DistiLLM)",
        "Ko et al., 2402.03898, 2024",
        losses.skew_forward_kl,
    ),
    _method(
        "skew_reverse_kl",
        "Skew reverse KL (DistiLLM)",
        "Ko et al., 2402.03898, 2024",
        losses.skew_reverse_kl,
    ),
    _method(
        "total_variation",
        "Total variation distance",
        "Wen et al., 2307.15190, 2023",
        losses.total_variation,
    ),
    _method("adaptive_kl", "Adaptive KL (AKL)", "Wu et al., 2404.02657, 2024", _adaptive_kl),
)
