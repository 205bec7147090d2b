"""Token divergences of the language-model trainers: exact, in chunks, top-k, self-distillation.

The library returns `[B, L]`, or sums over chunks; what stands here is each system's alignment,
mask and denominator, and whatever its code does besides its paper.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from golden_maps import Golden
from golden_maps.policies import aggregated, mean
from golden_maps.sequence import entropy, jsd_terms, masked_mean, pair
from kdtl_jax import losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def renormalized(logits: Array, ids: Array, temperature: Any = 1.0) -> Array:
    """The logits at some ids: renormalized by whatever takes them for all there are."""
    return jnp.take_along_axis(logits, ids, axis=-1) / temperature


def tail_buckets(
    student: Array, ids: Array, log_probs: Array, temperature: Any = 1.0, add_tail: bool = True
) -> tuple[Array, Array]:
    """TRL: a tail of at least 1e-7, which the exact buckets do not need; absent entries on both
    sides. Without the tail both are renormalized."""
    own = jnp.take_along_axis(jax.nn.log_softmax(student / temperature), ids, axis=-1)
    present = log_probs != -jnp.inf
    sides = []
    for values in (own, log_probs):
        chosen = jnp.where(present, values, -jnp.inf)
        if add_tail:
            mass = jnp.minimum(jax.nn.logsumexp(chosen, axis=-1, keepdims=True), -1e-7)
            chosen = jnp.concatenate([chosen, jnp.log(-jnp.expm1(mass))], axis=-1)
        sides.append(chosen)
    return sides[0], sides[1]


def compared(loss: Any, student: Array, teacher: Array, **more: Any) -> Array:
    """The loss, or 0 of one class alone, which is always certain."""
    if student.shape[-1] == 1:
        return jnp.zeros(student.shape[:-1], student.dtype)
    return loss(student, teacher, **more)


def head(x: Inputs, h: Hyper, side: str) -> losses.Head:
    """`(h W + b) scale`, soft-capped."""
    return losses.Head(
        x[f"{side}_head"], x.get(f"{side}_bias"), h[f"{side}_logit_scale"], h[f"{side}_softcap"]
    )


def distillation_chunked(x: Inputs, h: Hyper) -> dict[str, Array]:
    where, student = x["completion_mask"] != 0, head(x, h, "student")
    chunks: Any = {"where": where, "chunk_size": h["chunk_size"]}
    loss = partial(losses.jsd_gkd, beta=h["beta"], temperature=h["temperature"])
    total = losses.chunked_divergence(
        loss, x["student_hidden"], student, x["teacher_hidden"], head(x, h, "teacher"), **chunks
    )
    soft = losses.chunked_loss(
        lambda z, _: entropy(z / h["temperature"]), x["student_hidden"], student, None, **chunks
    )
    count = jnp.maximum(total.weight, 1) if h["num_items"] is None else h["num_items"]
    return {"value": total.total / count, "student_entropy_sum": soft.total}


def distillation_exact(x: Inputs, h: Hyper) -> Array:
    rows = slice(h["prompt_length"] - 1, -1)
    student, teacher = (z[:, rows] for z in pair(x))
    values = losses.jsd_gkd(student, teacher, beta=h["beta"], temperature=h["temperature"])
    return mean(values, x["completion_mask"], h["num_items"])


def gkd_shifted(x: Inputs, h: Hyper) -> Array:
    shifted = losses.causal_shift(x["student_logits"], x["labels"])
    values = losses.jsd_gkd(shifted.logits, x["teacher_logits"][:, :-1], beta=h["beta"])
    return mean(values, shifted.where, h["num_items"])


def server_forward_topk(x: Inputs, h: Hyper) -> Array:
    """Entries that the server did not return are absent on both sides."""
    where = x["labels"] != -100
    sides = tail_buckets(
        x["student_logits"],
        x["teacher_topk_ids"],
        jnp.where(where[..., None], x["teacher_topk_logprobs"], 0),
        h["temperature"],
        h["add_tail"],
    )
    return masked_mean(compared(losses.forward_kl, *sides), where)


def server_sparse_top1(x: Inputs, h: Hyper) -> Array:
    """The support is the sampled token, and unless beta is 1 the teacher's favorite."""
    where = x["labels"] != -100
    ids = x["completion_ids"][..., None]
    log_probs = jnp.where(where, x["teacher_logprob"], 0)[..., None]
    if h["beta"] != 1:
        favorite = x["teacher_top1_id"][..., None]
        again = jnp.where(where, x["teacher_top1_logprob"], 0)[..., None]
        again = jnp.where(favorite == ids, -jnp.inf, again)
        ids = jnp.concatenate([favorite, ids], axis=-1)
        log_probs = jnp.concatenate([again, log_probs], axis=-1)
    sides = tail_buckets(x["student_logits"], ids, log_probs, h["temperature"], h["add_tail"])
    return masked_mean(compared(losses.jsd_gkd, *sides, beta=h["beta"]), where)


