"""Methods of class logits: KD and what has been proposed in its place.

Each is beside the task, whose weight is named. They need classes that exclude each other (softmax);
`mlld` to `dist` also compare the examples of a batch.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import connectors, losses, temperatures
from kdtl_jax._types import Params, Scalar, Schedule
from kdtl_jax.methods._layers import key_and_step
from kdtl_jax.methods._setup import Head, Method, Setup, Weight, method
from kdtl_jax.objective import Inputs

# (student logits, teacher logits, labels) -> [B]
LogitLoss = Callable[[Array, Array, Array], Array]
RANKED = 32  # classes among which rankings take pairs


def of_logits(setup: Setup, term: str, loss: LogitLoss, weights: Mapping[str, Weight]) -> Method:
    """A method of one term that reads logits and labels.

    Raises:
      ValueError: if the classes do not exclude each other.
    """
    exclusive_classes(setup)

    def terms(inputs: Inputs) -> dict[str, Array]:
        return {term: loss(*logits_and_labels(inputs))}

    return method(setup, terms, weights)


def exclusive_classes(setup: Setup) -> None:
    """Refuses sigmoid heads, whose logits are no distribution over classes.

    Raises:
      ValueError: if the classes do not exclude each other.
    """
    if not setup.exclusive:
        raise ValueError(
            "needs two or more classes that exclude each other (softmax); for sigmoid heads use "
            "binary_kd"
        )


def logits_and_labels(inputs: Inputs) -> tuple[Array, Array, Array]:
    """The student's and the teacher's logits, and the labels."""
    return inputs.student["logits"], inputs.teacher["logits"], inputs.batch["labels"]


def needs_teacher_head(setup: Setup) -> Head:
    """The teacher's linear classifier.

    Raises:
      ValueError: if it is not known.
    """
    if setup.teacher_head is None:
        raise ValueError(
            "needs the teacher's classifier (a linear head), which this teacher does not show"
        )
    return setup.teacher_head


def warmed_up(weight: float, setup: Setup) -> Schedule:
    """0 to `weight` over the first 20 of 240 parts of the run, mdistiller's epochs."""
    return schedule(optax.linear_schedule(0.0, weight, max(round(20 / 240 * setup.steps), 1)))


def cooled_down(weight: float, setup: Setup) -> Schedule:
    """`weight`, and over the last 90 of 240 parts of the run down to 0 along a half cosine."""
    start = round(150 / 240 * setup.steps)
    decay = optax.cosine_decay_schedule(weight, max(setup.steps - start, 1))
    return schedule(optax.join_schedules([optax.constant_schedule(weight), decay], [start]))


def schedule(made: optax.Schedule) -> Schedule:
    """An optax schedule of a float step: its divisions pass strict promotion."""
    return lambda step: jnp.asarray(made(jnp.asarray(step, jnp.float32)))


