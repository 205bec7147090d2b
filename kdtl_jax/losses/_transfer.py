"""Losses of regularized fine-tuning, one value per example: stay near what the source model does.

The "teacher" of these losses is the pretrained model itself, run on the target's data.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door
from kdtl_jax.losses._divergences import forward_kl


def behavioral(student: Array, source: Array) -> Array:
    """`1/2 ||F - F0||^2`, summed over positions and channels of one layer's feature map.

    Args:
      student: features `[B, ..., C]` of the model being trained.
      source: features of the pretrained model, the same shape.

    Returns:
      `[B]`. `.sum()`, summed over layers, is TLL's number, which grows with the batch.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if the features are not floating point.

    References:
      Li et al., DELTA, 2019 (1901.09229), the baseline without attention.
    """
    student, source = _door.same_shape("behavioral", student, source)
    return jnp.sum(jnp.square(_numerics.batch_flat(student - source)), axis=-1) / 2


def delta(student: Array, source: Array, *, channel_weights: Array | None = None) -> Array:
    """`1/2 sum_c C a_c mean_positions (F_c - F0_c)^2`: channels weigh what they matter.

    Args:
      student: features `[B, ..., C]` of the model being trained.
      source: features of the pretrained model, the same shape.
      channel_weights: `a [C]`, sum 1 (`delta_attention`); None weighs all channels equally.

    Returns:
      `[B]`. `.sum()`, summed over layers, is TLL's number, which grows with the batch.

    Raises:
      ValueError: if shapes differ or are empty, or there is not one weight per channel.
      TypeError: if the features are not floating point.

    References:
      Li et al., DELTA: DEep Learning Transfer using Feature Map with Attention, 2019
      (1901.09229).
    """
    student, source = _door.same_shape("delta", student, source)
    channels = student.shape[-1]
    if channel_weights is None:
        channel_weights = jnp.full((channels,), 1 / channels, student.dtype)
    if jnp.shape(channel_weights) != (channels,):
        raise ValueError(
            f"expected one weight per channel, [{channels}], got "
            f"{_checks.described(channel_weights=channel_weights)}."
        )
    square = jnp.square(student - source).reshape(student.shape[0], -1, channels)
    weights = channels * _numerics.scalar(channel_weights, square)
    return jnp.sum(jnp.mean(square, axis=1) * weights[None, :], axis=-1) / 2


def delta_attention(damage: Array, *, temperature: Scalar = 5.0) -> Array:
    """Channel weights `softmax(standardized damage / temperature)` for `delta`.

    Args:
      damage: `[C]`, how much the loss rises when a channel is zeroed (`channel_damage`).
      temperature: 5 in DELTA's code; larger is flatter.

    Returns:
      `[C]`, sum 1. The deviation has divisor `C - 1`, as in TLL; equal damage gives 1/C.

    Raises:
      ValueError: if `damage` is not one row, or the temperature is not positive.
    """
    damage = _door.one("delta_attention", damage, at_least=1, at_most=1)
    _checks.positive(temperature=temperature)
    centered = damage - jnp.mean(damage)
    deviation = _numerics.safe_sqrt(jnp.sum(jnp.square(centered)) / max(damage.shape[0] - 1, 1))
    standard = jnp.where(deviation != 0, centered / jnp.where(deviation != 0, deviation, 1), 0)
    return jax.nn.softmax(standard / _numerics.scalar(temperature, damage))


def lwf(student_logits: Array, old_logits: Array, *, temperature: Scalar = 2.0) -> Array:
    """Learning without forgetting: `KL(softmax(z_old / T) || softmax(z / T))` on the old head.

    The paper prints the cross-entropy, which is larger by the entropy of the recorded outputs and
    has the same gradient. No `T^2` (TLL: weight 4, T = 3, `.mean()`; paper: weight 1, T = 2).

    Args:
      student_logits: `[..., num_classes]` of the old head on the model being trained.
      old_logits: the same, recorded before training.
      temperature: softens both.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Li and Hoiem, Learning without Forgetting, 2016 (1606.09282), eq. 2 and 3.
    """
    return forward_kl(student_logits, old_logits, temperature=temperature)


def co_tuning(student_logits: Array, target: Array) -> Array:
    """`-sum_s R[y, s] log softmax(z)_s`: the source head keeps predicting related source classes.

    Args:
      student_logits: `[B, Cs]`, the *source* head's, on the model being trained.
      target: `[B, Cs]`, `relation[labels]` of `category_relation`.

    Returns:
      `[B]`, nats. `.mean()` is TLL's number (weight 2.3 there, source head at 0.1 of the rate).

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an argument is not floating point.

    References:
      You et al., Co-Tuning for Transfer Learning, NeurIPS 2020.
    """
    student_logits, target = _door.same_shape("co_tuning", student_logits, target)
    log_p = _numerics.log_softmax(student_logits)
    # An impossible class that is never asked for contributes 0, not 0 * inf.
    return -jnp.sum(target * jnp.where(target == 0, 0, log_p), axis=-1)


def bi_tuning_classifier(
    features: Array,
    labels: Array,
    *,
    class_weights: Array,
    class_bias: Array,
    temperature: Scalar = 0.07,
) -> Array:
    """Every class vector finds its examples in the batch: `KL(u || softmax_j(w_y . g_j / T))`.

    `g = [h, 1] / ||[h, 1]||`, `w_c = [W_c, b_c] / ||[W_c, b_c]||`, and u is uniform over the
    batch's examples of the same class. The in-batch form of Bi-Tuning's classifier part; with
    queues of keys call `uniform_contrast` on their scores.

    Args:
      features: `[B, D]`, before the head.
      labels: int `[B]`.
      class_weights: the head's kernel `[D, C]`; the published code holds it constant here.
      class_bias: the head's bias `[C]`.
      temperature: of the cosine scores.

    Returns:
      `[B]`, nats.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if labels are not integers, or features are not floating point.

    References:
      Zhong et al., Bi-tuning of Pre-trained Representations, 2020 (2011.06182), eq. 3.
    """
    features = _door.one("bi_tuning_classifier", features, at_least=2, at_most=2)
    width, classes = features.shape[1], jnp.shape(class_bias)[0]
    if jnp.shape(class_weights) != (width, classes):
        raise ValueError(
            "expected class_weights [D, C] and class_bias [C], got "
            f"{_checks.described(features=features, weights=class_weights, bias=class_bias)}."
        )
    _checks.labels(labels, jnp.zeros((features.shape[0], classes)))
    vectors = unit_classes(class_weights, class_bias).astype(features.dtype)
    scores = _numerics.gram(vectors[labels], unit_features(features))
    same = labels[:, None] == labels[None, :]
    return uniform_contrast(scores, same, temperature=temperature)


def bi_tuning_projection(
    queries: Array, keys: Array, labels: Array, *, temperature: Scalar = 0.07
) -> Array:
    """Every projected query finds the keys of its class: `KL(u || softmax_j(z_i . k_j / T))`.

    Args:
      queries: `[B, P]` projections of the model being trained; normalized here.
      keys: `[B, P]` projections of the momentum model, or of another view.
      labels: int `[B]`.
      temperature: of the cosine scores.

    Returns:
      `[B]`, nats.

    Raises:
      ValueError: if shapes differ.
      TypeError: if labels are not integers, or projections are not floating point.

    References:
      Zhong et al., Bi-tuning of Pre-trained Representations, 2020 (2011.06182), eq. 4.
    """
    queries, keys = _door.same_shape("bi_tuning_projection", queries, keys, at_most=2)
    _checks.integers(labels=labels)
    _checks.same_batch(queries=queries, labels=labels)
    scores = _numerics.gram(_numerics.normalize(queries), _numerics.normalize(keys))
    same = labels[:, None] == labels[None, :]
    return uniform_contrast(scores, same, temperature=temperature)


def uniform_contrast(scores: Array, positives: Array, *, temperature: Scalar = 0.07) -> Array:
    """`KL(u || softmax(scores / T))`, u uniform over the positives; 0 for rows without any.

    Args:
      scores: `[B, M]`, of every anchor against M candidates.
      positives: bool `[B, M]`.
      temperature: divides the scores.

    Returns:
      `[B]`, nats.

    Raises:
      ValueError: if shapes differ, or the temperature is not positive.
      TypeError: if `positives` is not bool.
    """
    scores = _door.one("uniform_contrast", scores, at_least=2, at_most=2)
    _checks.mask(positives, scores.shape)
    _checks.positive(temperature=temperature)
    log_p = _numerics.log_softmax(scores / _numerics.scalar(temperature, scores))
    count = jnp.sum(positives, axis=-1, dtype=scores.dtype)
    mean = _numerics.masked_mean(log_p, positives, axis=-1)
    return jnp.where(count > 0, -jnp.log(jnp.maximum(count, 1)) - mean, 0)


def unit_features(features: Array) -> Array:
    """`[h, 1] / ||[h, 1]||`, `[B, D] -> [B, D + 1]`: features as the head's bias sees them."""
    features = _door.one("unit_features", features, at_least=2, at_most=2)
    ones = jnp.ones((features.shape[0], 1), features.dtype)
    return _numerics.normalize(jnp.concatenate([features, ones], axis=-1))


