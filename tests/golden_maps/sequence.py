"""Token distillation: divergences with masks, top-k teachers, foreign vocabularies.

The library returns `[B, L]`; what stands around its calls here is each system's mask, reduction,
T^2, and whatever its code does besides its paper.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from golden_maps import Golden
from golden_maps.alignment import merged
from kdtl_jax import language, losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def pair(x: Inputs) -> tuple[Array, Array]:
    return x["student_logits"], x["teacher_logits"]


def entropy(logits: Array) -> Array:
    return losses.soft_cross_entropy(logits, logits)


def masked_sum(values: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, values, 0))


def masked_mean(values: Array, where: Array) -> Array:
    return masked_sum(values, where) / jnp.maximum(jnp.sum(where), 1)


def labelled_mean(x: Inputs, values: Array) -> Array:
    """DistiLLM, AKL: the mean over positions whose label is not -100."""
    return masked_mean(values, x["labels"] != -100)


def labelled_sum(x: Inputs, values: Array) -> Array:
    """DSKD: the sum over positions whose label is not -100."""
    return masked_sum(values, x["labels"] != -100)


def symmetric_kl(x: Inputs, h: Hyper) -> Array:
    """DistiLLM leaves the teacher's entropy in the forward part."""
    kl = losses.symmetric_kl(*pair(x), weight=h["lam"])
    return labelled_mean(x, kl + (1 - h["lam"]) * entropy(x["teacher_logits"]))


def skew_forward_kl(x: Inputs, h: Hyper) -> Array:
    """DistiLLM's is a cross-entropy: the teacher's entropy is not subtracted."""
    kl = losses.skew_forward_kl(*pair(x), alpha=h["lam"])
    return labelled_mean(x, kl + entropy(x["teacher_logits"]))


def distillm2(x: Inputs, h: Hyper) -> dict[str, Array]:
    """DistiLLM-2: shifted, per-sample means (or sums) of a teacher-side and a student-side term."""
    student, labels, where = losses.causal_shift(x["student_logits"], x["labels"])
    teacher = losses.causal_shift(x["teacher_logits"], x["labels"]).logits

    def total(values: Array) -> Array:
        summed = jnp.sum(jnp.where(where, values, 0), axis=1)
        return summed / jnp.sum(where, axis=1) if h["average_log_prob"] else summed

    count = jnp.sum(where, axis=1)
    log_s, log_t = (losses.token_log_probs(z, labels) for z in (student, teacher))
    kind = h["loss_type"]
    if kind.startswith("distillm"):
        alpha_1, alpha_2 = h["base_alpha_1"], h["base_alpha_2"]
        if h.get("logp_logq") is not None and h.get("logq_logp") is not None:
            mean_s, mean_t = (
                jnp.sum(jnp.where(where, z, 0), axis=1) / count for z in (log_s, log_t)
            )
            alpha = losses.distillm2_alpha
            alpha_1 = alpha(mean_t, mean_s, anchor=h["logp_logq"], base=alpha_1)
            alpha_2 = alpha(mean_s, mean_t, anchor=h["logq_logp"], base=alpha_2)
        side_t = losses.skew_forward_kl(student, teacher, alpha=alpha_1)
        # The student inside the mixture is detached: the mixture is a teacher of its own.
        share = jnp.reshape(jnp.asarray(alpha_2), (-1, 1, 1))
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(student))
        mixture = jnp.logaddexp(
            jnp.log1p(-share) + jax.nn.log_softmax(teacher), jnp.log(share) + log_p
        )
        side_s = losses.reverse_kl(student, mixture)
    elif kind == "gkd":
        side_t = side_s = losses.jsd_gkd(student, teacher, beta=0.9)
    else:
        # The reverse term has the wrong sign in the reference.
        side_t, side_s = losses.forward_kl(student, teacher), -losses.reverse_kl(student, teacher)
    outputs = {
        "student_logps": total(log_s),
        "teacher_logps": total(log_t),
        "teacher_side": total(side_t),
        "student_side": total(side_s),
    }
    return {"value": jnp.sum(outputs["teacher_side"] + outputs["student_side"]), **outputs}