def kd(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """`T^2 KL(softmax(z_T / T) || softmax(z_S / T))`: knowledge distillation.

    Hinton, Vinyals and Dean, 2015 (1503.02531). Task 0.1, kd 0.9: mdistiller and the scripts of
    RepDistiller.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.kd_kl(student, teacher, temperature=temperature)

    return of_logits(setup, "kd", loss, {"task": 0.1, "kd": 0.9})


def logit_std(setup: Setup, *, temperature: Scalar = 2.0) -> Method:
    """KD of logits standardized over classes.

    Sun et al., 2024 (2403.01427). Task 0.1, kd 9: the authors' code. They divide by the unbiased
    deviation (`ddof=1`), the equation here by the population's.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.standardized_kd(student, teacher, temperature=temperature)

    return of_logits(setup, "kd", loss, {"task": 0.1, "kd": 9.0})


def dkd(
    setup: Setup, *, temperature: Scalar = 4.0, alpha: Scalar = 1.0, beta: Scalar = 8.0
) -> Method:
    """`alpha TCKD + beta NCKD`: KD of the target class and of the others, decoupled.

    Zhao et al., 2022 (2203.08679). Task 1, dkd 1 after a linear warm-up over 20 of 240 epochs:
    mdistiller. Beta is 8 for most CIFAR-100 pairs, 2 to 6 for some, 0.5 at T = 1 for ImageNet.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.dkd(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)

    return of_logits(setup, "dkd", loss, {"task": 1.0, "dkd": warmed_up(1.0, setup)})


def nkd(setup: Setup, *, temperature: Scalar = 1.0, gamma: Scalar = 1.5) -> Method:
    """`-p_T(y) log p_S(y) - gamma T^2 sum_{c != y} q_T(c) log q_S(c)`: normalized KD.

    Yang et al., 2023 (2303.13005). Task 1, nkd 1: the authors' code.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.nkd(student, teacher, labels, temperature=temperature, gamma=gamma)

    return of_logits(setup, "nkd", loss, {"task": 1.0, "nkd": 1.0})


def dist(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`(1 - rho over classes) + (1 - rho over the batch)`, Pearson correlations of probabilities.

    Huang et al., 2022 (2205.10536). Task 1, dist 1, T = 1: the authors on ImageNet (T = 4 on
    CIFAR-100).
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.dist(student, teacher, temperature=temperature)

    return of_logits(setup, "dist", loss, {"task": 1.0, "dist": 1.0})


def wsld(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """KD weighted by `1 - exp(-CE_S / CE_T)` per example: weighted soft labels.

    Zhou et al., 2021 (2102.00650). Task 1, wsld 2.25 at T = 4: cls_KD's ImageNet configuration (2.5
    at T = 2 elsewhere).
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.wsld(student, teacher, labels, temperature=temperature)

    return of_logits(setup, "wsld", loss, {"task": 1.0, "wsld": 2.25})


def ttm(setup: Setup, *, temperature: Scalar = 10.0) -> Method:
    """`KL(softmax(z_T / T) || softmax(z_S))`: transformed teacher matching, only the teacher soft.

    Zheng and Yang, 2024 (2402.11148). Task 1, ttm 45 at gamma = 1 / T = 0.1: the authors' README.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.ttm(student, teacher, gamma=1 / temperature)

    return of_logits(setup, "ttm", loss, {"task": 1.0, "ttm": 45.0})


def wttm(setup: Setup, *, temperature: Scalar = 5.0) -> Method:
    """`ttm` weighted by `sum_c p_T(c)^(1 / T)` per example.

    Zheng and Yang, 2024 (2402.11148). Task 1, wttm 4 at gamma = 1 / T = 0.2: the authors' README.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.wttm(student, teacher, gamma=1 / temperature)

    return of_logits(setup, "wttm", loss, {"task": 1.0, "wttm": 4.0})


def logit_mse(setup: Setup) -> Method:
    """`mean_c (z_S - z_T)^2`: regression on logits, without labels (task 0, mse 1).

    Ba and Caruana, 2014 (1312.6184). Sigmoid heads and regression are taught as well.
    """

    def terms(inputs: Inputs) -> dict[str, Array]:
        return {"mse": losses.logit_mse(inputs.student["logits"], inputs.teacher["logits"])}

    return method(setup, terms, {"task": 0.0, "mse": 1.0})


def mlld(setup: Setup, *, temperatures: Sequence[Scalar] = (2.0, 3.0, 4.0, 5.0, 6.0)) -> Method:
    """`sum_T (T^2 KL + batch correlation + class correlation)`: multi-level logit distillation.

    Jin, Wang and Lin, CVPR 2023. Their code departs from the paper; this is the paper. Task 0.1,
    mlld 0.9, as for KD in mdistiller.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        return losses.mlld(student, teacher, temperatures=temperatures)

    return of_logits(setup, "mlld", loss, {"task": 0.1, "mlld": 0.9})


def ctkd(setup: Setup) -> Method:
    """KD at a temperature in (1, 21) that is learned against the student.

    Li et al., 2022 (2211.16231). The gradient's reversal grows along a cosine over 10 of 240
    epochs. Task 0.1, kd 0.9: the authors' code.
    """
    exclusive_classes(setup)
    reversal = temperatures.adversarial_ramp(max(round(10 / 240 * setup.steps), 1))

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher, _ = logits_and_labels(inputs)
        _, step = key_and_step(inputs)
        temperature = temperatures.learned_temperature(
            inputs.connectors["temperature"], reversal=reversal(step)
        )
        return {"kd": losses.kd_kl(student, teacher, temperature=temperature)}

    def init(key: Array) -> Params:
        return {"temperature": temperatures.temperature_init()}

    return method(setup, terms, {"task": 0.1, "kd": 0.9}, connectors=init)


def wkd_l(setup: Setup, *, temperature: Scalar = 8.0) -> Method:
    """`-p_T(y) log p_S(y) + gamma W(q_S, q_T)`: transport between the classes other than the label.

    Lv, Yang and Li, 2024 (2412.08139). Moving mass costs `1 - exp(-(1 - cos))` of the teacher's
    class weights. Task 1, wkd_l 1, gamma 600, let down to 0 over the last 90 of 240 epochs along a
    half cosine: the authors' code.
    """
    exclusive_classes(setup)
    directions = connectors.unit_norm().apply({}, needs_teacher_head(setup).kernel.T)
    cost = -jnp.expm1(jnp.minimum(directions @ directions.T - 1, 0))
    gamma = cooled_down(600.0, setup)

    def terms(inputs: Inputs) -> dict[str, Array]:
        _, step = key_and_step(inputs)
        values = losses.wkd_logit(
            *logits_and_labels(inputs),
            jax.lax.stop_gradient(cost),
            gamma=gamma(step),
            temperature=temperature,
        )
        return {"wkd_l": values}

    return method(setup, terms, {"task": 1.0, "wkd_l": 1.0})


def hinge_ranking(setup: Setup) -> Method:
    """The teacher's order among its 32 likeliest classes, by hinges of its own gaps.

    DistillKit, 2024. Task 1, hinge 1.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        targets = losses.top_k_targets(teacher, k=min(RANKED, teacher.shape[-1]))
        return losses.hinge_ranking(student, targets)

    return of_logits(setup, "hinge", loss, {"task": 1.0, "hinge": 1.0})


def logistic_ranking(setup: Setup) -> Method:
    """The teacher's order among its 32 likeliest classes, by logistic losses of pairs.

    Burges et al., ICML 2005; DistillKit, 2024. Task 1, logistic 1.
    """

    def loss(student: Array, teacher: Array, labels: Array) -> Array:
        targets = losses.top_k_targets(teacher, k=min(RANKED, teacher.shape[-1]))
        return losses.logistic_ranking(student, targets)

    return of_logits(setup, "logistic", loss, {"task": 1.0, "logistic": 1.0})
