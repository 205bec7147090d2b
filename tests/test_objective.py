"""Terms, weights and their one reduction."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import objective
from kdtl_jax.objective import Masked, Mean


def f32(*values: float) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def test_per_example_values_are_averaged() -> None:
    mean = objective.reduce("kd", f32(1, 2, 6))
    assert (float(mean.total), float(mean.weight), float(mean.value())) == (9, 3, 3)


def test_tokens_are_averaged_over_positions() -> None:
    values = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    mean = objective.reduce("tokens", values)
    assert (float(mean.total), float(mean.weight)) == (15, 6)
    weighted = objective.reduce("tokens", values, f32(0, 1))
    assert (float(weighted.total), float(weighted.weight)) == (12, 3)


def test_what_is_summed_already_is_passed_on() -> None:
    mean = objective.reduce("chunked", Mean(*f32(6, 4)), f32(0, 1))
    assert (float(mean.total), float(mean.weight), float(mean.value())) == (6, 4, 1.5)
    with pytest.raises(TypeError, match="must be floating point"):
        objective.reduce("chunked", Mean(f32(6)[0], jnp.asarray(4, jnp.int32)))


def test_masked_values_count_where_the_mask_holds() -> None:
    values = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    where = jnp.asarray([[True, False, False], [True, True, False]])
    mean = objective.reduce("tokens", Masked(values, where))
    assert (float(mean.total), float(mean.weight)) == (0 + 3 + 4, 3)
    weighted = objective.reduce("tokens", Masked(values, where), f32(1, 0.5))
    assert (float(weighted.total), float(weighted.weight)) == (3.5, 2)
    nothing = objective.reduce("tokens", Masked(values, jnp.zeros_like(where)))
    assert float(nothing.value()) == 0


def test_a_penalty_counts_once_whatever_the_batch() -> None:
    assert float(objective.reduce("l2", jnp.float32(7)).value()) == 7
    padded = objective.reduce("l2", jnp.float32(7), f32(1, 1, 0))
    assert float(padded.value()) == 7
    two = jax.tree.map(jnp.add, padded, objective.reduce("l2", jnp.float32(7), f32(1)))
    assert float(two.value()) == 7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_padding_may_hold_anything(bad: float) -> None:
    values = f32(1, 3, bad)
    mean = objective.reduce("kd", values, f32(1, 1, 0))
    assert float(mean.value()) == 2
    grad = jax.grad(lambda v: objective.reduce("kd", v, f32(1, 1, 0)).value())(values)
    np.testing.assert_array_equal(grad, [0.5, 0.5, 0])
    masked = Masked(values, jnp.asarray([True, True, False]))
    assert float(objective.reduce("kd", masked).value()) == 2
    grad = jax.grad(lambda v: objective.reduce("kd", Masked(v, masked.where)).value())(values)
    np.testing.assert_array_equal(grad, [0.5, 0.5, 0])


def test_a_batch_of_padding_alone_is_zero() -> None:
    for term in (f32(1, np.nan), jnp.float32(3)):
        mean = objective.reduce("kd", term, f32(0, 0))
        assert float(mean.value()) == 0
        grad = jax.grad(lambda v: objective.reduce("kd", v, f32(0, 0)).value())(term)
        np.testing.assert_array_equal(grad, jnp.zeros_like(term))


def test_half_precision_is_summed_in_float32() -> None:
    mean = objective.reduce("kd", jnp.full((4096,), 0.1, jnp.bfloat16))
    assert mean.total.dtype == jnp.float32
    np.testing.assert_allclose(mean.value(), float(jnp.bfloat16(0.1)), rtol=1e-6)


@hypothesis.given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2**16)
)
def test_microbatches_add_up_to_the_batch(sizes: list[int], seed: int) -> None:
    """Also when they are unequal and weighted, which a mean of means gets wrong."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=sum(sizes)).astype(np.float32)
    weights = rng.choice([0.0, 0.5, 2.0], size=sum(sizes)).astype(np.float32)
    cuts = np.cumsum(sizes)[:-1]
    parts = [
        objective.reduce("kd", jnp.asarray(v), jnp.asarray(w))
        for v, w in zip(np.split(values, cuts), np.split(weights, cuts), strict=True)
    ]
    total = Mean(*(jnp.sum(jnp.stack([p[i] for p in parts])) for i in (0, 1)))
    expected = (values * weights).sum() / max(weights.sum(), 1e-30)
    np.testing.assert_allclose(total.value(), expected, rtol=1e-5, atol=1e-6)


def test_weights_that_cancel_give_zero() -> None:
    assert float(objective.reduce("kd", f32(1, 1), f32(1, -1)).value()) == 0
    assert float(objective.reduce("kd", f32(1, 2), f32(-1, -1)).value()) == 1.5


