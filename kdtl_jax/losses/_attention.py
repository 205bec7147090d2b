"""Transformers: attention scores by KL or MSE, relations between tokens, Gram matrices of states.

All take float arrays, student first: attention scores `[B, heads, L, L]` before the softmax, where
-inf masks a key, or hidden states. Values are per token (per query), `[B, L]`, averaged over heads,
in float32 or wider; KLs are in nats. `where` (bool `[B, L]`) marks real tokens: other tokens are
never keys, and their values as queries are 0. To compare states token by token, use `last_axis_mse`
or `cosine_distance`; the objective averages over real tokens (`Masked(values, where)`).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax.losses import _sides


def attention_mse(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean over heads and keys of (A_S - A_T)^2`, where A are attention scores before the softmax.

    Keys that either model masks with -inf contribute a difference of 0 and stay in the mean, as in
    TinyBERT's code. The mean over everything is TinyBERT's term; TextBrewer's masked form weights a
    query of example b by its number of real keys.

    Args:
      student: `[B, heads, L, L]`.
      teacher: the same shape.
      where: bool `[B, L]`, real tokens.

    Returns:
      `[B, L]`, squared score units.

    References:
      Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2019 (1909.10351).
    """
    student, teacher, real = _scores(student, teacher, where)
    # Subtraction is linear, so its result for two infinities is harmless once it is dropped here.
    hidden = (student == -jnp.inf) | (teacher == -jnp.inf)
    if real is not None:
        hidden = hidden | ~real
    squares = jnp.square(jnp.where(hidden, 0, student - teacher))
    if where is None:
        return jnp.mean(squares, axis=(1, 3))
    keys = jnp.sum(where, axis=1, keepdims=True, dtype=squares.dtype)
    return jnp.sum(squares, axis=(1, 3)) / (squares.shape[1] * jnp.maximum(keys, 1))


