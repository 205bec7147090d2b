"""Gradients term by term, DOT's two momenta, balancing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, objective, train
from kdtl_jax.train import balancing

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
        "match": losses.logit_mse(student, inputs.teacher["logits"]),
    }


BATCH = {"inputs": normal(B, 5), "labels": jnp.asarray([0, 1, 2, 1], jnp.int32)}
WEIGHTS = {"task": 0.3, "match": 2.0}


def test_term_gradients_add_up_to_the_gradient_of_the_sum() -> None:
    def loss(w: jax.Array) -> tuple[dict[str, jax.Array], str]:
        return {"a": jnp.sum(w**2), "b": jnp.sum(jnp.sin(w))}, "auxiliary"

    w = normal(3)
    values, gradients, auxiliary = balancing.term_gradients(loss, w)
    assert auxiliary == "auxiliary" and set(values) == {"a", "b"}
    np.testing.assert_allclose(gradients["a"], 2 * w, rtol=1e-6)
    np.testing.assert_allclose(gradients["b"], jnp.cos(w), rtol=1e-6)


def run(step: Any, tx: Any, steps: int = 3) -> tuple[np.ndarray, Any]:
    params = {"student": {"w": normal(5, C, seed=1)}}
    state = train.init_state(params, tx, key=jax.random.key(0))
    step, metrics = train.jit_step(step), None
    for _ in range(steps):
        state, metrics = step(state, {"w": normal(5, C, seed=2)}, BATCH)
    return np.asarray(state.params["student"]["w"]), metrics


def test_dot_by_its_equations() -> None:
    decay, rate, delta = 0.01, 0.1, 0.05
    tx = optax.chain(
        optax.add_decayed_weights(decay), balancing.scale_by_dot(delta=delta), optax.scale(-rate)
    )
    step = balancing.make_dot_step(linear, linear, terms, WEIGHTS, tx, distill=["match"])
    got, metrics = run(step, tx)
    assert set(metrics) == {"task", "match", "loss"}

    w = np.asarray(normal(5, C, seed=1), np.float64)
    x, target = (np.asarray(a, np.float64) for a in (BATCH["inputs"], normal(5, C, seed=2)))
    hot, task, match = np.eye(C)[np.asarray(BATCH["labels"])], np.zeros_like(w), np.zeros_like(w)
    for _ in range(3):
        z = x @ w
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        task_gradient = 0.3 * x.T @ (p - hot) / B + decay * w
        match_gradient = 2.0 * x.T @ (2 * (z - x @ target) / C) / B
        task = task_gradient + (0.9 - delta) * task
        match = match_gradient + (0.9 + delta) * match
        w = w - rate * (task + match)
    np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5)


def test_without_delta_dot_is_sgd_with_momentum_on_the_sum() -> None:
    dot = optax.chain(balancing.scale_by_dot(delta=0.0), optax.scale(-0.1))
    sgd = optax.sgd(0.1, momentum=0.9)
    ours, a = run(
        balancing.make_dot_step(linear, linear, terms, WEIGHTS, dot, distill=["match"]), dot
    )
    plain, b = run(train.make_distill_step(linear, linear, terms, WEIGHTS, sgd), sgd)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    for name in ("task", "match", "loss"):
        np.testing.assert_allclose(a[name].value(), b[name].value(), rtol=1e-5)


def test_a_dot_step_is_frozen_where_told_and_compiles_once() -> None:
    tx = optax.chain(balancing.scale_by_dot(), optax.scale(-0.1))
    params = {"student": {"w": normal(5, C)}, "connectors": {"v": normal(2)}}
    where = "student/.*"
    traces = []

    def counted(inputs: objective.Inputs) -> dict[str, jax.Array]:
        traces.append(0)
        return terms(inputs)

    step = balancing.make_dot_step(
        linear, None, counted, WEIGHTS, tx, distill=["match"], trainable=where
    )
    state = train.init_state(params, tx, key=jax.random.key(0), trainable=where)
    batch = {**BATCH, "teacher": {"logits": normal(B, C, seed=3)}}
    jitted = jax.jit(step)
    for _ in range(3):
        state, _ = jitted(state, None, batch)
    assert len(traces) == 1
    np.testing.assert_array_equal(state.params["connectors"]["v"], params["connectors"]["v"])
    assert not np.array_equal(state.params["student"]["w"], params["student"]["w"])
    assert len(jax.tree.leaves(state.opt_state)) == 2  # one momentum each, of w alone


def test_dot_refuses_what_it_cannot_do() -> None:
    for momentum, delta in ((0.9, 0.1), (0.9, -0.1), (0.1, 0.2)):
        with pytest.raises(ValueError, match="0 <= delta <= momentum"):
            balancing.scale_by_dot(momentum=momentum, delta=delta)
    tx = balancing.scale_by_dot()
    w = normal(2)
    with pytest.raises(ValueError, match="needs distill_gradient="):
        tx.update(w, tx.init(w))
    state = train.init_state({"student": {"w": normal(5, C)}}, tx, key=jax.random.key(0))
    for distill in (["task", "match"], ["kd"]):
        step = balancing.make_dot_step(linear, linear, terms, WEIGHTS, tx, distill=distill)
        with pytest.raises(ValueError, match=r"distill must name some of the terms"):
            jax.eval_shape(step, state, {"w": normal(5, C)}, BATCH)


def test_balanced_terms_have_one_size_and_their_own_directions() -> None:
    x = jnp.asarray([1.0, 3.0])
    where = jnp.asarray([[True, False], [True, True]])

    def raw(x: jax.Array) -> dict[str, Any]:
        tokens = objective.Masked(jnp.stack([x, x]) * 1e3, where)
        summed = objective.Mean(jnp.sum(x) * 10, jnp.asarray(2.0))
        return {"kd": x, "hint": 100 * x**2, "tokens": tokens, "summed": summed, "zero": 0 * x}

    terms = balancing.balanced(raw(x), reference="kd")
    means = {k: float(v.value()) for k, v in objective.reduce_all(terms).items()}
    np.testing.assert_allclose([means[k] for k in ("kd", "hint", "tokens", "summed")], 2, rtol=1e-5)
    assert means["zero"] == 0

    def hint(x: jax.Array) -> jax.Array:
        values = balancing.balanced(raw(x), reference="kd")["hint"]
        assert isinstance(values, jax.Array)
        return jnp.mean(values)

    np.testing.assert_allclose(jax.grad(hint)(x), 2 / 500 * 100 * x, rtol=1e-5)
    with pytest.raises(ValueError, match="no term 'kl', there are"):
        balancing.balanced(raw(x), reference="kl")


def test_padding_does_not_count_in_the_balance() -> None:
    terms = {"kd": jnp.asarray([1.0, 50.0]), "hint": jnp.asarray([4.0, jnp.nan])}
    weights = jnp.asarray([1.0, 0.0])
    balanced = balancing.balanced(terms, reference="kd", example_weights=weights)
    np.testing.assert_allclose(balanced["hint"][0], 1, rtol=1e-5)


def test_the_remainder_goes_to_one_term() -> None:
    assert balancing.remainder({"kd": 0.5, "hint": 0.25}, to="task")["task"] == 0.25
    for weights in ({"kd": 1.5}, {"kd": -0.1}, {"task": 0.1}):
        with pytest.raises(ValueError, match="at most 1"):
            balancing.remainder(weights, to="task")
