"""Across tokenizers: merged tokens, approximate likelihood matching, MinED, ULD by position."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from golden_maps import Golden
from kdtl_jax import language, losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def merged(log_p: Array, ids: np.ndarray, groups: np.ndarray, count: int, strategy: str) -> Array:
    """TRL's merged probabilities. "observed" is the chain rule read backwards: the first row's
    distribution times the later tokens. "bayesian" floors the earlier tokens at 1e-8."""
    if strategy == "observed":
        back = np.asarray(ids)[::-1], count - 1 - np.asarray(groups)[::-1]
        found = language.merge_tokens(log_p[::-1], *map(jnp.asarray, back), num_groups=count)[::-1]
    else:
        is_last = np.append(groups[1:] != groups[:-1], True)[:, None]
        floored = jnp.where(is_last, log_p, jnp.maximum(log_p, np.log(1e-8)))
        found = language.merge_tokens(
            floored, jnp.asarray(ids), jnp.asarray(groups), num_groups=count
        )
    some = np.isin(np.arange(count), np.asarray(groups))[:, None]
    return jnp.where(some, jnp.exp(found), 0)


def gold_merge(x: Inputs, h: Hyper) -> dict[str, Array]:
    ids, groups = np.asarray(x["token_ids"]), np.asarray(x["group_of"])
    count = x["cotangent"].shape[0]
    probabilities = merged(jnp.log(x["probs"]), ids, groups, count, h["strategy"])
    return {"value": jnp.sum(x["cotangent"] * probabilities), "merged": probabilities}


def groups_of(chunks: Array, mask: Array) -> Array:
    """The chunk of each token, -1 outside the mask, of no chunk, or in front (l = 0)."""
    inside = jnp.any(chunks, axis=-1) & mask
    inside = inside.at[:, 0].set(False)
    return jnp.where(inside, jnp.argmax(chunks, axis=-1), -1)


def last_of(chunks: Array) -> Array:
    """The position of each chunk's last token, 0 of an unused one."""
    length = chunks.shape[1]
    return jnp.max(jnp.where(chunks, jnp.arange(length)[None, :, None], 0), axis=1)


def alm(x: Inputs, h: Hyper) -> Array:
    """tokenkit: the binary cross-entropy, over a count of chunks that is merged twice."""
    sides, spaces, groups = {}, {}, {}
    count = x["student_chunks"].shape[-1]
    for side in ("student", "teacher"):
        logits, ids, chunks = (x[f"{side}_{name}"] for name in ("logits", "ids", "chunks"))
        groups[side] = groups_of(chunks, x[f"{side}_mask"])
        own = losses.token_log_probs(logits[:, :-1], ids[:, 1:])
        sides[side] = jnp.pad(own, ((0, 0), (1, 0)))
        space = losses.log_mass(logits, x[f"{side}_space"])
        spaces[side] = jnp.take_along_axis(space, last_of(chunks), axis=1)
    denominators = language.chunk_lengths(groups["teacher"], num_chunks=count)
    if "merge_by_space_prob" in h["alm_mode"]:
        closes = spaces["teacher"] > jnp.log(h["bias_threshold"])
        exists = denominators > 0  # chunks without a teacher's token are left out
        for side, own in groups.items():
            kept = jnp.take_along_axis(exists, jnp.maximum(own, 0), axis=1)
            groups[side] = language.merge_chunks(jnp.where(kept, own, -1), closes)
        for side, merged_groups in groups.items():
            of_chunks = merged_groups[..., None] == jnp.arange(count)
            space = losses.log_mass(x[f"{side}_logits"], x[f"{side}_space"])
            spaces[side] = jnp.take_along_axis(space, last_of(of_chunks), axis=1)
        lengths = language.chunk_lengths(groups["teacher"], num_chunks=count)
        # The merged counts go through the merging once more.
        shape = jnp.broadcast_to(jnp.arange(count), lengths.shape)
        again = language.merge_chunks(jnp.where(exists, shape, -1), closes)
        ones = lengths.astype(jnp.float64)
        denominators = language.chunk_log_probs(ones, again, num_chunks=count)
    lengths = language.chunk_lengths(groups["teacher"], num_chunks=count)
    s, t = (
        jnp.minimum(language.chunk_log_probs(sides[z], groups[z], num_chunks=count), 0)
        for z in ("student", "teacher")
    )
    if "append_space" in h["alm_mode"]:
        s, t = s + spaces["student"], t + spaces["teacher"]
    eps = h["epsilon"]
    if h["diff_fn"] == "abs":
        values = jnp.abs(t - s)
    elif h["diff_fn"] == "binary_kl_temp_limit":
        values = losses.alm_limit(s, t, eps=eps)
    else:
        tau = h["binarization_temp"]
        y = t / tau - eps
        p = jnp.exp(y)
        entropy = -(p * y + (1 - p) * jnp.log(-jnp.expm1(y)))
        values = losses.alm(s, t, temperature=tau, eps=eps) + entropy
    some = lengths > 0
    numerator = {
        "token_count": lengths,
        "chunk_count": jnp.ones_like(lengths),
        "log1p_token_count": jnp.log1p(lengths),
    }[h["numerator"]]
    over = denominators if h["denominator"] == "token_count" else denominators > 0
    return jnp.mean(jnp.where(some, values, 0) * numerator) / jnp.mean(over, dtype=jnp.float64)


def mined(x: Inputs, h: Hyper) -> Array:
    """Chunks of one token on both sides by KL, all others by cross-entropy. The reference counts
    unused columns as chunks of one token: `b == 1 & (a == 1)` is `b == (a == 1)`."""
    t, tokens, chunks = h["kd_temperature"], {}, {}
    for side in ("student", "teacher"):
        after = jnp.pad(x[f"{side}_mask"][:, 1:], ((0, 0), (0, 1)), constant_values=True)
        chunks[side] = x[f"{side}_chunks"] & after[..., None]
        tokens[side] = jnp.sum(chunks[side][:, 1:], axis=1)
    one = (tokens["student"] == 1) & (tokens["teacher"] == 1)
    mapped = losses.by_id(x["teacher_logits"], x["mined_mapping"])
    student = x["student_logits"]
    rows = [
        jnp.take_along_axis(z, last_of(chunks[side])[..., None], axis=1)
        for z, side in ((student, "student"), (mapped, "teacher"))
    ]
    kl = losses.forward_kl(*rows, temperature=t)
    hard = -losses.token_log_probs(student[:, :-1] / t, x["student_ids"][:, 1:])
    other = jnp.any(chunks["student"] & ~one[:, None], axis=-1)[:, 1:]
    counted = tokens["teacher"] == (tokens["student"] == 1)
    total = jnp.sum(jnp.where(one, kl, 0)) + jnp.sum(jnp.where(other, hard, 0))
    return total / (jnp.sum(counted) + jnp.sum(other))


def uld_positionwise(x: Inputs, _: Hyper) -> Array:
    """tokenkit compares rows of one index, whatever text they predict."""
    values = losses.uld(x["student_logits"], x["teacher_logits"])
    return jnp.sum(jnp.where(x["student_mask"], values, 0)) / jnp.sum(x["student_mask"])


METHODS: dict[str, Golden] = {
    "gold_merge": gold_merge,
    "alm": alm,
    "mined": mined,
    "uld_positionwise": uld_positionwise,
}
