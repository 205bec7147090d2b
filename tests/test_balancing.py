"""Gradients term by term, and balancing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import objective
from kdtl_jax.train import balancing

pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_term_gradients_add_up_to_the_gradient_of_the_sum() -> None:
    def loss(w: jax.Array) -> tuple[dict[str, jax.Array], str]:
        return {"a": jnp.sum(w**2), "b": jnp.sum(jnp.sin(w))}, "auxiliary"

    w = normal(3)
    values, gradients, auxiliary = balancing.term_gradients(loss, w)
    assert auxiliary == "auxiliary" and set(values) == {"a", "b"}
    np.testing.assert_allclose(gradients["a"], 2 * w, rtol=1e-6)
    np.testing.assert_allclose(gradients["b"], jnp.cos(w), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_a_term_that_is_nan_leaves_the_gradients_of_the_others(wrap: Any) -> None:
    x = normal(4, 3)

    def terms(params: Any) -> tuple[dict[str, jax.Array], None]:
        h = jnp.tanh(x @ params["w"])
        return {"a": jnp.mean(h**2), "nan": jnp.sum(jnp.sqrt(-1 - h**2)), "b": jnp.sum(h)}, None

    params = {"w": normal(3, 2, seed=1)}
    for run in (balancing.term_gradients, jax.jit(balancing.term_gradients, static_argnums=0)):
        values, gradients, _ = run(wrap(terms), params)
        assert np.isnan(values["nan"]) and np.isnan(gradients["nan"]["w"]).all()
        for name in ("a", "b"):
            want = jax.grad(lambda p, name=name: terms(p)[0][name])(params)["w"]
            np.testing.assert_allclose(gradients[name]["w"], want, rtol=1e-5, atol=1e-7)
    with pytest.raises(TypeError, match="params must be floating point, but 'n' is int32"):
        balancing.term_gradients(terms, {**params, "n": jnp.int32(1)})


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


def test_terms_in_any_unit_are_balanced() -> None:
    terms = {"kd": jnp.asarray([1.0, 3.0]), "hint": jnp.asarray([1e-20, 3e-20])}
    balanced = balancing.balanced(terms, reference="kd")
    np.testing.assert_allclose(balanced["hint"], [1, 3], rtol=1e-5)


def test_the_remainder_goes_to_one_term() -> None:
    assert balancing.remainder({"kd": 0.5, "hint": 0.25}, to="task")["task"] == 0.25
    for weights in ({"kd": 1.5}, {"kd": -0.1}, {"task": 0.1}):
        with pytest.raises(ValueError, match="at most 1"):
            balancing.remainder(weights, to="task")
