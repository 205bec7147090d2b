"""Methods of features that mean the same on vectors and on maps: most regress behind a connector.

Where a paper has one connector per layer, so has every matched pair here.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Params, Scalar
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import by_example, key_and_step, pairwise, projection, real, regressor
from kdtl_jax.methods._logits import exclusive_classes
from kdtl_jax.methods._setup import Method, Setup, method
from kdtl_jax.objective import Inputs


def hint(setup: Setup) -> Method:
    """`mean (r(f_S) - f_T)^2` of the middle layer, r a 1x1 convolution, batch norm, ReLU: FitNets.

    Romero et al., 2015 (1412.6550). Task 1, hint 100: RepDistiller and mdistiller, which train both
    at once (the paper: the hint first).
    """
    found = _layers.layers(setup, _layers.middle(setup))
    weights = {"task": 1.0, "hint": 100.0}
    return pairwise(setup, "hint", by_example(losses.mse), found, weights, connector=regressor)


def cosine(setup: Setup) -> Method:
    """`mean (1 - cos(W f_S, f_T))` summed over layers; task 1, cosine 1.

    Sanh et al., DistilBERT, 2019 (1910.01108), whose term for tokens is `hidden_cosine`.
    """
    found = _layers.layers(setup, _layers.every(setup))
    weights = {"task": 1.0, "cosine": 1.0}

    def loss(student: Array, teacher: Array) -> Array:
        values = losses.cosine_distance(student, teacher)  # of every position
        return jnp.mean(values.reshape(len(values), -1), axis=1)

    return pairwise(setup, "cosine", by_example(loss), found, weights, connector=connectors.linear)


def ridge_hint(setup: Setup) -> Method:
    """The hint of the deepest layer behind the best linear map, solved for in the loss.

    Golub and Pereyra, Separable nonlinear least squares: the variable projection method, 2003.
    Nothing to train beside the student; task 1, hint 1.
    """
    found = _layers.layers(setup, _layers.deepest(setup))

    def loss(student: Array, teacher: Array, where: Array | None) -> Array:
        return losses.ridge_hint(student, teacher, where=where)

    return pairwise(setup, "hint", loss, found, {"task": 1.0, "hint": 1.0})


def vid(setup: Setup) -> Method:
    """`mean 1/2 ((f_T - mu(f_S))^2 / v + log v)` summed over layers: variational information.

    Ahn et al., 2019 (1904.05835). The mean comes from three 1x1 convolutions, the variance is
    learned per channel, 5 at first. Task 1, vid 1: RepDistiller.
    """
    found = _layers.layers(setup, _layers.every(setup))
    means = [connectors.mlp((t.shape[-1],) * 3, bias=False) for t in found.teacher]
    variance = connectors.variance()

    def init(key: Array) -> Params:
        variances = [variance] * len(means)
        return _layers.init_each(means, found.student, key) | _layers.init_each(
            variances, found.teacher, key, prefix="variance"
        )

    def terms(inputs: Inputs) -> dict[str, Array]:
        params, features = inputs.connectors, found.read(inputs.student, inputs.teacher)
        features = _layers.connect(means, params, features, real(inputs))
        values = [
            losses.vid(mean, teacher, variance.apply(params[f"variance_{i}"], teacher))
            for i, (mean, teacher) in enumerate(features)
        ]
        return {"vid": sum(values[1:], values[0])}

    return method(setup, terms, {"task": 1.0, "vid": 1.0}, connectors=init)


def ickd(setup: Setup) -> Method:
    """`sum_cc' (G_S - G_T)^2 / C` of the deepest layer's channel Gram matrices, rows normalized.

    Liu et al., ICCV 2021. Task 1, ickd 500 / 256: torchdistill's 500 without its second division by
    the batch, there of 256 examples.
    """

    def loss(student: Array, teacher: Array) -> Array:
        return teacher.shape[-1] * losses.ickd(student, teacher)

    found = _layers.layers(setup, _layers.deepest(setup), _layers.maps)
    weights = {"task": 1.0, "ickd": 500 / 256}
    return pairwise(setup, "ickd", by_example(loss), found, weights, connector=projection)


def pkd(setup: Setup) -> Method:
    """`1 - rho` of features standardized per channel, summed over layers: Pearson correlation.

    Cao et al., 2022 (2207.02039). Task 1, pkd 1: mmrazor's default.
    """
    found = _layers.layers(setup, _layers.every(setup))
    weights = {"task": 1.0, "pkd": 1.0}

    def loss(student: Array, teacher: Array, where: Array | None) -> Array:
        return losses.pkd_pearson(student, teacher, where=where)

    return pairwise(setup, "pkd", loss, found, weights, connector=connectors.conv1x1)


def mgd(setup: Setup, *, masked: float = 0.15) -> Method:
    """`sum (G(mask * A f_S) - f_T)^2` of the deepest layer: masked generative distillation.

    Yang et al., 2022 (2205.01529). A share of the student's channels is dropped at every step and
    the teacher's features are generated from the rest. Task 1, mgd 7e-5, masked 0.15: the authors'
    classification settings.
    """
    found = _layers.layers(setup, _layers.deepest(setup), _layers.maps)
    channels = found.teacher[0].shape[-1]
    align, generate = connectors.conv1x1(channels), connectors.generator(channels)

    def init(key: Array) -> Params:
        key_align, key_generate = jax.random.split(key)
        return {
            "align": align.init(key_align, found.student[0]),
            "generator": generate.init(key_generate, found.teacher[0]),
        }

    def terms(inputs: Inputs) -> dict[str, Array]:
        params, (key, _) = inputs.connectors, key_and_step(inputs)
        [(student, teacher)] = found.read(inputs.student, inputs.teacher)
        student = align.apply(params["align"], student)
        keep = jax.random.bernoulli(key, 1 - masked, (len(student), 1, 1, channels))
        rest = jnp.where(keep, student, jnp.zeros((), student.dtype))
        generated = generate.apply(params["generator"], rest)
        return {"mgd": losses.squared_distance(generated, teacher)}

    return method(setup, terms, {"task": 1.0, "mgd": 7e-5}, connectors=init)


def srd(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`log sum_d |P f_S - f_T|^4` of what the heads read, batch-normalized, beside KD at T = 1.

    Miles and Mikolajczyk, The Role of the Projector, 2023 (2303.11098). The student is projected
    linearly. Task 1, srd 1, kd 1: the paper and torchdistill.
    """
    exclusive_classes(setup)
    of_student, of_teacher = setup.last
    teacher_shape = setup.teacher[of_teacher]
    project = projection(teacher_shape.shape[-1])
    norm = connectors.batch_norm()
    plain = norm.init(jax.random.key(0), teacher_shape)  # scale 1, offset 0: nothing to learn

    def terms(inputs: Inputs) -> dict[str, Array]:
        where = real(inputs)
        student = project.apply(inputs.connectors, inputs.student[of_student], where=where)
        teacher = norm.apply(plain, inputs.teacher[of_teacher], where=where)
        logits = inputs.student["logits"], inputs.teacher["logits"]
        return {
            "srd": losses.srd(student, teacher),
            "kd": losses.kd_kl(*logits, temperature=temperature),
        }

    def init(key: Array) -> Params:
        return project.init(key, setup.student[of_student])

    return method(setup, terms, {"task": 1.0, "srd": 1.0, "kd": 1.0}, connectors=init)
