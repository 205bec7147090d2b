"""The method table of the command line: every method, one step's terms and gradients."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from kdtl_jax import objective
from kdtl_jax._types import Outputs
from kdtl_jax.cli import methods
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes._method import TASK, Head, Method, Models, Options, Setup, build

BATCH, CLASSES, EXAMPLES, STEPS = 6, 5, 20, 100


def _dense(params: Mapping[str, Array], x: Array) -> Array:
    return x @ params["kernel"] + jnp.broadcast_to(params["bias"], (len(x), len(params["bias"])))


def mlp(params: Mapping[str, Any], x: Array) -> Outputs:
    """Two hidden layers with their values before the activation."""
    outputs = {}
    for i in range(2):
        outputs[f"dense_{i}"] = _dense(params[f"dense_{i}"], x)
        x = outputs[f"hidden_{i}"] = jax.nn.relu(outputs[f"dense_{i}"])
    return {**outputs, "logits": _dense(params["head"], x)}


def mlp_params(seed: int, *sizes: int) -> dict[str, dict[str, Array]]:
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    names = (*(f"dense_{i}" for i in range(len(sizes) - 2)), "head")
    return {
        name: {"kernel": jax.random.normal(key, (n, m)) / n**0.5, "bias": jnp.zeros((m,))}
        for name, key, n, m in zip(names, keys, sizes, sizes[1:], strict=False)
    }


def shapes_of(outputs: Outputs) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()}


class Pair:
    """A student, its teacher, and one batch."""

    def __init__(self) -> None:
        self.student_params = mlp_params(0, 7, 8, 6, CLASSES)
        self.teacher_params = mlp_params(1, 7, 10, 12, CLASSES)
        self.model = mlp
        self.batch = {
            "inputs": jax.random.normal(jax.random.key(2), (BATCH, 7)),
            "labels": jnp.arange(BATCH, dtype=jnp.int32) % CLASSES,
            "index": jnp.arange(BATCH, dtype=jnp.int32) + 3,
        }
        self.teacher = mlp(self.teacher_params, self.batch["inputs"])
        self.setup = Setup(
            classes=CLASSES,
            student=shapes_of(mlp(self.student_params, self.batch["inputs"])),
            teacher=shapes_of(self.teacher),
            pairs=(("hidden_0", "hidden_0"), ("hidden_1", "hidden_1")),
            last=("hidden_1", "hidden_1"),
            examples=EXAMPLES,
            steps=STEPS,
            teacher_head=Head(**self.teacher_params["head"]),
            student_head=lambda params: Head(**params["head"]),
            before_activation={"hidden_0": "dense_0", "hidden_1": "dense_1"},
            models=Models(mlp, lambda x: mlp(self.teacher_params, x)),
        )


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def check_one_step(pair: Any, method: Method) -> None:
    """Finite terms and gradients, the right keys and shapes, and a student that is taught."""
    built = build(method, pair.setup)
    params = {
        "student": pair.student_params,
        "connectors": built.connectors(jax.random.key(3)),
    }
    memory = built.memory(jax.random.key(4))

    def loss(params: Any) -> tuple[Array, Any]:
        inputs = Inputs(
            pair.model(params["student"], pair.batch["inputs"]),
            pair.teacher,
            pair.batch,
            params,
            memory,
            jnp.zeros((), jnp.int32),
            jax.random.key(5),
        )
        returned = built.terms(inputs)
        named, after = returned if isinstance(returned, tuple) else (returned, memory)
        total = sum(objective.reduce(k, v).value() for k, v in named.items())
        return jnp.asarray(total), (named, after)

    grads, (named, after) = jax.grad(loss, has_aux=True)(params)
    assert named.keys() == built.weights.keys() - {TASK}
    for name, values in named.items():
        assert values.shape == (BATCH,), name
        assert jnp.all(jnp.isfinite(values)), name
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads["student"]))
    assert jax.tree.structure(after) == jax.tree.structure(memory)


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: m.name)
def test_a_method_teaches_a_pair_of_mlps(method: Method, pair: Pair) -> None:
    reason = method.applies(pair.setup)
    if reason is None:
        check_one_step(pair, method)
    else:
        assert " " in reason


def test_names_are_unique() -> None:
    names = [method.name for method in methods.METHODS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


def test_rows_have_the_columns() -> None:
    assert all(len(row) == len(methods.COLUMNS) for row in methods.rows())


def test_the_user_overrides_weights_and_is_told_of_terms_that_are_not(pair: Pair) -> None:
    built = build(methods.BY_NAME["kd"], pair.setup, Options(weights={TASK: 0.5}))
    assert built.weights == {TASK: 0.5, "kd": 0.9}
    with pytest.raises(ValueError, match=r"kd: weights are for the terms \['kd', 'task'\].*'dkd'"):
        build(methods.BY_NAME["kd"], pair.setup, Options(weights={"dkd": 1.0}))
