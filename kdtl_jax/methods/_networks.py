"""Methods that use more of the networks than outputs: their classifiers, or their derivatives."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Outputs, Params
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._features import regressor
from kdtl_jax.methods._method import (
    TASK,
    Built,
    Head,
    Method,
    Options,
    Setup,
    no_connectors,
    no_memory,
)
from kdtl_jax.objective import Inputs

PROBES = 1  # random directions per step for the Jacobian


def _classify(head: Head, features: Array) -> Array:
    """`features @ kernel + bias`, the head frozen."""
    kernel, bias = jax.lax.stop_gradient(head)
    logits = features @ kernel.astype(features.dtype)
    return (
        logits
        if bias is None
        else logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)
    )


def _build_simkd(setup: Setup, options: Options) -> Built:
    """The student predicts through the projector and the teacher's classifier; no labels at all."""
    assert setup.teacher_head is not None
    head, view = setup.teacher_head, _views.matched_maps
    layers = (setup.last if setup.last_maps is None else setup.last_maps,)
    [(student_shape, teacher_shape)] = _views.shapes(view, layers, setup)
    projector = connectors.simkd_projector(teacher_shape.shape[-1])

    def projected(glue: Params, student: Outputs, teacher: Outputs) -> tuple[Array, Array]:
        [(features, target)] = _views.viewed(view, layers, student, teacher)
        return projector.apply(glue, features), target

    def terms(inputs: Inputs) -> dict[str, Array]:
        return {"simkd": losses.mse(*projected(inputs.connectors, inputs.student, inputs.teacher))}

    def predict(params: Params, student: Outputs) -> Array:
        [(of_student, of_teacher)] = layers
        shape = setup.teacher[of_teacher].shape[1:]
        # Of the teacher's map only the size matters here: the student's is pooled to it.
        blank = jnp.zeros((len(student[of_student]), *shape), student[of_student].dtype)
        features, _ = projected(params["connectors"], student, {of_teacher: blank})
        return _classify(head, _views.as_vector(features))

    def init(key: Array) -> Params:
        return projector.init(key, student_shape)

    return Built(terms, {TASK: 0.0, "simkd": 1.0}, init, no_memory, predict)


def _build_srrl(setup: Setup, options: Options) -> Built:
    assert setup.teacher_head is not None
    head, (of_student, of_teacher) = setup.teacher_head, setup.last
    connector = regressor(setup.teacher[of_teacher].shape[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        student = connector.apply(inputs.connectors, inputs.student[of_student])
        teacher = inputs.teacher[of_teacher]
        logits = _classify(head, student), _classify(head, teacher)
        return {"srrl": losses.mse(student, teacher) + 5 * losses.mse(*logits)}

    def init(key: Array) -> Params:
        return connector.init(key, setup.student[of_student])

    return Built(terms, {TASK: 1.0, "srrl": 1.0}, init, no_memory)


def _build_catkd(setup: Setup, options: Options) -> Built:
    """Class activation maps: the last map times the kernel of the head that reads its average."""
    assert setup.teacher_head is not None and setup.student_head is not None
    teacher_kernel, student_head = setup.teacher_head.kernel, setup.student_head

    def terms(inputs: Inputs) -> dict[str, Array]:
        [(student, teacher)] = _views.viewed(
            _views.matched_maps, _last_maps(setup), inputs.student, inputs.teacher
        )
        student = student @ student_head(inputs.params).kernel.astype(student.dtype)
        teacher = teacher @ jax.lax.stop_gradient(teacher_kernel).astype(teacher.dtype)
        resolution = min(2, *student.shape[1:3])
        return {"catkd": losses.catkd(student, teacher, resolution=resolution)}

    return Built(terms, {TASK: 1.0, "catkd": 400.0}, no_connectors, no_memory)


def _last_maps(setup: Setup) -> _views.Pairs:
    return () if setup.last_maps is None else (setup.last_maps,)


def _build_jacobian(setup: Setup, options: Options) -> Built:
    """Derivatives of the logits by the inputs, along a random direction of the outputs."""
    assert setup.models is not None
    models = setup.models

    def terms(inputs: Inputs) -> dict[str, Array]:
        key, _ = _builders.clock(inputs)
        logits = inputs.student["logits"]
        probes = jax.random.rademacher(key, (PROBES, *logits.shape), logits.dtype)
        values = losses.jacobian_matching(
            lambda x: models.student(inputs.params, x)["logits"],
            lambda x: models.teacher(x)["logits"],
            inputs.batch["inputs"],
            probes,
        )
        matched = losses.mse(logits, inputs.teacher["logits"])
        return {"mse": matched, "jacobian": values}

    weights = {TASK: 1.0, "mse": 1.0, "jacobian": 1.0}
    return Built(terms, weights, no_connectors, no_memory)


def _needs_student_head(setup: Setup) -> str | None:
    if setup.student_head is None:
        return "needs the student's classifier (a linear head), which this student does not show"
    return None


def _needs_last_maps(setup: Setup) -> str | None:
    if setup.last_maps is None:
        return "needs heads that read the average of a feature map, which has one map per class"
    return None


def _needs_models(setup: Setup) -> str | None:
    if setup.models is None:
        return "needs both networks to differentiate, not only their outputs (a teacher cache)"
    return None


METHODS = (
    Method(
        "simkd",
        "The teacher's classifier reused (SimKD)",
        "Chen et al., 2203.14001, 2022",
        "features",
        True,
        _build_simkd,
        _views.needs_teacher_head,
    ),
    Method(
        "srrl",
        "Softmax regression representation learning",
        "Yang et al., ICLR 2021",
        "features",
        True,
        _build_srrl,
        _views.needs_teacher_head,
    ),
    Method(
        "catkd",
        "Class attention transfer (CAT-KD)",
        "Guo et al., CVPR 2023",
        "maps",
        False,
        _build_catkd,
        _views.both(
            _needs_last_maps,
            _views.needs_positions(
                "a class activation map normalized over one position is only a sign", _last_maps
            ),
            _views.needs_teacher_head,
            _needs_student_head,
        ),
    ),
    Method(
        "jacobian",
        "Jacobian matching beside logit regression",
        "Srinivas, Fleuret, 1803.00443, 2018",
        "networks",
        False,
        _build_jacobian,
        _needs_models,
    ),
)