def shifted_mean(x: Inputs, h: Hyper, values: Array) -> Array:
    """NeMo-RL: row l beside mask l + 1, over a global count."""
    mask = x["token_mask"][:, 1:] * x["sample_mask"][:, None]
    return mean(values, mask, h["global_valid_toks"] + 1e-8)


def nemo_topk_kl(x: Inputs, h: Hyper) -> Array:
    """With `zero_outside_topk` the student keeps its own normalizer, and the teacher has the
    log-probability -100 outside: sums of the terms of a KL, no divergence of the library."""
    student, ids = x["student_logits"][:, :-1], x["teacher_topk_indices"][:, :-1]
    teacher = x["teacher_topk_logits"][:, :-1]
    chosen = renormalized(student, ids)
    if not h["zero_outside_topk"]:
        forward, reverse = (
            compared(loss, chosen, teacher) for loss in (losses.forward_kl, losses.reverse_kl)
        )
    else:
        targets = losses.TopK(
            ids, jax.nn.log_softmax(teacher), jnp.full(ids.shape[:-1], -jnp.inf, teacher.dtype)
        )
        forward = losses.top_k_kl_truncated(student, targets)
        log_q, log_p = jax.nn.log_softmax(student), jnp.full_like(student, -100.0)
        log_p = jnp.put_along_axis(log_p, ids, targets.log_probs, axis=-1, inplace=False)
        reverse = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    weight = {"forward": 1.0, "reverse": 0.0, "mixed": h["mixed_kl_weight"]}[h["kl_type"]]
    return shifted_mean(x, h, weight * forward + (1 - weight) * reverse)


def nemo_full_kl(x: Inputs, h: Hyper) -> Array:
    """The teacher's surplus columns are padding."""
    student = x["student_logits"]
    size = student.shape[-1]
    teacher = losses.without_padding(x["teacher_logits"], size=size, width=size)
    loss = losses.reverse_kl if h["reverse_kl"] else losses.forward_kl
    values = loss(student, teacher, temperature=h["temperature"])
    return h["temperature"] ** 2 * shifted_mean(x, h, values[:, :-1])


def swift_gkd(x: Inputs, h: Hyper) -> Array:
    """Labels are rolled, not shifted. The narrower side is filled with the OTHER side's logits."""
    where = jnp.roll(x["labels"], -1, axis=1) != -100
    student, k = x["student_logits"], h["gkd_logits_topk"]
    if "teacher_topk_ids" in x:
        ids, teacher = x["teacher_topk_ids"], x["teacher_topk_logprobs"]
        empty = jnp.all(teacher == -jnp.inf, axis=-1)
        where &= ~empty
        teacher = jnp.where(empty[..., None], 0, teacher)
        student = renormalized(student, ids)
        student = jnp.where(teacher == -jnp.inf, -jnp.inf, student)
    elif k is not None:
        teacher, ids = jax.lax.top_k(x["teacher_logits"], k)
        student = renormalized(student, ids)
    else:
        teacher = x["teacher_logits"]
        both = min(student.shape[-1], teacher.shape[-1])
        missing_s, missing_t = teacher[..., both:], student[..., both:]
        if missing_s.shape[-1]:
            student = jnp.concatenate([student, missing_s], axis=-1)
        elif missing_t.shape[-1]:
            teacher = jnp.concatenate([teacher, missing_t], axis=-1)
    how = {"beta": h["beta"], "temperature": h["temperature"]}
    return masked_mean(compared(losses.jsd_gkd, student, teacher, **how), where)


