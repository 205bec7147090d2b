"""How closely a language model follows its teacher on a text: token by token, logits in chunks."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _numerics, losses
from kdtl_jax._types import Mean, Outputs
from kdtl_jax.language._terms import CHUNK


class Fidelity(NamedTuple):
    """Means over learned tokens, at temperature 1, in nats.

    `nats` and `teacher_nats` are `-log p(next token)`. `forward_kl` is KL(teacher || student), and
    `reverse_kl` is KL(student || teacher). `agreement` is the share of tokens at which both have
    the same most likely token. `overlap` is `sum_v min(p_S, p_T)`, 1 minus the total variation.
    `entropy` and `teacher_entropy` are those of the distributions.
    """

    nats: Mean
    teacher_nats: Mean
    forward_kl: Mean
    reverse_kl: Mean
    agreement: Mean
    overlap: Mean
    entropy: Mean
    teacher_entropy: Mean


def fidelity(
    student: Outputs,
    teacher: Outputs,
    targets: Array,
    where: Array,
    *,
    vocabulary: int | None = None,
    chunk_size: int = CHUNK,
) -> Fidelity:
    """Compares two models' outputs on the same tokens; nothing is differentiated.

    Args:
      student, teacher: outputs of functions from `language.model`, hidden states `[B, L, *]`.
      targets, where: `[B, L]`, from `next_tokens`.
      vocabulary: the number of token ids, if a table has more rows; None means all rows.
      chunk_size: number of tokens whose logits exist at a time.
    """
    heads: Any = student["head"], teacher["head"]

    def compared(logits: Array, rows: Any) -> Array:
        teacher_hidden, target = rows
        student_logits, teacher_logits = (
            x[..., :vocabulary] for x in (logits, losses.head_logits(teacher_hidden, heads[1]))
        )
        alike = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
        measures = (  # in the order of Fidelity
            -losses.token_log_probs(student_logits, target),
            -losses.token_log_probs(teacher_logits, target),
            losses.forward_kl(student_logits, teacher_logits),
            losses.reverse_kl(student_logits, teacher_logits),
            _numerics.nan_of(
                alike.astype(student_logits.dtype),
                jnp.max(student_logits + teacher_logits, axis=-1),
            ),
            losses.acceptance(student_logits, teacher_logits),
            losses.soft_cross_entropy(student_logits, student_logits),
            losses.soft_cross_entropy(teacher_logits, teacher_logits),
        )
        return jnp.stack(measures, axis=-1)

    values = losses.chunked_map(
        compared,
        student["hidden"],
        heads[0],
        (teacher["hidden"], jnp.where(where, targets, 0)),
        where=where,
        chunk_size=chunk_size,
    )
    count = jnp.sum(where, dtype=values.dtype)
    return Fidelity(*(Mean(total, count) for total in jnp.sum(values, axis=(0, 1))))
