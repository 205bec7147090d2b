"""Vocabularies that differ: padded, shared, mapped by id, or compared by stretches of text (ALM).

Two vocabularies of the same size may number their tokens differently, and two of different sizes
may differ only in padding: compare ids, never sizes. The functions of logits `[..., num_classes]`
return logits (log-probabilities are logits), so any divergence can follow, including in
`chunked_divergence`:

    def kl(student, teacher):
        return losses.forward_kl(*losses.shared_vocabulary(student, teacher, ours, theirs))

Approximate likelihood matching compares a stretch of text's probability across two tokenizers. A
chunk is a stretch that both tokenizations cut at its ends (`language.align_tokens`); its
log-probability is the sum of its tokens' (`language.chunk_log_probs`). Only chunks are the same
text on both sides, which is why only this binary comparison, the observed chunk against all others,
is exact. Both arguments are log-probabilities <= 0 of one shape, e.g. `[B, C]`; the result has that
shape, in nats, float32 or wider.

References:
  Minixhofer, Vulić and Ponti, Cross-Tokenizer Distillation via Approximate Likelihood Matching,
  2025 (2503.20083), and its code, tokenkit.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def without_padding(logits: Array, *, size: int, width: int | None = None) -> Array:
    """Logits with -inf from class `size` on, cut or padded to `width` classes.

    Embedding tables are padded to round sizes; logits of tokens that do not exist are not part of a
    model's distribution. Takes `[..., num_classes]` logits; returns `[..., width]`.

    Args:
      size: number of real classes, the first ones.
      width: number of classes of the result, at least `size`; by default that of `logits`.
    """
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    classes = jnp.shape(logits)[-1]
    width = classes if width is None else width
    _checks.count(1, size=size)
    if size > min(classes, width):
        raise ValueError(f"size {size} exceeds the number of classes, {min(classes, width)}.")
    if width > classes:
        fill = [(0, 0)] * (jnp.ndim(logits) - 1) + [(0, width - classes)]
        logits = jnp.pad(logits, fill)
    logits = logits[..., :width]
    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(place < size, logits, -jnp.inf)


def by_id(logits: Array, ids: Array) -> Array:
    """`[..., num_ids]`: column v is the logit of class `ids[v]`, -inf where `ids[v]` is -1.

    Args:
      logits: `[..., num_classes]`.
      ids: int `[num_ids]`.
    """
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.rank(1, 1, ids=ids)
    _checks.integers(ids=ids)
    concrete = _checks.concrete(ids)
    if concrete is not None:
        _checks.indices(jnp.shape(logits)[-1], ids=concrete[concrete != -1])
    ids = jnp.asarray(ids)
    entries = _logspace.columns(logits, ids)
    return jnp.where(jnp.broadcast_to(ids == -1, entries.shape), -jnp.inf, entries)


def shared_vocabulary(
    student_logits: Array, teacher_logits: Array, student_ids: Array, teacher_ids: Array
) -> tuple[Array, Array]:
    """Both sides on the tokens that they share, plus one bucket for everything else.

    A divergence of the results sees how much mass each side puts on tokens of its own, though not
    on which. Renormalizing on the shared tokens would hide it: a student that abandons them could
    look perfect.

    Args:
      student_logits: `[..., student_vocabulary]`.
      teacher_logits: `[..., teacher_vocabulary]`, other dimensions equal.
      student_ids: int `[n]`, all different: the shared tokens' ids (`language.shared_ids`).
      teacher_ids: int `[n]`, the same tokens' ids on the other side.

    Returns:
      Log-probabilities `[..., n + 1]` of student and teacher, at temperature 1.
    """
    _checks.floating(student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.rank(1, student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.rank(1, 1, student_ids=student_ids, teacher_ids=teacher_ids)
    _checks.same_shape(student_ids=student_ids, teacher_ids=teacher_ids)
    if jnp.shape(student_logits)[:-1] != jnp.shape(teacher_logits)[:-1]:
        raise ValueError(
            "all dimensions but the vocabulary must be equal, got "
            f"{_checks.described(student_logits=student_logits, teacher_logits=teacher_logits)}."
        )
    return _with_rest(student_logits, student_ids), _with_rest(teacher_logits, teacher_ids)


def log_mass(logits: Array, classes: Array) -> Array:
    """`log P(class in the set)`, e.g. the log-probability that a word ends here.

    Args:
      logits: `[..., num_classes]`.
      classes: bool `[num_classes]`.

    Returns:
      `[...]`, <= 0; -inf, with gradient 0, for the empty set.
    """
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.mask(classes, jnp.shape(logits)[-1:], "classes")
    log_p = _softmax.log_softmax(logits)
    return _logspace.logsumexp(log_p, where=jnp.broadcast_to(classes, log_p.shape))


def _with_rest(logits: Array, ids: Array) -> Array:
    _checks.indices(jnp.shape(logits)[-1], ids=ids)
    log_p = _softmax.log_softmax(logits)
    is_shared = jnp.zeros(log_p.shape[-1], jnp.bool_).at[ids].set(True)
    unshared = _logspace.logsumexp(log_p, where=jnp.broadcast_to(~is_shared, log_p.shape))
    return jnp.concatenate([_logspace.columns(log_p, ids), unshared[..., None]], axis=-1)


def alm(
    student_log_probs: Array,
    teacher_log_probs: Array,
    *,
    temperature: Scalar = 100.0,
    eps: Scalar = 1e-6,
) -> Array:
    """`KL(Bernoulli(p_T^(1/T)) || Bernoulli(p_S^(1/T)))` of a chunk's probability on both sides.

    `eps` is subtracted from `log p / T` to keep the logarithm finite at probability 1. tokenkit's
    `binary_ce` is this plus the teacher's binary entropy, a constant. Takes log-probabilities
    `[...]` of one shape; returns `[...]`.

    Args:
      temperature: > 0; a high value compares log-probabilities, 1 compares probabilities.
      eps: > 0.
    """
    student, teacher = _check_log_probs(student_log_probs, teacher_log_probs)
    _checks.positive(temperature=temperature, eps=eps)
    _checks.per_example(student.shape, temperature=temperature)
    t = _numerics.per_example(temperature, student, "temperature")
    epsilon = _numerics.scalar(eps, student, "eps")
    log_s, log_t = student / t - epsilon, teacher / t - epsilon
    log_q = jnp.stack([log_s, _numerics.log1mexp(log_s)], axis=-1)
    log_p = jnp.stack([log_t, _numerics.log1mexp(log_t)], axis=-1)
    return jnp.sum(_softmax.kl_terms(log_p, log_q), axis=-1)


def alm_limit(student_log_probs: Array, teacher_log_probs: Array, *, eps: Scalar = 1e-6) -> Array:
    """`T` times `alm` as T grows: `y - x + y log(x / y)`, x the student's log-probability, y the
    teacher's.

    tokenkit's `binary_kl_temp_limit`: a Bregman divergence of log-probabilities. Takes
    log-probabilities `[...]` of one shape; returns `[...]`.

    Args:
      eps: > 0, subtracted from both.
    """
    student, teacher = _check_log_probs(student_log_probs, teacher_log_probs)
    _checks.positive(eps=eps)
    x, y = (side - _numerics.scalar(eps, side, "eps") for side in (student, teacher))
    # The term of a KL between -y and -x. When they are close, r gives the ratio y / x = 1 + r more
    # accurately.
    r = (teacher - student) / x
    is_near = jnp.abs(r) < 0.5
    ratio = jnp.where(is_near, jnp.log1p(jnp.where(is_near, r, 0)), jnp.log(y / x))
    return _softmax.kl_terms(jnp.log(-y), jnp.log(-x), ratio)


def _check_log_probs(student: Array, teacher: Array) -> tuple[Array, Array]:
    _checks.floating(student_log_probs=student, teacher_log_probs=teacher)
    _checks.rank(1, student_log_probs=student)
    _checks.same_shape(student_log_probs=student, teacher_log_probs=teacher)
    _checks.nonempty(student_log_probs=student)
    # Sums of rounded logarithms may come out just above 0.
    return jnp.minimum(_numerics.upcast(student), 0), jnp.minimum(_numerics.upcast(teacher), 0)