def test_malformed_terms_raise() -> None:
    with pytest.raises(ValueError, match=r"'kd' must be \[B\].*B = 4"):
        objective.reduce_all({"kd": f32(1, 2, 3)}, batch_size=4)
    with pytest.raises(ValueError, match=r"one batch size.*kd\[3\], weights\[2\]"):
        objective.reduce("kd", f32(1, 2, 3), f32(1, 1))
    with pytest.raises(ValueError, match=r"where must have shape \[3\], got where\[3, 1\]"):
        objective.reduce("kd", Masked(f32(1, 2, 3), jnp.ones((3, 1), bool)))
    with pytest.raises(TypeError, match="where must be bool"):
        objective.reduce("kd", Masked(f32(1, 2, 3), f32(1, 1, 0)))
    with pytest.raises(TypeError, match="accuracy must be floating point, got bool"):
        objective.reduce("accuracy", jnp.ones(3, bool))


def test_terms_and_weights_must_have_the_same_keys() -> None:
    means = objective.reduce_all({"task": f32(1), "kd": f32(2)})
    with pytest.raises(ValueError, match=r"only in terms: \['kd'\], only in weights: \['kl'\]"):
        objective.weighted_sum(means, {"task": jnp.float32(1), "kl": jnp.float32(1)})


def test_weighted_sum_of_schedules_numbers_and_arrays() -> None:
    means = objective.reduce_all({"a": f32(1), "b": f32(10), "c": f32(100)})
    weights: dict[str, Any] = {
        "a": 2,
        "b": jnp.asarray(0.5, jnp.bfloat16),
        "c": optax.linear_schedule(0.0, 1.0, 4),
    }

    def loss(step: jax.Array) -> jax.Array:
        return objective.weighted_sum(means, objective.resolve(weights, step))

    np.testing.assert_allclose(jax.vmap(loss)(jnp.arange(3, dtype=jnp.int32)), [7, 32, 57])


def test_the_gradient_with_respect_to_a_weight_is_the_term() -> None:
    means = objective.reduce_all({"a": f32(1, 3), "b": f32(5)})

    def loss(alpha: jax.Array) -> jax.Array:
        weights = objective.resolve({"a": alpha, "b": 1 - alpha}, jnp.int32(0))
        return objective.weighted_sum(means, weights)

    assert float(jax.grad(loss)(jnp.float32(0.3))) == 2 - 5


@pytest.mark.parametrize(
    "zero", [0, 0.0, np.float32(0), jnp.zeros((), jnp.bfloat16), lambda step: 0.0]
)
def test_a_constant_weight_of_zero_leaves_its_term_out(zero: Any) -> None:
    """Also of the backward pass, where 0 * NaN is NaN; its mean is still there."""

    def loss(x: jax.Array) -> tuple[jax.Array, Any]:
        means = objective.reduce_all({"task": x**2, "broken": x * jnp.nan})
        weights = objective.resolve({"task": 1.0, "broken": zero}, jnp.int32(0))
        return objective.weighted_sum(means, weights), means

    for grad in (jax.grad(loss, has_aux=True), jax.jit(jax.grad(loss, has_aux=True))):
        gradient, means = grad(f32(1, 3))
        np.testing.assert_array_equal(gradient, [1, 3])
        assert np.isnan(means["broken"].value())


def test_a_traced_weight_of_zero_multiplies() -> None:
    """A NaN that reaches the gradient reaches the loss as well, where it is seen."""
    means = objective.reduce_all({"broken": f32(jnp.nan)})

    def loss(step: jax.Array) -> jax.Array:
        weights = objective.resolve({"broken": lambda step: 0.0 * step}, step)
        return objective.weighted_sum(means, weights)

    assert np.isnan(jax.jit(loss)(jnp.float32(1)))


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64() -> None:
    means = objective.reduce_all({"a": jnp.asarray([1.0, 1e-12])})
    loss = objective.weighted_sum(means, objective.resolve({"a": 2.0}, jnp.int32(0)))
    assert loss.dtype == jnp.float64 and float(loss) == 1 + 1e-12


def test_inputs_have_defaults_for_all_but_the_batch() -> None:
    inputs = objective.Inputs({"logits": f32(1)}, {}, {"labels": f32(0)})
    assert inputs.params is None and inputs.memory is None and inputs.key is None


def test_real_examples_are_those_of_a_weight() -> None:
    batch = {"inputs": jnp.ones((3, 2))}
    assert objective.Inputs({}, {}, batch).real is None
    weighted = objective.Inputs({}, {}, batch | {"weights": jnp.asarray([0.5, 0.0, 2.0])})
    np.testing.assert_array_equal(weighted.real, [True, False, True])


def test_the_task_names_its_labels_and_padded_ones_may_be_anything() -> None:
    logits = jnp.asarray([[2.0, 0, 0], [0, 1, 0]])

    def task(labels: Any, **entries: Any) -> jax.Array:
        batch = {"labels": labels, **entries}
        return objective.classification(objective.Inputs({"logits": logits}, {}, batch))["task"]

    for labels, hint in (
        (np.asarray([[0], [1]]), "squeeze"),
        (np.eye(3)[:2], "argmax"),
        (np.asarray([True, False]), "astype"),
        (np.asarray([1, 3]), r"0\.\.2, got 1\.\.3"),
        (np.asarray([0, -100]), "labels != -100"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^labels .*{hint}"):
            task(labels)
    padded = task(np.asarray([0, -100]), weights=jnp.asarray([1.0, 0.0]))
    assert padded[0] == task(np.asarray([0, 1]))[0]
