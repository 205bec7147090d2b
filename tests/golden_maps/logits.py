"""Logit distillation: KD in its many reductions, and the methods after it.

The library returns one value per example; what stands around its calls here is each system's
reduction, T^2 and mixing, and whatever its code does besides its paper.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from golden_maps import Golden
from kdtl_jax import losses

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def pair(x: Inputs) -> tuple[Array, Array]:
    return x["student_logits"], x["teacher_logits"]


def share(where: Array) -> Array:
    return jnp.mean(where, dtype=jnp.float64)


def kd_ce(x: Inputs, h: Hyper) -> Array:
    """torchdistill: without labels (or with alpha 0) the KL alone, without T^2 and beta."""
    reduce = jnp.mean if h["reduction"] == "batchmean" else jnp.sum
    t = h["temperature"]
    if "labels" not in x or not h["alpha"]:
        return reduce(losses.forward_kl(*pair(x), temperature=t))
    beta = 1 - h["alpha"] if h["beta"] is None else h["beta"]
    hard = reduce(cross_entropy(x["student_logits"], x["labels"]))
    return h["alpha"] * hard + beta * reduce(losses.kd_kl(*pair(x), temperature=t))


def temperature_of(x: Inputs, h: Hyper) -> Any:
    return x["temperature"] if "temperature" in x else h["temperature"]


def kd_mse(x: Inputs, h: Hyper) -> Array:
    """TextBrewer: logits divided by T before the squares."""
    values = losses.last_axis_mse(*pair(x))
    t = jnp.asarray(temperature_of(x, h))
    return jnp.mean(values / jnp.square(t).reshape(t.shape + (1,) * (values.ndim - t.ndim)))


def kd_modelopt(x: Inputs, h: Hyper) -> Array:
    """Model-Optimizer: "mean" divides by the number of classes as well."""
    value = jnp.mean(losses.kd_kl(*pair(x), temperature=h["temperature"]))
    return value / x["student_logits"].shape[-1] if h["reduction"] == "mean" else value


def mft(x: Inputs, h: Hyper) -> Array:
    t = h["temperature"]
    corrected = losses.mft_teacher(
        x["teacher_logits"], x["labels"], threshold=h["threshold"], temperature=t
    )
    value = t**2 * jnp.mean(losses.forward_kl(x["student_logits"] / t, corrected))
    return value / x["student_logits"].shape[-1] if h["reduction"] == "mean" else value


def dkd(x: Inputs, h: Hyper) -> Array:
    """mdistiller subtracts 1000 from the label's logit to remove it, which is the same but where
    margins pass 1000: there the label comes back."""
    student, teacher = pair(x)
    t, label = h["temperature"], jax.nn.one_hot(x["labels"], student.shape[-1], dtype=student.dtype)
    target = losses.tckd(student, teacher, x["labels"], temperature=t)
    shifted = losses.kd_kl(student - 1000 * t * label, teacher - 1000 * t * label, temperature=t)
    return jnp.mean(h["alpha"] * target + h["beta"] * shifted)


def dist(x: Inputs, h: Hyper) -> Array:
    """tau^2 is the ports' convention, not the paper's; a map's positions are examples."""
    student, teacher = (logits.reshape(-1, logits.shape[-1]) for logits in pair(x))
    t = h["temperature"]
    inter = losses.dist_inter(student, teacher, temperature=t)
    intra = losses.dist_intra(student, teacher, temperature=t)
    return t**2 * jnp.mean(h["beta"] * inter + h["gamma"] * intra)


def standardized(x: Inputs) -> tuple[Array, Array]:
    student, teacher = (losses.standardize_logits(logits, ddof=1) for logits in pair(x))
    return student, teacher


def standardized_kd(student: Array, teacher: Array, *, temperature: float) -> Array:
    student, teacher = (losses.standardize_logits(z, ddof=1) for z in (student, teacher))
    return losses.kd_kl(student, teacher, temperature=temperature)