def generalized_jsd(x: Inputs, h: Hyper) -> Array:
    """TRL: "batchmean" divides by the kept tokens, or without labels by B alone."""
    values = losses.jsd_gkd(*pair(x), beta=h["beta"], temperature=h["temperature"])
    where = x["labels"] != -100 if "labels" in x else jnp.ones(values.shape, bool)
    total, kept = masked_sum(values, where), jnp.sum(where)
    if h["reduction"] == "sum":
        return total
    if h["num_items"] is not None:
        return total / h["num_items"]
    if h["reduction"] == "mean":
        return total / (kept * x["student_logits"].shape[-1])
    return total / (jnp.maximum(kept, 1) if "labels" in x else values.shape[0])


def adaptive_kl(x: Inputs, h: Hyper) -> Array:
    weight = jax.lax.stop_gradient(losses.adaptive_kl_weight(*pair(x), mu=h["mu"]))
    return labelled_mean(x, losses.symmetric_kl(*pair(x), weight=weight))


def adaptive_kl_sum(x: Inputs, h: Hyper) -> Array:
    """DSKD sorts ascending: its tail is the least likely alpha of mass, its head the rest."""
    t = h["temperature"]
    p, q = (jax.nn.softmax(z / t, axis=-1) for z in (x["teacher_logits"], x["student_logits"]))
    order = jnp.argsort(p, axis=-1)
    tail = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1) <= h["alpha"]
    gap = jnp.take_along_axis(jnp.abs(p - q), order, axis=-1)
    weight = jnp.sum(jnp.where(tail, gap, 0), axis=-1) / jnp.sum(gap, axis=-1)
    return labelled_sum(
        x, losses.symmetric_kl(*pair(x), weight=jax.lax.stop_gradient(weight), temperature=t)
    )


def js_sum(x: Inputs, h: Hyper) -> Array:
    """DSKD adds 1e-9 inside the logarithms; the difference from the exact value is written out."""
    t = h["temperature"]
    exact = losses.jensen_shannon(*pair(x), temperature=t)
    q, p = (jax.nn.softmax(z / t, axis=-1) for z in pair(x))
    middle = (p + q) / 2

    def excess(values: Array) -> Array:
        return jnp.sum(values * jnp.log1p(1e-9 / jnp.maximum(values, 1e-300)), axis=-1)

    added = 0.5 * (excess(p) + excess(q)) - excess(middle)
    return labelled_sum(x, exact + added)


def region(labels: Array, values: Array, *, skip_last: bool = False) -> tuple[Array, np.ndarray]:
    """The answers at the start of each row, and their lengths."""
    rotated, _ = losses.answers_first(values, labels)
    lengths = np.sum(np.asarray(labels) != -100, axis=1) - int(skip_last)
    return rotated, np.maximum(lengths, 0)


def uld(x: Inputs, h: Hyper) -> Array:
    """TRL's GOLD: both answers cut to the shorter, mean over positions, then over rows."""
    skip = h["skip_eos"]
    student, length_s = region(x["student_labels"], x["student_logits"], skip_last=skip)
    teacher, length_t = region(x["teacher_labels"], x["teacher_logits"], skip_last=skip)
    both = min(student.shape[1], teacher.shape[1])
    length = np.minimum(length_s, length_t)
    values = losses.uld(
        student[:, :both],
        teacher[:, :both],
        student_temperature=h["student_temperature"],
        teacher_temperature=h["teacher_temperature"],
    )
    inside = jnp.arange(both)[None] < length[:, None]
    rows = jnp.sum(jnp.where(inside, values, 0), axis=1) / np.maximum(length, 1)
    logits, labels, where = losses.causal_shift(x["student_logits"], x["student_labels"])
    hard = masked_mean(-losses.token_log_probs(logits, labels), where)
    return h["weight"] * jnp.mean(rows) + h["ce_weight"] * hard


