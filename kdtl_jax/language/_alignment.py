"""Two tokenizations of one text: groups of tokens that end at the same byte, and their probability.

    ours, theirs, count = language.align_tokens(student_ends, teacher_ends)
    chunks = [language.chunk_log_probs(lp, groups, num_chunks=count) for lp, groups in ...]
    loss = losses.alm(*chunks)

Vocabularies are compared token by token, never by size: `shared_ids`, `require_same_ids`.

Raises TypeError if log-probabilities are not floating point, or tokens, groups or numbers of chunks
are not integers, and ValueError if shapes do not fit or there are no chunks.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics


def align_tokens(
    student_ends: np.ndarray, teacher_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Groups consecutive tokens so that groups end at the same byte on both sides. Host only.

    Args:
      student_ends: int `[L_S]`, non-decreasing byte offsets at which the student's tokens end.
      teacher_ends: int `[L_T]`.

    Returns:
      The group of each student token `[L_S]` and of each teacher token `[L_T]`, and the number of
      groups. Tokens after the last common end get -1 if only one side has any.

    Raises:
      ValueError: if the ends are not `[L]` or decrease.
    """
    sides = {"student_ends": np.asarray(student_ends), "teacher_ends": np.asarray(teacher_ends)}
    _checks.rank(1, 1, **sides)
    for name, side in sides.items():
        if np.any(np.diff(side) < 0):
            raise ValueError(f"{name} must not decrease, got {side}.")
    ends = list(sides.values())
    groups = [np.full(len(side), -1, np.int32) for side in ends]
    start, positions, count = [0, 0], [0, 0], 0
    while positions[0] < len(ends[0]) and positions[1] < len(ends[1]):
        left, right = ends[0][positions[0]], ends[1][positions[1]]
        positions[0] += int(left <= right)
        positions[1] += int(right <= left)
        if left == right:
            for side in (0, 1):
                groups[side][start[side] : positions[side]] = count
            start, count = list(positions), count + 1
    if start[0] < len(ends[0]) and start[1] < len(ends[1]):
        for side in (0, 1):
            groups[side][start[side] :] = count
        count += 1
    return groups[0], groups[1], count


def merge_tokens(log_probs: Array, tokens: Array, groups: Array, *, num_groups: int) -> Array:
    """One distribution per group: that of its last token, times the probability of the tokens
    before it.

    By the chain rule, `p_j(v) prod_{k < j} p_k(token_k)` is the exact probability of the group's
    text with v in place of its last token; summed over v, it is the probability of the prefix. The
    first token's distribution times the probabilities of the later tokens would not be a
    probability of any text. The last tokens of a group differ between the two sides: only the
    observed entries are the same text, and `losses.alm` compares these.

    Args:
      log_probs: `[L, vocabulary]`; row k predicts token k.
      tokens: int `[L]`, the tokens observed.
      groups: int `[L]` from `align_tokens`, non-decreasing; tokens with -1 are ignored.
      num_groups: static number of groups; later ones are ignored.

    Returns:
      `[num_groups, vocabulary]` log-probabilities; all 0 for a group without tokens, NaN for one
      with a token outside the vocabulary before its last token.

    Raises:
      ValueError: if a token that is used is outside the vocabulary.

    References:
      TRL's GOLD trainer with "bayesian" merging.
    """
    _checks.floating(log_probs=log_probs)
    _checks.rank(2, 2, log_probs=log_probs)
    _checks.same_shape(tokens=tokens, groups=groups)
    groups = jnp.asarray(groups)
    _checks.labels(tokens, log_probs, groups >= 0)
    log_probs = _numerics.upcast(log_probs)
    after = jnp.concatenate([groups[1:], jnp.full((1,), -1, groups.dtype)])
    is_last = (groups >= 0) & (groups != after)
    safe, usable = _numerics.usable_labels(tokens, log_probs.shape[-1], groups >= 0)
    observed = jnp.take_along_axis(log_probs, safe[:, None], axis=1)[:, 0]
    observed = _numerics.at_usable(observed, usable, groups >= 0)
    part = jnp.where(is_last[:, None], log_probs, observed[:, None])
    # A negative group is out of range and is dropped.
    return jax.ops.segment_sum(part, jnp.where(groups < 0, num_groups, groups), num_groups)


