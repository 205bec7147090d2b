"""Label-side methods: teachers made of labels, corrected by labels, or reduced to labels."""

from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import Scalar
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._method import Method

SMOOTHING = 0.1


def _label_smoothing(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    """Cross-entropy with the virtual teacher that is right with `1 - e + e / C`."""
    classes = student.shape[-1]
    virtual = losses.virtual_teacher(
        labels, classes, correct_probability=1 - SMOOTHING + SMOOTHING / classes
    )
    return losses.soft_cross_entropy(student, virtual.astype(student.dtype))


def _tf_kd(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    virtual = losses.virtual_teacher(labels, student.shape[-1]).astype(student.dtype)
    return losses.kd_kl(student, virtual, temperature=temperature)


def _probability_shift(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    shifted = losses.probability_shift(teacher, labels)
    return losses.kd_kl(student, shifted, temperature=temperature)


def _mft(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    corrected = losses.mft_teacher(teacher, labels, temperature=temperature)
    return temperature**2 * losses.forward_kl(student / temperature, corrected)


def _hard(student: Array, teacher: Array, labels: Array, temperature: Scalar) -> Array:
    return losses.hard_kd(student, teacher)


def _method(name: str, title: str, paper: str, needs: str, build: _builders.Build) -> Method:
    return Method(name, title, paper, needs, False, build, _views.always)


_of = _builders.of_logits

METHODS = (
    _method(
        "label_smoothing",
        "Label smoothing, a virtual teacher",
        "Szegedy et al., 1512.00567, 2015",
        "labels",
        _of("smooth", _label_smoothing, task=0.0),
    ),
    _method(
        "tf_kd",
        "Teacher-free KD",
        "Yuan et al., 1909.11723, 2019",
        "labels",
        _of("kd", _tf_kd, temperature=20.0, task=0.1, weight=0.9),
    ),
    _method(
        "probability_shift",
        "KD from a teacher whose errors are swapped away",
        "Wen et al., 1911.07471, 2019",
        "logits",
        _of("kd", _probability_shift, temperature=4.0, task=0.1, weight=0.9),
    ),
    _method(
        "mft",
        "Minifinetuning's corrected teacher",
        "Belcak et al., 2506.15702, 2025",
        "logits",
        _of("mft", _mft, task=0.0),
    ),
    _method(
        "hard_kd",
        "Hard distillation of the teacher's decisions (DeiT)",
        "Touvron et al., 2012.12877, 2021",
        "logits",
        _of("hard", _hard, task=0.5, weight=0.5),
    ),
)