def uld_sum(x: Inputs, _: Hyper) -> Array:
    student, counts_s = losses.answers_first(x["student_logits"], x["student_labels"])
    teacher, counts_t = losses.answers_first(x["teacher_logits"], x["teacher_labels"])
    return masked_sum(losses.uld(student, teacher), counts_s & counts_t)


def jsd_terms(q: Array, p: Array, beta: float) -> Array:
    """The terms of GKD's divergence of student q and teacher p, log-probabilities as they are."""
    if beta == 0:
        return jnp.exp(p) * (p - q)
    if beta == 1:
        return jnp.exp(q) * (q - p)
    mix = jnp.logaddexp(np.log(beta) + p, np.log1p(-beta) + q)
    return beta * jnp.exp(p) * (p - mix) + (1 - beta) * jnp.exp(q) * (q - mix)


def uld_aligned(x: Inputs, h: Hyper) -> Array:
    """TRL's GOLD, tokens aligned by bytes and merged; "hybrid" compares shared tokens by JSD."""
    rows = []
    for b in range(x["student_logits"].shape[0]):
        sides = []
        ends = []
        for side in ("student", "teacher"):
            labels = np.asarray(x[f"{side}_labels"][b])
            start, size = int(np.argmax(labels != -100)), int(np.sum(labels != -100))
            # "bayesian" reads row k as predicting token k: one position earlier than the labels.
            at = max(start - 1, 0) if h["strategy"] == "bayesian" else start
            logits = x[f"{side}_logits"][b, at : at + size]
            sides.append((logits, np.asarray(x[f"{side}_ids"][b])[start : start + size]))
            ends.append(np.asarray(x[f"{side}_offsets"][b])[start : start + size, 1])
        student_groups, teacher_groups, count = language.align_tokens(ends[0], ends[1])
        student, teacher = (
            merged(jax.nn.log_softmax(logits), ids, groups, count, h["strategy"])
            for (logits, ids), groups in zip(sides, (student_groups, teacher_groups), strict=True)
        )
        if not h["hybrid"]:
            rows.append(jnp.sum(losses.sorted_l1(student, teacher)) / count)
            continue
        shared_t, shared_s = np.asarray(x["vocab_pairs"]).T
        # Merged probabilities do not sum to 1 and are not renormalized, so this is not a divergence
        # of the library: the terms of a JSD, written out.
        p, q = (jnp.log(jnp.maximum(z, 1e-8)) for z in (teacher[:, shared_t], student[:, shared_s]))
        terms = jsd_terms(q, p, h["beta"])
        own_s = np.setdiff1d(np.arange(student.shape[1]), shared_s)
        own_t = np.setdiff1d(np.arange(teacher.shape[1]), shared_t)
        rest = jnp.sum(losses.sorted_l1(student[:, own_s], teacher[:, own_t])) / count
        matched = len(shared_t) / teacher.shape[1]
        rows.append(matched * jnp.sum(terms) / count + (1 - matched) * rest)
    return jnp.mean(jnp.stack(rows))


def linear(x: Inputs, h: Hyper, soft: Any) -> Array:
    """Liger: hard and soft parts over the labelled tokens, from hidden states and heads. A narrower
    student is padded with ZEROS after the division by T, not with -inf."""
    student = x["student_hidden"] @ x["student_weight"]
    teacher = x["teacher_hidden"] @ x["teacher_weight"]
    student = student + x["student_bias"] if "student_bias" in x else student
    teacher = teacher + x["teacher_bias"] if "teacher_bias" in x else teacher
    where = x["labels"] != -100
    count = jnp.maximum(jnp.sum(where), 1)
    labels = jnp.where(where, x["labels"], 0)
    hard = optax.softmax_cross_entropy_with_integer_labels(student, labels)
    sizes = student.shape[-1], teacher.shape[-1]
    student, teacher = (
        jnp.pad(z / h["temperature"], ((0, 0), (0, max(sizes) - z.shape[-1])))
        for z in (student, teacher)
    )
    parts = h["weight_hard"] * masked_sum(hard, where), soft(student, teacher, where)
    return (parts[0] + h["weight_soft"] * parts[1]) / count


