"""Methods on class logits: KD and its proposed replacements.

Each is added to the task, whose weight is stated. All need mutually exclusive classes (softmax),
except `binary_kd` and the regressions: `logit_mse`, `logit_l1`, `logit_huber` and
`bounded_regression`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses, temperatures
from kdtl_jax._types import Params, Scalar
from kdtl_jax.methods._method import (
    Method,
    Weight,
    cooled_down,
    exclusive_classes,
    key_and_step,
    method,
    needs_teacher_head,
    warmed_up,
)
from kdtl_jax.methods._setup import Setup, check_setup, regression
from kdtl_jax.objective import Inputs

RANKED = 32  # ranking losses compare pairs among this many classes


class Logits(NamedTuple):
    """The inputs of methods on class logits."""

    student: Array  # [B, classes]
    teacher: Array
    labels: Array  # [B]
    where: Array | None  # [B], real examples; None if all are


def of_logits(
    setup: Setup, terms: Callable[[Logits], dict[str, Array]], weights: Mapping[str, Weight]
) -> Method:
    """A method on class logits."""
    exclusive_classes(setup)
    return method(setup, lambda inputs: terms(logits(inputs)), weights)


def of_pair(
    setup: Setup, name: str, loss: Callable[..., Array], *, task: float, weight: float
) -> Method:
    """A method of one term `loss(student logits, teacher logits)` on exclusive classes."""
    return of_logits(
        setup, lambda x: {name: loss(x.student, x.teacher)}, {"task": task, name: weight}
    )


def of_outputs(
    setup: Setup, name: str, loss: Callable[..., Array], *, task: float, weight: float
) -> Method:
    """`of_pair` for any outputs called logits: of softmax or sigmoid heads, or regression."""

    def terms(inputs: Inputs) -> dict[str, Array]:
        return {name: loss(inputs.student["logits"], inputs.teacher["logits"])}

    return method(setup, terms, {"task": task, name: weight})


def logits(inputs: Inputs) -> Logits:
    """The logits of both models, the labels and the mask of a batch."""
    labels, where = inputs.batch["labels"], inputs.real
    if where is not None:  # padding may be labeled with anything
        labels = jnp.where(where, labels, jnp.zeros((), labels.dtype))
    return Logits(inputs.student["logits"], inputs.teacher["logits"], labels, where)


def kd(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """`T^2 KL(softmax(z_T / T) || softmax(z_S / T))`: knowledge distillation.

    Hinton, Vinyals and Dean, 2015 (1503.02531). Task 0.1, kd 0.9: mdistiller and the scripts of
    RepDistiller.
    """
    loss = partial(losses.kd_kl, temperature=temperature)
    return of_pair(setup, "kd", loss, task=0.1, weight=0.9)


def logit_std(setup: Setup, *, temperature: Scalar = 2.0) -> Method:
    """KD of logits standardized over classes.

    Sun et al., 2024 (2403.01427). Task 0.1, kd 9: the authors' code. They divide by the unbiased
    deviation (`ddof=1` of `losses.standardize_logits`); this method divides by the population
    deviation.
    """

    def loss(*sides: Array) -> Array:
        return losses.kd_kl(*map(losses.standardize_logits, sides), temperature=temperature)

    return of_pair(setup, "kd", loss, task=0.1, weight=9.0)


def dkd(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """KD of the target class against the rest (tckd), and of the rest among themselves (nckd).

    Zhao et al., 2022 (2203.08679). Task 1, tckd 1, nckd 8, both after a linear warm-up over 20 of
    240 epochs: mdistiller. There nckd is 8 by default, 2 or 6 for some CIFAR-100 pairs, 0.5 at
    T = 1 for ImageNet.
    """

    def terms(x: Logits) -> dict[str, Array]:
        sides = x.student, x.teacher, x.labels
        return {
            "tckd": losses.tckd(*sides, temperature=temperature),
            "nckd": losses.nckd(*sides, temperature=temperature),
        }

    weights = {"task": 1.0, "tckd": warmed_up(1.0, setup), "nckd": warmed_up(8.0, setup)}
    return of_logits(setup, terms, weights)


def nkd(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`-p_T(y) log p_S(y)` (target), `-T^2 sum_{c != y} q_T(c) log q_S(c)` (others): normalized KD.

    q is the distribution over the classes other than the label. Yang et al., 2023 (2303.13005).
    Task 1, target 1, others 1.5: the authors' code.
    """

    def terms(x: Logits) -> dict[str, Array]:
        logits_pair = (losses.non_target_logits(z, x.labels) for z in (x.student, x.teacher))
        others = losses.soft_cross_entropy(*logits_pair, temperature=temperature)
        target = losses.target_cross_entropy(x.student, x.teacher, x.labels)
        return {"target": target, "others": temperature**2 * others}

    return of_logits(setup, terms, {"task": 1.0, "target": 1.0, "others": 1.5})