def minillm_single_step(x: Inputs, h: Hyper) -> Array:
    values = losses.reverse_kl(*pair(x), temperature=h["kd_temperature"])
    total = jnp.sum(jnp.where(x["mask"], values, 0))
    if h["reduction"] == "sum":
        return total
    count = jnp.sum(x["mask"])
    return total / (count * x["student_logits"].shape[-1] if h["reduction"] == "mean" else count)


def opd_forward_kl_topk(x: Inputs, h: Hyper) -> dict[str, Array]:
    """verl clamps the truncated sum at 0, and with it the gradient; optionally log-probabilities
    too, which leaves no loss of the library."""
    student, ids = x["student_logits"], x["teacher_topk_ids"]
    targets = losses.stored_top_k(ids, x["teacher_topk_logprobs"])
    own = losses.top_k_at(student, ids)
    least = h.get("log_prob_min_clamp")
    if least is None:
        unclamped = losses.top_k_kl_truncated(student, targets)
        log_q, log_p = own.log_probs, targets.log_probs
    else:
        log_q, log_p = (jnp.maximum(z, least) for z in (own.log_probs, targets.log_probs))
        unclamped = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    values = jnp.maximum(unclamped, 0)
    bound = h.get("loss_max_clamp")
    values = values if bound is None else jnp.clip(values, -bound, bound)
    common = losses.in_student_top_k(student, targets)
    overlap = losses.top_k_overlap(student, targets)
    gain = jnp.sum(jnp.where(common, -jnp.exp(log_p) * (log_p - log_q), 0), axis=-1)
    return {
        "value": aggregated(values, x["response_mask"], h),
        "unclamped": unclamped,
        "student_mass": jnp.sum(jnp.exp(own.log_probs), axis=-1),
        "teacher_mass": jnp.sum(jnp.exp(targets.log_probs), axis=-1),
        "overlap_count": overlap,
        "overlap_token_advantage": gain / jnp.maximum(overlap, 1),
    }


def score_function(student: Array, teacher: Array) -> Array:
    """`sg(log p_S - log p_T) log p_S`: the gradient of `sampled_reverse_kl`, of another value."""
    gradient = losses.sampled_reverse_kl(student, teacher, jax.lax.stop_gradient(student))
    value = (student - teacher) * student
    return jax.lax.stop_gradient(value - gradient) + gradient


def self_distillation(x: Inputs, h: Hyper) -> Array:
    """TRL's SDFT and SDPO: the mean over rows of masked means."""
    student, teacher = pair(x)
    own = losses.token_log_probs(student, x["completion_ids"])
    if h["mode"] == "sampled_token":
        values = score_function(own, losses.token_log_probs(teacher, x["completion_ids"]))
    elif h["mode"] == "full_logits":
        values = losses.jsd_gkd(student, teacher, beta=h["alpha"])
    else:
        ids = losses.top_k_targets(student, k=h["topk"]).indices
        targets = losses.top_k_at(teacher, ids)
        if h["add_tail"]:
            sides = losses.top_k_buckets(student, targets)
        else:
            sides = renormalized(student, ids), targets.log_probs
        values = compared(losses.jsd_gkd, *sides, beta=h["alpha"])
    if h["is_clip"] is not None:
        weight = losses.truncated_ratio(own, x["old_logprobs"], max_ratio=h["is_clip"])
        values = values * weight
    rows = jnp.sum(values * x["mask"], axis=1) / jnp.maximum(jnp.sum(x["mask"], axis=1), 1)
    return jnp.mean(rows)


