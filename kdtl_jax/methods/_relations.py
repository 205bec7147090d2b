"""Methods of relations between the examples of a batch: widths may differ."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Params
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import TASK, Built, Method, Options, Setup, no_connectors, no_memory
from kdtl_jax.objective import Inputs


def _build_rkd(setup: Setup, options: Options) -> Built:
    of_student, of_teacher = setup.last

    def terms(inputs: Inputs) -> dict[str, Array]:
        sides = inputs.student[of_student], inputs.teacher[of_teacher]
        return {"distance": losses.rkd_distance(*sides), "angle": losses.rkd_angle(*sides)}

    weights = {TASK: 1.0, "distance": 25.0, "angle": 50.0}
    return Built(terms, weights, no_connectors, no_memory)


def _pkt(student: Array, teacher: Array) -> Array:
    """As RepDistiller averages it, over pairs: its weight of 30000 belongs to that."""
    return losses.pkt(student, teacher) / len(student)


def _build_itrd(setup: Setup, options: Options) -> Built:
    """Correlation with each of the teacher's features, and the mutual information of both."""
    of_student, of_teacher = setup.last
    embed = connectors.linear(setup.teacher[of_teacher].shape[-1])

    def terms(inputs: Inputs) -> dict[str, Array]:
        teacher = inputs.teacher[of_teacher]
        student = embed.apply(inputs.connectors, inputs.student[of_student])
        apart = jnp.abs(losses.feature_correlation(student, teacher) - 1)
        return {
            # Published without a floor: -inf at perfect correlation.
            "correlation": jnp.log2(jnp.sum(apart**3) + 1e-12),
            "mutual": len(student) * losses.itrd_mutual(student, teacher),
        }

    def init(key: Array) -> Params:
        return embed.init(key, setup.student[of_student])

    return Built(terms, {TASK: 1.0, "correlation": 2.0, "mutual": 0.05}, init, no_memory)


def _related(
    name: str,
    title: str,
    paper: str,
    loss: _builders.PairLoss,
    weight: float,
    pairs: _builders.Layers = _views.last_pair,
) -> Method:
    build = _builders.over_pairs(
        name,
        loss,
        _builders.constant({name: weight}),
        pairs=pairs,
        view=_views.unmatched,
    )
    return Method(name, title, paper, "features", False, build, _views.needs_pairs(1, pairs))


METHODS = (
    _related(
        "sp",
        "Similarity-preserving KD",
        "Tung, Mori, 1907.09682, 2019",
        losses.sp,
        3000.0,
        _views.deepest_pair,
    ),
    Method(
        "rkd",
        "Relational KD, distances and angles",
        "Park et al., 1904.05068, 2019",
        "features",
        False,
        _build_rkd,
        _views.always,
    ),
    _related(
        "pkt",
        "Probabilistic knowledge transfer",
        "Passalis, Tefas, 1803.10837, 2018",
        _pkt,
        30000.0,
    ),
    _related("cc", "Correlation congruence", "Peng et al., 1904.01802, 2019", losses.cc, 0.003),
    Method(
        "itrd",
        "Information-theoretic representation distillation",
        "Miles, Rodriguez, Mikolajczyk, 2112.00459, 2022",
        "features",
        True,
        _build_itrd,
        _views.always,
    ),
)
