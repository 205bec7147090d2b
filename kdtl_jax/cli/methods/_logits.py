"""Methods of logits: KD and what has been proposed in its place for classifiers."""

from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import Scalar
from kdtl_jax.cli.methods import _builders, _views
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes._method import TASK, Built, Method, Options, Setup, no_connectors, no_memory


def _kd(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    return losses.kd_kl(student, teacher, temperature=temperature)


def _build_dkd(setup: Setup, options: Options) -> Built:
    temperature = _builders.chosen(options, 4.0)

    def terms(inputs: Inputs) -> dict[str, Array]:
        logits = _builders.logits_of(inputs)
        return {"dkd": losses.dkd(*logits, temperature=temperature)}

    weights = {TASK: 1.0, "dkd": _builders.warmed_up(1.0, setup.steps)}
    return Built(terms, weights, no_connectors, no_memory)


def _method(name: str, title: str, paper: str, build: _builders.Build) -> Method:
    return Method(name, title, paper, "logits", False, build, _views.always)


METHODS = (
    _method(
        "kd",
        "Knowledge distillation",
        "Hinton, Vinyals, Dean, 1503.02531, 2015",
        _builders.of_logits("kd", _kd, temperature=4.0, task=0.1, weight=0.9),
    ),
    _method("dkd", "Decoupled knowledge distillation", "Zhao et al., 2203.08679, 2022", _build_dkd),
)
