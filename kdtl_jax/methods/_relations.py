"""Methods of relations between the examples of a batch: widths may differ."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Params
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import count, pairwise, real
from kdtl_jax.methods._setup import Method, Setup, method
from kdtl_jax.objective import Inputs


def sp(setup: Setup) -> Method:
    """`mean_ij (G_S - G_T)_ij^2` of row-normalized Gram matrices of the deepest layer.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019 (1907.09682). Task 1, sp 3000:
    RepDistiller.
    """
    found = _layers.layers(setup, _layers.deepest(setup), _layers.unchanged)

    def loss(student: Array, teacher: Array, where: Array | None) -> Array:
        return losses.sp(student, teacher, where=where)

    return pairwise(setup, "sp", loss, found, {"task": 1.0, "sp": 3000.0})


def rkd(setup: Setup) -> Method:
    """Distances between pairs and angles of triples of examples, of what the heads read.

    Park et al., Relational Knowledge Distillation, 2019 (1904.05068). Task 1, distance 25, angle
    50: RepDistiller and mdistiller.
    """
    of_student, of_teacher = setup.last

    def terms(inputs: Inputs) -> dict[str, Array]:
        sides = inputs.student[of_student], inputs.teacher[of_teacher]
        where = real(inputs)
        return {
            "distance": losses.rkd_distance(*sides, where=where),
            "angle": losses.rkd_angle(*sides, where=where),
        }

    return method(setup, terms, {"task": 1.0, "distance": 25.0, "angle": 50.0})


def pkt(setup: Setup) -> Method:
    """`KL` of cosine similarities to the batch, of what the heads read, over the batch's size.

    Passalis and Tefas, Probabilistic Knowledge Transfer, 2018 (1803.10837). Task 1, pkt 30000:
    RepDistiller, which averages over pairs of examples.
    """

    def loss(student: Array, teacher: Array, where: Array | None) -> Array:
        values = losses.pkt(student, teacher, where=where)
        return values / count(values, where)

    found = _layers.layers(setup, [setup.last], _layers.unchanged)
    return pairwise(setup, "pkt", loss, found, {"task": 1.0, "pkt": 30000.0})


def cc(setup: Setup) -> Method:
    """`mean_ij (K_S - K_T)_ij^2` of Gaussian kernels of what the heads read.

    Peng et al., Correlation Congruence, 2019 (1904.01802). Task 1, cc 0.003: torchdistill's
    configuration.
    """
    found = _layers.layers(setup, [setup.last], _layers.unchanged)

    def loss(student: Array, teacher: Array, where: Array | None) -> Array:
        return losses.cc(student, teacher, where=where)

    return pairwise(setup, "cc", loss, found, {"task": 1.0, "cc": 0.003})


def itrd(setup: Setup) -> Method:
    """`log2 sum_d |rho_d - 1|^3` of feature correlations rho, and mutual information.

    Miles, Rodriguez and Mikolajczyk, 2021 (2112.00459). The student is embedded linearly in the
    teacher's width. Task 1, correlation 2, mutual 0.05: the authors' code. Published without the
    floor of 1e-12 under the logarithm, -inf at perfect correlation.
    """
    of_student, of_teacher = setup.last
    embed = connectors.linear(setup.teacher[of_teacher].shape[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        teacher, where = inputs.teacher[of_teacher], real(inputs)
        student = embed.apply(inputs.connectors, inputs.student[of_student])
        mutual = losses.itrd_mutual(student, teacher, where=where)
        distance = jnp.abs(losses.feature_correlation(student, teacher, where=where) - 1)
        return {
            "correlation": jnp.log2(jnp.sum(distance**3) + 1e-12),
            "mutual": count(mutual, where) * mutual,
        }

    def init(key: Array) -> Params:
        return embed.init(key, setup.student[of_student])

    weights = {"task": 1.0, "correlation": 2.0, "mutual": 0.05}
    return method(setup, terms, weights, connectors=init)
