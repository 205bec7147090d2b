"""Decoders as model functions, and terms on tokens whose logits are made in chunks.

A batch of the step is `{"inputs": tokens}` where `tokens` is a token batch:

- `tokens` int32 `[B, L]`; `segments` int32 `[B, L]`, 0 for padding, and `positions` int32 `[B, L]`
  within the segment, both optional;
- `learned` bool `[B, L]`: the tokens that are targets. Each is predicted one position earlier, in
  the same segment. This is the loss mask; `segments` is the attention mask.

Padding may hold anything, even ids that are not tokens. In the batch's `"weights"` `[B]`, only
zeros matter here: rows of weight 0 are left out, and every learned token of the others has the same
weight.

Outputs are `{"hidden": [B, L, width], "head": losses.Head}` and the taps. Every term is a `Mean`,
so sums and counts of microbatches, devices and padded rows add up exactly to those of the whole
batch. `chunk_size` is the number of tokens whose logits exist at a time.

Raises ValueError if a `chunk_size` is below 1, and TypeError if it is not a whole number.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _softmax, losses, models, trees
from kdtl_jax._types import Mean, ModelFn, Outputs, Params, PyTree
from kdtl_jax.models import Decoder
from kdtl_jax.objective import Inputs, TermsFn

CHUNK = 256  # number of tokens whose logits exist at a time
Divergence = Callable[[Array, Array], Array]  # [n, V], [n, V] -> [n]
Weights = Callable[[Params], Params]


def as_they_are(params: Params) -> Params:
    """The weights themselves."""
    return params


def model(
    decoder: Decoder, weights: Weights = as_they_are, *, taps: Sequence[trees.Selector] = ()
) -> ModelFn:
    """A model function of token batches, whose outputs are hidden states and the head.

    Args:
      decoder: `models.decoder(config)`, or a pretrained one's `.model`.
      weights: function from the trained parameters to the decoder's, run inside the step: an
        adapter's `lambda p: lora.apply(p.base, p.adapter)`, or a fake quantization.
      taps: values added to the outputs under their names: `r"layers_(2|5)"` for the outputs
        `[B, L, width]` of two layers, `"tokens"` for the input of the first,
        `"layers_2/attention/probs"` for a layer's attention `[B, heads, L, L]`; any name of
        `models.decoder(config).tap`.

    Raises:
      ValueError: if a tap matches nothing.
    """
    config = decoder.config
    inner_names = (*models.attention_names(config), *models.unit_names(config))
    names = {name: name for name in (*models.tap_names(config), *inner_names)}
    masks = [trees.mask(names, tap) for tap in taps]
    tap_names = [name for name in names if any(mask[name] for mask in masks)]

    def apply(
        params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, PyTree]:
        decoder_params = weights(params)
        arrays = inputs["tokens"], inputs.get("positions"), inputs.get("segments")
        hidden, tapped = decoder.tap(tap_names, decoder_params, *arrays)
        outputs: dict[str, Any] = {"hidden": hidden, "head": decoder.head(decoder_params), **tapped}
        return outputs, model_state

    return apply


def next_tokens(batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """The target of each position: `(targets int32 [B, L], where bool [B, L])`.

    Position i predicts token i + 1 if both are in one segment, not padding, and `learned[i + 1]`;
    the last position predicts nothing. Without `segments`, a row is one text; without `learned`,
    every token is a target.
    """
    tokens = batch["tokens"]
    ones = jnp.ones(tokens.shape, jnp.int32)
    segments, learned = batch.get("segments", ones), batch.get("learned", ones > 0)

    def after(x: Array) -> Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    where = (segments > 0) & (segments == after(segments)) & after(learned)
    return after(tokens), where


def counted(inputs: Inputs) -> tuple[Array, Array]:
    """`next_tokens` of the step's batch, without rows of weight 0."""
    targets, where = next_tokens(inputs.batch["inputs"])
    return targets, where if inputs.real is None else where & inputs.real[:, None]


def student_loss(
    loss: Callable[..., Array], inputs: Inputs, targets: Any, where: Array, chunk_size: int
) -> Mean:
    """The mean of `loss(student logits, targets)` over the tokens `where`, in chunks."""
    return losses.chunked_loss(
        loss,
        inputs.student["hidden"],
        _head(inputs.student),
        targets,
        where=where,
        chunk_size=chunk_size,
    )


def cross_entropy(*, chunk_size: int = CHUNK) -> TermsFn:
    """The terms `{"task": mean of -log p_S(next token)}`, nats per learned token."""
    _checks.count(1, chunk_size=chunk_size)

    def terms(inputs: Inputs) -> dict[str, Mean]:
        tokens, where = counted(inputs)
        tokens = jnp.where(where, tokens, 0)
        return {"task": student_loss(_softmax.cross_entropy, inputs, tokens, where, chunk_size)}

    return terms


