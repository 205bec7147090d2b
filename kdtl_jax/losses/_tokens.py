"""Hidden states of transformers: one value per token, `[B, L]`.

Padding is left to the objective: `Masked(values, where)` averages over real tokens. Only losses
that mix tokens (Gram matrices) take the mask themselves.
"""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax.losses import _door
from kdtl_jax.losses._hints import cosine_distance


def hidden_mse(student: Array, teacher: Array) -> Array:
    """`mean_d (h_S - h_T)^2` per token.

    Its mean over real tokens is TextBrewer's `hid_mse_loss`, DistillKit's hidden-state loss, and
    TinyBERT's hidden and embedding terms (which count padding too). Project the student first
    (`connectors.linear`).

    Args:
      student: `[B, L, D]`, or any `[..., D]`.
      teacher: the same shape.

    Returns:
      `[B, L]`, squared feature units.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2019 (1909.10351).
    """
    student, teacher = _door.same_shape("hidden_mse", student, teacher, at_least=1)
    return jnp.mean(jnp.square(student - teacher), axis=-1)


def hidden_cosine(student: Array, teacher: Array) -> Array:
    """`1 - cos(h_S, h_T)` per token.

    Its mean over real tokens is DistilBERT's, TextBrewer's and DistillKit's number. A zero vector
    has no direction: its distance is 1.

    Args:
      student: `[B, L, D]`, or any `[..., D]`.
      teacher: the same shape.

    Returns:
      `[B, L]`, in `[0, 2]`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Sanh et al., DistilBERT, 2019 (1910.01108).
    """
    student, teacher = _door.same_shape("hidden_cosine", student, teacher, at_least=1)
    return cosine_distance(student, teacher)


def patient_kd(student: Array, teacher: Array) -> Array:
    """`|| h_S / |h_S| - h_T / |h_T| ||^2` of the first token's state: patient distillation (PKD).

    Pass `hidden[:, 0]`, of one layer or of several stacked; `.mean()` is TextBrewer's number for
    one layer, the paper sums layers ("last" or "skip").

    Args:
      student: `[B, D]`, or any `[..., D]`.
      teacher: the same shape.

    Returns:
      `[B]`, in `[0, 4]`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Sun et al., Patient Knowledge Distillation for BERT Model Compression, 2019 (1908.09355).
    """
    student, teacher = _door.same_shape("patient_kd", student, teacher, at_least=1)
    return 2 * cosine_distance(student, teacher)


def token_gram(
    student: tuple[Array, Array], teacher: tuple[Array, Array], *, where: Array | None = None
) -> Array:
    """`mean_j (G_S - G_T)_ij^2` of token Gram matrices `G = h_1 h_2^T / D` between two layers.

    The mean over pairs of real tokens is TextBrewer's `mmd_loss`: weight token i of example b by
    its number of real tokens, since j runs over real tokens only. Widths may differ, each model
    divides by its own.

    Args:
      student: hidden states of two layers (or one layer twice), `[B, L, Ds]` each.
      teacher: two of `[B, L, Dt]`.
      where: bool `[B, L]`, real tokens.

    Returns:
      `[B, L]`; 0 at tokens that do not take part.

    Raises:
      ValueError: if batch, length or the widths within a model differ.
      TypeError: if an array is not floating point.

    References:
      TextBrewer, 2020 (2002.12620).
    """
    _door.same_positions("token_gram", student[0], teacher[0], at_most=3)
    _checks.mask(where, student[0].shape[:-1])
    grams = []
    for pair in (student, teacher):
        pair = _door.same_shape("token_gram", *pair, at_least=3, at_most=3)
        above, below = (_door.kept(states, where) for states in pair)
        grams.append(_numerics.gram(above, below) / above.shape[-1])
    both = None if where is None else where[:, :, None] & where[:, None, :]
    return _numerics.masked_mean(jnp.square(grams[0] - grams[1]), both, axis=-1)
