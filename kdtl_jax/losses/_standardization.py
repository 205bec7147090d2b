"""Logit standardization: z-scores per example, so that only the shape of the logits is taught."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses._logits import kd_kl


def standardize_logits(
    logits: Array, *, ddof: int = 0, eps: Scalar = 1e-7, where: Array | None = None
) -> Array:
    """`(z - mean z) / (std z + eps)` over the classes of each example.

    Use it before any loss on logits. A constant row becomes 0, with gradient 0; -inf entries stay
    -inf and do not count.

    Args:
      logits: `[..., num_classes]`.
      ddof: 0 divides the squared deviations by `num_classes`, the paper's population deviation;
        1 by `num_classes - 1`, what the authors' code does (with two classes the results differ by
        sqrt(2)).
      eps: added to the deviation, as in the authors' code.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[..., num_classes]`, float32 or wider.

    Raises:
      ValueError: if the logits are empty or scalar, or there are not more classes than `ddof`.
      TypeError: if the logits are not floating point.

    References:
      Sun et al., Logit Standardization in Knowledge Distillation, 2024 (2403.01427).
    """
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.nonempty(logits=logits)
    _checks.mask(where, logits.shape)
    if logits.shape[-1] <= ddof:
        raise ValueError(
            f"needs more than ddof={ddof} classes, "
            f"got {_checks.described(logits=logits)}. Use ddof=0."
        )
    z = _numerics.upcast(logits)
    present = z != -jnp.inf
    if where is not None:
        present &= where
    count = jnp.sum(present, axis=-1, keepdims=True, dtype=z.dtype)
    kept = jnp.where(present, z, 0)
    centered = jnp.where(present, kept - _sum(kept) / jnp.maximum(count, 1), 0)
    deviation = _numerics.safe_norm(centered, keepdims=True) / jnp.sqrt(
        jnp.maximum(count - ddof, 1)
    )
    varies = deviation != 0
    scale = jnp.where(varies, deviation, 1) + _numerics.scalar(eps, z)
    return jnp.where(present, jnp.where(varies, centered, 0) / scale, -jnp.inf)


def standardized_kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 2.0,
    ddof: int = 0,
    where: Array | None = None,
) -> Array:
    """`kd_kl` of standardized logits: `T^2 KL(softmax(Z(z_T) / T) || softmax(Z(z_S) / T))`.

    `.mean()` with `ddof=1` gives the number of the authors' code (weight 9 there) and, times beta,
    torchdistill's `LogitStdKDLoss`.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens the z-scores; a scalar or one value per example.
      ddof: see `standardize_logits`.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats times `T^2`.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Sun et al., 2024 (2403.01427).
    """
    _checks.same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    return kd_kl(
        standardize_logits(student_logits, ddof=ddof, where=where),
        standardize_logits(teacher_logits, ddof=ddof, where=where),
        temperature=temperature,
        where=where,
    )


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)
