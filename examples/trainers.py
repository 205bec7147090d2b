"""Distillation of language models in other libraries' training loops, in a few lines each.

A loss returns its sum over the counted tokens and their number separately, so that accumulated
steps and padded rows are exact. Tunix, MaxText, Flax NNX and Equinox models are used unchanged.
"""

# Models are whatever those frameworks accept.
# pyright: reportMissingParameterType=false

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kdtl_jax import language, losses
from kdtl_jax.objective import Masked, reduce


def tunix_loss(teacher):
    """For `PeftTrainer(...).with_loss_fn(tunix_loss(teacher))`; the teacher is another module."""
    from tunix.sft import utils

    def loss(model, input_tokens, input_mask, positions, attention_mask):
        inputs = (input_tokens, positions, None, attention_mask)
        student, told = model(*inputs)[0], jax.lax.stop_gradient(teacher(*inputs)[0])
        values = losses.forward_kl(student[:, :-1], told[:, :-1])
        kd = reduce("kd", Masked(values, input_mask[:, 1:] > 0))
        if hasattr(utils, "LossOutput"):  # sums and weights are accumulated separately
            return utils.LossOutput(utils.WeightedMetric(kd.total, kd.weight), {})
        return kd.value()

    return loss


def maxtext_loss(apply, params, teacher_params, data):
    """With MaxText's batch keys; `apply(params, tokens, positions, segments)` gives logits.

    `language.maxtext_batch` makes such a batch from this library's rows; its targets are shifted.
    """
    inputs = (data["inputs"], data["inputs_position"], data["inputs_segmentation"])
    logits = apply(params, *inputs)
    told = jax.lax.stop_gradient(apply(teacher_params, *inputs))
    counts = data["targets_segmentation"] != 0
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])
    kd = reduce("kd", Masked(losses.forward_kl(logits, told), counts))
    task = reduce("task", Masked(hard, counts))
    return (0.9 * kd.total + 0.1 * task.total), kd.weight


@nnx.jit
def nnx_step(student, teacher, optimizer, batch):
    """One step of a plain NNX loop; modules map tokens and segments to logits."""

    def loss(student):
        told = jax.lax.stop_gradient(teacher(batch["tokens"], batch["segments"]))
        values = losses.forward_kl(student(batch["tokens"], batch["segments"]), told)
        _, where = language.next_tokens(batch)
        return reduce("kd", Masked(values, where)).value()

    value, grads = nnx.value_and_grad(loss)(student)
    optimizer.update(student, grads)
    return value


@eqx.filter_jit
def equinox_step(student, teacher, opt_state, tx, batch):
    """One step of a plain Equinox loop; modules map one row's tokens and segments to logits."""

    def loss(student):
        rows = (batch["tokens"], batch["segments"])
        logits, told = jax.vmap(student)(*rows), jax.lax.stop_gradient(jax.vmap(teacher)(*rows))
        _, where = language.next_tokens(batch)
        return reduce("kd", Masked(losses.forward_kl(logits, told), where)).value()

    value, grads = eqx.filter_value_and_grad(loss)(student)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(student, eqx.is_inexact_array))
    return eqx.apply_updates(student, updates), opt_state, value


if __name__ == "__main__":
    rows = language.document(list(b"the quick brown fox")), language.document(list(b"lazy dog"))
    batch = jax.tree.map(jnp.asarray, language.batch(language.packed(rows, 32)))
    embeddings = [nnx.Embed(256, 8, rngs=nnx.Rngs(seed)) for seed in (0, 1)]

    class Model(nnx.Module):
        def __init__(self, table):
            self.table = table

        def __call__(self, tokens, segments):
            return self.table.attend(self.table(tokens))

    student, teacher = map(Model, embeddings)
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    for _ in range(3):
        print(float(nnx_step(student, teacher, optimizer, batch)))
