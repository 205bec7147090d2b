"""Transfer objectives: TLL's and the authors' numbers.

The library's losses are per example; TLL sums feature penalties over the batch and averages the
rest. Its constants (which gradients are stopped, where the entropy has an epsilon) are set here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import discrepancies, losses, normalization, penalties, transferability

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def numbered(x: Inputs, name: str) -> dict[str, Array]:
    """`{"0": x["name_0"], "1": x["name_1"], ...}`."""
    keys = [key for key in x if key.startswith(f"{name}_")]
    return {key.removeprefix(f"{name}_"): x[key] for key in keys}


def behavioral(x: Inputs, h: Hyper) -> Array:
    student, source = numbered(x, "student"), numbered(x, "source")
    layers = [jnp.sum(losses.squared_distance(student[i], source[i])) / 2 for i in student]
    return sum(layers[1:], layers[0])


def delta(x: Inputs, h: Hyper) -> Array:
    student, source = numbered(x, "student"), numbered(x, "source")
    weights = numbered(x, "attention")
    layers = [
        jnp.sum(losses.delta(student[i], source[i], channel_weights=weights[i])) for i in student
    ]
    return sum(layers[1:], layers[0])


def relation(probabilities: Array, labels: Array) -> Array:
    return transferability.category_relation(
        probabilities, labels, num_classes=int(labels.max()) + 1
    )


def calibrated_relation(x: Inputs, h: Hyper) -> Array:
    logits = jnp.concatenate([x["train_logits"], x["validation_logits"]])
    labels = jnp.concatenate([x["train_labels"], x["validation_labels"]])
    return relation(jax.nn.softmax(h["logit_scale"] * logits), labels)


def stochnorm(x: Inputs, h: Hyper) -> dict[str, Array]:
    def run(inputs: Array, scale: Array, running: normalization.Running) -> Array:
        out, _ = normalization.stoch_norm(
            inputs, scale, x["offset"], running, x["selector"], momentum=h["momentum"], eps=h["eps"]
        )
        return out

    before = normalization.Running(x["running_mean"], x["running_var"])
    out, after = normalization.stoch_norm(
        x["x"], x["scale"], x["offset"], before, x["selector"], momentum=h["momentum"], eps=h["eps"]
    )
    # The unmodified reference overwrites the statistics before its backward pass runs, so its
    # gradient is that of normalizing with the statistics *after* the step.
    wrong = jax.grad(lambda a, b: jnp.sum(run(a, b, after) * x["probe"]), argnums=(0, 1))
    reference_x, reference_scale = wrong(x["x"], x["scale"])
    return {
        "value": jnp.sum(out * x["probe"]),
        "out": out,
        "new_running_mean": after.mean,
        "new_running_var": after.var,
        "reference_grad_x": reference_x,
        "reference_grad_scale": reference_scale,
    }


def enqueued(queue: Array, keys: Array, labels: Array) -> Array:
    """Keys `[B, D]` written into `[D, C, K]`, each at its class's pointer, which starts at 0."""
    used: dict[int, int] = {}
    for key, label in zip(keys, labels.tolist(), strict=True):
        at = used.get(label, 0)
        queue = queue.at[:, label, at % queue.shape[2]].set(key)
        used[label] = at + 1
    return queue


def queue_scores(anchors: Array, own: Array, queue: Array, labels: Array) -> Array:
    """`[B, 1 + K C]`: each anchor's own pair, its class's queue, then the other classes'."""
    every = jnp.einsum("bd,dck->bck", anchors, queue)
    rows = []
    for row, first, label in zip(every, own, labels.tolist(), strict=True):
        others = jnp.delete(row, label, axis=0).ravel()
        rows.append(jnp.concatenate([first[None], row[label], others]))
    return jnp.stack(rows)


