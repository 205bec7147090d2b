"""Rows of the losses of regularized fine-tuning, and of matched derivatives."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase


def maps(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 2, 3, 4)), rng.normal(size=(batch, 2, 3, 4))


def logits_and_target(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 5)), rng.dirichlet(np.ones(5), size=batch)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def delta(student: np.ndarray, source: np.ndarray, channel_weights: np.ndarray) -> np.ndarray:
    positions = student.shape[1] * student.shape[2]
    by_channel = ((student - source) ** 2).sum((1, 2)) / positions
    return 0.5 * (len(channel_weights) * channel_weights * by_channel).sum(-1)


def co_tuning(student: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -(target * np.log(softmax(student))).sum(-1)


def models(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    """Each example has a model of its own, `tanh(W x)`: student, teacher, inputs, probes."""
    student, teacher = rng.normal(size=(2, batch, 2, 3))
    return student, teacher, rng.normal(size=(batch, 3)), rng.normal(size=(batch, 4, 2))


def model(weights: Array) -> Callable[[Array], Array]:
    return lambda x: jnp.tanh(jnp.einsum("bij,bj->bi", weights, x))


def checked(student: Array, teacher: Array) -> jnp.dtype:
    """The wrappers below stand for a user's models, who would check their own weights."""
    for weights in (student, teacher):
        if not jnp.issubdtype(jnp.asarray(weights).dtype, jnp.floating):
            raise TypeError("models must be floating point")
    if jnp.shape(student) != jnp.shape(teacher):
        shapes = list(jnp.shape(student)), list(jnp.shape(teacher))
        raise ValueError(f"models differ: {shapes}")
    dtype = jnp.asarray(student).dtype
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def jacobian_matching(student: Array, teacher: Array, inputs: Array, probes: Array) -> Array:
    dtype = checked(student, teacher)
    student, teacher, inputs, probes = (
        jnp.asarray(x, dtype) for x in (student, teacher, inputs, probes)
    )
    return losses.jacobian_matching(
        model(student), model(teacher), inputs, jnp.swapaxes(probes, 0, 1)
    )


def jacobian_matching_exact(student: Array, teacher: Array, inputs: Array, _: Array) -> Array:
    dtype = checked(student, teacher)
    student, teacher, inputs = (jnp.asarray(x, dtype) for x in (student, teacher, inputs))
    return losses.jacobian_matching_exact(model(student), model(teacher), inputs)


def jacobian(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (1 - np.tanh(weights @ x) ** 2)[:, None] * weights


def probed(
    student: np.ndarray, teacher: np.ndarray, inputs: np.ndarray, probes: np.ndarray
) -> np.ndarray:
    out = []
    for s, t, x, vs in zip(student, teacher, inputs, probes, strict=True):
        apart = jacobian(s, x) - jacobian(t, x)
        out.append(np.mean([((v @ apart) ** 2).sum() for v in vs]))
    return np.asarray(out)


def frobenius(
    student: np.ndarray, teacher: np.ndarray, inputs: np.ndarray, _: np.ndarray
) -> np.ndarray:
    zipped = zip(student, teacher, inputs, strict=True)
    return np.asarray([((jacobian(s, x) - jacobian(t, x)) ** 2).sum() for s, t, x in zipped])


CASES: dict[str, LossCase] = {
    "delta": LossCase(
        losses.delta, maps, delta, {"channel_weights": np.asarray([0.125, 0.25, 0.125, 0.5])}
    ),
    "co_tuning": LossCase(
        losses.co_tuning,
        logits_and_target,
        co_tuning,
        zero_at_equality=False,
        nonnegative=False,
        note="a cross-entropy against probabilities; the battery also passes it other numbers",
    ),
    "jacobian_matching": LossCase(jacobian_matching, models, probed),
    "jacobian_matching_exact": LossCase(jacobian_matching_exact, models, frobenius),
}