def with_tails(sides: tuple[Array, Array]) -> tuple[Array, Array]:
    """Log-probabilities of some classes, and that of all others as one more."""
    empty = jnp.zeros(sides[0].shape, jnp.int32)
    first, second = (
        jnp.concatenate([side.log_probs, side.log_tail[..., None]], axis=-1)
        for side in (losses.stored_top_k(empty, log_probs) for log_probs in sides)
    )
    return first, second


def sdpo(x: Inputs, h: Hyper) -> Array:
    """The authors' code; log-probabilities come in."""
    own = x["student_logprobs"]
    if h["full_logit_distillation"]:
        sides = x["student_logprobs_all"], x["teacher_logprobs_all"]
        if h["distillation_topk"] is None:
            # Numbers that need not sum to 1, and are not normalized either.
            values = jnp.sum(jsd_terms(*sides, h["alpha"]), axis=-1)
        else:
            if h["distillation_add_tail"]:
                sides = with_tails(sides)
            values = compared(losses.jsd_gkd, *sides, beta=h["alpha"])
    else:
        values = score_function(own, x["teacher_logprobs"])
    if h["is_clip"] is not None:
        weight = losses.truncated_ratio(own, x["old_logprobs"], max_ratio=h["is_clip"])
        values = values * weight
    values = values * x.get("rollout_weights", 1.0)
    mask = x["response_mask"] * x.get("row_mask", jnp.ones(len(own)))[:, None]
    return mean(values, mask)


def opsd(x: Inputs, h: Hyper) -> Array:
    """The same completion after two prompts; top-k means the teacher's, renormalized."""
    start, other = h["student_prompt_length"], h["teacher_prompt_length"]
    student, teacher = (
        x["student_logits"][:, start - 1 : -1],
        x["teacher_logits"][:, other - 1 : -1],
    )
    labels, tokens = x["labels"][:, start:], x["student_input_ids"][:, start:]
    if h["sampled"]:
        sides = (losses.token_log_probs(z / h["temperature"], tokens) for z in (student, teacher))
        values = score_function(*sides)
    else:
        if h["top_k"] is not None:
            teacher, ids = jax.lax.top_k(teacher, h["top_k"])
            student = renormalized(student, ids)
        how = {"beta": h["beta"], "temperature": h["temperature"]}
        values = compared(losses.jsd_gkd, student, teacher, **how)
    where = labels != -100
    return jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where)


def entropy_aware_opd(x: Inputs, h: Hyper) -> Array:
    values = losses.entropy_aware_kl(
        *pair(x), threshold=h["tau"], weight=h["alpha"], k=h["top_k"], temperature=h["temperature"]
    )
    return mean(values, x["mask"])


def random_sampling_kd(x: Inputs, h: Hyper) -> dict[str, Array]:
    targets = losses.random_sampling_targets(x["teacher_logits"], x["draws"], exponent=h["t"])
    if h["normalize"]:
        weights = targets.weights / jnp.sum(targets.weights, axis=-1, keepdims=True)
        targets = targets._replace(weights=weights)
    drawn = x["draws"][..., None] == np.arange(x["teacher_logits"].shape[-1])
    return {
        "value": mean(
            losses.random_sampling_cross_entropy(x["student_logits"], targets), x["mask"]
        ),
        "p_hat": jnp.sum(jnp.where(drawn, targets.weights[..., None], 0), axis=-2),
    }


METHODS: dict[str, Golden] = {
    "distillation_chunked": distillation_chunked,
    "distillation_exact": distillation_exact,
    "gkd_shifted": gkd_shifted,
    "server_forward_topk": server_forward_topk,
    "server_sparse_top1": server_sparse_top1,
    "nemo_topk_kl": nemo_topk_kl,
    "nemo_full_kl": nemo_full_kl,
    "swift_gkd": swift_gkd,
    "minillm_single_step": minillm_single_step,
    "opd_forward_kl_topk": opd_forward_kl_topk,
    "self_distillation": self_distillation,
    "sdpo": sdpo,
    "opsd": opsd,
    "entropy_aware_opd": entropy_aware_opd,
    "random_sampling_kd": random_sampling_kd,
}
