"""Losses on scores of candidates, for embedding models and rerankers with a stronger ranker.

A query's scores are a row `[B, n]`, the positive first: dot products or cosines (`1 -
cosine_distance`) of embeddings, or a reranker's logits. The listwise loss on them is `kd_kl`, the
teacher's softmax against the student's (sentence-transformers' `DistillKLDivLoss` at its own
temperature). For a pair's similarity, use `squared_distance`; for the embeddings themselves, `mse`
or `cosine_distance`.
"""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics


def margin_mse(student_scores: Array, teacher_scores: Array) -> Array:
    """Mean over the others of `((s_0 - s_i) - (t_0 - t_i))^2`: how far the positive leads.

    Pass the teacher's logits: sigmoids squash margins (.99 and .95 are .04 apart, their logits 1.65
    apart).

    Args:
      student_scores: `[..., n]`, n > 1, the positive first.
      teacher_scores: the same shape. Pass stored margins m as the scores `[0, -m_1, -m_2, …]`.

    Returns:
      `[...]`, float32 or wider; `.mean()` is sentence-transformers' number.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or the positive is the only candidate.

    References:
      Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
      Distillation, 2020 (2010.02666).
    """
    scores = {"student_scores": student_scores, "teacher_scores": teacher_scores}
    _checks.floating(**scores)
    _checks.same_shape(**scores)
    _checks.rank(1, student_scores=student_scores)
    _checks.nonempty(student_scores=student_scores)
    if jnp.shape(student_scores)[-1] < 2:
        raise ValueError(f"a margin needs two scores, got {_checks.described(**scores)}.")
    differences = _numerics.upcast(student_scores) - _numerics.upcast(teacher_scores)
    return jnp.mean(jnp.square(differences[..., :1] - differences[..., 1:]), axis=-1)
