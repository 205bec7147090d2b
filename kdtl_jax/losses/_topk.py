"""Teachers given by their k most likely classes: five meanings of "top-k KL", and ranking losses.

| function | teacher | student | blind spot |
|---|---|---|---|
| `top_k_kl_tail` (recommended) | k classes and a tail | the same | how the tail is spread |
| `top_k_kl_renormalized` | renormalized on the k | the same | mass leaving the k: loss 0 |
| `top_k_kl_teacher_renormalized` | renormalized on the k | full | not 0 at equal models |
| `top_k_kl_truncated` | as it is | full | may be negative |
| `top_k_kl_sampled` | one sampled class | full | variance |

What all functions here share: logits are `[..., num_classes]`, softened by `temperature`;
`targets`, from `top_k_targets` or `stored_top_k`, are the teacher's k classes, made at the same
temperature, which is a scalar or one value per example. The result is `[...]`, in nats unless
stated otherwise, float32 or wider. Under `jit`, an index out of range (such as a stored -1) gives
NaN, with gradient 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


class TopK(NamedTuple):
    """A teacher's most likely classes, and how much it leaves out.

    `indices` int `[..., k]`, `log_probs` `[..., k]`, `log_tail` `[...]`: the log of the mass on all
    other classes, -inf if there is none.
    """

    indices: Array
    log_probs: Array
    log_tail: Array


def top_k_targets(teacher_logits: Array, *, k: int, temperature: Scalar = 1.0) -> TopK:
    """The k most likely classes of a dense teacher.

    Takes `[..., num_classes]` logits; the arrays of the result are `[..., k]`.

    Args:
      k: 1 to num_classes.
      temperature: softens the teacher before the cut; use the same for the student.

    Returns:
      `TopK`, sorted from the most likely; the tail's mass is the sum over the rest.
    """
    teacher = _logspace.soften_teacher(teacher_logits, temperature)
    classes = teacher.shape[-1]
    _checks.integer(k=k)
    if not 1 <= k <= classes:
        raise ValueError(f"k must lie in 1..{classes}, got {k}.")
    log_p = _softmax.log_softmax(teacher)
    values, indices = jax.lax.top_k(log_p, k)
    return TopK(indices, values, _log_tail(log_p, indices))


def top_k_at(teacher_logits: Array, indices: Array, *, temperature: Scalar = 1.0) -> TopK:
    """A dense teacher on k given classes, such as the student's most likely ones, and its tail.

    In chunks: `chunked_map(top_k_at, teacher_hidden, teacher_head, indices)`.

    Args:
      teacher_logits: `[..., num_classes]`.
      indices: int `[..., k]`, all different within a row.
      temperature: softens the teacher; use the same for the student.

    Returns:
      `TopK`; under `jit`, a class out of range is NaN, and so is its row's tail.
    """
    teacher = _logspace.soften_teacher(teacher_logits, temperature)
    _checks.indices(teacher.shape[-1], indices=indices)
    _check_some_class(indices)
    if jnp.ndim(indices) != teacher.ndim or jnp.shape(indices)[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "indices must be [..., k] with the teacher's leading dimensions, got "
            f"{_checks.described(teacher_logits=teacher_logits, indices=indices)}."
        )
    log_p = _softmax.log_softmax(teacher)
    safe, usable = _numerics.usable_labels(indices, log_p.shape[-1])
    log_probs = _numerics.at_usable(jnp.take_along_axis(log_p, safe, axis=-1), usable)
    tail = _numerics.at_usable(_log_tail(log_p, safe), jnp.all(usable, axis=-1))
    return TopK(indices, log_probs, tail)


def stored_top_k(indices: Array, log_probs: Array) -> TopK:
    """`TopK` from stored classes and log-probabilities; the tail is the rest of the mass.

    Args:
      indices: int `[..., k]`.
      log_probs: `[..., k]`, of the full distribution; if rounding makes them sum to more than 1,
        the tail is empty.
    """
    _checks.integers(indices=indices)
    _check_some_class(indices)
    _checks.floating(log_probs=log_probs)
    _checks.same_shape(indices=indices, log_probs=log_probs)
    log_probs = _numerics.upcast(log_probs)
    mass = _logspace.logsumexp(log_probs)
    return TopK(indices, log_probs, _numerics.log1mexp(jnp.minimum(mass, 0)))


def soften_top_k(targets: TopK, *, temperature: Scalar, tail_classes: int | None = None) -> TopK:
    """The targets at another temperature: `p^(1/T)` renormalized.

    The result for the tail depends on how its mass is spread, which is unknown: it is assumed to be
    spread evenly over `tail_classes` classes (pass `num_classes - k`) or, by default, to be one
    class. The result is exact if there is no tail.

    Args:
      targets: `[..., k]`, usually at temperature 1; temperatures multiply.
      temperature: > 0; a scalar or one value per example.
      tail_classes: number of classes that share the tail.

    Returns:
      `TopK` with the same indices.

    References:
      One class is DistillKit's "symmetric_uniform".
    """
    _checks.instance(TopK, targets=targets)
    _checks.positive(temperature=temperature)
    _checks.per_example(jnp.shape(targets.log_tail), temperature=temperature)
    log_probs = _numerics.upcast(targets.log_probs)
    t = _numerics.per_example(temperature, log_probs, "temperature")
    tail = targets.log_tail[..., None]
    in_tail = tail != -jnp.inf
    tail = jnp.where(in_tail, tail, 0) / t
    if tail_classes is not None:
        _checks.positive(tail_classes=tail_classes)
        tail += (1 - 1 / t) * jnp.log(jnp.asarray(tail_classes, log_probs.dtype))
    tail = jnp.where(in_tail, tail, -jnp.inf)
    full = _softmax.log_softmax(jnp.concatenate([log_probs / t, tail], axis=-1))
    return TopK(targets.indices, full[..., :-1], full[..., -1])


def top_k_buckets(
    student_logits: Array, targets: TopK, *, temperature: Scalar = 1.0
) -> tuple[Array, Array]:
    """Student and teacher over k + 1 classes: the teacher's k and everything else.

    Both are log-probabilities, hence logits: any divergence of the package can compare them and
    keeps its properties (it is a divergence of coarser distributions, never above that of the full
    ones).

    Args:
      student_logits: `[..., num_classes]`.
      targets: of the teacher, at the same temperature.
      temperature: softens the student; a scalar or one value per example.

    Returns:
      student `[..., k + 1]`, teacher `[..., k + 1]`.
    """
    log_q, targets, _ = check_targets(student_logits, targets, temperature)
    return _with_tail(log_q, targets), _teacher_with_tail(targets)


def top_k_kl_tail(student_logits: Array, targets: TopK, *, temperature: Scalar = 1.0) -> Array:
    """`KL` over the teacher's k classes and one tail bucket: the recommended top-k KL.

    Zero at equality, never negative, at most the full KL, and equal to it when student and teacher
    agree within the tail. Takes `[..., num_classes]` logits and `[..., k]` targets; returns
    `[...]`, in nats.

    References:
      TRL's server distillation (`loss_add_tail`), DistillKit's "symmetric_uniform" (which
      multiplies by `T^2`).
    """
    log_q, targets, usable = check_targets(student_logits, targets, temperature)
    kl = _softmax.kl_from_logits(_teacher_with_tail(targets), _with_tail(log_q, targets))
    return _numerics.at_usable(kl, usable)


def top_k_kl_renormalized(
    student_logits: Array, targets: TopK, *, temperature: Scalar = 1.0
) -> Array:
    """`KL` of both sides renormalized on the teacher's k classes.

    Does not notice mass that leaves the set: shifting all k logits of the student together changes
    nothing. A single class (k = 1) is therefore an error. Takes `[..., num_classes]` logits and
    `[..., k]` targets; returns `[...]`, in nats.

    References:
      Model-Optimizer's top-k loss, MaxText's offline distillation, Tunix's `distill_top_k`.
    """
    log_q, targets, usable = check_targets(student_logits, targets, temperature)
    _checks.several_classes(log_probs=targets.log_probs)
    student_log_probs = jnp.take_along_axis(log_q, targets.indices, axis=-1)
    return _numerics.at_usable(
        _softmax.kl_from_logits(targets.log_probs, student_log_probs), usable
    )


def top_k_kl_teacher_renormalized(
    student_logits: Array, targets: TopK, *, temperature: Scalar = 1.0
) -> Array:
    """`KL` from the teacher renormalized on its k classes to the student's full distribution.

    Teaches that the tail is empty: positive (minus the log of the kept mass) at equal models. Takes
    `[..., num_classes]` logits and `[..., k]` targets; returns `[...]`, in nats.

    References:
      DistillKit's "zero" (which multiplies by `T^2`), EasyDeL's sparse distillation (as a
      cross-entropy).
    """
    log_q, targets, usable = check_targets(student_logits, targets, temperature)
    log_p = _softmax.log_softmax(targets.log_probs)
    log_p = jnp.concatenate([log_p, jnp.full_like(log_p[..., :1], -jnp.inf)], axis=-1)
    kl = jnp.sum(_softmax.kl_terms(log_p, _with_tail(log_q, targets)), axis=-1)
    return _numerics.at_usable(kl, usable)


def top_k_kl_truncated(student_logits: Array, targets: TopK, *, temperature: Scalar = 1.0) -> Array:
    """`sum_k p_T (log p_T - log p_S)` over the teacher's k classes, without renormalization.

    Not a divergence: negative when the student puts more mass on the set. Do not clamp it, since
    that drops the gradient; use `top_k_kl_tail` instead. Takes `[..., num_classes]` logits and
    `[..., k]` targets; returns `[...]`, in nats.

    References:
      verl's top-k distillation.
    """
    log_q, targets, usable = check_targets(student_logits, targets, temperature)
    log_p = _numerics.upcast(targets.log_probs)
    student_log_probs = jnp.take_along_axis(log_q, targets.indices, axis=-1)
    kl = _logspace.cross_entropy(log_p, student_log_probs) - _logspace.cross_entropy(log_p, log_p)
    return _numerics.at_usable(kl, usable)


def top_k_kl_sampled(student_logits: Array, targets: TopK, *, temperature: Scalar = 1.0) -> Array:
    """`log p_T(x) - log p_S(x)` of one class x per position, the first of the targets.

    For x sampled from the teacher, the mean is the forward KL, and its gradient is correct. For x
    sampled from the student, *minus* the mean is the reverse KL, but the gradient is not that of
    the reverse KL: use the value as a reward. It is a one-sample estimate: unbiased, of high
    variance and of either sign. (TRL's server distillation with `loss_top_k=1` compares two
    buckets, the class and the rest: `top_k_kl_tail`, or `reverse_kl` of `top_k_buckets`.)

    Args:
      student_logits: `[..., num_classes]`.
      targets: `indices[..., 0]` is the sampled class, `log_probs[..., 0]` the teacher's.
      temperature: softens the student; a scalar or one value per example.

    Returns:
      `[...]`, nats, of either sign.
    """
    log_q, targets, usable = check_targets(student_logits, targets, temperature)
    student_log_prob = _logspace.at_label(log_q, targets.indices[..., 0])
    return _numerics.at_usable(
        _numerics.upcast(targets.log_probs[..., 0]) - student_log_prob, usable
    )


def hinge_ranking(
    student_logits: Array,
    targets: TopK,
    *,
    margin: Scalar | None = None,
    eps: Scalar = 1e-8,
) -> Array:
    """Mean over ordered pairs `p_T(k) > p_T(l) + eps` of `max(0, margin - (p_S(k) - p_S(l)))`.

    Args:
      student_logits: `[..., num_classes]`.
      targets: the teacher's k classes (`top_k_targets`); all k^2 pairs among them are compared.
      margin: by how much the better class must lead; by default as much as for the teacher,
        `p_T(k) - p_T(l)`.
      eps: pairs closer than this, and classes below it, do not count.

    Returns:
      `[...]`, a probability; 0 where no pair counts.

    References:
      DistillKit's `sparse_hinge_loss`, which divides by the number of pairs of all positions.
    """
    log_q, targets, usable = check_targets(student_logits, targets, 1.0)
    _checks.non_negative(**({} if margin is None else {"margin": margin}))
    p_s = jnp.exp(jnp.take_along_axis(log_q, targets.indices, axis=-1))
    p_t = jnp.exp(_numerics.upcast(targets.log_probs))
    lead = _pairwise_differences(p_t) if margin is None else _numerics.scalar(margin, p_t, "margin")
    mean = _numerics.masked_mean(
        jax.nn.relu(lead - _pairwise_differences(p_s)), _is_ordered(p_t, eps), axis=(-2, -1)
    )
    return _numerics.at_usable(_numerics.nan_of(mean, jnp.sum(p_t, axis=-1)), usable)


def logistic_ranking(student_logits: Array, targets: TopK, *, eps: Scalar = 1e-9) -> Array:
    """Mean over ordered pairs `p_T(k) > p_T(l) + eps` of `log(1 + exp(-(z_S(k) - z_S(l))))`.

    Args:
      student_logits: `[..., num_classes]`.
      targets: the teacher's k classes (`top_k_targets`); all k^2 pairs among them are compared.
      eps: pairs closer than this, and classes below it, do not count.

    Returns:
      `[...]`, nats; 0 where no pair counts. Not zero at equality.

    References:
      Burges et al., Learning to Rank using Gradient Descent, 2005. DistillKit's
      `sparse_logistic_ranking_loss` divides by the number of pairs of all positions.
    """
    log_q, targets, usable = check_targets(student_logits, targets, 1.0)
    student_log_probs = jnp.take_along_axis(log_q, targets.indices, axis=-1)
    present = student_log_probs != -jnp.inf
    p_t = jnp.exp(_numerics.upcast(targets.log_probs))
    # A class masked to -inf in the student cannot be ranked.
    is_counted = _is_ordered(p_t, eps) & present[..., :, None] & present[..., None, :]
    gap = _pairwise_differences(jnp.where(present, student_log_probs, 0))
    mean = _numerics.masked_mean(jax.nn.softplus(-gap), is_counted, axis=(-2, -1))
    return _numerics.at_usable(_numerics.nan_of(mean, jnp.sum(p_t, axis=-1)), usable)


def check_targets(
    student_logits: Array, targets: TopK, temperature: Scalar
) -> tuple[Array, TopK, Array]:
    """Checks targets; returns the student's log-probabilities, safe targets, and rows in range.

    `[..., num_classes]` logits and targets `[..., k]` give `[..., num_classes]`, targets of the
    same shapes, and bool `[...]`.
    """
    _checks.instance(TopK, targets=targets)
    student, _ = _logspace.soften(student_logits, student_logits, temperature)
    classes = student.shape[-1]
    _checks.indices(classes, indices=targets.indices)
    _check_some_class(targets.indices)
    _checks.floating(log_probs=targets.log_probs, log_tail=targets.log_tail)
    _checks.same_shape(indices=targets.indices, log_probs=targets.log_probs)
    leading = student.shape[:-1]
    if targets.indices.shape[:-1] != leading or targets.log_tail.shape != leading:
        raise ValueError(
            f"targets must be [..., k] with the student's leading dimensions, got "
            f"{_checks.described(student_logits=student_logits, **targets._asdict())}."
        )
    indices, usable = _numerics.usable_labels(targets.indices, classes)
    log_q = _softmax.log_softmax(student)
    return log_q, targets._replace(indices=indices), jnp.all(usable, axis=-1)


def _check_some_class(indices: Array) -> None:
    if jnp.shape(indices)[-1:] == (0,):
        raise ValueError(
            f"there must be at least one class in a row (k >= 1), got "
            f"{_checks.described(indices=indices)}."
        )


def _log_tail(log_p: Array, indices: Array) -> Array:
    """Log of the mass outside `indices`, summed from its own terms."""
    classes = log_p.shape[-1]
    flat = indices.reshape(-1, indices.shape[-1])
    rows = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 0)
    is_listed = jnp.zeros((flat.shape[0], classes), jnp.bool_).at[rows, flat].set(True)
    return _logspace.logsumexp(log_p, where=~is_listed.reshape(log_p.shape))


def _with_tail(log_q: Array, targets: TopK) -> Array:
    log_probs = jnp.take_along_axis(log_q, targets.indices, axis=-1)
    tail = _log_tail(log_q, targets.indices)
    return jnp.concatenate([log_probs, tail[..., None]], axis=-1)


def _teacher_with_tail(targets: TopK) -> Array:
    tail = targets.log_tail[..., None]
    return _numerics.upcast(jnp.concatenate([targets.log_probs, tail], axis=-1))


def _pairwise_differences(x: Array) -> Array:
    """`x_k - x_l`, `[..., k, l]`."""
    return x[..., :, None] - x[..., None, :]


def _is_ordered(p: Array, eps: Scalar) -> Array:
    _checks.non_negative(eps=eps)
    threshold = _numerics.scalar(eps, p, "eps")
    is_counted = p > threshold
    return (
        (_pairwise_differences(p) > threshold) & is_counted[..., :, None] & is_counted[..., None, :]
    )
