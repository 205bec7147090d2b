"""Losses for regularized fine-tuning and for matching derivatives.

Here the "teacher" is usually the pretrained model itself, run on the target task's data. All return
one value per example, `[B]`, in float32 or wider.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def delta(student: Array, source: Array, *, channel_weights: Array | None = None) -> Array:
    """`1/2 sum_c C a_c mean_positions (F_c - F0_c)^2`: channels weighted by their importance.

    Args:
      student: features `[B, ..., C]` of the model being trained.
      source: features of the pretrained model, the same shape.
      channel_weights: `a [C]`, sum 1 (`delta_attention`); None weighs all channels equally.

    Returns:
      `[B]`. `.sum()`, summed over layers, is TLL's number, which grows with the batch size.

    References:
      Li et al., DELTA: DEep Learning Transfer using Feature Map with Attention, 2019
      (1901.09229).
    """
    student, source = _sides.same_shape(student, source, names=("student", "source"))
    channels = student.shape[-1]
    if channel_weights is None:
        channel_weights = jnp.full((channels,), 1 / channels, student.dtype)
    if jnp.shape(channel_weights) != (channels,):
        raise ValueError(
            f"expected one weight per channel, [{channels}], got "
            f"{_checks.described(channel_weights=channel_weights)}."
        )
    square = jnp.square(student - source).reshape(student.shape[0], -1, channels)
    weights = channels * _numerics.cast(channel_weights, square)
    return jnp.sum(jnp.mean(square, axis=1) * weights[None, :], axis=-1) / 2


def delta_attention(damage: Array, *, temperature: Scalar = 5.0) -> Array:
    """Channel weights `softmax(standardized damage / temperature)` for `delta`.

    Args:
      damage: `[C]`, how much the loss rises when a channel is zeroed.
      temperature: 5 in DELTA's code; larger is flatter.

    Returns:
      `[C]`, sum 1. The deviation has divisor `C - 1`, as in TLL; equal damage gives 1/C.
    """
    damage = _sides.single(damage, "damage", at_least=1, at_most=1)
    _checks.positive(temperature=temperature)
    centered = damage - jnp.mean(damage)
    deviation = _numerics.safe_sqrt(jnp.sum(jnp.square(centered)) / max(damage.shape[0] - 1, 1))
    standard = _numerics.ratio(centered, deviation)
    return jax.nn.softmax(standard / _numerics.scalar(temperature, damage, "temperature"))


def co_tuning(student_logits: Array, target: Array) -> Array:
    """`-sum_s R[y, s] log softmax(z)_s`: the source head keeps predicting related source classes.

    Args:
      student_logits: `[B, Cs]`, the *source* head's, on the model being trained.
      target: `[B, Cs]`, `relation[labels]` of `transferability.category_relation`.

    Returns:
      `[B]`, nats. `.mean()` is TLL's number (weight 2.3; the source head at 0.1 times the learning
      rate).

    References:
      You et al., Co-Tuning for Transfer Learning, NeurIPS 2020.
    """
    names = "student_logits", "target"
    student_logits, target = _sides.same_shape(student_logits, target, names=names)
    _checks.several_classes(student_logits=student_logits)
    log_p = _softmax.log_softmax(student_logits)
    # An impossible class with target 0 contributes 0, not 0 * inf.
    return -jnp.sum(target * jnp.where(target == 0, 0, log_p), axis=-1)


def afn(features: Array, norms: Array, *, step: Scalar = 1.0) -> Array:
    """`(||f|| - norm - step)^2`: makes every example's feature norm grow by `step`.

    Args:
      features: `[B, D]`.
      norms: `[B]`, the norms to grow from: `stop_gradient(feature_norms(features))` gives the
        paper's stepwise form, a constant radius its hard form.
      step: the increase.

    Returns:
      `[B]`. In the stepwise form the value is always `step^2`; only the gradient matters.

    References:
      Xu et al., Larger Norm More Transferable, 2019 (1811.07456), its stepwise form.
    """
    features = _sides.single(features, "features", at_least=2, at_most=2)
    _checks.floating(norms=norms)
    if jnp.shape(norms) != features.shape[:1]:
        raise ValueError(
            f"expected norms [{features.shape[0]}], got {_checks.described(norms=norms)}."
        )
    target = _numerics.cast(norms, features) + _numerics.scalar(step, features, "step")
    return jnp.square(feature_norms(features) - target)


def feature_norms(features: Array) -> Array:
    """`||f||`, `[B, D] -> [B]`, with gradient 0 at 0."""
    return _numerics.safe_norm(_sides.single(features, "features", at_least=2, at_most=2))


# Matching derivatives needs models rather than outputs, as functions of a batch whose examples do
# not interact: `lambda x: model(params, state, x)[0]["logits"]`. Call these losses in `terms`.
BatchFn = Callable[[Array], Array]  # [B, ...] -> [B, ...], example by example


def jacobian_matching(student: BatchFn, teacher: BatchFn, inputs: Array, probes: Array) -> Array:
    """`mean_k || (J_S - J_T)^T v_k ||^2`, with one vector-Jacobian product per probe.

    If the probes have independent +-1 or unit normal entries, this is an unbiased estimate of
    `||J_S - J_T||_F^2` (Hutchinson); draw them with
    `jax.random.rademacher(inputs.key, (k, B, classes), dtype)`. A one-hot probe selects one output,
    as in Sobolev training and in matching the gradient of the target class.

    Args:
      student: maps `inputs` to `[B, ...]`.
      teacher: the same output shape.
      inputs: `[B, ...]`, where the derivatives are taken.
      probes: `[k, *output.shape]`, directions in output space.

    Returns:
      `[B]`, squared output units per squared input unit.

    References:
      Czarnecki et al., Sobolev Training for Neural Networks, 2017 (1706.04859); Srinivas and
      Fleuret, Knowledge Transfer with Jacobian Matching, 2018 (1803.00443).
    """
    inputs = _sides.single(inputs, "inputs", at_least=1)

    def difference(x: Array) -> Array:
        sides = student(x), teacher(x)
        return jnp.subtract(*_sides.same_shape(*sides, at_least=1))

    out, pull = jax.vjp(difference, inputs)
    if jnp.shape(probes)[1:] != out.shape:
        raise ValueError(
            "probes must have shape [k, *output], got "
            f"{_checks.described(probes=probes, output=out)}."
        )
    pulled = jax.vmap(lambda probe: pull(probe)[0])(_numerics.cast(probes, out))
    squares = jnp.square(pulled.reshape(len(probes), len(inputs), -1))
    return jnp.mean(jnp.sum(squares, axis=-1), axis=0)


def jacobian_matching_exact(student: BatchFn, teacher: BatchFn, inputs: Array) -> Array:
    """`||J_S - J_T||_F^2` per example, as `jacobian_matching`: one product per output.

    Args:
      student: maps `inputs` to `[B, ...]`.
      teacher: the same output shape.
      inputs: `[B, ...]`, where the derivatives are taken.

    Returns:
      `[B]`, squared output units per squared input unit.

    References:
      Srinivas and Fleuret, Knowledge Transfer with Jacobian Matching, 2018 (1803.00443).
    """
    out = jax.eval_shape(student, inputs)
    size = out.size // max(len(inputs), 1)
    basis = jnp.eye(size, dtype=out.dtype)
    probes = jnp.broadcast_to(basis[:, None, :], (size, len(inputs), size))
    probes = probes.reshape(size, *out.shape)
    return size * jacobian_matching(student, teacher, inputs, probes)
