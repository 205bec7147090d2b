"""Samplers, gradient accumulation, labels and masks of padded and packed text."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import language, losses
from kdtl_jax.objective import Masked, Mean, reduce

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def chosen(log_probs: Array, tokens: Array) -> dict[str, Array]:
    picked = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)
    return {"value": jnp.sum(picked), "logprobs": log_probs}


def sampler_logprobs(x: Inputs, h: Hyper) -> dict[str, Array]:
    """0 and 1 turn filters off."""
    log_probs = language.sampling_log_probs(
        x["logits"],
        temperature=h["temperature"],
        top_k=h["top_k"] or None,
        top_p=h["top_p"] if h["top_p"] < 1 else None,
        min_p=h["min_p"] or None,
    )
    return chosen(log_probs, x["tokens"])


def sampler_logprobs_rows(x: Inputs, h: Hyper) -> dict[str, Array]:
    log_probs = language.sampling_log_probs(
        x["logits"],
        temperature=x["temperature"],
        top_k=x["top_k"] if h["use_top_k"] else None,
        top_p=x["top_p"] if h["use_top_p"] else None,
    )
    return chosen(log_probs, x["tokens"])


def causal_lm_accumulation(x: Inputs, h: Hyper) -> dict[str, Array]:
    """Sums and counts of microbatches add up; transformers without a count averages means."""
    parts = []
    for logits, labels in zip(x["logits"], x["labels"], strict=True):
        shifted = losses.causal_shift(logits, labels)
        hard = -losses.token_log_probs(shifted.logits, shifted.labels)
        parts.append(reduce("hard", Masked(hard, shifted.where)))
    whole = Mean(*(jnp.sum(jnp.stack(side)) for side in zip(*parts, strict=True)))
    if h["num_items"]:
        micro = [Mean(p.total, whole.weight).value() for p in parts]
        return {"value": whole.value(), "micro_losses": jnp.stack(micro)}
    micro = jnp.stack([p.value() for p in parts])
    return {"value": jnp.mean(micro), "micro_losses": micro}


METHODS: dict[str, Golden] = {
    "sampler_logprobs": sampler_logprobs,
    "sampler_logprobs_rows": sampler_logprobs_rows,
    "causal_lm_accumulation": causal_lm_accumulation,
}

EXCLUDED = {
    "completion_mask": "reads lengths off token ids; the sampler returns the mask by position",
    "collate_labels": "lists of rows to padded arrays: covered where text is packed",
}