def dist(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`1 - rho` (Pearson) of probabilities over classes (inter) and over the batch (intra).

    Huang et al., 2022 (2205.10536). Task 1, inter 2, intra 2, T = 1: the authors' settings on
    ImageNet. On CIFAR-100 they use T = 4, where their code multiplies both by `T^2`.
    """

    def terms(x: Logits) -> dict[str, Array]:
        sides = x.student, x.teacher
        return {
            "inter": losses.dist_inter(*sides, temperature=temperature),
            "intra": losses.dist_intra(*sides, temperature=temperature, where=x.where),
        }

    return of_logits(setup, terms, {"task": 1.0, "inter": 2.0, "intra": 2.0})


def wsld(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """KD weighted by `1 - exp(-CE_S / CE_T)` per example, a constant: weighted soft labels.

    Zhou et al., 2021 (2102.00650). Task 1, wsld 2.25 at T = 4: cls_KD on CIFAR-100 (2.5
    at T = 2 on ImageNet).
    """

    def terms(x: Logits) -> dict[str, Array]:
        weight = losses.wsld_weight(x.student, x.teacher, x.labels)
        values = losses.kd_kl(x.student, x.teacher, temperature=temperature)
        return {"wsld": jax.lax.stop_gradient(weight) * values}

    return of_logits(setup, terms, {"task": 1.0, "wsld": 2.25})


def ttm(setup: Setup, *, temperature: Scalar = 10.0) -> Method:
    """`KL(softmax(z_T / T) || softmax(z_S))`: transformed teacher matching (soft teacher only).

    Zheng and Yang, 2024 (2402.11148). Task 1, ttm 45 at gamma = 1 / T = 0.1: the authors' README.
    """
    loss = partial(losses.ttm, gamma=1 / temperature)
    return of_pair(setup, "ttm", loss, task=1.0, weight=45.0)


def wttm(setup: Setup, *, temperature: Scalar = 5.0) -> Method:
    """`ttm` weighted by `sum_c p_T(c)^(1 / T)` per example.

    Zheng and Yang, 2024 (2402.11148). Task 1, wttm 4 at gamma = 1 / T = 0.2: the authors' README,
    combined with CRD.
    """
    loss = partial(losses.wttm, gamma=1 / temperature)
    return of_pair(setup, "wttm", loss, task=1.0, weight=4.0)


def logit_mse(setup: Setup) -> Method:
    """`mean_c (z_S - z_T)^2`: regression on logits, without labels (task 0, mse 1).

    Ba and Caruana, 2014 (1312.6184). It also works for sigmoid heads and regression.
    """
    return of_outputs(setup, "mse", losses.mse, task=0.0, weight=1.0)


def logit_l1(setup: Setup) -> Method:
    """`mean_c |z_S - z_T|`: L1, less sensitive than squares to a teacher far off on some examples.

    He et al., FAKD, ICIP 2020. Task 0.5, l1 0.5: the authors' scripts, whose task is L1 too. It
    works for regression and for logits.
    """
    return of_outputs(setup, "l1", losses.mae, task=0.5, weight=0.5)


def logit_huber(setup: Setup, *, delta: Scalar = 1.0) -> Method:
    """`logit_l1`, but quadratic where student and teacher are closer than `delta` (smooth L1).

    Huber, 1964. Task 0.5, huber 0.5, as `logit_l1`. `delta` is in units of the outputs: standard
    deviations of the targets if these are standardized, as in `kdtl`.
    """
    return of_outputs(setup, "huber", partial(losses.huber, delta=delta), task=0.5, weight=0.5)


def bounded_regression(setup: Setup, *, margin: Scalar = 0.0) -> Method:
    """An extra squared error, until the student is closer to the targets than its teacher.

    Chen et al., NeurIPS 2017, whose task is the smooth L1 loss. Task 1, bounded 0.5: the paper.
    `margin` is in squared units of the outputs.
    """
    check_setup(setup)
    if setup.task is not regression:
        raise ValueError("needs targets that are numbers (task=methods.regression)")

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher = inputs.student["logits"], inputs.teacher["logits"]
        targets = inputs.batch["labels"].astype(student.dtype)
        return {"bounded": losses.teacher_bounded(student, teacher, targets, margin=margin)}

    return method(setup, terms, {"task": 1.0, "bounded": 0.5})


def mlld(setup: Setup, *, temperatures: Sequence[Scalar] = (2.0, 3.0, 4.0, 5.0, 6.0)) -> Method:
    """KD, correlations of the batch and of the classes, each summed over temperatures.

    Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023. Task 0.1, kd 0.9, batch 0.9,
    classes 0.9, as for KD in mdistiller. The authors' code departs from the paper; this follows the
    paper.
    """

    def terms(x: Logits) -> dict[str, Array]:
        sides = x.student, x.teacher
        kd = [losses.kd_kl(*sides, temperature=t) for t in temperatures]
        batch, classes = (
            [level(*sides, temperature=t, where=x.where) for t in temperatures]
            for level in (losses.batch_correlation, losses.class_correlation)
        )
        values_by_term = {"kd": kd, "batch": batch, "classes": classes}
        return {name: sum(values[1:], values[0]) for name, values in values_by_term.items()}

    return of_logits(setup, terms, {"task": 0.1, "kd": 0.9, "batch": 0.9, "classes": 0.9})


def ctkd(setup: Setup) -> Method:
    """KD at a temperature in (1, 21) that is learned adversarially against the student.

    Li et al., 2022 (2211.16231). The gradient reversal ramps up along a cosine over 10 of 240
    epochs. Task 0.1, kd 0.9: the authors' code.
    """
    exclusive_classes(setup)
    reversal = temperatures.adversarial_ramp(max(round(10 / 240 * setup.steps), 1))

    def terms(inputs: Inputs) -> dict[str, Array]:
        x, (_, step) = logits(inputs), key_and_step(inputs)
        temperature = temperatures.learned_temperature(
            inputs.connectors["temperature"], reversal=reversal(step)
        )
        return {"kd": losses.kd_kl(x.student, x.teacher, temperature=temperature)}

    def init(key: Array) -> Params:
        return {"temperature": temperatures.temperature_init()}

    return method(setup, terms, {"task": 0.1, "kd": 0.9}, connectors=init)


def wkd_l(setup: Setup, *, temperature: Scalar = 8.0) -> Method:
    """`-p_T(y) log p_S(y)` (target), and the cost of moving q_S to q_T (transport).

    q is the distribution over the classes other than the label; moving mass costs
    `1 - exp(-(1 - cos))` of the teacher's class weights. Lv, Yang and Li, 2024 (2412.08139). Task
    1, target 1, transport 600, decaying to 0 over the last 90 of 240 epochs along a half cosine:
    the authors' code for ResNet-32x4 to 8x4, which uses costs from the CKA of class features.
    """
    directions = connectors.unit_norm().apply({}, needs_teacher_head(setup).kernel.T)
    cost = -jnp.expm1(jnp.minimum(directions @ directions.T - 1, 0))

    def terms(x: Logits) -> dict[str, Array]:
        student, teacher = (losses.non_target_logits(z, x.labels) for z in (x.student, x.teacher))
        return {
            "target": losses.target_cross_entropy(x.student, x.teacher, x.labels),
            "transport": losses.sinkhorn_cost(
                student, teacher, jax.lax.stop_gradient(cost), temperature=temperature
            ),
        }

    weights = {"task": 1.0, "target": 1.0, "transport": cooled_down(600.0, setup)}
    return of_logits(setup, terms, weights)


def _ranking(setup: Setup, name: str, ranking: Callable[..., Array]) -> Method:
    def loss(student: Array, teacher: Array) -> Array:
        return ranking(student, losses.top_k_targets(teacher, k=min(RANKED, setup.classes)))

    return of_pair(setup, name, loss, task=1.0, weight=1.0)


def hinge_ranking(setup: Setup) -> Method:
    """The teacher's order among its 32 most likely classes, with hinges at the teacher's own gaps.

    DistillKit, 2024. Task 1, hinge 1.
    """
    return _ranking(setup, "hinge", losses.hinge_ranking)


def logistic_ranking(setup: Setup) -> Method:
    """The teacher's order among its 32 most likely classes, with logistic losses on pairs.

    Burges et al., ICML 2005; DistillKit, 2024. Task 1, logistic 1.
    """
    return _ranking(setup, "logistic", losses.logistic_ranking)


def binary_kd(
    setup: Setup, *, temperature: Scalar = 1.0, class_weights: Array | None = None
) -> Method:
    """`T^2 mean_k w_k KL(sigmoid(z_T / T) || sigmoid(z_S / T))` over labels: sigmoid heads.

    Yang et al., Multi-Label Knowledge Distillation, 2023 (2308.06453): its multi-label logits
    distillation, which the authors sum over labels. Task 1, kd 1; `class_weights` is `[classes]`.
    A binary head with one logit is the case of one label.
    """
    check_setup(setup)
    if setup.exclusive:
        raise ValueError("needs sigmoid heads (exclusive=False), but classes exclude each other")
    if setup.task is regression:
        raise ValueError("needs sigmoid heads, but the outputs are numbers")

    def loss(*sides: Array) -> Array:
        values = losses.binary_kl(*sides, temperature=temperature, class_weights=class_weights)
        return values / setup.classes

    return of_outputs(setup, "kd", loss, task=1.0, weight=1.0)
