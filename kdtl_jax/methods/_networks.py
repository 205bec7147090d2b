"""Methods that use more of the networks than outputs: their classifiers, or their derivatives."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Outputs, Params, PyTree
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import key_and_step, real, regressor
from kdtl_jax.methods._logits import needs_teacher_head
from kdtl_jax.methods._setup import Head, Method, Setup, method
from kdtl_jax.objective import Inputs


def classify(head: Head, features: Array) -> Array:
    """`features @ kernel + bias`, the head frozen."""
    kernel, bias = jax.lax.stop_gradient(head)
    logits = features @ kernel.astype(features.dtype)
    if bias is None:
        return logits
    return logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)


def simkd(setup: Setup) -> Method:
    """`mean (P f_S - f_T)^2` of the last map, read by the teacher's classifier at inference.

    Chen et al., 2022 (2203.14001). The projector P (1x1, 3x3, 1x1 convolutions, each with batch
    norm and ReLU) stays: `Method.predict` goes through it, normalizing by the running statistics
    that the memory holds. Learns without labels (task 0, simkd 1), as the authors do.
    """
    head = needs_teacher_head(setup)
    pair = setup.last if setup.last_maps is None else setup.last_maps
    found = _layers.layers(setup, [pair], _layers.maps)
    of_teacher = setup.teacher[pair[1]]
    projector = connectors.simkd_projector(of_teacher.shape[-1])

    def terms(inputs: Inputs) -> tuple[dict[str, Array], PyTree]:
        [(student, teacher)] = found.read(inputs.student, inputs.teacher)
        student, measured = projector.measure(inputs.connectors, student, where=real(inputs))
        running = connectors.running_update(inputs.memory, measured)
        return {"simkd": losses.mse(student, teacher)}, running

    def predict(params: Params, memory: PyTree, student: Outputs) -> Array:
        # Of the teacher's map only the size matters here: the student's is pooled to it.
        features = student[pair[0]]
        blank = jnp.zeros((len(features), *of_teacher.shape[1:]), features.dtype)
        [(features, _)] = found.read(student, {pair[1]: blank})
        projected = projector.evaluate(params, memory, features)
        return classify(head, _layers.as_vector(projected))

    def init(key: Array) -> Params:
        return projector.init(key, found.student[0])

    def running(key: Array) -> PyTree:
        params = jax.eval_shape(init, key)
        return connectors.running_init(projector, params, found.student[0])

    weights = {"task": 0.0, "simkd": 1.0}
    return method(setup, terms, weights, connectors=init, memory=running, predict=predict)


def srrl(setup: Setup) -> Method:
    """`mean (r(f_S) - f_T)^2 + 5 mean (W_T r(f_S) - W_T f_T)^2`: the teacher's classifier judges.

    Yang et al., ICLR 2021. r is a 1x1 convolution, batch norm and ReLU on what the head reads. Task
    1, feature 1, classifier 5: cls_KD.
    """
    head, (of_student, of_teacher) = needs_teacher_head(setup), setup.last
    connector = regressor(setup.teacher[of_teacher].shape[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        student = inputs.student[of_student]
        student = connector.apply(inputs.connectors, student, where=real(inputs))
        teacher = inputs.teacher[of_teacher]
        logits = classify(head, student), classify(head, teacher)
        return {"feature": losses.mse(student, teacher), "classifier": losses.mse(*logits)}

    def init(key: Array) -> Params:
        return connector.init(key, setup.student[of_student])

    return method(setup, terms, {"task": 1.0, "feature": 1.0, "classifier": 5.0}, connectors=init)


def jacobian(setup: Setup, *, probes: int = 1) -> Method:
    """`||(J_S - J_T)^T v||^2` of the logits with respect to the inputs, beside logit regression.

    Srinivas and Fleuret, 2018 (1803.00443). v is drawn from {-1, 1}, so that the mean is the
    squared distance of the Jacobians. Task 1, mse 1, jacobian 1.
    """
    if setup.models is None:
        raise ValueError(
            "needs both networks to differentiate, without batch statistics, and the teacher's "
            "parameters, not only outputs (a teacher cache)"
        )
    models = setup.models

    def terms(inputs: Inputs) -> dict[str, Array]:
        key, _ = key_and_step(inputs)
        logits = inputs.student["logits"]
        directions = jax.random.rademacher(key, (probes, *logits.shape), logits.dtype)
        values = losses.jacobian_matching(
            lambda x: models.student(inputs.params, x)["logits"],
            lambda x: models.teacher(x)["logits"],
            inputs.batch["inputs"],
            directions,
        )
        return {"mse": losses.mse(logits, inputs.teacher["logits"]), "jacobian": values}

    return method(setup, terms, {"task": 1.0, "mse": 1.0, "jacobian": 1.0})