def dkd_standardized(x: Inputs, h: Hyper) -> Array:
    student, teacher = standardized(x)
    return dkd({**x, "student_logits": student, "teacher_logits": teacher}, h)


def logit_standardization_ce(x: Inputs, h: Hyper) -> Array:
    student, teacher = (
        losses.standardize_logits(logits, ddof=1, eps=h["eps"]) for logits in pair(x)
    )
    beta = 1 - h["alpha"] if h["beta"] is None else h["beta"]
    hard = jnp.mean(cross_entropy(x["student_logits"], x["labels"]))
    soft = jnp.mean(losses.kd_kl(student, teacher, temperature=h["temperature"]))
    return h["alpha"] * hard + beta * soft


def mlkd(x: Inputs, h: Hyper) -> dict[str, Array]:
    """The published code, not the paper (`methods.mlld`): the confidence masks multiply losses that
    are reduced already, temperatures 2 and 6 of the strong view use the weak logits, and the strong
    view's correlations are dropped."""
    weak = x["student_logits_weak"], x["teacher_logits_weak"]
    strong = x["student_logits_strong"], x["teacher_logits_strong"]
    kd: Any = standardized_kd if h["standardize"] else losses.kd_kl

    def total(loss: Any, logits: tuple[Array, Array], *temperatures: float) -> Array:
        return sum((jnp.mean(loss(*logits, temperature=t)) for t in temperatures), jnp.zeros(()))

    base, w = h["temperature"], h["kd_weight"]
    p = jax.nn.softmax(weak[1], axis=-1)
    confidence, mass = jnp.max(p, axis=1), jnp.sum(p, axis=0)
    unsure = share(confidence <= jnp.median(confidence))
    rare = share(mass <= jnp.median(mass))
    every = (base, 3.0, 5.0, 2.0, 6.0)
    loss_ce = h["ce_weight"] * (
        jnp.mean(cross_entropy(weak[0], x["labels"]))
        + jnp.mean(cross_entropy(strong[0], x["labels"]))
    )
    loss_kd = unsure * total(kd, weak, *every)
    loss_kd = w * (loss_kd + total(kd, strong, base, 3.0, 5.0) + total(kd, weak, 2.0, 6.0))
    loss_cc = w * rare * total(losses.class_correlation, weak, *every)
    loss_bc = w * unsure * total(losses.batch_correlation, weak, *every)
    value = loss_ce + loss_kd + loss_cc + loss_bc
    parts = {"loss_ce": loss_ce, "loss_kd": loss_kd, "loss_cc": loss_cc, "loss_bc": loss_bc}
    return {"value": value, **parts}


def nkd(x: Inputs, h: Hyper) -> Array:
    """A soft label counts by its argmax."""
    labels = x["labels"]
    labels = labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1).astype(jnp.int32)
    target = losses.target_cross_entropy(*pair(x), labels)
    others = (losses.non_target_logits(z, labels) for z in pair(x))
    non_target = losses.soft_cross_entropy(*others, temperature=h["temperature"])
    return jnp.mean(target + h["gamma"] * h["temperature"] ** 2 * non_target)


def uskd(x: Inputs, h: Hyper) -> Array:
    """The authors' code, from pieces: it ranks by the weak head's probabilities plus the student's
    *log*-probabilities, each over its own "rest", and takes soft labels of two classes."""
    student, labels = x["student_logits"], x["labels"]
    weak = x["features"] @ x["weight"] + x["bias"]
    classes = student.shape[-1]
    if labels.ndim == 1:
        target = jax.nn.one_hot(labels, classes, dtype=student.dtype)
        values, chosen = jnp.ones_like(student[:, :1]), labels[:, None]
        smooth = 0.9 * target + 0.1 / classes
    else:
        values, chosen = jax.lax.top_k(labels, 2)
        smooth = 0.9 * labels + 0.1 / classes

    def at_labels(array: Array) -> Array:
        return jnp.take_along_axis(array, chosen, axis=-1)

    log_p = jax.nn.log_softmax(student, axis=-1)
    squared = jnp.square(jnp.exp(at_labels(log_p)))
    weights = squared + values - jnp.mean(squared, axis=0, keepdims=True)
    weights = jax.lax.stop_gradient(jnp.where(values == 0, 0, weights))
    loss_target = -jnp.mean(jnp.sum(weights * at_labels(log_p), axis=-1))
    q = jax.nn.softmax(weak, axis=-1)

    def over_rest(array: Array) -> Array:
        return array / (1 - jnp.sum(at_labels(array), axis=-1, keepdims=True) + 1e-6)

    zipf = losses.zipf_targets(over_rest(q) + over_rest(log_p), chosen)
    others = zipf > -jnp.inf
    loss_non = jnp.mean(losses.soft_cross_entropy(student, zipf, where=others))
    loss_weak = jnp.mean(optax.softmax_cross_entropy(weak, smooth))
    return h["alpha"] * loss_target + h["beta"] * loss_non + h["mu"] * loss_weak


