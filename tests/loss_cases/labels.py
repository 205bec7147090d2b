"""Rows of the losses with a teacher made or corrected from labels."""

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.divergences import kl, softmax
from loss_cases.logits import labelled


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


CASES: dict[str, LossCase] = {
    "tf_kd": LossCase(
        losses.tf_kd,
        logits_and_labels,
        tf_kd,
        {"correct_probability": 0.9, "temperature": 3.0},
        zero_at_equality=False,
        note="the second argument is a label",
    ),
    "mft": LossCase(
        losses.mft,
        labelled,
        mft,
        {"threshold": 0.2, "temperature": 2.0},
        zero_at_equality=False,
        note="the teacher is corrected",
    ),
}
