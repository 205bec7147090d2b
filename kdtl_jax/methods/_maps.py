"""Methods that compare positions: they need feature maps (or tokens), and say so of vectors."""

import jax
from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax._types import Scalar
from kdtl_jax.methods import _layers
from kdtl_jax.methods._layers import by_example, layers_of_maps, pairwise, regressor
from kdtl_jax.methods._logits import cooled_down, needs_teacher_head
from kdtl_jax.methods._setup import Method, Setup, method
from kdtl_jax.objective import Inputs


def at(setup: Setup) -> Method:
    """`mean_i (a_S - a_T)_i^2` of unit attention maps `a = mean_c f^2`, summed over layers.

    Zagoruyko and Komodakis, 2017 (1612.03928). Task 1, at 1000: RepDistiller and mdistiller. (The
    paper does not square the norm.)
    """
    why = "a normalized attention map of one position is always 1"
    found = layers_of_maps(setup, _layers.every(setup), because=why)
    return pairwise(
        setup, "at", by_example(losses.attention_transfer), found, {"task": 1.0, "at": 1000.0}
    )


def nst(setup: Setup) -> Method:
    """Squared MMD of unit channel maps under `(x . y)^2`, summed over layers: neuron selectivity.

    Huang and Wang, 2017 (1707.01219). Task 1, nst 50: RepDistiller.
    """
    why = "a channel normalized over one position is only a sign"
    found = layers_of_maps(setup, _layers.every(setup), because=why)
    return pairwise(setup, "nst", by_example(losses.nst), found, {"task": 1.0, "nst": 50.0})


def cwd(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """`T^2 mean_c KL(softmax_hw(t_c / T) || softmax_hw(s_c / T))` of the deepest map: channel-wise.

    Shu et al., 2020 (2011.13256). Task 1, cwd 50: the authors' weight for features.
    """

    def loss(student: Array, teacher: Array) -> Array:
        return losses.cwd(student, teacher, temperature=temperature)

    why = "a softmax over one position is always 1"
    found = layers_of_maps(setup, _layers.deepest(setup), because=why)
    weights = {"task": 1.0, "cwd": 50.0}
    return pairwise(setup, "cwd", by_example(loss), found, weights, connector=connectors.conv1x1)


def wkd_f(setup: Setup) -> Method:
    """`4 ||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2` over the deepest map's positions.

    Lv, Yang and Li, 2024 (2412.08139). Task 1, wkd_f 0.08, let down to 0 over the last 90 of 240
    epochs along a half cosine: the authors' code, whose variance is the unbiased one.
    """

    def loss(student: Array, teacher: Array) -> Array:
        return losses.wkd_feature(student, teacher, mean_weight=4.0)

    found = layers_of_maps(setup, _layers.deepest(setup), because="one position has no variance")
    weights = {"task": 1.0, "wkd_f": cooled_down(0.08, setup)}
    return pairwise(setup, "wkd_f", by_example(loss), found, weights, connector=regressor)


def catkd(setup: Setup) -> Method:
    """`mean (c_S - c_T)^2` of class activation maps, pooled to 2x2 and normalized per class.

    Guo et al., CVPR 2023. The maps are the last feature map times the kernel of the head that reads
    its average. Task 1, catkd 400: the authors on CIFAR-100.
    """
    if setup.last_maps is None:
        raise ValueError(
            "needs heads that read the average of a feature map, which has one map per class"
        )
    why = "a class activation map normalized over one position is only a sign"
    found = layers_of_maps(setup, [setup.last_maps], because=why)
    teacher_kernel, student_head = needs_teacher_head(setup).kernel, setup.student_head
    if student_head is None:
        raise ValueError(
            "needs the student's classifier (a linear head), which this student does not show"
        )

    def terms(inputs: Inputs) -> dict[str, Array]:
        [(student, teacher)] = found.read(inputs.student, inputs.teacher)
        student = student @ student_head(inputs.params).kernel.astype(student.dtype)
        teacher = teacher @ jax.lax.stop_gradient(teacher_kernel).astype(teacher.dtype)
        resolution = min(2, *student.shape[1:3])
        return {"catkd": losses.catkd(student, teacher, resolution=resolution)}

    return method(setup, terms, {"task": 1.0, "catkd": 400.0})