def attention_kl(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean over heads of KL(softmax(A_T) || softmax(A_S))` over keys.

    TextBrewer's `att_ce_loss` is the cross-entropy form: it adds the teacher's entropy, a constant
    (and takes both softmaxes over padding too). Takes scores before the softmax `[B, heads, L, L]`
    and the mask of real tokens `[B, L]`; returns `[B, L]`, in nats.

    Args:
      student: `[B, heads, L, L]`, scores before the softmax; -inf masks a key.
      teacher: the same shape.
      where: bool `[B, L]`, real tokens.

    Returns:
      `[B, L]`, nats.

    References:
      Wang et al., MiniLM, 2020 (2002.10957), whose first term this is.
    """
    student, teacher, real = _scores(student, teacher, where)
    return jnp.mean(_softmax.kl_from_logits(teacher, student, where=real), axis=1)


def _scores(
    student: Array, teacher: Array, where: Array | None
) -> tuple[Array, Array, Array | None]:
    """Checks scores; also returns the mask of real (query, key) pairs, of their shape or None."""
    student, teacher = _sides.same_shape(student, teacher, at_least=4, at_most=4)
    batch, _, queries, keys = student.shape
    if queries != keys:
        raise ValueError(
            f"scores must be [B, heads, L, L], got {_checks.described(student=student)}."
        )
    _checks.mask(where, (batch, queries))
    if where is None:
        return student, teacher, None
    real = where[:, None, :, None] & where[:, None, None, :]
    return student, teacher, jnp.broadcast_to(real, student.shape)


def minilm_relation(
    student: tuple[Array, Array],
    teacher: tuple[Array, Array],
    *,
    relation_heads: int,
    where: Array | None = None,
) -> Array:
    """`mean over heads of KL(softmax(x_T y_T^T / sqrt(d)) || softmax(x_S y_S^T / sqrt(d)))`.

    The vectors of all heads are joined and split again into `relation_heads`, so widths and numbers
    of heads may differ and no projection is needed. Averaged over the real tokens of an example and
    then over examples, it is the published number. MiniLM uses (queries, keys) and (values, values)
    of the last layer; see also `minilm_v2`.

    Args:
      student: two arrays `[B, L, Ds]`: queries and keys, or either of them twice.
      teacher: two arrays `[B, L, Dt]`.
      relation_heads: A, a divisor of both widths.
      where: bool `[B, L]`, real tokens.

    Returns:
      `[B, L]`, nats.

    References:
      Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, 2021 (2012.15828).
    """
    _checks.count(1, relation_heads=relation_heads)
    _sides.check_sequences(2, student=student, teacher=teacher)
    _sides.same_positions(student[0], teacher[0], at_most=3)
    _checks.mask(where, student[0].shape[:-1])
    scores_s = _relation(*student, relation_heads, where)
    scores_t = _relation(*teacher, relation_heads, where)
    return attention_kl(scores_s, scores_t, where=where)


def minilm_v2(
    student: Mapping[str, Array],
    teacher: Mapping[str, Array],
    *,
    relation_heads: int,
    where: Array | None = None,
) -> Array:
    """Query-query + key-key + value-value relations of one layer each: MiniLMv2.

    Args:
      student: any of "query", "key", "value": `[B, L, Ds]`, heads joined.
      teacher: the same keys, `[B, L, Dt]`; an upper-middle layer of a large teacher.
      relation_heads: as in `minilm_relation`.
      where: bool `[B, L]`, real tokens.

    Returns:
      `[B, L]`, nats.

    References:
      Wang et al., 2021 (2012.15828).
    """
    _checks.count(1, relation_heads=relation_heads)
    _checks.same_keys(student=student, teacher=teacher)
    if not student:
        raise ValueError("give at least one of query, key, value.")
    for name in student:
        _sides.same_positions(student[name], teacher[name], at_most=3)
    _checks.mask(where, next(iter(student.values())).shape[:-1])

    def relations(side: Mapping[str, Array]) -> Array:
        """Concatenates all relations along the axis of heads."""
        parts = [_relation(side[name], side[name], relation_heads, where) for name in sorted(side)]
        return jnp.concatenate(parts, axis=1)

    return len(student) * attention_kl(relations(student), relations(teacher), where=where)


def _relation(x: Array, y: Array, heads: int, where: Array | None) -> Array:
    x, y = _sides.same_shape(x, y, at_least=3, at_most=3, names=("first", "second"))
    x, y = _numerics.kept(x, where), _numerics.kept(y, where)
    width, left_over = divmod(x.shape[-1], heads)
    if left_over:
        raise ValueError(
            f"relation_heads={heads} must divide the width, got {_checks.described(vectors=x)}."
        )
    # The scale is split between both factors, which keeps half precisions in range.
    x, y = (_heads(z, heads) / width**0.25 for z in (x, y))
    return _numerics.gram(x, y)


def _heads(x: Array, heads: int) -> Array:
    """`[B, L, D] -> [B, heads, L, D / heads]`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def uniform_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """TinyBERT's map `g(m) = m N / M` from M student layers to N; layer 0 is the embedding.

    Hidden state m learns from the teacher's hidden state `g(m)`; with attentions counted from 0,
    attention i learns from attention `g(i + 1) - 1`.

    >>> uniform_layers(4, 12)
    (0, 3, 6, 9, 12)

    Returns:
      `(g(0), ..., g(M))`: `[M + 1]` Python ints from 0 to N.

    Raises:
      ValueError: unless both are at least 1 and M divides N.

    References:
      Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2019 (1909.10351).
    """
    _checks.count(1, student_layers=student_layers, teacher_layers=teacher_layers)
    if teacher_layers % student_layers:
        raise ValueError(
            "the student's layers must divide the teacher's, got "
            f"{student_layers} and {teacher_layers}."
        )
    return tuple(range(0, teacher_layers + 1, teacher_layers // student_layers))


def token_gram(
    student: tuple[Array, Array], teacher: tuple[Array, Array], *, where: Array | None = None
) -> Array:
    """`mean_j (G_S - G_T)_ij^2` of token Gram matrices `G = h_1 h_2^T / D` between two layers.

    The mean over pairs of real tokens is TextBrewer's `mmd_loss`: weight token i of example b by
    its number of real tokens, since j runs over real tokens only. Widths may differ: each model
    divides by its own.

    Args:
      student: hidden states of two layers (or one layer twice), `[B, L, Ds]` each.
      teacher: two arrays `[B, L, Dt]`.
      where: bool `[B, L]`, real tokens.

    Returns:
      `[B, L]`; 0 at masked tokens.

    References:
      TextBrewer, 2020 (2002.12620).
    """
    _sides.check_sequences(2, student=student, teacher=teacher)
    _sides.same_positions(student[0], teacher[0], at_most=3)
    _checks.mask(where, student[0].shape[:-1])
    grams = []
    for pair in (student, teacher):
        pair = _sides.same_shape(*pair, at_least=3, at_most=3, names=("first", "second"))
        upper, lower = (_numerics.kept(states, where) for states in pair)
        grams.append(_numerics.gram(upper, lower) / upper.shape[-1])
    is_real_pair = None if where is None else where[:, :, None] & where[:, None, :]
    return _numerics.masked_mean(jnp.square(grams[0] - grams[1]), is_real_pair, axis=-1)
