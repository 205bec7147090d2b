"""Matching derivatives: a student that also moves as its teacher moves.

These take models rather than outputs, as functions of a batch whose examples do not interact:
`lambda x: model(params, state, x)[0]["logits"]`. Call them inside `terms`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax.losses import _door

BatchFn = Callable[[Array], Array]  # [B, ...] -> [B, ...], example by example


def jacobian_matching(student: BatchFn, teacher: BatchFn, inputs: Array, probes: Array) -> Array:
    """`mean_k || (J_S - J_T)^T v_k ||^2` by one vector-Jacobian product per probe.

    With probes of independent +-1 or unit normal entries this is an unbiased estimate of
    `||J_S - J_T||_F^2` (Hutchinson): draw them with
    `jax.random.rademacher(inputs.key, (k, B, classes), dtype)`. A one-hot probe selects one
    output, as in Sobolev training and in matching the gradient of the target class.

    Args:
      student: maps `inputs` to `[B, ...]`.
      teacher: the same output shape.
      inputs: `[B, ...]`, where the derivatives are taken.
      probes: `[k, *output.shape]`, directions in output space.

    Returns:
      `[B]`, squared output units per squared input unit.

    Raises:
      ValueError: if the output shapes differ or the probes do not fit them.
      TypeError: if an array is not floating point.

    References:
      Czarnecki et al., Sobolev Training for Neural Networks, 2017 (1706.04859); Srinivas and
      Fleuret, Knowledge Transfer with Jacobian Matching, 2018 (1803.00443).
    """
    inputs = _door.one("jacobian_matching", inputs, at_least=1)

    def difference(x: Array) -> Array:
        sides = student(x), teacher(x)
        return jnp.subtract(*_door.same_shape("jacobian_matching", *sides, at_least=1))

    out, pull = jax.vjp(difference, inputs)
    if jnp.shape(probes)[1:] != out.shape:
        raise ValueError(
            "probes must have shape [k, *output], got "
            f"{_checks.described(probes=probes, output=out)}."
        )
    pulled = jax.vmap(lambda probe: pull(probe)[0])(_numerics.scalar(probes, out))
    squares = jnp.square(pulled.reshape(len(probes), len(inputs), -1))
    return jnp.mean(jnp.sum(squares, axis=-1), axis=0)


def jacobian_matching_exact(student: BatchFn, teacher: BatchFn, inputs: Array) -> Array:
    """`||J_S - J_T||_F^2` per example: one vector-Jacobian product per output.

    Args:
      student: maps `inputs` to `[B, ...]`.
      teacher: the same output shape.
      inputs: `[B, ...]`, where the derivatives are taken.

    Returns:
      `[B]`, squared output units per squared input unit.

    Raises:
      ValueError: if the output shapes differ.
      TypeError: if an array is not floating point.

    References:
      Srinivas and Fleuret, Knowledge Transfer with Jacobian Matching, 2018 (1803.00443).
    """
    out = jax.eval_shape(student, inputs)
    size = out.size // max(len(inputs), 1)
    basis = jnp.eye(size, dtype=out.dtype)
    probes = jnp.broadcast_to(basis[:, None, :], (size, len(inputs), size))
    probes = probes.reshape(size, *out.shape)
    return size * jacobian_matching(student, teacher, inputs, probes)
