"""A published method in three lines, on models of any framework."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from kdtl_jax import methods, train
from kdtl_jax._types import ModelFn, Outputs, Params, Variables
from kdtl_jax.interop import equinox, haiku, linen
from kdtl_jax.interop import nnx as interop_nnx
from kdtl_jax.objective import Inputs

INPUTS = jax.random.normal(jax.random.key(1), (8, 5))
BATCH = {
    "inputs": INPUTS,
    "labels": jnp.arange(8, dtype=jnp.int32) % 3,
    "index": jnp.arange(8, dtype=jnp.int32),
}
Made = tuple[ModelFn, Variables]

pytestmark = pytest.mark.usefixtures("standard_promotion")


class LinenNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        first = nn.relu(nn.Dense(self.width, name="one")(x))
        second = nn.relu(nn.Dense(self.width, name="two")(first))
        return {"f1": first, "f2": second, "logits": nn.Dense(3, name="head")(second)}


def of_linen(width: int) -> Made:
    model = linen.model(LinenNet(width))
    return model.apply, model.init(jax.random.key(width), INPUTS)


class NnxNet(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.one = nnx.Linear(5, width, rngs=rngs)
        self.two = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: Array) -> Outputs:
        first = nnx.relu(self.one(x))
        second = nnx.relu(self.two(first))
        return {"f1": first, "f2": second, "logits": self.head(second)}


def of_nnx(width: int) -> Made:
    model, params, state = interop_nnx.model(NnxNet(width, nnx.Rngs(width)))
    return model, Variables(params, state)


class EquinoxNet(eqx.Module):
    one: eqx.nn.Linear
    two: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int) -> None:
        keys = jax.random.split(jax.random.key(width), 3)
        self.one = eqx.nn.Linear(5, width, key=keys[0])
        self.two = eqx.nn.Linear(width, width, key=keys[1])
        self.head = eqx.nn.Linear(width, 3, key=keys[2])

    def __call__(self, x: Array) -> Outputs:
        first = jax.nn.relu(self.one(x))
        second = jax.nn.relu(self.two(first))
        return {"f1": first, "f2": second, "logits": self.head(second)}


def of_equinox(width: int) -> Made:
    model, params, state = equinox.model(EquinoxNet(width))
    return model, Variables(params, state)


def of_haiku(width: int) -> Made:
    def net(x: Array, train: bool) -> Outputs:
        first = jax.nn.relu(hk.Linear(width, name="one")(x))
        second = jax.nn.relu(hk.Linear(width, name="two")(first))
        return {"f1": first, "f2": second, "logits": hk.Linear(3, name="head")(second)}

    model = haiku.model(net)
    return model.apply, model.init(jax.random.key(width), INPUTS)


def of_functions(width: int) -> Made:
    keys, sizes = jax.random.split(jax.random.key(width), 3), (5, width, width, 3)
    params = {
        name: {"kernel": jax.random.normal(key, (n, m)) / n**0.5}
        for name, key, n, m in zip(("one", "two", "head"), keys, sizes, sizes[1:], strict=False)
    }

    def model(
        params: Params, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, Any]:
        first = jax.nn.relu(inputs @ params["one"]["kernel"])
        second = jax.nn.relu(first @ params["two"]["kernel"])
        return {"f1": first, "f2": second, "logits": second @ params["head"]["kernel"]}, model_state

    return model, Variables(params)


@pytest.mark.parametrize(
    "made", [of_linen, of_nnx, of_equinox, of_haiku, of_functions], ids=lambda made: made.__name__
)
def test_a_method_takes_three_lines(made: Callable[[int], Made]) -> None:
    (student, variables), (teacher, frozen) = made(4), made(6)
    tx = optax.adam(1e-2)

    setup = methods.setup(
        student,
        teacher,
        student_variables=variables,
        teacher_variables=frozen,
        inputs=INPUTS,
        examples=8,
        steps=240,
    )
    method = methods.review(setup)
    step = train.make_step(student, method.terms, method.weights, tx, teacher=teacher)

    state = train.init_state(
        variables.params,
        tx,
        key=jax.random.key(0),
        connectors=method.connectors(jax.random.key(1)),
        model_state=variables.model_state,
        memory=method.memory(jax.random.key(2)),
    )
    run, losses = jax.jit(step), []
    for _ in range(30):
        state, metrics = run(state, BATCH, frozen)
        losses.append(float(metrics["hcl"].value()))
    assert setup.pairs == (("f1", "f1"), ("f2", "f2")) and setup.last == ("f2", "f2")
    assert losses[-1] < 0.7 * losses[0]
    assert method.weights.keys() == {"task", "hcl"}


@pytest.mark.parametrize("made", [of_linen, of_nnx, of_equinox, of_haiku, of_functions])
def test_heads_and_derivatives_of_every_framework(made: Callable[[int], Made]) -> None:
    (student, variables), (teacher, frozen) = made(4), made(6)
    setup = methods.setup(
        student,
        teacher,
        student_variables=variables,
        teacher_variables=frozen,
        inputs=INPUTS,
        examples=8,
        steps=240,
    )
    assert setup.teacher_head is not None and setup.student_head is not None
    outputs, _ = teacher(*frozen, INPUTS)
    actual = outputs["f2"] @ setup.teacher_head.kernel
    actual = actual if setup.teacher_head.bias is None else actual + setup.teacher_head.bias
    np.testing.assert_allclose(actual, outputs["logits"], rtol=1e-5, atol=1e-6)
    assert setup.student_head(variables.params).kernel.shape == (4, 3)
    # Derivatives run the networks once more, with whatever model state they have.
    jacobian = methods.jacobian(setup)
    inputs = Inputs(
        student(*variables, INPUTS)[0], outputs, BATCH, variables.params, key=jax.random.key(0)
    )
    terms = jax.eval_shape(lambda x: jacobian.terms(x._replace(step=jnp.int32(0))), inputs)
    assert terms["jacobian"].shape == (8,)
