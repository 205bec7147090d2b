"""Label-side methods: teachers made of labels, corrected by labels, or reduced to labels."""

from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import Scalar
from kdtl_jax.methods._logits import Logits, of_logits
from kdtl_jax.methods._setup import Method, Setup


def label_smoothing(setup: Setup, *, smoothing: float = 0.1) -> Method:
    """Cross-entropy with a virtual teacher that is right with probability `1 - e + e / C`.

    Szegedy et al., 2015 (1512.00567). In place of the task (task 0, smooth 1), e = 0.1 as in the
    paper.
    """

    def terms(x: Logits) -> dict[str, Array]:
        correct = 1 - smoothing + smoothing / setup.classes
        virtual = losses.virtual_teacher(x.labels, setup.classes, correct_probability=correct)
        return {"smooth": losses.soft_cross_entropy(x.student, virtual.astype(x.student.dtype))}

    return of_logits(setup, terms, {"task": 0.0, "smooth": 1.0})


def tf_kd(setup: Setup, *, temperature: Scalar = 20.0, correct_probability: float = 0.99) -> Method:
    """KD from a virtual teacher of the labels: teacher-free KD.

    Yuan et al., 2019 (1909.11723). Task 0.1, kd 0.9, T = 20: the authors' code, which averages over
    classes as well and makes up for it by a constant.
    """

    def terms(x: Logits) -> dict[str, Array]:
        virtual = losses.virtual_teacher(
            x.labels, setup.classes, correct_probability=correct_probability
        )
        virtual = virtual.astype(x.student.dtype)
        return {"kd": losses.kd_kl(x.student, virtual, temperature=temperature)}

    return of_logits(setup, terms, {"task": 0.1, "kd": 0.9})


def probability_shift(setup: Setup, *, temperature: Scalar = 4.0) -> Method:
    """KD from the teacher with its largest logit and the label's exchanged: never wrong.

    Wen et al., 2019 (1911.07471). Task 0.1, kd 0.9, as for KD.
    """

    def terms(x: Logits) -> dict[str, Array]:
        shifted = losses.probability_shift(x.teacher, x.labels)
        return {"kd": losses.kd_kl(x.student, shifted, temperature=temperature)}

    return of_logits(setup, terms, {"task": 0.1, "kd": 0.9})


def mft(setup: Setup, *, temperature: Scalar = 1.0) -> Method:
    """KD from a teacher that the labels correct: minifinetuning.

    Belcak et al., 2025 (2506.15702). In place of the task (task 0, mft 1), threshold 0.2:
    Model-Optimizer.
    """

    def terms(x: Logits) -> dict[str, Array]:
        corrected = losses.mft_teacher(x.teacher, x.labels, temperature=temperature)
        values = losses.forward_kl(x.student / temperature, corrected)
        return {"mft": temperature**2 * values}

    return of_logits(setup, terms, {"task": 0.0, "mft": 1.0})


def hard_kd(setup: Setup) -> Method:
    """`-log p_S(argmax z_T)`: the teacher's decisions as labels (DeiT).

    Touvron et al., 2020 (2012.12877). Task 0.5, hard 0.5, as in the paper.
    """

    def terms(x: Logits) -> dict[str, Array]:
        return {"hard": losses.hard_kd(x.student, x.teacher)}

    return of_logits(setup, terms, {"task": 0.5, "hard": 0.5})
