"""Classifiers on a decoder's last hidden states: of a text, or of each of its tokens."""

from typing import Any

import jax.numpy as jnp
from jax import Array

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

    def model(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[dict[str, Array], Any]:
        real, hidden = _hidden(decoder, params, inputs, padding)
        places = jnp.where(real, jnp.arange(real.shape[1])[None], -1)
        last = jnp.argmax(places, axis=1)[:, None, None]
        pooled = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
        return {"last_hidden": hidden, "logits": _scores(params, pooled)}, model_state

    return model


def token_classifier(decoder: Decoder) -> ModelFn:
    """A classifier of each token; as `text_classifier`, with `logits` `[B, L, classes]`."""

    def model(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[dict[str, Array], Any]:
        hidden = _hidden(decoder, params, inputs, None)[1]
        return {"last_hidden": hidden, "logits": _scores(params, hidden)}, model_state

    return model


def _hidden(
    decoder: Decoder, params: Params, inputs: Any, padding: int | None
) -> tuple[Array, Array]:
    """Which tokens are real, bool `[B, L]`, and the hidden states."""
    tokens, mask, _ = token_inputs(inputs, None)
    real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
    if padding is not None:
        real &= tokens != padding
    segments = None if mask is None else mask.astype(jnp.int32)
    ids = known_ids(tokens, decoder.config.vocabulary, real)
    return real, decoder.apply(params, ids, segments=segments)[0]


def _scores(params: Params, hidden: Array) -> Array:
    score = params["score"]
    kernel = score["kernel"].astype(hidden.dtype)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    if "bias" not in score:
        return logits
    return logits + score["bias"].reshape((1,) * (hidden.ndim - 1) + (-1,)).astype(jnp.float32)
