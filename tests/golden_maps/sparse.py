"""DistillKit's losses of teachers stored as their k most likely tokens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from golden_maps.sequence import masked_mean, pair
from kdtl_jax import losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def stored(x: Inputs, h: Hyper) -> losses.TopK:
    """DistillKit's teacher at the distillation temperature, from stored values at another."""
    ids, values = x["target_ids"], x["target_values"]
    softer = h["temperature"] / h["generation_temperature"]
    if h["values_are_log_probabilities"]:
        targets = losses.stored_top_k(ids, values)
    else:
        empty = jnp.full_like(values[..., 0], -jnp.inf)
        targets = losses.TopK(ids, jax.nn.log_softmax(values), empty)
    if softer != 1:
        targets = losses.soften_top_k(targets, temperature=softer)
    if h["missing"] == "symmetric_uniform":
        return targets
    # "zero": renormalized, with an empty tail.
    empty = jnp.full_like(targets.log_tail, -jnp.inf)
    return losses.TopK(ids, jax.nn.log_softmax(targets.log_probs), empty)


def per_token(x: Inputs, h: Hyper, values: Array) -> Array:
    """DistillKit: T^2 times the mean over the positions of the mask, whatever the divergence."""
    where = x["mask"] if "mask" in x else jnp.ones(values.shape, bool)
    return h["temperature"] ** 2 * masked_mean(values, where)


def sparse_kl(x: Inputs, h: Hyper) -> Array:
    if h["missing"] == "zero":
        kl = losses.top_k_kl_teacher_renormalized
    else:
        kl = losses.top_k_kl_tail
    return per_token(x, h, kl(x["student_logits"], stored(x, h), temperature=h["temperature"]))


def bucketed(loss: Any, x: Inputs, h: Hyper) -> Array:
    """Any divergence over the k classes and a tail."""
    buckets = losses.top_k_buckets(x["student_logits"], stored(x, h), temperature=h["temperature"])
    return per_token(x, h, loss(*buckets))


def of_all_pairs(x: Inputs, h: Hyper, values: Array) -> Array:
    """DistillKit divides by the number of pairs of all positions, not of each."""
    p, eps = jnp.exp(x["target_values"]), h["eps"]
    higher = p[..., :, None] > p[..., None, :] + eps
    pairs = higher & (p > eps)[..., :, None] & (p > eps)[..., None, :]
    counts = jnp.where(x["mask"], jnp.sum(pairs, axis=(-2, -1)), 0)
    return jnp.sum(values * counts) / (jnp.sum(counts) + eps)


def sparse_hinge(x: Inputs, h: Hyper) -> Array:
    targets = losses.stored_top_k(x["target_ids"], x["target_values"])
    return of_all_pairs(
        x,
        h,
        losses.hinge_ranking(x["student_logits"], targets, margin=h["margin"], eps=h["eps"]),
    )


def sparse_logistic_ranking(x: Inputs, h: Hyper) -> Array:
    targets = losses.stored_top_k(x["target_ids"], x["target_values"])
    return of_all_pairs(x, h, losses.logistic_ranking(x["student_logits"], targets, eps=h["eps"]))


METHODS: dict[str, Golden] = {
    "sparse_kl": sparse_kl,
    "dense_kl": lambda x, h: per_token(
        x, h, losses.forward_kl(*pair(x), temperature=h["temperature"])
    ),
    "sparse_jsd": partial(bucketed, losses.jensen_shannon),
    "dense_jsd": lambda x, h: per_token(
        x, h, losses.jensen_shannon(*pair(x), temperature=h["temperature"])
    ),
    "sparse_tvd": partial(bucketed, losses.total_variation),
    "dense_tvd": lambda x, h: per_token(
        x, h, losses.total_variation(*pair(x), temperature=h["temperature"])
    ),
    "sparse_hinge": sparse_hinge,
    "sparse_logistic_ranking": sparse_logistic_ranking,
}
