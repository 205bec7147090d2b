"""DOT: two momenta, on the same step as everything else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, objective, train
from kdtl_jax._types import Variables
from kdtl_jax.run import data, loop
from kdtl_jax.train import dot, precision

pytestmark = pytest.mark.usefixtures("standard_promotion")

B, C = 4, 3


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def linear(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    return {"logits": inputs @ params["w"]}, model_state


def terms(inputs: objective.Inputs) -> dict[str, jax.Array]:
    student, labels = inputs.student["logits"], inputs.batch["labels"]
    return {
        "task": optax.softmax_cross_entropy_with_integer_labels(student, labels),
        "match": losses.mse(student, inputs.teacher["logits"]),
    }


BATCH = {"inputs": normal(B, 5), "labels": jnp.asarray([0, 1, 2, 1], jnp.int32)}
WEIGHTS = {"task": 0.3, "match": 2.0}


def step_of(tx: Any, **options: Any) -> train.Step:
    return train.make_step(linear, terms, WEIGHTS, tx, teacher=linear, **options)


def run(step: Any, tx: Any, steps: int = 3, batch: Any = BATCH) -> tuple[np.ndarray, Any]:
    state = train.init_state({"w": normal(5, C, seed=1)}, tx, key=jax.random.key(0))
    step, metrics = train.jit_step(step), None
    for _ in range(steps):
        state, metrics = step(state, batch, {"w": normal(5, C, seed=2)})
    return np.asarray(state.params["w"]), metrics


DECAY, RATE, DELTA = 0.01, 0.1, 0.05
DOT = optax.chain(
    optax.add_decayed_weights(DECAY),
    dot.scale_by_dot(distill=["match"], delta=DELTA),
    optax.scale(-RATE),
)


def by_hand() -> np.ndarray:
    w = np.asarray(normal(5, C, seed=1), np.float64)
    x, target = (np.asarray(a, np.float64) for a in (BATCH["inputs"], normal(5, C, seed=2)))
    hot, task, match = np.eye(C)[np.asarray(BATCH["labels"])], np.zeros_like(w), np.zeros_like(w)
    for _ in range(3):
        z = x @ w
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        task_gradient = 0.3 * x.T @ (p - hot) / B + DECAY * w
        match_gradient = 2.0 * x.T @ (2 * (z - x @ target) / C) / B
        task = task_gradient + (0.9 - DELTA) * task
        match = match_gradient + (0.9 + DELTA) * match
        w = w - RATE * (task + match)
    return w


PADDED = {
    "inputs": jnp.concatenate([BATCH["inputs"], jnp.full((2, 5), jnp.nan)]),
    "labels": jnp.concatenate([BATCH["labels"], jnp.zeros(2, jnp.int32)]),
    "weights": jnp.asarray([1.0] * B + [0.0] * 2),
}


@pytest.mark.parametrize(
    ("tx", "batch", "options"),
    [
        (DOT, BATCH, {}),
        (DOT, PADDED, {}),
        (DOT, PADDED, {"microbatches": 3}),
        (precision.loss_scaling(DOT, initial=64.0), PADDED, {"microbatches": 2}),
    ],
    ids=["plain", "padded", "microbatches", "loss scaling"],
)
def test_dot_by_its_equations(tx: Any, batch: Any, options: Any) -> None:
    got, metrics = run(step_of(tx, **options), tx, batch=batch)
    assert set(metrics) == {"task", "match", "loss"}
    np.testing.assert_allclose(got, by_hand(), rtol=1e-4, atol=1e-5)


def test_without_delta_dot_is_sgd_with_momentum_on_the_sum() -> None:
    both = optax.chain(dot.scale_by_dot(distill=["match"], delta=0.0), optax.scale(-0.1))
    sgd = optax.sgd(0.1, momentum=0.9)
    ours, a = run(step_of(both), both)
    plain, b = run(step_of(sgd), sgd)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    for name in ("task", "match", "loss"):
        np.testing.assert_allclose(a[name].value(), b[name].value(), rtol=1e-5)


def test_a_dot_step_is_frozen_where_told_and_compiles_once() -> None:
    params, where = {"w": normal(5, C), "v": normal(2)}, "w"
    traces = []

    def counted(inputs: objective.Inputs) -> dict[str, jax.Array]:
        traces.append(0)
        return terms(inputs)

    step = train.make_step(linear, counted, WEIGHTS, DOT, trainable=where)
    state = train.init_state(params, DOT, key=jax.random.key(0), trainable=where)
    batch = {**BATCH, "teacher": {"logits": normal(B, C, seed=3)}}
    jitted = jax.jit(step)
    for _ in range(3):
        state, _ = jitted(state, batch)
    assert len(traces) == 1
    np.testing.assert_array_equal(state.params["v"], params["v"])
    assert not np.array_equal(state.params["w"], params["w"])
    assert len(jax.tree.leaves(state.opt_state)) == 2  # one momentum each, of w alone


def test_dot_runs_in_the_loop_with_its_policy_for_what_is_not_finite() -> None:
    source = data.resident(dict(BATCH), 2, key=jax.random.key(0))
    state = train.init_state({"w": normal(5, C, seed=1)}, DOT, key=jax.random.key(0))
    lines: list[Any] = []
    teacher = Variables({"w": normal(5, C, seed=2)})
    result = loop.run(step_of(DOT), state, source, teacher, steps=4, log=lines.append, log_every=2)
    assert result.step == 4 and {"task", "match", "loss"} < lines[-1].keys()
    state = train.init_state({"w": jnp.full((5, C), jnp.nan)}, DOT, key=jax.random.key(0))
    skipping = jax.jit(loop.skip_nonfinite(step_of(DOT)))
    after, metrics = skipping(state, BATCH, teacher)
    assert float(metrics["skipped"].value()) == 1
    assert not any(leaf.any() for leaf in jax.tree.leaves(after.opt_state))


def test_dot_refuses_what_it_cannot_do() -> None:
    for momentum, delta in ((0.9, 0.1), (0.9, -0.1), (0.1, 0.2)):
        with pytest.raises(ValueError, match="0 <= delta <= momentum"):
            dot.scale_by_dot(distill=["match"], momentum=momentum, delta=delta)
    for none in ([], "match"):
        with pytest.raises(ValueError, match="distill must be names of terms"):
            dot.scale_by_dot(distill=none)
    tx = dot.scale_by_dot(distill=["match"])
    w = normal(2)
    with pytest.raises(ValueError, match="needs distill_gradient="):
        tx.update(w, tx.init(w), w)
    for distill in (["task", "match"], ["kd"]):
        tx = dot.scale_by_dot(distill=distill)
        state = train.init_state({"w": normal(5, C)}, tx, key=jax.random.key(0))
        with pytest.raises(ValueError, match=r"distill must name some of the terms"):
            jax.eval_shape(step_of(tx), state, BATCH, {"w": normal(5, C)})


def test_a_part_of_the_parameters_or_a_second_dot_is_refused() -> None:
    once = dot.scale_by_dot(distill=["match"])
    for tx, message in (
        (optax.masked(once, {"w": False}), "must see every parameter"),
        (optax.flatten(once), "such as optax.flatten"),
        (optax.partition({"a": once, "b": optax.sgd(0.1)}, {"w": "b"}), "must see every parameter"),
        (optax.chain(once, dot.scale_by_dot(distill=["task"])), "is used once"),
    ):
        state = train.init_state({"w": normal(5, C)}, tx, key=jax.random.key(0))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(step_of(tx), state, BATCH, {"w": normal(5, C)})
