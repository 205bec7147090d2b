"""Frozen leaves are free: a head-only step compiles to what partitioning by hand compiles to."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import train, trees
from kdtl_jax._types import Outputs, Params, PyTree
from kdtl_jax.objective import Inputs

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, WIDTH, CLASSES, BATCH = 8, 64, 5, 16


def network() -> Params:
    rng = np.random.default_rng(0)

    def dense(n: int, m: int) -> Params:
        kernel = jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32)
        return {"kernel": kernel, "bias": jnp.zeros(m)}

    body = {f"layer_{i}": dense(WIDTH, WIDTH) for i in range(DEPTH - 1)}
    return {**body, "head": dense(WIDTH, CLASSES)}


def forward(params: Params, x: jax.Array) -> jax.Array:
    for i in range(DEPTH - 1):
        x = jax.nn.relu(x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def model(
    params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[Outputs, PyTree]:
    return {"logits": forward(params, inputs)}, model_state


def terms(inputs: Inputs) -> dict[str, jax.Array]:
    logits, labels = inputs.student["logits"], inputs.batch["labels"]
    return {"task": optax.softmax_cross_entropy_with_integer_labels(logits, labels)}


class Logged(NamedTuple):
    """The last gradient's norm, kept where a metrics hook finds it."""

    norm: jax.Array


def log_norm() -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Logged]:
        return updates, Logged(optax.tree.norm(updates))

    return optax.GradientTransformation(lambda params: Logged(jnp.zeros(())), update)


OPTIMIZERS = {
    "adam": optax.adamw(1e-3, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "norm logged": optax.chain(log_norm(), optax.adamw(1e-3)),
}


def flops(fn: Any, *args: Any) -> float:
    analysis = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def batch() -> dict[str, jax.Array]:
    return {"inputs": jnp.ones((BATCH, WIDTH)), "labels": jnp.zeros(BATCH, jnp.int32)}


def step_flops(tx: optax.GradientTransformation, where: trees.Selector) -> float:
    step = train.make_step(model, terms, {"task": 1.0}, tx, trainable=where)
    state = train.init_state(network(), tx, key=jax.random.key(0), trainable=where)
    return flops(step, state, batch())


@functools.cache
def full_step_flops() -> float:
    """Of the plainest optimizer: the strictest to compare with."""
    return step_flops(OPTIMIZERS["adam"], ".*")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_head_only_step_costs_what_the_hand_partitioned_step_costs(name: str) -> None:
    tx, params = OPTIMIZERS[name], network()
    head, body = params["head"], {k: v for k, v in params.items() if k != "head"}

    def by_hand(head: Params, body: Params, opt_state: PyTree, count: jax.Array, data: Any) -> Any:
        def loss(head: Params) -> jax.Array:
            logits = forward({**body, "head": head}, data["inputs"])
            values = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
            return jnp.sum(values) / values.size

        value, grads = jax.value_and_grad(loss)(head)
        updates, opt_state = tx.update(grads, opt_state, head)
        return optax.apply_updates(head, updates), opt_state, count + 1, value

    expected = flops(by_hand, head, body, tx.init(head), jnp.int32(0), batch())
    assert step_flops(tx, "head/.*") == expected
    assert expected <= 0.4 * full_step_flops()
