"""Sampled tokens: on-policy distillation by policy gradients, KL estimators, MiniLLM, IW-OPD.

The library returns `[B, L]`; the systems differ in how they average it, which stands here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def mean(values: Array, mask: Array, count: Any = None) -> Array:
    """Over the masked positions, or over a given number of them."""
    total = jnp.sum(jnp.where(mask != 0, values, 0) * mask)
    return total / (jnp.maximum(jnp.sum(mask), 1) if count is None else count)


def aggregated(values: Array, mask: Array, h: Hyper) -> Array:
    """verl's `agg_loss`."""
    mode = h["loss_agg_mode"]
    if mode == "token-mean":
        return mean(values, mask, h.get("batch_num_tokens"))
    rows = jnp.sum(values * mask, axis=1)
    length = jnp.sum(mask, axis=1)
    if mode == "seq-mean-token-mean":
        rows = rows / (length + 1e-8)
    elif mode.endswith("-norm"):
        rows = rows / (h.get("loss_scale_factor") or values.shape[1])
    some = length > 0
    return jnp.sum(jnp.where(some, rows, 0)) / (h.get("global_batch_size") or jnp.sum(some))


def opd_tinker(x: Inputs, h: Hyper) -> dict[str, Array]:
    """Neither the sum nor the discounted advantages are masked: prompts are trained on."""
    log_ratio = x["sampled_logprobs"] - x["teacher_logprobs"]
    own = -h["kl_penalty_coef"] * x["mask"] * log_ratio
    advantages = x["advantages"] + losses.reward_to_go(own, gamma=h["kl_discount_factor"])
    sampled = x["target_logprobs"], advantages, x["sampled_logprobs"]
    return {
        "value": jnp.sum(losses.policy_gradient(*sampled)),
        "new_advantages": advantages,
        "teacher_kl": mean(log_ratio, x["mask"]),
    }


