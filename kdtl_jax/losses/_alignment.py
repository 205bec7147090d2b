"""Two tokenizations of one text: tokens that cover the same bytes, and merged predictions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics


def align_tokens(
    student_ends: np.ndarray, teacher_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Groups of consecutive tokens that end at the same byte on both sides. Host-side.

    Args:
      student_ends: int `[L_S]`, non-decreasing byte offsets at which the student's tokens end.
      teacher_ends: int `[L_T]`.

    Returns:
      The group of each student token `[L_S]` and of each teacher token `[L_T]`, and the number of
      groups; -1 for tokens after the last common end if only one side has any.

    Raises:
      ValueError: if ends are not one-dimensional or decrease.
    """
    sides = {"student_ends": np.asarray(student_ends), "teacher_ends": np.asarray(teacher_ends)}
    _checks.rank(1, 1, **sides)
    for name, ends in sides.items():
        if np.any(np.diff(ends) < 0):
            raise ValueError(f"{name} must not decrease, got {ends}.")
    groups = [np.full(len(ends), -1, np.int32) for ends in sides.values()]
    start, at, count = [0, 0], [0, 0], 0
    ends = list(sides.values())
    while at[0] < len(ends[0]) and at[1] < len(ends[1]):
        left, right = ends[0][at[0]], ends[1][at[1]]
        at[0] += int(left <= right)
        at[1] += int(right <= left)
        if left == right:
            for side in (0, 1):
                groups[side][start[side] : at[side]] = count
            start, count = list(at), count + 1
    if start[0] < len(ends[0]) and start[1] < len(ends[1]):
        for side in (0, 1):
            groups[side][start[side] :] = count
        count += 1
    return groups[0], groups[1], count


def merge_tokens(log_probs: Array, tokens: Array, groups: Array, *, num_groups: int) -> Array:
    """One distribution per group: its first token's, times the probability of the others observed.

    `p_i(v) prod_{k > i} p_k(token_k)`: the chance of the text that continues `v` with the rest of
    the group. It does not sum to 1.

    Args:
      log_probs: `[L, vocabulary]`; row k predicts token k.
      tokens: int `[L]`, the tokens observed.
      groups: int `[L]` from `align_tokens`, non-decreasing; -1 takes no part.
      num_groups: static number of groups.

    Returns:
      `[num_groups, vocabulary]` log-probabilities.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if arrays have the wrong kind of dtype.
    """
    _checks.floating(log_probs=log_probs)
    _checks.rank(2, 2, log_probs=log_probs)
    _checks.labels(tokens, log_probs)
    _checks.same_shape(tokens=tokens, groups=groups)
    log_probs = _numerics.upcast(log_probs)
    groups = jnp.asarray(groups)
    before = jnp.concatenate([jnp.full((1,), -1, groups.dtype), groups[:-1]])
    is_first = (groups >= 0) & (groups != before)
    observed = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)
    part = jnp.where(is_first[:, None], log_probs, observed)
    # A negative group falls outside and is dropped.
    return jax.ops.segment_sum(part, jnp.where(groups < 0, num_groups, groups), num_groups)
