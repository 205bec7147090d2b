"""Sampling from a decoder as one compiled loop.

    samples = language.sample(model, params, prompts, keys=jax.random.split(key, len(prompts)),
                              length=64, temperature=0.7, top_p=0.95, stop_tokens=(2,))

The log-probabilities returned with the tokens are *under the distribution that was sampled from*,
tempered and filtered, as importance ratios need them. The model's own log-probabilities are
different numbers; compute them in a forward pass.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, losses
from kdtl_jax._types import Params, Scalar
from kdtl_jax.models import Cache, Decoder, init_cache


class Samples(NamedTuple):
    """Sampled continuations.

    `tokens` int32 `[B, N]`, 0 after the end; `mask` bool `[B, N]`, True on sampled tokens,
    including the final stop token; `log_probs` float32 `[B, N]` under the distribution that was
    sampled from, 0 where the mask is False.
    """

    tokens: Array
    mask: Array
    log_probs: Array


class Sequences(NamedTuple):
    """Prompts with their continuations.

    `tokens` and `segments` int32 `[B, P + N]`, segment 0 on padding (also between a short prompt
    and its continuation); `is_sampled` bool `[B, P + N]`, the positions of sampled tokens.
    """

    tokens: Array
    segments: Array
    is_sampled: Array


def sampling_log_probs(
    logits: Array,
    *,
    temperature: Scalar = 1.0,
    top_k: int | Array | None = None,
    top_p: Scalar | None = None,
    min_p: Scalar | None = None,
) -> Array:
    """Log-probabilities of the tempered and filtered distribution; -inf for a dropped token.

    The filters apply in this order, each to the softmax of the tokens that remain:

    - `z = logits / temperature`; a temperature of 0 keeps only the first largest logit (greedy);
    - `top_k` keeps tokens with at least the k-th largest `z`, including ties;
    - `top_p` drops the smallest probabilities whose sum is at most `1 - top_p`, never the largest;
    - `min_p` keeps tokens with at least `min_p` times the largest probability.

    Args:
      logits: `[..., vocabulary]`.
      temperature, top_k, top_p, min_p: a number, or an array of the logits' leading dimensions or
        the first of them (one per example); None skips a filter.

    Returns:
      `[..., vocabulary]`, float32 or wider. transformers and vLLM use the same filters in the same
      order, but vLLM by default reports log-probabilities before temperature and filters.

    Raises:
      ValueError: if the temperature is below 0, `top_k` is below 1, or `top_p` or `min_p` is
        outside [0, 1].
    """
    z = _filter(logits, temperature, top_k, top_p, min_p)
    return jax.nn.log_softmax(z, axis=-1)


def _filter(
    logits: Array,
    temperature: Scalar,
    top_k: int | Array | None,
    top_p: Scalar | None,
    min_p: Scalar | None,
) -> Array:
    """Logits of the tempered and filtered distribution, not normalized."""
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.non_negative(temperature=temperature)
    scores = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def rows(name: str, value: Any, dtype: Any = scores.dtype) -> Array:
        return _numerics.per_example(value, jnp.zeros(scores.shape[:-1], dtype), name)[..., None]

    t = rows("temperature", temperature)

    def greedy() -> Array:
        best = jnp.argmax(scores, axis=-1, keepdims=True)
        is_best = jax.lax.broadcasted_iota(best.dtype, scores.shape, scores.ndim - 1) == best
        greedy_logits = jnp.where(is_best, jnp.zeros((), scores.dtype), -jnp.inf)
        return jnp.where(t > 0, scores / jnp.where(t > 0, t, 1), greedy_logits)

    # The largest is computed only if needed, since it takes a third as long as the draw.
    z = jax.lax.cond(jnp.all(t > 0), lambda: scores / t, greedy)
    if top_k is not None:
        _checks.within(1, float("inf"), top_k=top_k)
        _checks.integers(top_k=top_k)
        ranked = jnp.flip(jnp.sort(z, axis=-1), axis=-1)
        last = jnp.minimum(rows("top_k", top_k, jnp.int32), z.shape[-1]) - 1
        last = jnp.broadcast_to(last, (*z.shape[:-1], 1))
        z = jnp.where(z >= jnp.take_along_axis(ranked, last, axis=-1), z, -jnp.inf)
    if top_p is not None:
        _checks.within(0, 1, top_p=top_p)
        order = jnp.argsort(z, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(z, order, axis=-1), axis=-1), axis=-1)
        is_dropped = (mass <= 1 - rows("top_p", top_p)).at[..., -1].set(False)
        rank = jnp.argsort(order, axis=-1)
        z = jnp.where(jnp.take_along_axis(is_dropped, rank, axis=-1), -jnp.inf, z)
    if min_p is not None:
        _checks.within(0, 1, min_p=min_p)
        p = jax.nn.softmax(z, axis=-1)
        floor = rows("min_p", min_p) * jnp.max(p, axis=-1, keepdims=True)
        z = jnp.where(p >= floor, z, -jnp.inf)
    return z


def _draw(keys: Array, z: Array) -> tuple[Array, Array]:
    """One token from each row of logits `[B, V]`, and its log-probability: both `[B]`.

    Draws one of about `sqrt(V)` blocks of tokens, then a token of that block, each by a uniform
    number. That is two random numbers per row, whereas a Gumbel for every token takes as long as a
    small model. In a single draw, a number's 23 bits would be too few for a large vocabulary.
    """
    vocabulary = z.shape[-1]
    top = jnp.max(z, axis=-1, keepdims=True)
    mass = jnp.exp(z - jnp.where(top != -jnp.inf, top, 0))
    size = 2 ** round(math.log2(vocabulary) / 2)
    blocks = jnp.pad(mass, ((0, 0), (0, -vocabulary % size))).reshape(len(z), -1, size)
    block_mass = jnp.sum(blocks, axis=-1)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,), z.dtype))(keys)
    block = _select_by_mass(block_mass, uniforms[:, :1])
    token_mass = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    offset = _select_by_mass(token_mass, uniforms[:, 1:])
    token = jnp.minimum(block[:, 0] * size + offset[:, 0], vocabulary - 1)
    log_total = jnp.log(jnp.sum(block_mass, axis=-1)) + top[:, 0]
    return token, jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0] - log_total


def _select_by_mass(mass: Array, share: Array) -> Array:
    """The index at which the share `[B, 1]` of the mass `[B, n]` is reached; it has mass.

    Cumulative sums of neighbors may differ only by rounding, so the mass itself is checked.
    """
    cumulative = jnp.cumsum(mass, axis=-1)
    is_reached = (mass > 0) & (cumulative > share * cumulative[:, -1:])
    last_with_mass = mass.shape[-1] - 1 - jnp.argmax(jnp.flip(mass > 0, axis=-1), axis=-1)
    first = jnp.where(jnp.any(is_reached, axis=-1), jnp.argmax(is_reached, axis=-1), last_with_mass)
    return first[:, None].astype(jnp.int32)


def sample(
    model: Decoder,
    params: Params,
    prompts: Array,
    *,
    keys: Array,
    length: int,
    prompt_mask: Array | None = None,
    temperature: Scalar = 1.0,
    top_k: int | Array | None = None,
    top_p: Scalar | None = None,
    min_p: Scalar | None = None,
    stop_tokens: Sequence[int] = (),
    cache_dtype: Any = jnp.float32,
) -> Samples:
    """Continues every prompt by up to `length` tokens, using a key-value cache.

    Jit it with `model`, `length` and `stop_tokens` closed over; everything else may be traced. The
    loop ends when every row has stopped. A row's sample depends only on its prompt and its key, not
    on the rest of the batch.

    Args:
      model: `models.decoder(config)`.
      params: its parameters.
      prompts: int `[B, P]`, padded on either side.
      keys: typed PRNG keys `[B]`, one per row.
      length: N, the largest number of tokens to sample.
      prompt_mask: bool `[B, P]`, True on real tokens, at least one per row; None means that all
        are real.
      temperature, top_k, top_p, min_p: as in `sampling_log_probs`, numbers or `[B]`.
      stop_tokens: a row ends after one of these; the token itself is part of the sample.
      cache_dtype: dtype of the cached keys and values.

    Returns:
      `Samples`.

    Raises:
      ValueError: if shapes do not fit, or a prompt is empty (checked if the mask is concrete).
      TypeError: if prompts are not integers, or the mask is not bool.
    """
    _checks.integers(prompts=prompts)
    _checks.rank(2, 2, prompts=prompts)
    _checks.count(1, length=length)
    batch, width = prompts.shape
    if keys.shape != (batch,):
        raise ValueError(
            f"keys must be typed PRNG keys [{batch}], one per prompt, got {list(keys.shape)}. "
            f"Use jax.random.split(key, {batch})."
        )
    mask = jnp.ones((batch, width), jnp.bool_) if prompt_mask is None else prompt_mask
    _checks.mask(mask, (batch, width), "prompt_mask")
    concrete_mask = _checks.concrete(mask)
    if width == 0 or (concrete_mask is not None and not concrete_mask.any(axis=1).all()):
        raise ValueError("every prompt needs at least one token; give empty ones a start token.")
    segments = mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = init_cache(model.config, batch, width + length, cache_dtype)
    hidden, cache = model.apply(params, prompts, positions, segments, cache)
    assert cache is not None
    last = width - 1 - jnp.argmax(jnp.flip(mask, axis=1), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    head, stops = model.head(params), jnp.asarray(stop_tokens, jnp.int32)[None]
    first_positions = jnp.sum(segments, axis=1)  # of the new tokens

    class Carry(NamedTuple):
        step: Array  # int32 []: the token to sample
        hidden: Array
        cache: Cache
        is_running: Array  # bool [B]
        samples: Samples

    def advance(carry: Carry) -> Carry:
        step, is_running, samples = carry.step, carry.is_running, carry.samples
        logits = losses.head_logits(carry.hidden, head)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        token, log_prob = _draw(step_keys, _filter(logits, temperature, top_k, top_p, min_p))
        token = jnp.where(is_running, token, 0)
        log_prob = jnp.where(is_running, log_prob.astype(jnp.float32), 0)
        pairs = zip(samples, (token, is_running, log_prob), strict=True)
        samples = Samples(*(array.at[:, step].set(column) for array, column in pairs))
        is_running = is_running & ~jnp.any(token[:, None] == stops, axis=1)
        positions = (first_positions + step)[:, None]
        new_segments = is_running[:, None].astype(jnp.int32)
        hidden, cache = model.apply(params, token[:, None], positions, new_segments, carry.cache)
        assert cache is not None
        return Carry(step + 1, hidden[:, 0], cache, is_running, samples)

    empty = Samples(
        *(jnp.zeros((batch, length), dtype) for dtype in (jnp.int32, jnp.bool_, jnp.float32))
    )
    start = Carry(jnp.zeros((), jnp.int32), hidden, cache, jnp.ones(batch, jnp.bool_), empty)
    final = jax.lax.while_loop(lambda c: (c.step < length) & jnp.any(c.is_running), advance, start)
    return final.samples


def joined(prompts: Array, samples: Samples, *, prompt_mask: Array | None = None) -> Sequences:
    """Prompts and continuations as rows to train on: `[B, P + N]`."""
    mask = jnp.ones(prompts.shape, jnp.bool_) if prompt_mask is None else prompt_mask
    return Sequences(
        jnp.concatenate([prompts.astype(jnp.int32), samples.tokens], axis=1),
        jnp.concatenate([mask, samples.mask], axis=1).astype(jnp.int32),
        jnp.concatenate([jnp.zeros_like(mask), samples.mask], axis=1),
    )
