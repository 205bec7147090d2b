"""Transformer losses: `[B, L]` per token, averaged as each code averages."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import connectors, losses

Arrays = Mapping[str, Array]
Hyper = Mapping[str, Any]


def _layers(x: Arrays, prefix: str) -> list[Array]:
    names = [f"{prefix}_{i}" for i in range(len(x))]
    return [x[name] for name in names if name in x]


def _pair(x: Arrays, side: str) -> tuple[Array, Array]:
    return x[f"{side}_0"], x[f"{side}_1"]


def _token_mean(values: Array, where: Array | None) -> Array:
    if where is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where)


def _pair_mean(values: Array, where: Array | None) -> Array:
    """TextBrewer averages over pairs of real tokens: a query counts once per real key."""
    if where is None:
        return jnp.mean(values)
    count = jnp.sum(where, axis=1, keepdims=True)
    return jnp.sum(values * count) / jnp.sum(jnp.square(count))


def _per_layer(x: Arrays, loss: Any) -> Array:
    """DistillKit: students through their projections, mean over tokens, mean over layers."""
    weights = _layers(x, "weight")
    values = []
    for i, (student, teacher) in enumerate(
        zip(_layers(x, "student"), _layers(x, "teacher"), strict=True)
    ):
        if weights:
            project = connectors.linear(teacher.shape[-1], bias=False)
            student = project.apply({"kernel": weights[i]}, student)
        values.append(_token_mean(loss(student, teacher), x["mask"]))
    return jnp.mean(jnp.stack(values))


def _without_negatives(scores: Array) -> Array:
    """Quirk of TextBrewer without a mask: every score <= -0.001 is taken for a masked one."""
    return jnp.where(scores <= -1e-3, 0, scores)


def _attention_mse(x: Arrays, hyper: Hyper) -> Array:
    student, teacher, mask = x["student"], x["teacher"], x.get("mask")
    if mask is None:
        student, teacher = _without_negatives(student), _without_negatives(teacher)
    return _pair_mean(losses.attention_mse(student, teacher, where=mask), mask)


def _attention_mse_sum(x: Arrays, hyper: Hyper) -> Array:
    """The sum over heads, compared as one head."""
    student, teacher, mask = x["student"], x["teacher"], x.get("mask")
    summed = {
        name: jnp.sum(scores, axis=1, keepdims=True)
        for name, scores in (("student", student), ("teacher", teacher))
    }
    return _attention_mse({**summed, **({"mask": mask} if mask is not None else {})}, hyper)


def _attention_ce(x: Arrays, hyper: Hyper) -> Array:
    """TextBrewer's cross-entropy: KL, plus the teacher's entropy, less what its mask drops.

    Its softmaxes run over padding too, and its mask then drops *terms* of the cross-entropy (keys
    that are padding; without a mask, keys whose teacher score is <= -0.001).
    """
    student, teacher, mask = x["student"], x["teacher"], x.get("mask")
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    dropped = teacher <= -1e-3 if mask is None else ~mask[:, None, None, :]
    less = -jnp.sum(jnp.where(dropped, jnp.exp(log_p) * log_q, 0), axis=-1)
    values = losses.attention_kl(student, teacher) + jnp.mean(entropy - less, axis=1)
    return _token_mean(values, mask)


def _attention_ce_mean(x: Arrays, hyper: Hyper) -> Array:
    averaged = {name: jnp.mean(x[name], axis=1, keepdims=True) for name in ("student", "teacher")}
    return _attention_ce({**x, **averaged}, hyper)


def _hidden_gram_fsp(x: Arrays, hyper: Hyper) -> Array:
    return jnp.mean(losses.fsp(_pair(x, "student"), _pair(x, "teacher"), where=x.get("mask")))


def _hidden_gram_mmd(x: Arrays, hyper: Hyper) -> Array:
    values = losses.token_gram(_pair(x, "student"), _pair(x, "teacher"), where=x.get("mask"))
    return _pair_mean(values, x.get("mask"))


def _tinybert(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    """TinyBERT's code replaces scores <= -100 by 0 and counts padding."""

    def scores(prefix: str) -> list[Array]:
        return [jnp.where(a <= -1e2, 0, a) for a in _layers(x, f"{prefix}_attention")]

    maps = scores("student"), scores("teacher")
    layers = losses.uniform_layers(*map(len, maps))[1:]
    each = [losses.attention_mse(s, maps[1][g - 1]) for s, g in zip(maps[0], layers, strict=True)]
    attention = jnp.mean(sum(each[1:], each[0]))
    states = [_layers(x, f"{side}_hidden") for side in ("student", "teacher")]
    layers = losses.uniform_layers(len(states[0]) - 1, len(states[1]) - 1)
    each = [losses.last_axis_mse(s, states[1][g]) for s, g in zip(states[0], layers, strict=True)]
    hidden = jnp.mean(sum(each[1:], each[0]))
    return {"value": attention + hidden, "attention_loss": attention, "hidden_loss": hidden}


def _minilm(x: Arrays, hyper: Hyper) -> Array:
    """Per example over its real tokens, then over examples, so short examples weigh the same."""
    total, mask = jnp.zeros(()), x["mask"]
    for names, weight in hyper["relations"].items():
        first, second = names.split("-")
        values = losses.minilm_relation(
            (x[f"student_{first}"], x[f"student_{second}"]),
            (x[f"teacher_{first}"], x[f"teacher_{second}"]),
            relation_heads=hyper["relation_heads"],
            where=mask,
        )
        total = total + weight * jnp.mean(jnp.sum(values, axis=1) / jnp.sum(mask, axis=1))
    return total


METHODS: dict[str, Golden] = {
    "hidden_mse_masked": lambda x, h: _per_layer(x, losses.last_axis_mse),
    "hidden_cosine_masked": lambda x, h: _per_layer(x, losses.cosine_distance),
    "hidden_mse": lambda x, h: _token_mean(
        losses.last_axis_mse(x["student"], x["teacher"]), x.get("mask")
    ),
    "hidden_cosine": lambda x, h: _token_mean(
        losses.cosine_distance(x["student"], x["teacher"]), x.get("mask")
    ),
    "attention_mse": _attention_mse,
    "attention_mse_sum": _attention_mse_sum,
    "attention_ce": _attention_ce,
    "attention_ce_mean": _attention_ce_mean,
    "patient_kd": lambda x, h: (
        2 * jnp.mean(losses.cosine_distance(x["student"][:, 0], x["teacher"][:, 0]))
    ),
    "hidden_gram_fsp": _hidden_gram_fsp,
    "hidden_gram_mmd": _hidden_gram_mmd,
    "tinybert_layers": _tinybert,
    "minilm_attention": _minilm,
    "minilm_value": _minilm,
    "minilm_v2": _minilm,
}
