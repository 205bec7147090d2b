"""Random-sampling distillation: a teacher stored as a few classes drawn from it.

The k most likely classes are a biased teacher, however their tail is treated; N draws are an
unbiased one. Draws come from `q ~ p_T^exponent`; a drawn class has the weight `p_T / q`.

    draws = losses.random_sampling_draws(key, teacher_logits, num_draws=50)
    targets = losses.random_sampling_targets(teacher_logits, draws)
    loss = losses.random_sampling_cross_entropy(student_logits, targets)

Logits are `[..., num_classes]`.

References:
  Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, 2025
  (2503.16870).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


class WeightedClasses(NamedTuple):
    """A sparse target: int `indices` `[..., N]` and `weights` `[..., N]`, >= 0.

    A class may appear more than once; its weights add up. An entry with weight 0 is padding.
    """

    indices: Array
    weights: Array


def random_sampling_draws(
    key: Array, teacher_logits: Array, *, num_draws: int, exponent: Scalar = 1.0
) -> Array:
    """Classes drawn with replacement from `q ~ p_T^exponent`: int32 `[..., num_draws]`.

    Args:
      key: a PRNG key.
      teacher_logits: `[..., num_classes]`.
      num_draws: N; 50 draws from a language model contain about 12 distinct classes.
      exponent: >= 0; below 1 it draws rare classes more often.
    """
    _checks.count(1, num_draws=num_draws)
    log_q = _proposal(teacher_logits, exponent)[1]
    draws = jax.random.categorical(key, log_q, axis=-1, shape=(num_draws, *log_q.shape[:-1]))
    return jnp.moveaxis(draws, 0, -1).astype(jnp.int32)


def random_sampling_targets(
    teacher_logits: Array, draws: Array, *, exponent: Scalar = 1.0
) -> WeightedClasses:
    """The draws with weights `p_T / (N q)`: in expectation, the teacher itself.

    At exponent 1 each weight is `1 / N`. Otherwise the weights do not sum to 1; divided by their
    sum, they are the paper's weights, with less variance and a bias that vanishes as N grows.

    Args:
      teacher_logits: `[..., num_classes]`.
      draws: int `[..., N]`, from `random_sampling_draws` with the same exponent.
      exponent: of the draws.

    Returns:
      `WeightedClasses`; under `jit`, the weight of a class out of range is NaN.
    """
    log_p, log_q = _proposal(teacher_logits, exponent)
    _checks.indices(log_p.shape[-1], draws=draws)
    if jnp.shape(draws)[:-1] != log_p.shape[:-1]:
        raise ValueError(
            "draws must be [..., N] with the teacher's leading dimensions, got "
            f"{_checks.described(teacher_logits=teacher_logits, draws=draws)}."
        )
    safe, usable = _numerics.usable_labels(draws, log_p.shape[-1])
    ratio = jnp.take_along_axis(_softmax.masked_difference(log_p, log_q), safe, axis=-1)
    weights = _numerics.at_usable(jnp.exp(ratio), usable) / jnp.shape(draws)[-1]
    return WeightedClasses(draws, weights)


def random_sampling_cross_entropy(
    student_logits: Array, targets: WeightedClasses, *, temperature: Scalar = 1.0
) -> Array:
    """`-sum_n w_n log p_S(class_n)`; its mean over draws is `soft_cross_entropy` with the teacher.

    Args:
      student_logits: `[..., num_classes]`.
      targets: indices out of range raise, or give NaN with gradient 0 under `jit`.
      temperature: softens the student, as the teacher was softened before the draws.

    Returns:
      `[...]`, nats, float32 or wider. Not zero at equality: the teacher's entropy stays in.
    """
    _checks.instance(WeightedClasses, targets=targets)
    student, _ = _logspace.soften(student_logits, student_logits, temperature)
    _checks.indices(student.shape[-1], indices=targets.indices)
    _checks.floating(weights=targets.weights)
    _checks.same_shape(**targets._asdict())
    if jnp.shape(targets.indices)[:-1] != student.shape[:-1]:
        raise ValueError(
            "targets must be [..., N] with the student's leading dimensions, got "
            f"{_checks.described(student_logits=student_logits, **targets._asdict())}."
        )
    indices, usable = _numerics.usable_labels(targets.indices, student.shape[-1])
    log_p = jnp.take_along_axis(_softmax.log_softmax(student), indices, axis=-1)
    weights = _numerics.upcast(targets.weights).astype(log_p.dtype)
    loss = _logspace.minus_mean_log(weights, weights != 0, log_p)
    return _numerics.at_usable(loss, jnp.all(usable, axis=-1))


def _proposal(teacher_logits: Array, exponent: Scalar) -> tuple[Array, Array]:
    """`log p` and `log q`; a class that the teacher excludes is never drawn."""
    _checks.non_negative(exponent=exponent)
    teacher = _logspace.soften_teacher(teacher_logits)
    log_p = _softmax.log_softmax(teacher)
    present = log_p != -jnp.inf
    power = _numerics.scalar(exponent, log_p, "exponent") * jnp.where(present, log_p, 0)
    return log_p, _softmax.log_softmax(power, where=present)
