"""The two worked examples of the tutorial, implemented as its text describes.

(a) Parameter distillation: an MLP 10-20-1 teaches an MLP 10-10-1. The student's weights are
`alpha = 0.1` times the weights of the teacher's first ten hidden units; then it is fine-tuned.
(b) Parameter transfer: an MLP 10-20-1 is trained on a source task; a target of the same shape takes
its weights and is fine-tuned on the target task.

Both use SGD at 0.01, mean squared error and 100 epochs (full batch), on a regression set made from
a fixed key. As printed, the PyTorch examples cannot run: head shapes differ, and weights are
assigned to names that no layer reads and, in (b), from target to source.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import train, transforms
from kdtl_jax._types import Params
from kdtl_jax.interop import linen
from kdtl_jax.models import mlp
from kdtl_jax.objective import Inputs

# The settings of the tutorial's examples.
ALPHA, RATE, EPOCHS, INPUTS, LARGE, SMALL = 0.1, 0.01, 100, 10, 20, 10


class Example(NamedTuple):
    """A worked example's weights at its three stages, and its loss during fine-tuning."""

    source: Params  # the teacher, or the source model, after its training
    start: Params  # the student, or the target, after the transform and before fine-tuning
    tuned: Params
    report: transforms.Report
    losses: Array  # [epochs]


def regression(key: Array, *, examples: int = 256, shift: float = 0.0) -> dict[str, Array]:
    """`y = sin(x a + shift) + 0.1 noise` for standard normal x `[N, 10]`; labels are `[N, 1]`."""
    key_x, key_a, key_noise = jax.random.split(key, 3)
    x = jax.random.normal(key_x, (examples, INPUTS), jnp.float32)
    a = jax.random.normal(key_a, (INPUTS, 1), jnp.float32) / jnp.sqrt(jnp.float32(INPUTS))
    noise = jax.random.normal(key_noise, (examples, 1), jnp.float32)
    return {"inputs": x, "labels": jnp.sin(x @ a + shift) + 0.1 * noise}


def parameter_distillation(*, alpha: float = ALPHA, epochs: int = EPOCHS) -> Example:
    """Example (a): 10-20-1 to 10-10-1, `theta_small = alpha * theta_large`, then fine-tuned."""
    data = regression(jax.random.key(0))
    teacher, student = linen.model(mlp((LARGE,), 1)), linen.model(mlp((SMALL,), 1))
    key_teacher, key_student = jax.random.split(jax.random.key(1))
    large, _ = fit(teacher, teacher.init(key_teacher, data["inputs"]).params, data, epochs)
    fresh = student.init(key_student, data["inputs"]).params
    # crop keeps the first ten hidden units on both sides: kernel columns, biases, head rows.
    start, report = transforms.transfer(large, fresh, alpha=alpha, on_mismatch=transforms.crop)
    tuned, losses = fit(student, start, data, epochs)
    return Example(large, start, tuned, report, losses)


def parameter_transfer(*, epochs: int = EPOCHS) -> Example:
    """Example (b): 10-20-1 on two tasks, `theta_target = theta_source`, then fine-tuned."""
    # One function, shifted: the two tasks are related but not equal.
    source_data = regression(jax.random.key(0))
    target_data = regression(jax.random.key(0), shift=0.5)
    model = linen.model(mlp((LARGE,), 1))
    key_source, key_target = jax.random.split(jax.random.key(1))
    initial = model.init(key_source, source_data["inputs"]).params
    source, _ = fit(model, initial, source_data, epochs)
    fresh = model.init(key_target, target_data["inputs"]).params
    start, report = transforms.transfer(source, fresh)
    tuned, losses = fit(model, start, target_data, epochs)
    return Example(source, start, tuned, report, losses)


def fit(
    model: linen.Linen, params: Params, data: dict[str, Array], epochs: int
) -> tuple[Params, Array]:
    """SGD on the mean squared error, with the full set as one batch; losses, `[epochs]`."""
    tx = optax.sgd(RATE)
    step = train.make_step(model.apply, squared_error, {"mse": 1.0}, tx)
    state = train.init_state(params, tx, key=jax.random.key(2))
    indices = jnp.arange(len(data["labels"]), dtype=jnp.int32)
    index = jnp.broadcast_to(indices[None], (epochs, len(indices)))
    state, metrics = train.jit_epoch(step)(state, data, index)
    return state.params, train.values(metrics)["mse"]


def squared_error(inputs: Inputs) -> dict[str, Array]:
    """One squared error per example."""
    difference = inputs.student["logits"] - inputs.batch["labels"]
    return {"mse": jnp.sum(jnp.square(difference), axis=-1)}
