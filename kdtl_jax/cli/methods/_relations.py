"""Methods of relations between the examples of a batch: widths may differ, nothing is trained."""

from jax import Array

from kdtl_jax import losses
from kdtl_jax.cli.methods import _views
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes._method import TASK, Built, Method, Options, Setup, no_connectors, no_memory


def _build_rkd(setup: Setup, options: Options) -> Built:
    of_student, of_teacher = setup.last

    def terms(inputs: Inputs) -> dict[str, Array]:
        sides = inputs.student[of_student], inputs.teacher[of_teacher]
        return {
            "distance": losses.rkd_distance(*sides),
            "angle": losses.rkd_angle(*sides),
        }

    weights = {TASK: 1.0, "distance": 25.0, "angle": 50.0}
    return Built(terms, weights, no_connectors, no_memory)


METHODS = (
    Method(
        "rkd",
        "Relational KD, distances and angles",
        "Park et al., 1904.05068, 2019",
        "features",
        False,
        _build_rkd,
        _views.always,
    ),
)
