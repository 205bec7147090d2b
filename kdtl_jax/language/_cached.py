"""A teacher's distributions per token, stored on disk, and learning from them.

    stored = language.stored_outputs(teacher.model, top_k=64)
    run.teacher_cache.write("cache", stored, teacher.params, {"inputs": rows}, batch_size=16,
                            taps=language.stored_names(top_k=64))
    learner = language.kd_stored(setup)  # batches have the cache's rows as "teacher"

There are three forms: all logits (`logits`), the k most likely tokens with the mass of the rest
(`indices`, `log_probs`, `log_tail`), and counts of tokens drawn from the teacher (`indices`,
`counts`). Counts are unbiased with a dozen entries per position. The top k without the rest would
be biased and is not offered.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import Mean, ModelFn, Outputs, Params, PyTree
from kdtl_jax.language import _methods, _terms
from kdtl_jax.language._terms import CHUNK, Divergence
from kdtl_jax.models import Decoder
from kdtl_jax.objective import Inputs, TermsFn


def stored_names(*, top_k: int | None = None, draws: int | None = None) -> tuple[str, ...]:
    """Names of the outputs of `stored_outputs` with the same arguments.

    Raises:
      ValueError: if both top_k and draws are given.
    """
    if top_k is not None and draws is not None:
        raise ValueError(f"give one of top_k and draws, got {top_k} and {draws}.")
    if draws is not None:
        return ("indices", "counts")
    return ("logits",) if top_k is None else ("indices", "log_probs", "log_tail")


def stored_outputs(
    teacher: Decoder,
    *,
    top_k: int | None = None,
    draws: int | None = None,
    key: Array | None = None,
    vocabulary: int | None = None,
    chunk_size: int = CHUNK,
) -> ModelFn:
    """A model function of token batches whose outputs are stored in a cache for each position.

    Args:
      teacher: the decoder.
      top_k: keep the k most likely tokens, their log-probabilities and the log of the rest's mass.
      draws: keep N draws with replacement, as distinct tokens and their counts (0 for unused
        entries). Needs an entry `"row"` int `[B]` in the batch: a row's draws depend only on it
        and the key.
      key: the PRNG key of the draws.
      vocabulary: the number of token ids, if the teacher's table has more rows.
      chunk_size: number of tokens whose logits exist at a time, for `top_k` and `draws`.

    Returns:
      The function. With `top_k`, it gives `indices` (unsigned) and `log_probs` `[B, L, k]`, and
      `log_tail` `[B, L]`; with `draws`, `indices` and `counts`, unsigned `[B, L, N]`; with neither,
      `logits` `[B, L, V]`.

    Raises:
      ValueError: if both `top_k` and `draws` are given, or only one of `draws` and `key`.
    """
    names = stored_names(top_k=top_k, draws=draws)
    if (draws is None) != (key is None):
        raise ValueError("draws and key belong together.")
    draw_key, apply_hidden = key, _terms.model(_methods.within_vocabulary(teacher, vocabulary))

    def of_logits(logits: Array, keys: Any) -> dict[str, Array]:
        dtype = _smallest_dtype(logits.shape[-1])
        if top_k is not None:
            targets = losses.top_k_targets(logits, k=top_k)
            return {**targets._asdict(), "indices": targets.indices.astype(dtype)}
        assert draws is not None and draw_key is not None
        num_draws, impl = draws, jax.random.key_impl(draw_key)

        def draw(data: Array, row: Array) -> Array:
            key = jax.random.wrap_key_data(data, impl=impl)
            return losses.random_sampling_draws(key, row, num_draws=num_draws)

        indices, counts = _count_draws(jax.vmap(draw)(keys, logits))
        # A draw from NaN is an arbitrary token. Counts of 0 make such a position's loss NaN.
        is_invalid = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=-1, keepdims=True)
        counts = jnp.where(is_invalid, jnp.zeros_like(counts), counts)
        return {
            "indices": indices.astype(dtype),
            "counts": counts.astype(_smallest_dtype(draws + 1)),
        }

    def apply(
        params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, PyTree]:
        outputs, model_state = apply_hidden(params, model_state, inputs)
        hidden: Any = outputs["hidden"]
        head: Any = outputs["head"]
        if names == ("logits",):
            return {"logits": losses.head_logits(hidden, head)}, model_state
        keys = None
        if draw_key is not None:
            rows = jax.vmap(jax.random.fold_in, (None, 0))(draw_key, inputs["row"])
            position_keys = jax.vmap(lambda key: jax.random.split(key, hidden.shape[1]))(rows)
            keys = jax.random.key_data(position_keys)
        stored = losses.chunked_map(of_logits, hidden, head, keys, chunk_size=chunk_size)
        return stored, model_state

    return apply


def stored_divergence(divergence: Divergence | None = None, *, chunk_size: int = CHUNK) -> TermsFn:
    """The terms `{"kd": mean over learned tokens}` against `inputs.teacher`, in any stored form.

    The student's outputs are "hidden" `[B, L, D]` and its head.

    From all logits, the term is the divergence, forward KL by default. From the k most likely
    tokens, it is the divergence over these tokens and one bucket of all others. From counts c, it
    is the cross-entropy with the drawn tokens, `-sum_i c_i / sum(c) log p_S(v_i)`, whose expected
    gradient is that of the forward KL.

    Raises:
      ValueError: if the batch has no stored teacher, or a divergence is given and the teacher is
        stored as counts.
    """

    def terms(inputs: Inputs) -> dict[str, Mean]:
        _, where = _terms.counted(inputs)
        loss, targets = _loss(inputs.teacher, divergence)
        return {"kd": _terms.student_loss(loss, inputs, targets, where, chunk_size)}

    return terms


def kd_stored(setup: _methods.Setup) -> _methods.Learner:
    """`kd` from a cached teacher: batches hold its rows as `"teacher"`, and the step needs no
    teacher.

    References:
      Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, 2025
      (2503.16870), for counts.
    """
    terms = stored_divergence(setup.divergence, chunk_size=setup.chunk_size)
    return _methods.Learner(_methods.distilled(setup, terms, teacher=None))


def _loss(stored: Mapping[str, Any], divergence: Divergence | None) -> tuple[Any, Any]:
    """The loss of logits and targets, and the targets, for the stored form."""
    if "logits" in stored:
        return divergence or losses.forward_kl, stored["logits"]
    if "counts" in stored:
        if divergence is not None:
            raise ValueError("a teacher stored as counts has one loss: give no divergence.")
        counts = stored["counts"].astype(jnp.float32)
        shares = counts / jnp.sum(counts, axis=-1, keepdims=True)
        indices = stored["indices"].astype(jnp.int32)
        return losses.random_sampling_cross_entropy, losses.WeightedClasses(indices, shares)
    if "log_tail" in stored:
        targets = losses.TopK(
            stored["indices"].astype(jnp.int32), stored["log_probs"], stored["log_tail"]
        )
        if divergence is None:
            return losses.top_k_kl_tail, targets
        return lambda logits, cut: divergence(*losses.top_k_buckets(logits, cut)), targets
    raise ValueError(
        f'the batch has no stored teacher: "teacher" has {sorted(stored)}, expected the outputs of '
        "stored_outputs."
    )


def _count_draws(draws: Array) -> tuple[Array, Array]:
    """Distinct draws first, each with its count; then entries of count 0."""
    ordered = jnp.sort(draws, axis=-1)
    before = jnp.pad(ordered[..., :-1], [(0, 0)] * (draws.ndim - 1) + [(1, 0)], constant_values=-1)
    is_first = ordered != before
    counts = jnp.sum(ordered[..., :, None] == ordered[..., None, :], axis=-1) * is_first
    order = jnp.argsort(~is_first, axis=-1, stable=True)
    take = partial(jnp.take_along_axis, indices=order, axis=-1)
    return take(ordered), take(counts)


def _smallest_dtype(size: int) -> Any:
    return next(t for t in (jnp.uint8, jnp.uint16, jnp.uint32) if size - 1 <= jnp.iinfo(t).max)
