"""A small network, its distillation, and its data, for the tests of steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import losses, train, trees
from kdtl_jax._types import Outputs, Params, PyTree
from kdtl_jax.objective import Inputs
from kdtl_jax.train import TrainState

WIDTH, CLASSES = 6, 3


def mlp_init(key: jax.Array, widths: tuple[int, ...]) -> Params:
    layers = {}
    for i, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
        name = "head" if i == len(widths) - 2 else f"layer_{i}"
        kernel = jax.random.normal(jax.random.fold_in(key, i), (n_in, n_out)) / n_in**0.5
        layers[name] = {"kernel": kernel, "bias": jnp.zeros(n_out)}
    return layers


def mlp(
    params: Params,
    model_state: PyTree,
    inputs: Any,
    *,
    key: jax.Array | None = None,
    train: bool = False,
) -> tuple[Outputs, PyTree]:
    x = inputs
    for name in sorted(params.keys() - {"head"}, key=trees.natural_key):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    if train and model_state is not None:
        model_state = {"seen": model_state["seen"] + x.shape[0]}
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return {"logits": logits, "features": x}, model_state


def data(seed: int = 0, size: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "inputs": jnp.asarray(rng.normal(size=(size, WIDTH)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    }


def distill_terms(inputs: Inputs) -> dict[str, jax.Array]:
    student, teacher = inputs.student["logits"], inputs.teacher["logits"]
    labels = inputs.batch["labels"]
    return {
        "task": optax.softmax_cross_entropy_with_integer_labels(student, labels),
        "match": losses.mse(student, teacher),
    }


def task_terms(inputs: Inputs) -> dict[str, jax.Array]:
    labels = inputs.batch["labels"]
    logits = inputs.student["logits"]
    return {"task": optax.softmax_cross_entropy_with_integer_labels(logits, labels)}


WEIGHTS = {"task": 0.1, "match": optax.linear_schedule(0.0, 0.9, 10)}
STUDENT = (WIDTH, 5, CLASSES)
TEACHER = (WIDTH, 8, CLASSES)


def distillation(tx: optax.GradientTransformation | None = None) -> tuple[Any, TrainState, Params]:
    tx = optax.adam(1e-2) if tx is None else tx
    step = train.make_step(mlp, distill_terms, WEIGHTS, tx, teacher=mlp)
    params = mlp_init(jax.random.key(0), STUDENT)
    return step, train.init_state(params, tx, key=jax.random.key(1)), mlp_init(
        jax.random.key(2), TEACHER
    )  # fmt: skip


def assert_equal_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