def opd_slime(x: Inputs, h: Hyper) -> dict[str, Array]:
    """The mean over tokens of each row, summed over rows; nothing exists past a row's length."""
    inside = jnp.arange(x["mask"].shape[1])[None] < x["lengths"][:, None]
    log_ratio = x["old_logprobs"] - x["teacher_logprobs"]
    advantages = jnp.where(inside, x["advantages"] - h["opd_kl_coef"] * log_ratio, 0)
    values = losses.clipped_policy_gradient(
        x["student_logprobs"],
        advantages,
        x["old_logprobs"],
        clip_low=h["eps_clip"],
        clip_high=h["eps_clip_high"],
        dual_clip=h["eps_clip_c"],
        where=inside,
    )
    mask = x["mask"] * inside
    rows = jnp.sum(values * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return {"value": jnp.sum(rows), "new_advantages": advantages}


def estimate(x: Inputs, h: Hyper) -> Array:
    """k3 is bounded at 10; "+" keeps the value and takes the gradient of k2."""
    pair = x["student_logprobs"], x["teacher_logprobs"]
    mode = h["loss_mode"]
    kind = mode.removesuffix("+")
    if kind in ("k1", "kl"):
        values = pair[0] - pair[1]
    elif kind == "abs":
        values = jnp.abs(pair[0] - pair[1])
    elif kind in ("k2", "mse"):
        values = losses.kl_k2(*pair)
    else:
        values = jnp.clip(losses.kl_k3(*pair), -10, 10)
    if mode.endswith("+"):
        squared = losses.kl_k2(*pair)
        values = jax.lax.stop_gradient(values - squared) + squared
    bound = h.get("loss_max_clamp")
    return values if bound is None else jnp.clip(values, -bound, bound)


def opd_kl_estimator(x: Inputs, h: Hyper) -> Array:
    return aggregated(estimate(x, h), x["response_mask"], h)


def opd_policy_gradient(x: Inputs, h: Hyper) -> Array:
    values = losses.clipped_policy_gradient(
        x["student_logprobs"],
        -estimate(x, h),
        x["old_logprobs"],
        clip_low=h["clip_ratio"],
        clip_high=h["clip_ratio"],
        dual_clip=h["clip_ratio_c"],
    )
    return aggregated(values * x.get("rollout_weights", 1.0), x["response_mask"], h)


def ref_kl(x: Inputs, h: Hyper) -> Array:
    """prime-rl: gated, `1e-3` of the squared log-ratio on every token, its own denominators."""
    inside = jnp.arange(x["ref_kl_weights"].shape[1])[None] < x["lengths"][:, None]
    student, sampler = x["trainer_logprobs"], x["inference_logprobs"]
    where = inside & (x["ref_kl_weights"] != 0)
    distilled = losses.sampled_reverse_kl(student, x["ref_logprobs"], sampler, where=where)
    distilled = jnp.where(losses.drop_gate(student, sampler, max_drop=0.2), distilled, 0)
    distilled += 1e-3 * jnp.square(student - sampler)
    hard = inside & (x["ce_weights"] != 0)
    return (
        jnp.sum(jnp.where(where, distilled * x["ref_kl_weights"], 0)) / h["ref_kl_scale"]
        - jnp.sum(jnp.where(hard, student * x["ce_weights"], 0)) / h["ce_scale"]
    )


def opd_skyrl(x: Inputs, h: Hyper) -> dict[str, Array]:
    """The reduction is folded into the advantages."""
    mask = x["mask"]
    advantages = -(x["old_logprobs"] - x["teacher_logprobs"]) * mask
    batch, length, kind = mask.shape[0], jnp.sum(mask, axis=1, keepdims=True), h["loss_reduction"]
    if kind == "token_mean":
        scale = jnp.maximum(jnp.sum(mask), 1)
    elif kind == "token_mean_legacy":
        size = h["micro_batch_size"]
        count = batch // size
        tokens = jnp.sum(length[: count * size].reshape(count, size), axis=1)
        scale = jnp.repeat(jnp.maximum(tokens, 1) * count, size)[:, None]
        scale = jnp.pad(scale, ((0, batch - count * size), (0, 0)), constant_values=jnp.inf)
    elif kind == "sequence_mean":
        scale = batch * jnp.maximum(length, 1)
    elif kind == "seq_mean_token_sum_norm":
        scale = batch * h["max_seq_len"]
    else:
        scale = jnp.full((batch, 1), jnp.inf)
        for start, end in h["prompt_boundaries"]:
            tokens = jnp.maximum(jnp.sum(mask[start:end]), 1)
            scale = scale.at[start:end].set(len(h["prompt_boundaries"]) * tokens)
    advantages = advantages / scale
    sampled = x["student_logprobs"], advantages, x["old_logprobs"]
    values = losses.policy_gradient(*sampled)
    return {"value": jnp.sum(values * mask), "scaled_advantages": advantages}


def minillm_advantage(x: Inputs, h: Hyper) -> dict[str, Array]:
    """TRL: not detached; a stray `gamma^l` unless normalized, where masked tokens count 1e-4."""
    gamma, mask = h["gamma"], x["mask"]
    rewards = (x["teacher_logprobs"] - x["student_logprobs"]) * mask
    advantages = losses.reward_to_go(rewards, gamma=gamma)
    if gamma and h["length_normalization"]:
        advantages /= losses.reward_to_go(jnp.where(mask, 1.0, 1e-4), gamma=gamma)
    elif gamma:
        advantages *= gamma ** jnp.arange(mask.shape[1])[None]
    return {"value": jnp.sum(x["cotangent"] * advantages), "advantages": advantages}


def minillm_ppo(x: Inputs, h: Hyper) -> dict[str, Array]:
    """LMOps: whitened over padding too; weights of teacher-mixed sampling belong to the sampler."""
    mask = x["mask"]
    student = x["student_logits"] / h["temperature"]
    left = jnp.maximum(losses.reward_to_go(mask.astype(student.dtype)), 1)
    raw = losses.reward_to_go(x["rewards"], gamma=h["gamma"]) / left
    advantages = losses.whitened(raw)
    # Outside the mask the reference's ratio is the weight alone.
    mixed = x["old_logprobs"] - jnp.log(x["weights"])
    own = losses.token_log_probs(student, x["response_ids"])
    clip = h["cliprange"]
    policy = losses.clipped_policy_gradient(own, advantages, mixed, clip_low=clip, clip_high=clip)
    out = {
        "advantages": advantages,
        "pg_loss": mean(policy, mask),
        "reg_loss": mean(losses.reverse_kl(student, x["teacher_logits"]), mask),
    }
    return out | {"value": out["pg_loss"] + out["reg_loss"] * h["single_step_reg"]}


def iw_opd(x: Inputs, h: Hyper) -> Array:
    """`-log p_S` times the weighted advantage: no ratio to the sampler."""
    where = x["labels"] != -100
    student = x["student_logits"] / h["temperature"]
    own = losses.token_log_probs(student, x["completion_ids"])
    sampler = x.get("rollout_logprobs", jax.lax.stop_gradient(own))
    advantages = jnp.where(where, x["teacher_logprobs"] - sampler, 0)
    weight = losses.iw_opd_weight(advantages, gamma=h["gamma"], where=where)
    return mean(-own * weight * jax.lax.stop_gradient(advantages), where, h["num_items"])


METHODS: dict[str, Golden] = {
    "opd_tinker": opd_tinker,
    "opd_slime": opd_slime,
    "opd_kl_estimator": opd_kl_estimator,
    "opd_policy_gradient": opd_policy_gradient,
    "ref_kl": ref_kl,
    "opd_skyrl": opd_skyrl,
    "minillm_advantage": minillm_advantage,
    "minillm_ppo": minillm_ppo,
    "iw_opd": iw_opd,
}