def unit_classes(class_weights: Array, class_bias: Array) -> Array:
    """`[W_c, b_c] / ||[W_c, b_c]||`, `[D, C], [C] -> [C, D + 1]`: a head as class directions."""
    rows = jnp.concatenate(
        [_numerics.upcast(class_weights).T, _numerics.upcast(class_bias)[:, None]], axis=-1
    )
    return _numerics.normalize(rows)


def afn(features: Array, norms: Array, *, step: Scalar = 1.0) -> Array:
    """`(||f|| - norm - step)^2`: every example's feature norm is asked to grow by `step`.

    Args:
      features: `[B, D]`.
      norms: `[B]`, the norms to grow from: `stop_gradient(feature_norms(features))` is the
        paper's stepwise form, a constant radius its hard form.
      step: the increase; 1.0.

    Returns:
      `[B]`. In the stepwise form the value is always `step^2`; only the gradient matters.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if the features or norms are not floating point.

    References:
      Xu et al., Larger Norm More Transferable, 2019 (1811.07456), eq. 7.
    """
    features = _door.one("afn", features, at_least=2, at_most=2)
    _checks.floating(norms=norms)
    if jnp.shape(norms) != features.shape[:1]:
        raise ValueError(
            f"expected norms [{features.shape[0]}], got {_checks.described(norms=norms)}."
        )
    target = _numerics.scalar(norms, features) + _numerics.scalar(step, features)
    return jnp.square(feature_norms(features) - target)


def feature_norms(features: Array) -> Array:
    """`||f||`, `[B, D] -> [B]`, with gradient 0 at 0."""
    return _numerics.safe_norm(_door.one("feature_norms", features, at_least=2, at_most=2))