def bi_tuning(x: Inputs, h: Hyper) -> dict[str, Array]:
    """The published form with queues: projections read them before, the classifier after."""
    temperature, labels = h["temperature"], x["labels"]
    kernel, bias = x["projector_weight"], x["projector_bias"]
    keys = jax.lax.stop_gradient(x["key_features"])

    def project(f: Array, w: Array, b: Array) -> Array:
        return f @ w + b[None, :]

    def unit(z: Array) -> Array:
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    query_z = unit(project(x["query_features"], kernel, bias))
    key_z = jax.lax.stop_gradient(unit(project(keys, kernel, bias)))
    query_h, key_h = losses.unit_features(x["query_features"]), losses.unit_features(keys)
    queue_h = enqueued(x["queue_h"], key_h, labels)
    # The head is read as data: the classifier part trains the features only.
    head = jax.lax.stop_gradient(losses.unit_classes(x["head_weight"], x["head_bias"]))[labels]
    own_z, own_h = jnp.sum(query_z * key_z, axis=-1), jnp.sum(query_h * head, axis=-1)
    scores_z = queue_scores(query_z, own_z, x["queue_z"], labels)
    scores_y = queue_scores(head, own_h, queue_h, labels)
    positives = jnp.broadcast_to(
        jnp.arange(scores_z.shape[1]) <= x["queue_h"].shape[2], scores_z.shape
    )
    parts = [
        losses.uniform_contrast(scores, positives, temperature=temperature)
        for scores in (scores_z, scores_y)
    ]
    return {
        "value": jnp.mean(parts[0] + parts[1]),
        "log_probs_z": jax.nn.log_softmax(scores_z / temperature),
        "log_probs_y": jax.nn.log_softmax(scores_y / temperature),
        "new_queue_h": queue_h,
        "new_queue_z": enqueued(x["queue_z"], key_z, labels),
    }


def coral(x: Inputs, h: Hyper) -> Array:
    source, target = x["source_features"], x["target_features"]
    means = jnp.mean(jnp.square(jnp.mean(source, axis=0) - jnp.mean(target, axis=0)))
    return means + 4 * discrepancies.coral(source, target)


def mk_mmd(x: Inputs, h: Hyper) -> Array:
    source, target = x["source_features"], x["target_features"]
    scale = jax.lax.stop_gradient(discrepancies.mean_squared_distance(source, target))
    batch = source.shape[0]
    if not h["linear"]:
        value = discrepancies.mk_mmd(source, target, scale=scale, alphas=h["alphas"])
    else:
        value = discrepancies.mk_mmd_linear(source, target, scale=scale, alphas=h["alphas"])
        if batch == 2:  # both neighbors are the same pair, and the reference sets, not adds
            kernel = discrepancies.multi_gaussian(source, target, scale=scale, alphas=h["alphas"])
            value = value + (kernel[0, 1] + kernel[1, 0]) / batch
    return value + 2 / (batch - 1)


def mcc(x: Inputs, h: Hyper) -> Array:
    p = jax.nn.softmax(x["logits"] / h["temperature"])
    entropy = -jnp.sum(p * jnp.log(p + 1e-5), axis=-1)  # the reference's epsilon
    weights = 1 + jnp.exp(-entropy)
    weights = jax.lax.stop_gradient(weights / jnp.mean(weights))
    return discrepancies.mcc(x["logits"], temperature=h["temperature"], example_weights=weights)


def afn(x: Inputs, h: Hyper) -> Array:
    norms = jax.lax.stop_gradient(losses.feature_norms(x["features"]))
    return jnp.mean(losses.afn(x["features"], norms, step=h["delta"]))


METHODS: dict[str, Golden] = {
    "l2_sp": lambda x, h: penalties.l2_sp(numbered(x, "param"), numbered(x, "source")),
    "l2": lambda x, h: penalties.l2(numbered(x, "param")),
    "behavioral": behavioral,
    "delta": delta,
    "bss": lambda x, h: discrepancies.bss(x["features"], k=h["k"]),
    "co_tuning": lambda x, h: jnp.mean(losses.co_tuning(x["student_logits"], x["target"])),
    "co_tuning_relation": lambda x, h: relation(x["source_probabilities"], x["labels"]),
    "co_tuning_relation_logits": calibrated_relation,
    "lwf": lambda x, h: jnp.mean(
        losses.forward_kl(x["student_logits"], x["teacher_logits"], temperature=h["temperature"])
    ),
    "stochnorm": stochnorm,
    "bi_tuning": bi_tuning,
    "coral": coral,
    "mk_mmd": mk_mmd,
    "mcc": mcc,
    "afn": afn,
}
