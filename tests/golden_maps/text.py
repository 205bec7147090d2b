"""Samplers, gradient accumulation, labels and masks of padded and packed text."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from golden_maps import Golden
from kdtl_jax import language, losses
from kdtl_jax.models import segment_positions
from kdtl_jax.objective import Masked, Mean, reduce

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]
IGNORED = -100


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


def collate_labels(x: Inputs, h: Hyper) -> dict[str, Any]:
    """Examples one to a row, or all in one; labels are -100 where nothing is learned."""
    tokens, labels, sizes = (np.asarray(x[n]) for n in ("tokens", "token_labels", "lengths"))
    if "segment_lengths" in x:
        sizes = np.asarray(x["segment_lengths"]).ravel()
        sizes = sizes[sizes > 0]
    cuts = np.cumsum(sizes)[:-1]
    found = [
        language.document(ids, own != IGNORED)
        for ids, own in zip(np.split(tokens, cuts), np.split(labels, cuts), strict=True)
    ]
    lines = [found] if h["padding_free"] else [[each] for each in found]
    width = max(sum(len(each.tokens) for each in line) for line in lines)
    multiple = h["pad_to_multiple_of"] or 1
    width = -(-width // multiple) * multiple
    rows = [language.joined_row(line, width, padding=h["pad_token_id"]) for line in lines]
    batch = language.batch(rows)
    learned, segments = batch["learned"], batch["segments"]
    out = {"input_ids": batch["tokens"]}
    if h["padding_free"]:
        positions = np.asarray(segment_positions(jnp.asarray(segments))) * (segments > 0)
        learned = learned & (positions > 0)
        out["position_ids"] = positions
    else:
        out["attention_mask"] = (segments > 0).astype(np.int32)
    return {"value": np.where(learned, batch["tokens"], IGNORED), **out}


def completion_mask(x: Inputs, h: Hyper) -> dict[str, Array]:
    ends = h["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    mask = language.completion_mask(
        x["tokens"][:, h["prompt_width"] :], padding=h["pad_token_id"], ends=ends
    )
    return {"value": mask, "lengths": jnp.sum(mask, axis=1)}


METHODS: dict[str, Golden] = {
    "sampler_logprobs": sampler_logprobs,
    "sampler_logprobs_rows": sampler_logprobs_rows,
    "causal_lm_accumulation": causal_lm_accumulation,
    "collate_labels": collate_labels,
    "completion_mask": completion_mask,
}

EXCLUDED: dict[str, str] = {}
