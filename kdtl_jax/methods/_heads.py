"""Methods that compare positions, reuse the networks' classifiers, or differentiate the networks.

`at`, `nst`, `cwd`, `wkd_f` and `catkd` need feature maps (or tokens), and refuse vectors.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Outputs, Params, PyTree, Scalar
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import by_example, layers_of_maps, pairwise, regressor
from kdtl_jax.methods._method import (
    Method,
    cooled_down,
    key_and_step,
    method,
    needs_teacher_head,
    no_head,
)
from kdtl_jax.methods._setup import Head, Setup, check_setup
from kdtl_jax.objective import Inputs


def at(setup: Setup) -> Method:
    """`mean_i (a_S - a_T)_i^2` of unit attention maps `a = mean_c f^2`, summed over layers.

    Zagoruyko and Komodakis, 2017 (1612.03928). Task 1, at 1000: RepDistiller and mdistiller. (The
    paper does not square the norm.)
    """
    why = "a normalized attention map of one position is always 1"
    layers = layers_of_maps(setup, _layers.every(setup), because=why)
    return pairwise(
        setup, "at", by_example(losses.attention_transfer), layers, {"task": 1.0, "at": 1000.0}
    )


def nst(setup: Setup) -> Method:
    """Squared MMD of unit channel maps under `(x . y)^2`, summed over layers: neuron selectivity.

    Huang and Wang, 2017 (1707.01219). Task 1, nst 50: RepDistiller.
    """
    why = "a channel normalized over one position is only a sign"
    layers = layers_of_maps(setup, _layers.every(setup), because=why)
    return pairwise(setup, "nst", by_example(losses.nst), layers, {"task": 1.0, "nst": 50.0})


def cwd(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`T^2 mean_c KL(softmax_hw(t_c / T) || softmax_hw(s_c / T))` of the deepest map: channel-wise.

    Shu et al., 2021 (2011.13256). Task 1, cwd 50: the paper's weight for features (3 for score
    maps).
    """

    def loss(student: Array, teacher: Array) -> Array:
        return losses.cwd(student, teacher, temperature=temperature)

    why = "a softmax over one position is always 1"
    layers = layers_of_maps(setup, _layers.deepest(setup), because=why)
    weights = {"task": 1.0, "cwd": 50.0}
    return pairwise(setup, "cwd", by_example(loss), layers, weights, connector=connectors.conv1x1)


def wkd_f(setup: Setup) -> Method:
    """`4 ||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2` over the deepest map's positions.

    Lv, Yang and Li, 2024 (2412.08139). Task 1, wkd_f 0.08, decaying to 0 over the last 90 of 240
    epochs along a half cosine: the authors' code, whose variance is the unbiased one.
    """

    def loss(student: Array, teacher: Array) -> Array:
        return losses.wkd_feature(student, teacher, mean_weight=4.0)

    layers = layers_of_maps(setup, _layers.deepest(setup), because="one position has no variance")
    weights = {"task": 1.0, "wkd_f": cooled_down(0.08, setup)}
    return pairwise(setup, "wkd_f", by_example(loss), layers, weights, connector=regressor)


def catkd(setup: Setup) -> Method:
    """`mean (c_S - c_T)^2` of class activation maps, pooled to 2x2 and normalized per class.

    Guo et al., CVPR 2023. The maps are the last feature map times the kernel of the head that reads
    its average. Task 1, catkd 400: the default of the authors' code, whose configurations use 10 to
    600 depending on the pair (and 0.5 to 15 without the normalization).
    """
    check_setup(setup)
    if setup.last_maps is None:
        raise ValueError(
            "needs heads that read the average of the last feature map, and this average as the "
            "output 'pooled' of both models"
        )
    why = "a class activation map normalized over one position is only a sign"
    layers = layers_of_maps(setup, [setup.last_maps], because=why)
    teacher_kernel, student_head = needs_teacher_head(setup).kernel, setup.student_head
    if student_head is None:
        raise ValueError(no_head("student"))

    def terms(inputs: Inputs) -> dict[str, Array]:
        [(student, teacher)] = layers.read(inputs.student, inputs.teacher)
        student = student @ student_head(inputs.params).kernel.astype(student.dtype)
        teacher = teacher @ jax.lax.stop_gradient(teacher_kernel).astype(teacher.dtype)
        resolution = min(2, *student.shape[1:3])
        return {"catkd": losses.catkd(student, teacher, resolution=resolution)}

    return method(setup, terms, {"task": 1.0, "catkd": 400.0})


