"""Gradients through unrolled training, against central differences in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from kdtl_jax import train, transforms
from kdtl_jax.train import hypergradients

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 4


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    return {"logits": jnp.tanh(inputs @ params["w"]) @ params["head"]}, model_state


def relu_model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    hidden = jax.nn.relu(inputs @ params["w"] + jnp.asarray([0.0, 0.0, -1e3]))  # one dead unit
    return {"logits": hidden @ params["head"]}, model_state


def soft_cross_entropy(student: jax.Array, teacher: jax.Array, t: jax.Array) -> jax.Array:
    """KD up to the teacher's entropy: a tenth of the operations of `kd_kl`, for quick compiles."""
    return -(t**2) * jnp.sum(jax.nn.softmax(teacher / t) * jax.nn.log_softmax(student / t), -1)


def problem(apply: Any, tx: optax.GradientTransformation, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    teacher = {"w": normal(4, 3), "head": normal(3, 2)}
    large = {"w": normal(4, 3), "head": normal(3, 2)}
    batches = {"inputs": normal(STEPS, 5, 4), "labels": jnp.ones((STEPS, 5), jnp.int32)}
    held_out, labels = normal(6, 4), jnp.asarray([0, 1, 0, 1, 1, 0], jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def make_step(hyper: Any) -> train.Step:
        def terms(x: Any) -> dict[str, jax.Array]:
            student = x.student["logits"]
            temperature = jnp.exp(hyper["log_temperature"])
            return {
                "task": cross_entropy(student, x.batch["labels"]),
                "kd": soft_cross_entropy(student, x.teacher["logits"], temperature),
            }

        return train.make_step(apply, terms, hyper["weights"], tx, teacher=apply)

    def init(hyper: Any) -> train.TrainState:
        student = transforms.scale(large, hyper["alpha"])
        return train.init_state(student, tx, key=jax.random.key(0))

    def validation(state: train.TrainState) -> jax.Array:
        outputs, _ = apply(state.params, None, held_out)
        return jnp.mean(cross_entropy(outputs["logits"], labels))

    hyper = {
        "log_temperature": jnp.asarray(0.7, dtype),
        "weights": {"task": jnp.asarray(0.4, dtype), "kd": jnp.asarray(0.6, dtype)},
        "alpha": jnp.asarray(0.8, dtype),
    }
    return {
        "make_step": make_step,
        "init": init,
        "validation": validation,
        "hyper": hyper,
        "teacher_params": teacher,
        "batches": batches,
    }


ADAM = optax.adam(0.05, eps_root=1e-8)


@pytest.mark.usefixtures("x64")
def test_agrees_with_central_differences_in_float64() -> None:
    given = problem(model, ADAM, jnp.float64)
    hyper = given.pop("hyper")

    @jax.jit
    def both(hyper: Any) -> Any:
        return hypergradients.hypergradient(hyper=hyper, **given)

    _, gradient = both(hyper)
    assert jax.tree.structure(gradient) == jax.tree.structure(hyper)
    flat, unflatten = ravel_pytree(hyper)
    slopes, _ = ravel_pytree(gradient)
    eps = 1e-5
    for i in range(flat.size):
        up, down = (both(unflatten(flat.at[i].add(e)))[0] for e in (eps, -eps))
        np.testing.assert_allclose(slopes[i], (up - down) / (2 * eps), rtol=1e-6, atol=1e-9)
    assert np.abs(slopes).min() > 1e-6  # every one of them matters


def test_is_finite_in_float32_and_does_not_depend_on_remat() -> None:
    given = problem(relu_model, ADAM, jnp.float32)
    value, gradient = jax.jit(lambda: hypergradients.hypergradient(**given))()
    other, kept = jax.jit(lambda: hypergradients.hypergradient(**given, remat=False))()
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(kept), strict=True):
        assert a.dtype == jnp.float32 and np.isfinite(a)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_gradient_lost_in_adams_square_root_is_named() -> None:
    given = problem(relu_model, optax.adam(0.05), jnp.float32)
    value, gradient = jax.jit(lambda: hypergradients.hypergradient(**given))()
    assert np.isfinite(value) and np.isnan(gradient["alpha"])  # values are not known under jit
    with pytest.raises(FloatingPointError, match=r"'rate' is nan.*eps_root"):
        hypergradients.hypergradient(
            lambda h: lambda x, batch, target: (x - jnp.sqrt(h["rate"] * batch), None),
            lambda rate: jnp.float32(0),
            lambda x: x**2,
            {"rate": jnp.float32(0.1)},
            jnp.zeros(2),
        )


def test_descending_hypergradients_improves_validation() -> None:
    given = problem(model, ADAM, jnp.float32)
    hyper = given.pop("hyper")
    both = jax.jit(lambda hyper: hypergradients.hypergradient(hyper=hyper, **given))
    first, _ = both(hyper)
    for _ in range(10):
        _, gradient = both(hyper)
        hyper = jax.tree.map(lambda h, g: h - 0.3 * g, hyper, gradient)
    assert both(hyper)[0] < 0.95 * first


def test_any_step_of_the_form_will_do() -> None:
    """Plain gradient descent on (x - b)^2: after one step from 0, x = 2 r b, so dV/dr is known."""

    def make_step(rate: jax.Array) -> Any:
        return lambda x, batch, target: (x - rate * 2 * (x - batch), None)

    value, gradient = hypergradients.hypergradient(
        make_step, lambda rate: jnp.float32(0), lambda x: x**2, jnp.float32(0.1),
        jnp.asarray([3.0]),
    )  # fmt: skip
    np.testing.assert_allclose([value, gradient], [0.36, 2 * 0.6 * 6], rtol=1e-5)


def test_malformed_input_raises() -> None:
    given = problem(model, ADAM, jnp.float32)
    with pytest.raises(TypeError, match="epochs must be floating point"):
        hypergradients.hypergradient(**{**given, "hyper": {"epochs": 3}})
    for batches in ({}, {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, {"a": jnp.ones((0, 1))}):
        with pytest.raises(ValueError, match="number of steps"):
            hypergradients.hypergradient(**{**given, "batches": batches})
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \[4, 3\]"):
        by_leaf = {**given, "validation": lambda state: state.params["w"]}
        hypergradients.hypergradient(**by_leaf)
