"""Steps over batches and epochs: keys, memory, caches, padding, evaluation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_models import (
    CLASSES,
    STUDENT,
    WEIGHTS,
    WIDTH,
    assert_equal_trees,
    data,
    distill_terms,
    distillation,
    mlp,
    mlp_init,
    task_terms,
)

from kdtl_jax import train
from kdtl_jax._types import Outputs, Params, PyTree, Variables
from kdtl_jax.objective import Inputs, Mean
from kdtl_jax.train import TrainState

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_keys_differ_by_step_and_by_use() -> None:
    seen = []

    def noisy(
        params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, PyTree]:
        seen.append(jax.random.key_data(key))
        return mlp(params, model_state, inputs)

    def terms(inputs: Inputs) -> dict[str, jax.Array]:
        assert inputs.key is not None
        seen.append(jax.random.key_data(inputs.key))
        return task_terms(inputs)

    tx = optax.sgd(0.0)
    step = train.make_step(noisy, terms, {"task": 1.0}, tx)
    state = train.init_state(mlp_init(jax.random.key(0), STUDENT), tx, key=jax.random.key(1))
    state, _ = step(state, data())
    again, _ = step(state, data())
    assert len({tuple(np.asarray(k)) for k in seen}) == 4
    assert_equal_trees(again.key, state.key)


def test_memory_and_model_state_are_carried() -> None:
    def terms(inputs: Inputs) -> tuple[dict[str, jax.Array], PyTree]:
        return task_terms(inputs), inputs.memory + jnp.mean(inputs.student["features"])

    tx = optax.sgd(0.1)
    step = train.make_step(mlp, terms, {"task": 1.0}, tx)
    state = train.init_state(
        mlp_init(jax.random.key(0), STUDENT), tx, key=jax.random.key(1),
        model_state={"seen": jnp.int32(0)}, memory=jnp.zeros((), jnp.bfloat16),
    )  # fmt: skip
    new, _ = jax.jit(step)(state, data())
    assert int(new.model_state["seen"]) == 8
    assert new.memory.dtype == jnp.bfloat16 and float(new.memory) != 0


def test_cached_teacher_outputs_equal_the_teacher() -> None:
    step, state, teacher = distillation()
    outputs, _ = mlp(teacher, None, data()["inputs"])
    tx = optax.adam(1e-2)
    cached = train.make_step(mlp, distill_terms, WEIGHTS, tx)
    a, _ = jax.jit(step)(state, data(), teacher)
    b, _ = jax.jit(cached)(state, {**data(), "teacher": outputs})
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    c, _ = jax.jit(step)(state, data(), Variables(teacher))
    assert_equal_trees(a, c)


def test_padding_changes_nothing_whatever_it_holds() -> None:
    step, state, teacher = distillation(optax.sgd(0.1))
    plain = data(size=5)
    a, metrics_a = jax.jit(step)(state, plain, teacher)
    stepped = jax.jit(step)
    for filler in (0.0, 1e30, np.nan):
        padded = {
            "inputs": jnp.concatenate([plain["inputs"], jnp.full((3, WIDTH), filler)]),
            "labels": jnp.concatenate([plain["labels"], jnp.zeros(3, jnp.int32)]),
            "weights": jnp.asarray([1.0] * 5 + [0.0] * 3),
        }
        b, metrics_b = stepped(state, padded, teacher)
        for x, y in zip(
            jax.tree.leaves((a.params, train.values(metrics_a))),
            jax.tree.leaves((b.params, train.values(metrics_b))),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_step_computes_in_the_dtype_of_its_state() -> None:
    step, state, teacher = distillation(optax.sgd(0.1))
    half = train.init_state(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params),
        optax.sgd(0.1),
        key=jax.random.key(1),
    )
    new, metrics = jax.jit(step)(half, data(), teacher)
    assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype(jnp.bfloat16)}
    assert metrics["loss"].total.dtype == jnp.float32


def test_evaluation_adds_up_over_unequal_batches() -> None:
    def correct(inputs: Inputs) -> dict[str, jax.Array]:
        hits = jnp.argmax(inputs.student["logits"], -1) == inputs.batch["labels"]
        return {"accuracy": hits.astype(jnp.float32)} | task_terms(inputs)

    evaluate = jax.jit(train.make_eval_step(mlp, correct))
    params, batch = mlp_init(jax.random.key(0), STUDENT), data()
    whole = train.values(evaluate(params, batch))
    parts = [
        evaluate(Variables(params), train.take(batch, i)) for i in (jnp.arange(3), jnp.arange(3, 8))
    ]
    added = train.values(train.add_metrics(*parts))
    for name, value in whole.items():
        np.testing.assert_allclose(added[name], value, rtol=1e-6)
    assert isinstance(parts[0]["accuracy"], Mean)


def test_epoch_index_is_a_permutation_by_key_and_epoch() -> None:
    key = jax.random.key(0)
    first = train.epoch_index(key, 0, 10, 3)
    assert first.shape == (3, 3) and first.dtype == jnp.int32
    assert len(set(np.asarray(first).ravel())) == 9
    assert set(np.asarray(first).ravel()) <= set(range(10))
    np.testing.assert_array_equal(first, train.epoch_index(key, jnp.int32(0), 10, 3))
    assert (np.asarray(first) != np.asarray(train.epoch_index(key, 1, 10, 3))).any()
    for size in (0, 11):
        with pytest.raises(ValueError, match=r"batch_size must lie in 1\.\.10"):
            train.epoch_index(key, 0, 10, size)


def test_take_gathers_every_array_of_a_batch() -> None:
    batch = {**data(), "teacher": {"logits": data()["inputs"]}}
    taken = train.take(batch, jnp.asarray([[1, 3], [0, 0]]))
    assert taken["inputs"].shape == (2, 2, WIDTH)
    np.testing.assert_array_equal(taken["teacher"]["logits"][0, 1], batch["inputs"][3])


def convolving(
    params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[Outputs, PyTree]:
    x = inputs[..., None]
    y = jax.lax.conv_general_dilated(
        x, params["conv"].reshape(3, 1, 1), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return {"logits": y[:, :CLASSES, 0]}, model_state


@pytest.mark.parametrize(
    ("model", "path"), [(mlp, "scan"), (convolving, "steps")], ids=["scan", "steps"]
)
def test_jit_epoch_gives_the_scanned_epoch_on_either_path(model: Any, path: str) -> None:
    tx = optax.sgd(0.1)
    params = mlp_init(jax.random.key(0), STUDENT) if model is mlp else {"conv": jnp.ones(3)}
    step = train.make_step(model, task_terms, {"task": 1.0}, tx)
    index = train.epoch_index(jax.random.key(3), 0, 8, 4)

    def start() -> TrainState:
        return train.init_state(params, tx, key=jax.random.key(1))

    if jax.default_backend() == "cpu":
        assert train.epoch_path(step, start(), data()) == path
    a, metrics_a = train.jit_epoch(step)(start(), data(), index)
    b, metrics_b = jax.jit(train.scan_epoch(step))(start(), data(), index)
    for x, y in zip(
        jax.tree.leaves((a.params, metrics_a)), jax.tree.leaves((b.params, metrics_b)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