def linear_jsd(x: Inputs, h: Hyper) -> Array:
    return linear(x, h, lambda s, t, where: masked_sum(losses.jsd_gkd(s, t, beta=h["beta"]), where))


def linear_cosine(x: Inputs, h: Hyper) -> Array:
    """The soft part is beta (1 - cosine), summed over ignored positions too."""

    def soft(student: Array, teacher: Array, _: Array) -> Array:
        cosine = optax.losses.cosine_similarity(student, teacher, epsilon=1e-12)
        return jnp.sum(h["beta"] * (1 - cosine))

    return linear(x, h, soft)


def taid(x: Inputs, h: Hyper) -> Array:
    """The cross-entropy form of the method's KL."""
    teacher = losses.taid_teacher(*pair(x), progress=h["t"])
    values = losses.soft_cross_entropy(x["student_logits"], jax.lax.stop_gradient(teacher))
    return masked_mean(values, x["mask"])


def taid_schedule(x: Inputs, h: Hyper) -> Array:
    def advance(state: losses.TaidProgress, loss: Array) -> tuple[losses.TaidProgress, Array]:
        state = losses.taid_advance(
            state,
            loss,
            num_steps=h["num_train_steps"],
            start=h["t_start"],
            end=h["t_end"],
            alpha=h["alpha"],
            beta=h["beta"],
        )
        return state, state.progress

    start = losses.taid_start(start=jnp.asarray(h["t_start"], x["losses"].dtype))
    return jax.lax.scan(advance, start, x["losses"])[1]


METHODS: dict[str, Golden] = {
    # The name says KL, the code is the cross-entropy.
    "forward_kl": lambda x, h: labelled_mean(x, losses.soft_cross_entropy(*pair(x))),
    "reverse_kl": lambda x, h: labelled_mean(x, losses.reverse_kl(*pair(x))),
    "symmetric_kl": symmetric_kl,
    # lam weighs the student where GKD's beta weighs the teacher.
    "js": lambda x, h: labelled_mean(x, losses.jsd_gkd(*pair(x), beta=1 - h["lam"])),
    "tvd": lambda x, h: labelled_mean(x, losses.total_variation(*pair(x))),
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": lambda x, h: labelled_mean(
        x, losses.skew_reverse_kl(*pair(x), alpha=h["lam"])
    ),
    "distillm2": distillm2,
    "generalized_jsd": generalized_jsd,
    "uld": uld,
    "uld_aligned": uld_aligned,
    "forward_kl_sum": lambda x, h: labelled_sum(
        x, losses.forward_kl(*pair(x), temperature=h["temperature"])
    ),
    "reverse_kl_sum": lambda x, h: labelled_sum(
        x, losses.reverse_kl(*pair(x), temperature=h["temperature"])
    ),
    "adaptive_kl_sum": adaptive_kl_sum,
    "skewed_forward_kl_sum": lambda x, h: labelled_sum(
        x, losses.skew_forward_kl(*pair(x), alpha=h["lam"], temperature=h["temperature"])
    ),
    "skewed_reverse_kl_sum": lambda x, h: labelled_sum(
        x, losses.skew_reverse_kl(*pair(x), alpha=h["lam"], temperature=h["temperature"])
    ),
    "js_sum": js_sum,
    "uld_sum": uld_sum,
    "adaptive_kl": adaptive_kl,
    "taid": taid,
    "taid_schedule": taid_schedule,
    "linear_jsd": linear_jsd,
    "linear_cosine": linear_cosine,
}