def wsld(x: Inputs, h: Hyper) -> Array:
    """A cross-entropy where the method is a KL: the gradient is one, the value is not."""
    weight = jax.lax.stop_gradient(losses.wsld_weight(*pair(x), x["labels"]))
    soft = losses.soft_cross_entropy(*pair(x), temperature=h["temperature"])
    return h["temperature"] ** 2 * jnp.mean(weight * soft)


def wsld_ce(x: Inputs, h: Hyper) -> Array:
    classes = x["student_logits"].shape[-1]
    smooth = optax.smooth_labels(jax.nn.one_hot(x["labels"], classes), h["label_smoothing"])
    hard = optax.softmax_cross_entropy(x["student_logits"], smooth.astype(jnp.float64))
    return jnp.mean(hard) + h["alpha"] * wsld(x, h)


def wkd_logit(x: Inputs, h: Hyper) -> Array:
    moved = losses.sinkhorn_cost(
        losses.non_target_logits(pair(x)[0], x["labels"]),
        losses.non_target_logits(pair(x)[1], x["labels"]),
        jax.nn.relu(x["cost_matrix"]) + 1e-8,
        temperature=h["temperature"],
        regularization=h["sinkhorn_lambda"],
        iterations=h["sinkhorn_iterations"],
        eps=1e-8,
    )
    target = losses.target_cross_entropy(*pair(x), x["labels"])
    return jnp.mean(target + h["gamma"] * moved)


def skd_instance(x: Inputs, h: Hyper) -> Array:
    """Mode "code" keeps the unsure half of the batch, with T^2, and divides by the whole."""
    kl = losses.forward_kl(*pair(x), temperature=h["temperature"])
    if h["mode"] == "paper":
        return jnp.mean(kl)
    confidence = jnp.max(jax.nn.softmax(x["teacher_logits"], axis=-1), axis=-1)
    kept = confidence <= jnp.median(confidence)
    return jnp.mean(jnp.where(kept, h["temperature"] ** 2 * kl, 0))


def skd_direction(x: Inputs, h: Hyper) -> Array:
    """Mode "code" divides both Gram matrices by C (as if tikhonov were C^2 times larger) and
    multiplies by the share of rare classes."""
    if h["mode"] == "paper":
        return jnp.mean(losses.skd_direction(*pair(x), tikhonov=h["tikhonov"]))
    mass = jnp.sum(jax.nn.softmax(x["teacher_logits"], axis=-1), axis=0)
    wider = h["tikhonov"] * x["student_logits"].shape[-1] ** 2
    value = jnp.mean(losses.skd_direction(*pair(x), tikhonov=wider))
    return value * share(mass <= jnp.median(mass))


def srd(x: Inputs, h: Hyper) -> Array:
    """torchdistill takes the logarithm of the sum over the batch, and doubles it."""
    rows = losses.srd(x["student_features"], x["teacher_features"], exponent=h["exponent"])
    kl = losses.forward_kl(*pair(x), temperature=h["temperature"])
    return 2 * jax.nn.logsumexp(rows) + jnp.mean(kl)


