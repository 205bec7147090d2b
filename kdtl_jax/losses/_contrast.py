"""Contrastive losses: an example must recognize its teacher, or its class, among others.

The others come from the rest of the batch, a memory bank or a queue; the last two are values of
`kdtl_jax.memory` that the step carries. All take float arrays, embeddings of one shape `[B, ...]`
that are flattened per example and normalized here unless stated otherwise, and return `[B]`, in
nats, float32 or wider. Labels are int `[B]`. Temperatures are > 0 and may be learned.

`where` (bool `[B]`) marks the real examples. The others have the value 0 and serve as neither
positives nor negatives, so a padded batch gives the same numbers as its real rows alone.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def crd(log_scores: Array, *, num_data: int, eps: float = 1e-7) -> Array:
    """`-log x_0 / (x_0 + P + eps) - sum_j log P / (x_j + P + eps)`, `P = K / n`: CRD.

    Noise-contrastive estimation with K uniform negatives out of n rows, `x = exp(v . m / T) / Z`.
    Column 0 is the positive. CRD adds two such terms: the student's embedding against the bank of
    teacher embeddings, and the reverse. The sum of the two `.mean()`s is RepDistiller's number
    (weight .8). It is computed from log scores so that no score overflows.

    Args:
      log_scores: `[B, 1 + K]`, `log x` from `memory.bank_scores`.
      num_data: n, rows of the bank.
      eps: the published guard, added to the ratio P.

    Returns:
      `[B]`, nats, at least 0; never exactly 0.

    References:
      Tian, Krishnan and Isola, Contrastive Representation Distillation, 2020 (1910.10699).
    """
    log_scores = _sides.single(log_scores, "log_scores", at_least=2, at_most=2)
    _checks.scalar(num_data=num_data)
    _checks.positive(num_data=num_data)
    negatives = log_scores.shape[1] - 1
    if negatives < 1:
        raise ValueError(
            "log_scores needs the positive and at least one negative per row, got "
            f"{_checks.described(log_scores=log_scores)}."
        )
    noise = negatives / num_data
    log_guarded = jnp.log(jnp.asarray(noise + eps, log_scores.dtype))
    excess = log_scores - log_guarded
    # log(x + P + eps), short of log(P + eps): a softplus.
    log_sums = jnp.maximum(excess, 0) + jnp.log1p(jnp.exp(-jnp.abs(excess)))
    guard = negatives * math.log1p(eps / noise)  # published with eps on one side only
    return jnp.sum(log_sums, axis=-1) - excess[:, 0] + guard


def info_nce(
    student: Array, teacher: Array, *, temperature: Scalar = 0.07, where: Array | None = None
) -> Array:
    """`-log softmax_j(cos(s_i, t_j) / T)_i`: the negatives are the rest of the batch.

    `.mean()` is the contrastive part of DCD (whose `1 / T` is learned, `min(exp(tau), 10)`).

    Args:
      student: `[B, ...]`, embedded; flattened per example and normalized here.
      teacher: the same shape.
      temperature: T > 0, possibly learned.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, nats, at least 0; 0 for a batch of one.

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018;
      Giakoumoglou and Stathaki, 2024 (2407.11802).
    """
    logits, is_candidate = _similarities(student, teacher, temperature, where)
    return _numerics.kept(-jnp.diagonal(_softmax.log_softmax(logits, where=is_candidate)), where)


def dcd_invariance(
    student: Array, teacher: Array, *, temperature: Scalar = 0.07, where: Array | None = None
) -> Array:
    """`KL(softmax_k(A_ki)_j || softmax_k(A_ik)_j)`, with A the similarities of `info_nce`: DCD.

    Compares how the teacher of example i sees the students with how its student sees the teachers;
    both sides are differentiated. DCD is `info_nce + .5 dcd_invariance`.

    Args:
      student: `[B, ...]`, embedded; flattened per example and normalized here.
      teacher: the same shape.
      temperature: T > 0, possibly learned.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, nats, at least 0.

    References:
      Giakoumoglou and Stathaki, Discriminative and Consistent Representation Distillation, 2024
      (2407.11802).
    """
    logits, is_candidate = _similarities(student, teacher, temperature, where)
    return _numerics.kept(_softmax.kl_from_logits(logits.T, logits, where=is_candidate), where)


def _similarities(
    student: Array, teacher: Array, temperature: Scalar, where: Array | None
) -> tuple[Array, Array | None]:
    """Scaled cosines `[B, B]`, and which columns are real examples."""
    _checks.positive(temperature=temperature)
    sides = _sides.zero_masked(where, *_sides.same_shape(student, teacher))
    s, t = (_numerics.normalize(_numerics.batch_flat(side)) for side in sides)
    is_candidate = None if where is None else jnp.broadcast_to(where[None, :], (len(s), len(s)))
    return _numerics.gram(s, t) / _numerics.scalar(temperature, s, "temperature"), is_candidate


def rrd(
    student: Array,
    teacher: Array,
    *,
    queue: Array,
    student_temperature: Scalar = 0.1,
    teacher_temperature: Scalar = 0.02,
    where: Array | None = None,
) -> Array:
    """`KL(softmax(Q t / T_T) || softmax(Q s / T_S))` over a queue of teacher embeddings: RRD.

    The authors use the cross-entropy: add the teacher's entropy to get their number. Their code
    pushes the current batch onto the queue before comparing (`memory.queue_push`).

    Args:
      student: `[B, D]`.
      teacher: `[B, D]`.
      queue: `[K, D]`, unit rows, `memory.Queue.rows`.
      student_temperature: T_S > 0.
      teacher_temperature: T_T, smaller than T_S: a sharper target.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, nats, at least 0.

    References:
      Giakoumoglou and Stathaki, Relational Representation Distillation, 2024 (2407.12073).
    """
    _checks.positive(
        student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    student, teacher = _sides.zero_masked(where, *_sides.same_shape(student, teacher, at_most=2))
    _checks.floating(queue=queue)
    if jnp.ndim(queue) != 2 or jnp.shape(queue)[1:] != student.shape[1:]:
        raise ValueError(
            "queue must have shape [K, D] with the embeddings' D, got "
            f"{_checks.described(queue=queue, student=student)}."
        )
    rows = _numerics.cast(queue, student)
    toward_s = _numerics.gram(_numerics.normalize(student), rows)
    toward_t = _numerics.gram(_numerics.normalize(teacher), rows)
    toward_s = toward_s / _numerics.scalar(student_temperature, student, "student_temperature")
    toward_t = toward_t / _numerics.scalar(teacher_temperature, student, "teacher_temperature")
    return _numerics.kept(_softmax.kl_from_logits(toward_t, toward_s), where)


def bi_tuning_classifier(
    features: Array,
    labels: Array,
    *,
    class_weights: Array,
    class_bias: Array,
    temperature: Scalar = 0.07,
    where: Array | None = None,
) -> Array:
    """Each class vector must find its examples in the batch: `KL(u || softmax_j(w_y . g_j / T))`.

    `g = [h, 1] / ||[h, 1]||`, `w_c = [W_c, b_c] / ||[W_c, b_c]||`, and u is uniform over the
    batch's examples of the same class. This is the in-batch form of Bi-Tuning's classifier part;
    with queues of keys, call `uniform_contrast` on their scores.

    Args:
      features: `[B, D]`, before the head.
      labels: int `[B]`.
      class_weights: the head's kernel `[D, C]`; the published code holds it constant here.
      class_bias: the head's bias `[C]`.
      temperature: of the cosine scores.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, nats.

    References:
      Zhong et al., Bi-tuning of Pre-trained Representations, 2020 (2011.06182), its contrastive
      cross-entropy.
    """
    features = _sides.single(features, "features", at_least=2, at_most=2)
    _checks.floating(class_weights=class_weights, class_bias=class_bias)
    _checks.rank(1, 1, class_bias=class_bias)
    width, classes = features.shape[1], jnp.shape(class_bias)[0]
    if jnp.shape(class_weights) != (width, classes):
        raise ValueError(
            "expected class_weights [D, C] and class_bias [C], got "
            f"{_checks.described(features=features, weights=class_weights, bias=class_bias)}."
        )
    _checks.labels(labels, jax.ShapeDtypeStruct((len(features), classes), features.dtype), where)
    labels, usable = _numerics.usable_labels(labels, classes, where)
    vectors = unit_classes(class_weights, class_bias).astype(features.dtype)
    (features,) = _sides.zero_masked(where, features)
    scores = _numerics.gram(vectors[labels], unit_features(features))
    return _numerics.at_usable(_class_contrast(scores, labels, temperature, where), usable, where)


def bi_tuning_projection(
    queries: Array,
    keys: Array,
    labels: Array,
    *,
    temperature: Scalar = 0.07,
    where: Array | None = None,
) -> Array:
    """Each projected query must find the keys of its class: `KL(u || softmax_j(z_i . k_j / T))`.

    Args:
      queries: `[B, P]` projections of the model being trained; normalized here.
      keys: `[B, P]` projections of the momentum model, or of another view.
      labels: int `[B]`, from 0, for any number of classes.
      temperature: of the cosine scores.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, nats.

    References:
      Zhong et al., 2020 (2011.06182), its categorical contrastive learning.
    """
    sides = _sides.same_shape(queries, keys, at_most=2, names=("queries", "keys"))
    queries, keys = _sides.zero_masked(where, *sides)
    any_class = jnp.iinfo(jnp.int32).max  # only a negative label is certainly invalid
    as_logits = jax.ShapeDtypeStruct((len(queries), any_class), queries.dtype)
    _checks.labels(labels, as_logits, where)
    labels, usable = _numerics.usable_labels(labels, any_class, where)
    scores = _numerics.gram(_numerics.normalize(queries), _numerics.normalize(keys))
    return _numerics.at_usable(_class_contrast(scores, labels, temperature, usable), usable, where)


def _class_contrast(
    scores: Array, labels: Array, temperature: Scalar, where: Array | None
) -> Array:
    same = labels[:, None] == labels[None, :]
    candidates = None if where is None else jnp.broadcast_to(where[None, :], scores.shape)
    values = uniform_contrast(scores, same, temperature=temperature, where=candidates)
    return _numerics.kept(values, where)


def uniform_contrast(
    scores: Array, positives: Array, *, temperature: Scalar = 0.07, where: Array | None = None
) -> Array:
    """`KL(u || softmax(scores / T))`, u uniform over the positives; 0 for rows without positives.

    Args:
      scores: `[B, M]`, one row per anchor, over M candidates.
      positives: bool `[B, M]`.
      temperature: divides the scores.
      where: bool `[B, M]`, candidates to include.

    Returns:
      `[B]`, nats.
    """
    scores = _sides.single(scores, "scores", at_least=2, at_most=2)
    _checks.mask(positives, scores.shape, "positives")
    _checks.positive(temperature=temperature)
    _checks.mask(where, scores.shape)
    if where is not None:
        scores, positives = _numerics.kept(scores, where), positives & where
    log_p = _softmax.log_softmax(
        scores / _numerics.scalar(temperature, scores, "temperature"), where=where
    )
    count = jnp.sum(positives, axis=-1, dtype=scores.dtype)
    mean = _numerics.masked_mean(log_p, positives, axis=-1)
    return jnp.where(count != 0, -jnp.log(jnp.maximum(count, 1)) - mean, 0)


def unit_features(features: Array) -> Array:
    """`[h, 1] / ||[h, 1]||`, `[B, D] -> [B, D + 1]`: features as the head's bias sees them."""
    features = _sides.single(features, "features", at_least=2, at_most=2)
    ones = jnp.ones((features.shape[0], 1), features.dtype)
    return _numerics.normalize(jnp.concatenate([features, ones], axis=-1))


def unit_classes(class_weights: Array, class_bias: Array) -> Array:
    """`[W_c, b_c] / ||[W_c, b_c]||`, `[D, C], [C] -> [C, D + 1]`: a head as class directions."""
    _checks.floating(class_weights=class_weights, class_bias=class_bias)
    rows = jnp.concatenate(
        [_numerics.upcast(class_weights).T, _numerics.upcast(class_bias)[:, None]], axis=-1
    )
    return _numerics.normalize(rows)
