"""Classifiers on a decoder's last hidden states: of a text, or of each of its tokens."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from kdtl_jax import losses
from kdtl_jax._types import ModelFn, Params
from kdtl_jax.models._blocks import known_ids, token_inputs
from kdtl_jax.models._decoder import Decoder


def text_classifier(decoder: Decoder, *, padding: int | None = None) -> ModelFn:
    """A classifier of texts that reads the hidden state of each text's last token.

    Inputs: int tokens `[B, L]`, or a dict with `tokens` and optionally `mask` (bool, True where
    there is a token). Parameters: the decoder's, and `score`: `kernel` `[width, classes]` and
    optionally `bias`.

    Args:
      decoder: its functions.
      padding: the id of a token that is never a text's last, in texts without a mask too; None if
        there is none.

    Returns:
      A model with the outputs `last_hidden` `[B, L, width]` and, in float32, `logits`
      `[B, classes]`.
    """

    def last_token(hidden: Array, real: Array) -> Array:
        position = jnp.where(real, jnp.arange(real.shape[1])[None], -1)
        last = jnp.argmax(position, axis=1)[:, None, None]
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0]

    return _classifier(decoder, padding, last_token)


def token_classifier(decoder: Decoder) -> ModelFn:
    """A classifier of each token; as `text_classifier`, with `logits` `[B, L, classes]`."""
    return _classifier(decoder, None, lambda hidden, real: hidden)


def _classifier(
    decoder: Decoder, padding: int | None, pool: Callable[[Array, Array], Array]
) -> ModelFn:
    """A head on `pool(hidden states [B, L, width], which tokens are real [B, L])`."""

    def model(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[dict[str, Array], Any]:
        tokens, mask, _ = token_inputs(inputs, None)
        real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
        if padding is not None:
            real &= tokens != padding
        segments = None if mask is None else mask.astype(jnp.int32)
        ids = known_ids(tokens, decoder.config.vocabulary, real)
        hidden, _ = decoder.apply(params, ids, segments=segments)
        score = losses.Head(params["score"]["kernel"], params["score"].get("bias"))
        logits = losses.head_logits(pool(hidden, real), score)
        return {"last_hidden": hidden, "logits": logits}, model_state

    return model
