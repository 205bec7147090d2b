"""Methods of logits for classifiers: KD and what has been proposed in its place."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses, temperatures
from kdtl_jax._types import Params, Scalar
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import TASK, Built, Method, Options, Setup, no_connectors, no_memory
from kdtl_jax.objective import Inputs

RANKED = 32  # classes among which rankings take pairs


def _kd(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    return losses.kd_kl(student, teacher, temperature=temperature)


def _standardized(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    student, teacher = (losses.standardize_logits(z) for z in (student, teacher))
    return losses.kd_kl(student, teacher, temperature=temperature)


def _nkd(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    others = (losses.non_target_logits(z, labels) for z in (student, teacher))
    non_target = losses.soft_cross_entropy(*others, temperature=temperature)
    target = losses.target_cross_entropy(student, teacher, labels)
    return target + 1.5 * temperature**2 * non_target


def _dist(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    inter = losses.dist_inter(student, teacher, temperature=temperature)
    return inter + losses.dist_intra(student, teacher, temperature=temperature)


def _wsld(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    weight = jax.lax.stop_gradient(losses.wsld_weight(student, teacher, labels))
    return weight * losses.kd_kl(student, teacher, temperature=temperature)


def _ttm(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    return losses.ttm(student, teacher, gamma=1 / temperature)


def _wttm(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    return losses.wttm(student, teacher, gamma=1 / temperature)


def _mse(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    return losses.mse(student, teacher)


def _mlld(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    levels = (losses.kd_kl, losses.batch_correlation, losses.class_correlation)
    first, *others = [
        level(student, teacher, temperature=t)
        for t in (2.0, 3.0, 4.0, 5.0, 6.0)
        for level in levels
    ]
    return sum(others, first)


def _hinge(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    targets = losses.top_k_targets(teacher, k=min(RANKED, teacher.shape[-1]))
    return losses.hinge_ranking(student, targets)


def _logistic(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    targets = losses.top_k_targets(teacher, k=min(RANKED, teacher.shape[-1]))
    return losses.logistic_ranking(student, targets)


def _build_dkd(setup: Setup, options: Options) -> Built:
    temperature = _builders.chosen(options, 4.0)

    def terms(inputs: Inputs) -> dict[str, Array]:
        logits = _builders.logits_of(inputs)
        target = losses.tckd(*logits, temperature=temperature)
        return {"dkd": target + 8 * losses.nckd(*logits, temperature=temperature)}

    weights = {TASK: 1.0, "dkd": _builders.warmed_up(1.0, setup.steps)}
    return Built(terms, weights, no_connectors, no_memory)


def _build_ctkd(setup: Setup, options: Options) -> Built:
    """KD whose temperature is trained against the student, ever harder over 10 of 240 epochs."""
    ramp = temperatures.adversarial_ramp(max(round(10 / 240 * setup.steps), 1))

    def terms(inputs: Inputs) -> dict[str, Array]:
        student, teacher, _ = _builders.logits_of(inputs)
        _, step = _builders.clock(inputs)
        temperature = temperatures.learned_temperature(
            inputs.connectors["temperature"], reversal=ramp(step)
        )
        return {"kd": losses.kd_kl(student, teacher, temperature=temperature)}

    def init(key: Array) -> Params:
        return {"temperature": temperatures.temperature_init()}

    return Built(terms, {TASK: 0.1, "kd": 0.9}, init, no_memory)


def _build_wkd_l(setup: Setup, options: Options) -> Built:
    """Moving mass costs `1 - exp(-(1 - cos))` of the teacher's class weights."""
    assert setup.teacher_head is not None
    temperature = _builders.chosen(options, 8.0)
    unit = connectors.unit_norm().apply({}, setup.teacher_head.kernel.T)
    cost = -jnp.expm1(jnp.minimum(unit @ unit.T - 1, 0))
    gamma = _builders.let_go(600.0, setup.steps)

    def terms(inputs: Inputs) -> dict[str, Array]:
        _, step = _builders.clock(inputs)
        student, teacher, labels = _builders.logits_of(inputs)
        moved = losses.sinkhorn_cost(
            losses.non_target_logits(student, labels),
            losses.non_target_logits(teacher, labels),
            jax.lax.stop_gradient(cost),
            temperature=temperature,
        )
        target = losses.target_cross_entropy(student, teacher, labels)
        return {"wkd_l": target + jnp.asarray(gamma(step), moved.dtype) * moved}

    return Built(terms, {TASK: 1.0, "wkd_l": 1.0}, no_connectors, no_memory)


def _method(name: str, title: str, paper: str, build: _builders.Build) -> Method:
    return Method(name, title, paper, "logits", False, build, _views.always)


_of = _builders.of_logits

METHODS = (
    _method(
        "kd",
        "Knowledge distillation",
        "Hinton, Vinyals, Dean, 1503.02531, 2015",
        _of("kd", _kd, temperature=4.0, task=0.1, weight=0.9),
    ),
    _method(
        "logit_std",
        "KD of standardized logits",
        "Sun et al., 2403.01427, 2024",
        _of("kd", _standardized, temperature=2.0, task=0.1, weight=9.0),
    ),
    _method("dkd", "Decoupled KD", "Zhao et al., 2203.08679, 2022", _build_dkd),
    _method("nkd", "Normalized KD", "Yang et al., 2303.13005, 2023", _of("nkd", _nkd)),
    _method(
        "dist",
        "DIST: correlations of classes and of examples",
        "Huang et al., 2205.10536, 2022",
        _of("dist", _dist),
    ),
    _method(
        "wsld",
        "Weighted soft labels",
        "Zhou et al., 2102.00650, 2021",
        _of("wsld", _wsld, temperature=4.0, weight=2.25),
    ),
    _method(
        "ttm",
        "Transformed teacher matching",
        "Zheng, Yang, 2402.11148, 2024",
        _of("ttm", _ttm, temperature=10.0, weight=45.0),
    ),
    _method(
        "wttm",
        "Weighted transformed teacher matching",
        "Zheng, Yang, 2402.11148, 2024",
        _of("wttm", _wttm, temperature=5.0, weight=4.0),
    ),
    _method(
        "logit_mse",
        "Regression on logits",
        "Ba, Caruana, 1312.6184, 2014",
        _of("mse", _mse, task=0.0),
    ),
    _method(
        "mlld",
        "Multi-level logit distillation",
        "Jin, Wang, Lin, CVPR 2023",
        _of("mlld", _mlld, task=0.1, weight=0.9),
    ),
    Method(
        "ctkd",
        "Curriculum temperature, learned against the student",
        "Li et al., 2211.16231, 2022",
        "logits",
        True,
        _build_ctkd,
        _views.always,
    ),
    Method(
        "wkd_l",
        "Wasserstein KD of logits",
        "Lv, Yang, Li, 2412.08139, 2024",
        "logits",
        False,
        _build_wkd_l,
        _views.needs_teacher_head,
    ),
    _method(
        "hinge_ranking",
        "Hinge ranking of the teacher's order",
        "DistillKit, 2024",
        _of("hinge", _hinge),
    ),
    _method(
        "logistic_ranking",
        "Logistic ranking of the teacher's order",
        "Burges et al., ICML 2005",
        _of("logistic", _logistic),
    ),
)