def chunk_log_probs(log_probs: Array, groups: Array, *, num_chunks: int) -> Array:
    """Log-probability of every chunk of text: the sum of its tokens'.

    Args:
      log_probs: `[..., L]`, of the observed tokens (`losses.token_log_probs`).
      groups: int `[..., L]`, the chunk of each token; tokens not in 0..num_chunks-1 are ignored.
      num_chunks: static number of chunks.

    Returns:
      `[..., num_chunks]`, <= 0; 0 for a chunk without tokens (mask it with `chunk_lengths`).
    """
    _checks.floating(log_probs=log_probs)
    _checks.rank(1, log_probs=log_probs)
    _checks.integers(groups=groups)
    _checks.same_shape(log_probs=log_probs, groups=groups)
    _checks.count(1, num_chunks=num_chunks)
    log_probs = _numerics.upcast(log_probs)
    inside = (groups >= 0) & (groups < num_chunks)
    rows = log_probs.reshape(-1, log_probs.shape[-1])
    row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0).reshape(log_probs.shape)
    total = rows.shape[0] * num_chunks
    segment = jnp.where(inside, row * num_chunks + groups.astype(jnp.int32), total)
    values = jnp.where(inside, log_probs, 0)
    sums = jax.ops.segment_sum(values.reshape(-1), segment.reshape(-1), total)
    return sums.reshape(*log_probs.shape[:-1], num_chunks)


def chunk_lengths(groups: Array, *, num_chunks: int) -> Array:
    """The number of tokens in each chunk: int32 `[..., num_chunks]`, 0 for an unused chunk."""
    ones = jnp.ones(np.shape(groups), jnp.float32)
    return chunk_log_probs(ones, groups, num_chunks=num_chunks).astype(jnp.int32)


def merge_chunks(groups: Array, closes: Array) -> Array:
    """Merges each chunk with the following ones, up to the next one that closes.

    If a chunk ends within a word, two tokenizers expect different continuations. tokenkit
    recommends closing chunks only where the teacher's probability of a token that begins a new word
    (`losses.log_mass`) exceeds 0.1.

    Args:
      groups: int `[..., L]`, the chunk of each token; tokens with -1 are ignored.
      closes: bool `[..., num_chunks]`; use the same for both sides.

    Returns:
      int `[..., L]`, the merged chunk of each token.
    """
    _checks.integers(groups=groups)
    _checks.arrays(closes=closes)
    groups, closes = jnp.asarray(groups), jnp.asarray(closes)
    if closes.shape[:-1] != groups.shape[:-1] or not closes.ndim:
        raise ValueError(
            "closes must be [..., num_chunks] with the leading axes of groups, got "
            f"{_checks.described(closes=closes, groups=groups)}."
        )
    closed = jnp.cumsum(closes.astype(groups.dtype), axis=-1) - closes.astype(groups.dtype)
    merged = jnp.take_along_axis(closed, jnp.maximum(groups, 0), axis=-1)
    return jnp.where(groups >= 0, merged, -1)


def shared_ids(
    student_vocabulary: Mapping[str, int], teacher_vocabulary: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of tokens with the same text on both sides, for `losses.shared_vocabulary`.

    Args:
      student_vocabulary: token text to id (`Tokenizer.vocabulary`).
      teacher_vocabulary: the same for the teacher.

    Returns:
      int32 `[n]` twice, in the order of the student's ids.

    Raises:
      ValueError: if no token is shared.
    """
    _checks.mappings(student_vocabulary=student_vocabulary, teacher_vocabulary=teacher_vocabulary)
    pairs = sorted(
        (i, teacher_vocabulary[token])
        for token, i in student_vocabulary.items()
        if token in teacher_vocabulary
    )
    if not pairs:
        raise ValueError(
            "the two vocabularies share no token; compare chunks of text (losses.alm)."
        )
    student_ids, teacher_ids = np.asarray(pairs, np.int32).T
    return student_ids, teacher_ids


def require_same_ids(
    student_vocabulary: Mapping[str, int], teacher_vocabulary: Mapping[str, int]
) -> None:
    """Raises an error if a token has different ids in two vocabularies, or exists in only one.

    Losses on logits compare class by class; with different ids they are finite but meaningless.
    Equal sizes do not prove equal ids, since tables are padded.

    Raises:
      ValueError: naming some of the tokens that differ.
    """
    _checks.mappings(student_vocabulary=student_vocabulary, teacher_vocabulary=teacher_vocabulary)
    differ = [
        (token, student_vocabulary.get(token), teacher_vocabulary.get(token))
        for token in student_vocabulary.keys() | teacher_vocabulary.keys()
        if student_vocabulary.get(token) != teacher_vocabulary.get(token)
    ]
    if differ:
        some = ", ".join(f"{t!r} is {a} and {b}" for t, a, b in sorted(differ, key=str)[:3])
        raise ValueError(
            f"{len(differ)} tokens have other ids in student and teacher: {some}. Compare them by "
            "losses.shared_vocabulary(…, *language.shared_ids(…)) or by chunks (losses.alm)."
        )
