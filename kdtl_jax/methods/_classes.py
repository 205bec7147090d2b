"""Divergences between class distributions, and teachers made from labels or corrected by them.

The papers on divergences distill language models with the divergence alone, at temperature 1. Here,
with labels, the divergence and the task share the loss equally (task 0.5), as in fused kernels.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from kdtl_jax import _softmax, connectors, losses
from kdtl_jax._types import Scalar
from kdtl_jax.methods import _layers
from kdtl_jax.methods._logits import Logits, logits, of_logits, of_pair
from kdtl_jax.methods._method import Method, exclusive_classes, method
from kdtl_jax.methods._setup import Setup
from kdtl_jax.objective import Inputs


def _half(setup: Setup, name: str, divergence: Callable[..., Array], temperature: Scalar) -> Method:
    loss = partial(divergence, temperature=temperature)
    return of_pair(setup, name, loss, task=0.5, weight=0.5)


def forward_kl(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`KL(p_T || p_S)`, without the `T^2` of `kd`.

    Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    return _half(setup, "forward_kl", losses.forward_kl, temperature)


def reverse_kl(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`KL(p_S || p_T)`, mode-seeking: MiniLLM's divergence.

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

    Agarwal et al., 2023 (2306.13649). Beta 0.1, the paper's smallest interior value.
    """
    return _half(setup, "jsd_gkd", partial(losses.jsd_gkd, beta=beta), temperature)


def jsd_continuous(setup: Setup, *, temperature: Scalar = 1.0, beta: Scalar = 0.1) -> Method:
    """`jsd_gkd` with `M = (1 - beta) p_T + beta p_S`: continuous at both ends.

    Agarwal et al., 2023 (2306.13649), in EasyDeL's convention.
    """
    return _half(setup, "jsd_continuous", partial(losses.jsd_continuous, beta=beta), temperature)


def jsd_normalized(setup: Setup, *, temperature: Scalar = 1.0, beta: Scalar = 0.1) -> Method:
    """`jsd_gkd / (beta (1 - beta))`: forward KL at beta 0, reverse KL at 1, smooth in between.

    Huszár, 2015 (1511.05101).
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

    Wu et al., 2024 (2404.02657). No gradient flows through the weights.
    """

    def divergence(student: Array, teacher: Array, *, temperature: Scalar) -> Array:
        weight = losses.adaptive_kl_weight(student, teacher, mu=mu, temperature=temperature)
        weight = jax.lax.stop_gradient(weight)
        return losses.symmetric_kl(student, teacher, weight=weight, temperature=temperature)

    return _half(setup, "adaptive_kl", divergence, temperature)


def label_smoothing(setup: Setup, *, smoothing: float = 0.1) -> Method:
    """Cross-entropy with a virtual teacher that is right with probability `1 - e + e / C`.

    Szegedy et al., 2015 (1512.00567). In place of the task (task 0, smooth 1), e = 0.1 as in the
    paper.
    """

    def terms(x: Logits) -> dict[str, Array]:
        correct = 1 - smoothing + smoothing / setup.classes
        virtual = losses.virtual_teacher(x.labels, setup.classes, correct_probability=correct)
        return {"smooth": losses.soft_cross_entropy(x.student, virtual.astype(x.student.dtype))}

    return of_logits(setup, terms, {"task": 0.0, "smooth": 1.0})


def tf_kd(setup: Setup, *, temperature: Scalar = 20.0, correct_probability: float = 0.99) -> Method:
    """KD from a virtual teacher made from the labels: teacher-free KD.

    Yuan et al., 2019 (1909.11723). Task 0.1, kd 0.9 and `T^2`, as for KD; T = 20 as for the
    authors' ResNet-18 (10 or 40 for others). Their code differs: see `losses.virtual_teacher`.
    """

    def terms(x: Logits) -> dict[str, Array]:
        virtual = losses.virtual_teacher(
            x.labels, setup.classes, correct_probability=correct_probability
        )
        virtual = virtual.astype(x.student.dtype)
        return {"kd": losses.kd_kl(x.student, virtual, temperature=temperature)}

    return of_logits(setup, terms, {"task": 0.1, "kd": 0.9})


def uskd(setup: Setup) -> Method:
    """The student as its own teacher: Zipf's law over the other classes, ranked by two heads.

    Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, 2023 (2303.13005). In
    place of the task (task 0): target 1, the cross-entropy weighted by
    `p(y)^2 + 1 - mean p(y)^2`; others 0.1, a cross-entropy to `1 / rank`; weak 0.005, a linear
    head on the first layer that learns labels smoothed by 0.1. Classes are ranked by the sum of
    both heads' probabilities, as in the paper; the authors' code adds log-probabilities.
    """
    exclusive_classes(setup)
    student_tap = _layers.every(setup)[0][0]
    shape = jax.eval_shape(_layers.as_vector, setup.student[student_tap])
    head = connectors.linear(setup.classes)

    def terms(inputs: Inputs) -> dict[str, Array]:
        x = logits(inputs)
        weak = head.apply(inputs.connectors, _layers.as_vector(inputs.student[student_tap]))
        student, other = (losses.non_target_logits(z, x.labels) for z in (x.student, weak))
        zipf = losses.zipf_targets(jax.nn.softmax(student) + jax.nn.softmax(other), x.labels)
        weight = losses.uskd_weight(x.student, x.labels, where=x.where)
        smooth = losses.virtual_teacher(
            x.labels, setup.classes, correct_probability=0.9 + 0.1 / setup.classes
        )
        hard = _softmax.cross_entropy(x.student, x.labels, x.where)
        return {
            "target": jax.lax.stop_gradient(weight) * hard,
            "others": losses.soft_cross_entropy(student, zipf.astype(student.dtype)),
            "weak": losses.soft_cross_entropy(weak, smooth.astype(weak.dtype)),
        }

    weights = {"task": 0.0, "target": 1.0, "others": 0.1, "weak": 0.005}
    return method(setup, terms, weights, connectors=lambda key: head.init(key, shape))


def probability_shift(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """KD from the teacher with its largest logit and the label's swapped, so it is never wrong.

    Wen et al., 2019 (1911.07471). Task 0.1, kd 0.9, as for KD.
    """

    def terms(x: Logits) -> dict[str, Array]:
        shifted = losses.probability_shift(x.teacher, x.labels)
        return {"kd": losses.kd_kl(x.student, shifted, temperature=temperature)}

    return of_logits(setup, terms, {"task": 0.1, "kd": 0.9})


def mft(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """KD from a teacher corrected by the labels: minifinetuning.

    Belcak et al., 2025 (2506.15702). In place of the task (task 0, mft 1), threshold 0.2:
    Model-Optimizer.
    """

    def terms(x: Logits) -> dict[str, Array]:
        corrected = losses.mft_teacher(x.teacher, x.labels, temperature=temperature)
        values = losses.forward_kl(x.student / temperature, corrected)
        return {"mft": temperature**2 * values}

    return of_logits(setup, terms, {"task": 0.0, "mft": 1.0})


def hard_kd(setup: Setup) -> Method:
    """`-log p_S(argmax z_T)`: the teacher's decisions as labels (DeiT).

    Touvron et al., 2021 (2012.12877). Task 0.5, hard 0.5, as in the paper.
    """
    return of_pair(setup, "hard", losses.hard_kd, task=0.5, weight=0.5)