def divergence(loss: Divergence, *, chunk_size: int = CHUNK) -> TermsFn:
    """The terms `{"kd": mean of loss(student logits, teacher logits)}` over learned tokens.

    The outputs of both models are "hidden" `[B, L, D]`, each with its own width, and their heads.

    Args:
      loss: `losses.forward_kl`, `reverse_kl`, `jsd_normalized`, `skew_forward_kl`, … with its
        hyper-parameters bound by `functools.partial`.
    """
    _checks.count(1, chunk_size=chunk_size)

    def terms(inputs: Inputs) -> dict[str, Mean]:
        _, where = counted(inputs)
        kd = losses.chunked_divergence(
            loss,
            inputs.student["hidden"],
            _head(inputs.student),
            inputs.teacher["hidden"],
            _head(inputs.teacher),
            where=where,
            chunk_size=chunk_size,
        )
        return {"kd": kd}

    return terms


def together(*parts: TermsFn) -> TermsFn:
    """The terms of several functions, none of which has memory."""

    def terms(inputs: Inputs) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for part in parts:
            more: Any = part(inputs)
            values |= more
        return values

    return terms


def sampled_reverse_kl(*, chunk_size: int = CHUNK) -> TermsFn:
    """The terms `{"kd": mean of -rho sg[log p_T(y) - log p_S(y)]}` over sampled tokens y.

    `rho = p_S(y) / p_sampler(y)` carries the gradient, whose expectation is that of the reverse KL
    at every position, with the tokens before it constant. The batch's inputs hold the sampler's
    `log_probs`, as returned by a rollout. The exact KL at each position has the same expectation
    and far less variance; use this for teachers that only score tokens.
    """
    _checks.count(1, chunk_size=chunk_size)

    def loss(teacher_head: losses.Head, logits: Array, targets: Any) -> Array:
        tokens, teacher_hidden, sampler = targets
        student = losses.token_log_probs(logits, tokens)
        teacher = losses.token_log_probs(losses.head_logits(teacher_hidden, teacher_head), tokens)
        return losses.sampled_reverse_kl(student, teacher, sampler)

    def terms(inputs: Inputs) -> dict[str, Mean]:
        tokens, where = counted(inputs)
        targets = (jnp.where(where, tokens, 0), inputs.teacher["hidden"], _sampler(inputs))
        against_teacher = partial(loss, jax.lax.stop_gradient(_head(inputs.teacher)))
        return {"kd": student_loss(against_teacher, inputs, targets, where, chunk_size)}

    return terms


def policy_gradient(*, chunk_size: int = CHUNK) -> TermsFn:
    """REINFORCE with rewards-to-go: `{"long": mean of -rho_t sg[R_{t+1}]}` over sampled tokens.

    `R_{t+1}` is the mean of `log p_T - log p_S` over the row's sampled tokens after t (the paper's
    length normalization), and 0 at the last. This is MiniLLM's long part. Added to the exact
    reverse KL at each position (the paper's single-step part), it gives the gradient of MiniLLM's
    objective, without mixing the teacher into the sampler, and without clipping, which is not
    needed for one update per sample.

    References:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023 (2306.08543), eq. 5.
    """
    _checks.count(1, chunk_size=chunk_size)

    def loss(logits: Array, targets: Any) -> Array:
        tokens, returns, sampler = targets
        return losses.policy_gradient(losses.token_log_probs(logits, tokens), returns, sampler)

    def terms(inputs: Inputs) -> dict[str, Mean]:
        tokens, where = counted(inputs)
        tokens = jnp.where(where, tokens, 0)
        student, teacher = (
            losses.chunked_map(
                losses.token_log_probs,
                *jax.lax.stop_gradient((out["hidden"], _head(out))),
                tokens,
                where=where,
                chunk_size=chunk_size,
            )
            for out in (inputs.student, inputs.teacher)
        )
        rewards = teacher - student
        later, count = (
            losses.reward_to_go(x, where=where) - x for x in (rewards, where.astype(rewards.dtype))
        )
        targets = (tokens, later / jnp.maximum(count, 1), _sampler(inputs))
        return {"long": student_loss(loss, inputs, targets, where, chunk_size)}

    return terms


def _head(outputs: Outputs) -> losses.Head:
    head: Any = outputs["head"]
    return head


def _sampler(inputs: Inputs) -> Array:
    """The sampler's log-probability of the token that each position predicts."""
    return jnp.pad(inputs.batch["inputs"]["log_probs"][:, 1:], ((0, 0), (0, 1)))
