"""Draft models, embedding models, rerankers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from golden_maps import Golden
from kdtl_jax import losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def draft_ids(x: Inputs) -> Array:
    return jnp.asarray(np.flatnonzero(np.asarray(x["in_draft_vocab"])), jnp.int32)


def step_losses(x: Inputs) -> list[Array]:
    """SpecForge divides by the number of all positions, masked ones included."""
    found = []
    for step, draft in enumerate(x["draft_logits"]):
        where = x["loss_mask"] != 0
        targets, where = losses.draft_targets(
            x["target_logits"], where, step=step, draft_ids=draft_ids(x)
        )
        values = losses.soft_cross_entropy(draft, targets)
        found.append(jnp.mean(jnp.where(where, values, 0)))
    return found


def eagle3(x: Inputs, h: Hyper) -> dict[str, Array]:
    steps = jnp.stack(step_losses(x))
    weights = h["step_decay"] ** jnp.arange(len(steps))
    return {"value": jnp.sum(weights * steps), "step_losses": steps}


def lk_loss(x: Inputs, h: Hyper) -> dict[str, Array]:
    """The "KL" is a cross-entropy over all positions, the acceptance a mean over counted ones."""
    pair, ids = (x["draft_logits"][0], x["target_logits"]), draft_ids(x)
    _, where = losses.draft_targets(pair[1], x["loss_mask"] != 0, step=0, draft_ids=ids)
    count = jnp.sum(where)

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(where, values, 0)) / count

    accepted = losses.acceptance(*pair, draft_ids=ids)
    acceptance = mean(accepted)
    if h["lk_loss_type"] == "alpha":
        value = mean(losses.lk_alpha(*pair, draft_ids=ids))
    else:
        weight = h["kl_scale"] * jnp.exp(-h["kl_decay"] * jax.lax.stop_gradient(acceptance))
        refused = losses.lk_lambda(*pair, weight=0.0, draft_ids=ids)
        value = weight * step_losses(x)[0] + (1 - weight) * mean(refused)
    return {"value": value, "acceptance": acceptance}


def dspark(x: Inputs, h: Hyper) -> dict[str, Array]:
    """Blocks after anchors; an entry counts while all before it do. L1 is twice the variation."""
    draft = x["draft_logits"]
    length = x["input_ids"].shape[1]
    offsets = jnp.arange(draft.shape[2])
    place = x["anchors"][..., None] + 1 + offsets
    inside = jnp.minimum(place, length - 1)
    batch = jnp.arange(draft.shape[0])[:, None, None]
    counts = (place < length) & (x["loss_mask"][batch, inside] != 0) & x["block_keep"][..., None]
    counted = jnp.cumprod(counts, axis=-1).astype(bool)
    gamma = h["loss_decay_gamma"]
    decay = jnp.exp(-offsets / gamma) if gamma else jnp.ones(len(offsets))
    hard = -losses.token_log_probs(draft, x["input_ids"][batch, inside])
    soft = 2 * losses.total_variation(draft, x["target_logits"][batch, inside - 1])
    weights = counted * decay
    mixed = h["ce_weight"] * hard + h["l1_weight"] * soft
    return {"value": jnp.sum(weights * mixed) / jnp.sum(weights), "counted": counted}


def score(query: Array, passage: Array, h: Hyper) -> Array:
    if h["similarity"] == "cosine":
        return 1 - losses.cosine_distance(query, passage)
    return jnp.sum(query * passage, axis=-1)


def scores(query: Array, passages: Array, h: Hyper) -> Array:
    """`[B, n]` of passages `[n, B, D]`."""
    return jnp.stack([score(query, passage, h) for passage in passages], axis=1)


def margins(student: Array, labels: Array) -> Array:
    """Labels are the teacher's scores, or the margins of all but the first."""
    labels = labels[:, None] if labels.ndim == 1 else labels
    if labels.shape != student.shape:
        labels = jnp.concatenate([jnp.zeros_like(labels[:, :1]), -labels], axis=1)
    return jnp.mean(losses.margin_mse(student, labels))


def margin_mse(x: Inputs, h: Hyper) -> Array:
    passages = jnp.concatenate([x["positive"][None], x["negatives"]])
    return margins(scores(x["query"], passages, h), x["labels"])


def reranker_margin_mse(x: Inputs, h: Hyper) -> Array:
    activation = {"identity": lambda z: z, "sigmoid": jax.nn.sigmoid}[h["activation"]]
    return margins(activation(x["scores"]), x["labels"])


def embedding_mse(x: Inputs, h: Hyper) -> Array:
    return jnp.mean(jnp.stack([losses.mse(e, x["labels"]) for e in x["embeddings"]]))


def distill_kl_div(x: Inputs, h: Hyper) -> Array:
    student = scores(x["query"], x["passages"], h)
    return jnp.mean(losses.kd_kl(student, x["labels"], temperature=h["temperature"]))


def cosine_similarity_mse(x: Inputs, h: Hyper) -> Array:
    similarity = 1 - losses.cosine_distance(x["a"], x["b"])
    return jnp.mean(losses.last_axis_mse(similarity[:, None], x["labels"][:, None]))


METHODS: dict[str, Golden] = {
    "eagle3": eagle3,
    "lk_loss": lk_loss,
    "dspark": dspark,
    "margin_mse": margin_mse,
    "reranker_margin_mse": reranker_margin_mse,
    "embedding_mse": embedding_mse,
    "distill_kl_div": distill_kl_div,
    "cosine_similarity_mse": cosine_similarity_mse,
}
