"""Rows of the losses with labels, and of losses against teachers made or corrected from labels."""

from typing import Any

import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.divergences import kl, logits, softmax


def labelled(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    labels = rng.integers(0, 5, size=batch).astype(np.int32)
    return *logits(rng, batch), labels


def at(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return p[np.arange(len(p)), labels]


def without(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The distribution over the classes other than the label."""
    rest = np.stack([np.delete(row, label) for row, label in zip(p, labels, strict=True)])
    return rest / rest.sum(-1, keepdims=True)


def softened(student: np.ndarray, teacher: np.ndarray, temperature: float) -> tuple[Any, Any]:
    return softmax(student / temperature), softmax(teacher / temperature)


def tckd(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q, p = (at(x, labels) for x in softened(student, teacher, temperature))
    binary = [np.stack([x, 1 - x], axis=-1) for x in (p, q)]
    return temperature**2 * kl(*binary)


def nckd(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q, p = (without(x, labels) for x in softened(student, teacher, temperature))
    return temperature**2 * kl(p, q)


def target_cross_entropy(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    return -at(softmax(teacher), labels) * np.log(at(softmax(student), labels))


def wsld_weight(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> np.ndarray:
    of_student, of_teacher = (-np.log(at(softmax(x), labels)) for x in (student, teacher))
    return 1 - np.exp(-of_student / (of_teacher + 1e-7))


def uskd_weight(student: np.ndarray, labels: np.ndarray) -> np.ndarray:
    squared = at(softmax(student), labels) ** 2
    return squared + 1 - squared.mean()


def non_target_cross_entropy(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q, p = (without(x, labels) for x in softened(student, teacher, temperature))
    return -(p * np.log(q)).sum(-1)


def logits_and_labels(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    student, _, labels = labelled(rng, batch)
    return student, labels


def tf_kd(
    student: np.ndarray, labels: np.ndarray, correct_probability: float, temperature: float
) -> np.ndarray:
    classes = student.shape[-1]
    wrong = (1 - correct_probability) / (classes - 1)
    virtual = np.where(np.eye(classes)[labels] > 0, correct_probability, wrong)
    softer = virtual ** (1 / temperature)
    softer /= softer.sum(-1, keepdims=True)
    return temperature**2 * kl(softer, softmax(student / temperature))


def mft(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    temperature: float,
) -> np.ndarray:
    """Mixes each wrong row so that the label leads by the threshold; raises each right one."""
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    out = []
    for b, y in enumerate(labels):
        top, right = p[b].max(), p[b, y]
        if p[b].argmax() == y:
            share = min(threshold, 1 - right) / (1 - right + 1e-7)
        else:
            share = (top - right + threshold) / (1 + top - right + 1e-7)
        target = (1 - share) * p[b] + share * np.eye(p.shape[1])[y]
        if p[b].argmax() != y:
            others = np.delete(target, y)
            np.testing.assert_allclose(target[y] - others.max(), threshold, atol=1e-6)
        terms = [t * np.log(t / s) for t, s in zip(target, q[b], strict=True) if t > 0]
        out.append(temperature**2 * np.sum(terms))
    return np.asarray(out)


# The methods that are a loss against a teacher made by another function of the package.


def of_non_targets(student: Array, teacher: Array, labels: Array, *, temperature: float) -> Array:
    others = (losses.non_target_logits(z, labels) for z in (student, teacher))
    return losses.soft_cross_entropy(*others, temperature=temperature)


def of_virtual_teacher(
    student: Array, labels: Array, *, correct_probability: float, temperature: float
) -> Array:
    virtual = losses.virtual_teacher(
        labels, student.shape[-1], correct_probability=correct_probability
    )
    return losses.kd_kl(student, virtual, temperature=temperature)


def of_corrected_teacher(
    student: Array, teacher: Array, labels: Array, *, threshold: float, temperature: float
) -> Array:
    corrected = losses.mft_teacher(teacher, labels, threshold=threshold, temperature=temperature)
    student = student.astype(corrected.dtype) / temperature
    return temperature**2 * losses.forward_kl(student, corrected)


def row(fn: Any, oracle: Any, note: str, example: Any = labelled, **hyper: Any) -> LossCase:
    """A row of a loss that is not 0 at equality and masks examples."""
    return LossCase(fn, example, oracle, hyper, zero_at_equality=False, where_rank=1, note=note)


CE = "a cross-entropy: the teacher's entropy remains"

CASES: dict[str, LossCase] = {
    "tckd": LossCase(losses.tckd, labelled, tckd, {"temperature": 2.0}, where_rank=1),
    "nckd": LossCase(losses.nckd, labelled, nckd, {"temperature": 2.0}, where_rank=1),
    "target_cross_entropy": row(losses.target_cross_entropy, target_cross_entropy, CE),
    "wsld_weight": row(losses.wsld_weight, wsld_weight, "1 - 1/e at equality"),
    "uskd_weight": row(
        losses.uskd_weight, uskd_weight, "the second argument is a label", logits_and_labels
    )._replace(relational=True),
    "non_target_cross_entropy": row(
        of_non_targets, non_target_cross_entropy, CE, temperature=2.0
    )._replace(where_rank=0),
    "tf_kd": row(
        of_virtual_teacher,
        tf_kd,
        "the second argument is a label",
        logits_and_labels,
        correct_probability=0.9,
        temperature=3.0,
    )._replace(where_rank=0),
    "mft": row(
        of_corrected_teacher, mft, "the teacher is corrected", threshold=0.2, temperature=2.0
    )._replace(where_rank=0),
}