def _least_wrong(scores: np.ndarray, truth: np.ndarray, ratio: float) -> np.ndarray:
    """Rows whose true column ranks first, and of the others the `ratio` of smallest rank."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    rank = np.argmax(order == truth[:, None], axis=-1)
    wrong = int(np.sum(rank > 0))
    keep = len(rank) - wrong + int(ratio * wrong)
    return np.argsort(rank, kind="stable")[:keep]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-8)


def sskd(x: Inputs, h: Hyper) -> Array:
    """Self-supervision: KD on one normal view in four, on the least wrong augmented views, and on
    the similarities between the two."""
    normal = np.arange(x["student_logits"].shape[0]) % 4 == 0
    owner = np.arange(3 * int(normal.sum())) // 3
    labels, teacher = np.asarray(x["labels"]), x["teacher_logits"]
    vectors = _unit(np.asarray(x["teacher_ss"]))
    similar = vectors[~normal] @ vectors[normal].T
    views, originals = x["student_ss"][~normal], x["student_ss"][normal]
    student_ss = optax.losses.cosine_similarity(views[:, None], originals[None], epsilon=1e-8)
    ss = _least_wrong(similar, owner, h["ss_ratio"])
    tf = _least_wrong(np.asarray(teacher)[~normal], labels[owner], h["tf_ratio"])
    teacher_ss = jnp.asarray(similar)
    student = x["student_logits"]
    terms = (
        cross_entropy(student[normal], x["labels"]),
        losses.kd_kl(student[normal], teacher[normal], temperature=h["kl_temp"]),
        losses.kd_kl(student_ss[ss], teacher_ss[ss], temperature=h["ss_temp"]),
        losses.kd_kl(student[~normal][tf], teacher[~normal][tf], temperature=h["tf_temp"]),
    )
    weighted = (w * jnp.mean(v) for w, v in zip(h["loss_weights"], terms, strict=True))
    return sum(weighted, jnp.zeros(()))


METHODS: dict[str, Golden] = {
    # RepDistiller, mdistiller, mmrazor: T^2, sum over classes, mean over the batch.
    "kd": lambda x, h: jnp.mean(losses.kd_kl(*pair(x), temperature=h["temperature"])),
    "kd_ce": kd_ce,
    "kd_mse": kd_mse,
    "kd_soft_ce": lambda x, h: jnp.mean(
        losses.soft_cross_entropy(*pair(x), temperature=temperature_of(x, h))
    ),
    # A mean over the classes too.
    "tinybert_prediction": lambda x, h: (
        jnp.mean(losses.soft_cross_entropy(*pair(x), temperature=h["temperature"]))
        / x["student_logits"].shape[-1]
    ),
    "hard_kd": lambda x, h: h["loss_weight"] * jnp.mean(losses.hard_kd(*pair(x))),
    "kd_modelopt": kd_modelopt,
    "mft": mft,
    "dkd": dkd,
    "dist": dist,
    "logit_standardization": lambda x, h: jnp.mean(
        standardized_kd(*pair(x), temperature=h["temperature"])
    ),
    "dkd_standardized": dkd_standardized,
    "logit_standardization_ce": logit_standardization_ce,
    "mlkd_class": lambda x, h: jnp.mean(
        losses.class_correlation(*pair(x), temperature=h["temperature"])
    ),
    "mlkd_batch": lambda x, h: jnp.mean(
        losses.batch_correlation(*pair(x), temperature=h["temperature"])
    ),
    "mlkd": mlkd,
    "nkd": nkd,
    "uskd": uskd,
    "wsld": lambda x, h: h["loss_weight"] * wsld(x, h),
    "wsld_ce": wsld_ce,
    "ttm": lambda x, h: jnp.mean(losses.ttm(*pair(x), gamma=h["gamma"])),
    "wttm": lambda x, h: jnp.mean(losses.wttm(*pair(x), gamma=h["gamma"])),
    "wkd_logit": wkd_logit,
    "skd_instance": skd_instance,
    "skd_direction": skd_direction,
    "srd": srd,
    "sskd": sskd,
}