def classify(head: Head, features: Array) -> Array:
    """`features @ kernel + bias`, with the head frozen."""
    kernel, bias = jax.lax.stop_gradient(head)
    logits = features @ kernel.astype(features.dtype)
    if bias is None:
        return logits
    return logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)


def simkd(setup: Setup) -> Method:
    """`mean (P f_S - f_T)^2` of the last map, read by the teacher's classifier at inference.

    Chen et al., 2022 (2203.14001). The projector P (1x1, 3x3, 1x1 convolutions, each with batch
    norm and ReLU) remains part of the model: `Method.predict` goes through it, normalizing by the
    running statistics in the memory. Learns without labels (task 0, simkd 1), as the authors do.
    """
    head = needs_teacher_head(setup)
    pair = setup.last if setup.last_maps is None else setup.last_maps
    layers = _layers.layers(setup, [pair], _layers.maps)
    teacher_shape = setup.teacher[pair[1]]
    projector = connectors.simkd_projector(teacher_shape.shape[-1])

    def terms(inputs: Inputs) -> tuple[dict[str, Array], PyTree]:
        [(student, teacher)] = layers.read(inputs.student, inputs.teacher)
        student, measured = projector.measure(inputs.connectors, student, where=inputs.real)
        running = connectors.running_update(inputs.memory, measured)
        return {"simkd": losses.mse(student, teacher)}, running

    def predict(params: Params, memory: PyTree, student: Outputs) -> Array:
        # Only the size of the teacher's map matters here: the student's map is pooled to it.
        features = student[pair[0]]
        blank = jnp.zeros((features.shape[0], *teacher_shape.shape[1:]), features.dtype)
        [(features, _)] = layers.read(student, {pair[1]: blank})
        projected = projector.evaluate(params, memory, features)
        return classify(head, _layers.as_vector(projected))

    def init(key: Array) -> Params:
        return projector.init(key, layers.student[0])

    def running(key: Array) -> PyTree:
        params = jax.eval_shape(init, key)
        return connectors.running_init(projector, params, layers.student[0])

    weights = {"task": 0.0, "simkd": 1.0}
    return method(setup, terms, weights, connectors=init, memory=running, predict=predict)


def srrl(setup: Setup) -> Method:
    """`mean (r(f_S) - f_T)^2 + 5 mean (W_T r(f_S) - W_T f_T)^2`: the teacher's classifier judges.

    Yang et al., ICLR 2021. r is a 1x1 convolution, batch norm and ReLU on the head's input. Task 1,
    feature 1, classifier 5: cls_KD.
    """
    head, (student_tap, teacher_tap) = needs_teacher_head(setup), setup.last
    connector = regressor(setup.teacher[teacher_tap].shape[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        student = inputs.student[student_tap]
        student = connector.apply(inputs.connectors, student, where=inputs.real)
        teacher = inputs.teacher[teacher_tap]
        logits = classify(head, student), classify(head, teacher)
        return {"feature": losses.mse(student, teacher), "classifier": losses.mse(*logits)}

    def init(key: Array) -> Params:
        return connector.init(key, setup.student[student_tap])

    return method(setup, terms, {"task": 1.0, "feature": 1.0, "classifier": 5.0}, connectors=init)


def jacobian(setup: Setup, *, probes: int = 1) -> Method:
    """`||(J_S - J_T)^T v||^2` of the logits with respect to the inputs, plus logit regression.

    Srinivas and Fleuret, 2018 (1803.00443). v is drawn from {-1, 1}, so the mean is the squared
    distance between the Jacobians. Task 1, mse 1, jacobian 1.
    """
    check_setup(setup)
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
