"""Steps: compiled once, frozen means frozen, and the transformations compose."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_models import (
    CLASSES,
    STUDENT,
    TEACHER,
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
from kdtl_jax._types import Params, PyTree
from kdtl_jax.objective import Inputs
from kdtl_jax.train import TrainState

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_distillation_learns_and_logs_unweighted_terms() -> None:
    step, state, teacher = distillation()
    step = train.jit_step(step)
    history = []
    for _ in range(100):
        state, metrics = step(state, data(), teacher)
        history.append(train.values(metrics))
    before, after = history[0], history[-1]
    assert set(after) == {"task", "match", "loss"}
    assert float(after["match"]) < 0.2 * float(before["match"])
    assert int(state.step) == 100
    # Step 0 has match weight 0: the loss is a tenth of the task term.
    np.testing.assert_allclose(before["loss"], 0.1 * before["task"], rtol=1e-6)


def test_states_print_counts_in_place_of_arrays() -> None:
    _, state, _ = distillation()
    text = repr(state)
    assert text.startswith("TrainState(step=0, params: ") and len(text) < 300
    assert "Array" not in repr(jax.eval_shape(lambda: state)._replace(step=None))


def test_one_compilation_over_100_steps() -> None:
    traces = []

    def counted(inputs: Inputs) -> dict[str, jax.Array]:
        traces.append(0)
        return distill_terms(inputs)

    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 100))
    step = train.jit_step(train.make_step(mlp, counted, WEIGHTS, tx, teacher=mlp))
    # A weakly typed and a NumPy leaf, as models make them by accident.
    state = train.init_state(
        mlp_init(jax.random.key(0), STUDENT),
        tx,
        key=jax.random.key(1),
        connectors={"scale": jnp.asarray(2.0), "offset": 0.0, "table": np.ones(2, np.float32)},
        model_state={"seen": 0},
        memory={"bank": 1.0},
    )
    teacher, batch = mlp_init(jax.random.key(2), TEACHER), data()
    for _ in range(100):
        before = jax.tree.map(jax.typeof, state)
        state, _ = step(state, batch, teacher)
        assert jax.tree.map(jax.typeof, state) == before
    assert len(traces) == 1
    assert int(state.model_state["seen"]) == 100 * 8


def frozen_run(tx: optax.GradientTransformation, steps: int) -> tuple[Params, TrainState]:
    params = mlp_init(jax.random.key(0), STUDENT)
    where = "head/.*"
    state = train.init_state(params, tx, key=jax.random.key(1), trainable=where)
    step = train.jit_step(train.make_step(mlp, task_terms, {"task": 1.0}, tx, trainable=where))
    for i in range(steps):
        state, _ = step(state, data(i % 4))
    return params, state


CLIPPED = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2, weight_decay=0.1))


def test_frozen_leaves_are_bit_identical_after_100_steps_with_decay_and_clipping() -> None:
    params, state = frozen_run(CLIPPED, 100)
    assert_equal_trees(state.params["layer_0"], params["layer_0"])
    moved = jnp.abs(state.params["head"]["kernel"] - params["head"]["kernel"])
    assert float(moved.min()) > 0
    held = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(held) == 2 * 2  # Adam's two moments of the head's two leaves, nothing else


@pytest.mark.parametrize(
    "tx", [CLIPPED, optax.adamw(1e-2, weight_decay=0.1)], ids=["clipped", "unclipped"]
)
def test_a_frozen_step_equals_one_partitioned_by_hand(tx: optax.GradientTransformation) -> None:
    """So the frozen part enters neither the clipping norm nor the decay."""
    params, state = frozen_run(tx, 5)
    head, opt_state = params["head"], tx.init(params["head"])

    @jax.jit
    def by_hand(head: Params, opt_state: PyTree, batch: Any) -> tuple[Params, PyTree]:
        def loss(head: Params) -> jax.Array:
            outputs, _ = mlp({**params, "head": head}, None, batch["inputs"], train=True)
            return jnp.mean(task_terms(Inputs(outputs, {}, batch))["task"])

        updates, opt_state = tx.update(jax.grad(loss)(head), opt_state, head)
        return optax.apply_updates(head, updates), opt_state

    for i in range(5):
        head, opt_state = by_hand(head, opt_state, data(i % 4))
    for a, b in zip(jax.tree.leaves(state.params["head"]), jax.tree.leaves(head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_frozen_layers_cost_no_gradient() -> None:
    tx = optax.sgd(0.1)
    params = mlp_init(jax.random.key(0), (WIDTH,) + (32,) * 8 + (CLASSES,))

    def flops(where: str) -> float:
        step = train.make_step(mlp, task_terms, {"task": 1.0}, tx, trainable=where)
        state = train.init_state(params, tx, key=jax.random.key(1), trainable=where)
        analysis = jax.jit(step).lower(state, data()).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    assert flops("head/.*") <= 0.4 * flops(".*")


def test_the_teacher_is_in_no_backward_pass() -> None:
    step, state, teacher = distillation(optax.sgd(0.1))

    def after(teacher: Params) -> jax.Array:
        new, metrics = step(state, data(), teacher)
        return metrics["match"].value() + jnp.sum(new.params["head"]["kernel"])

    assert all(not g.any() for g in jax.tree.leaves(jax.jit(jax.grad(after))(teacher)))


def test_scan_equals_a_loop() -> None:
    step, state, teacher = distillation()
    batches = {k: v.reshape(4, 2, *v.shape[1:]) for k, v in data().items()}
    looped, one = state, jax.jit(step)
    for i in range(4):
        looped, _ = one(looped, jax.tree.map(lambda x, i=i: x[i], batches), teacher)
    index = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    epoch = jax.jit(train.scan_epoch(step))
    scanned, metrics = epoch(state, data(), index, teacher)
    assert train.values(metrics)["loss"].shape == (4,)
    for a, b in zip(jax.tree.leaves(scanned.params), jax.tree.leaves(looped.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_vmap_over_students_sharing_a_teacher() -> None:
    step, _, teacher = distillation()
    tx = optax.adam(1e-2)

    def start(seed: jax.Array) -> TrainState:
        params = mlp_init(jax.random.key(seed), STUDENT)
        return train.init_state(params, tx, key=jax.random.key(seed))

    states = jax.vmap(start)(jnp.arange(3))
    many, metrics = jax.jit(jax.vmap(step, in_axes=(0, None, None)))(states, data(), teacher)
    assert train.values(metrics)["match"].shape == (3,)
    single, _ = jax.jit(step)(start(jnp.asarray(1)), data(), teacher)
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-6)


def test_grad_through_steps() -> None:
    step, state, teacher = distillation(optax.sgd(0.1))

    def match_after(kernel: jax.Array) -> jax.Array:
        student = state.params
        head = {**student["head"], "kernel": kernel}
        start = state._replace(params={**student, "head": head})
        last, _ = jax.lax.scan(lambda s, _: (step(s, data(), teacher)[0], None), start, length=3)
        return step(last, data(), teacher)[1]["match"].value()

    kernel = state.params["head"]["kernel"]
    slope = jax.jit(jax.grad(match_after))(kernel)
    after = jax.jit(match_after)
    eps = 1e-2 * slope / jnp.linalg.norm(slope)
    expected = (after(kernel + eps) - after(kernel - eps)) / 2
    np.testing.assert_allclose(jnp.sum(slope * eps), expected, rtol=1e-2)


def test_a_donated_state_never_deletes_the_callers_arrays() -> None:
    params = mlp_init(jax.random.key(0), STUDENT)
    tx, key = optax.adam(1e-2), jax.random.key(1)
    memory, model_state = jnp.ones(3, jnp.float32), {"seen": jnp.int32(0)}
    state = train.init_state(params, tx, key=key, memory=memory, model_state=model_state)
    step, _, teacher = distillation(tx)
    batch = data()
    new, _ = train.jit_step(step)(state, batch, teacher)
    given = (params, key, memory, model_state, teacher, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves((given, new)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))  # the donation is real


def test_one_step_transfers_nothing_and_leaks_nothing() -> None:
    step, state, teacher = distillation()
    batch, compiled = data(), jax.jit(step)
    compiled(state, batch, teacher)
    with jax.transfer_guard("disallow"):
        compiled(state, batch, teacher)
    with jax.checking_leaks():
        jax.jit(lambda *args: step(*args))(state, batch, teacher)


def test_mismatched_keys_raise_when_traced() -> None:
    tx = optax.sgd(0.1)
    step = train.make_step(mlp, distill_terms, {"task": 1.0, "mtach": 1.0}, tx, teacher=mlp)
    _, state, teacher = distillation(tx)
    with pytest.raises(
        ValueError, match=r"only in terms: \['match'\], only in weights: \['mtach'\]"
    ):
        step(state, data(), teacher)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"inputs": None}, r"a dict with 'inputs', got the keys \['labels'\]"),
        ({"weights": jnp.ones((8, 1))}, r"'weights' must be \[B\].*got \[8, 1\]"),
    ],
)
def test_a_malformed_batch_is_told(batch: Any, words: str) -> None:
    step, state, teacher = distillation()
    given = {k: v for k, v in {**data(), **batch}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(step, state, given, teacher)


@pytest.mark.parametrize(
    ("terms", "error", "words"),
    [
        (lambda x: jnp.ones(8), TypeError, r"must be a dict \{name: values\}"),
        (lambda x: {"task": jnp.ones(3)}, ValueError, r"'task' must be \[B\].*B = 8.*got \[3\]"),
    ],
)
def test_malformed_terms_are_told(terms: Any, error: type[Exception], words: str) -> None:
    _, state, teacher = distillation(optax.sgd(0.1))
    step = train.make_step(mlp, terms, {"task": 1.0}, optax.sgd(0.1), teacher=mlp)
    with pytest.raises(error, match=words):
        jax.eval_shape(step, state, data(), teacher)


def test_an_optimizer_state_for_other_parameters_is_told() -> None:
    _, state, teacher = distillation()
    tx = optax.adam(1e-2)
    step = train.make_step(mlp, distill_terms, WEIGHTS, tx, teacher=mlp, trainable="head/.*")
    with pytest.raises(ValueError, match="the same optimizer and the same trainable="):
        jax.eval_shape(step, state, data(), teacher)


def test_a_selector_that_matches_nothing_raises() -> None:
    params = mlp_init(jax.random.key(0), STUDENT)
    with pytest.raises(ValueError, match=r"'tail/\.\*' matches no leaf.*head"):
        train.init_state(params, optax.sgd(0.1), key=jax.random.key(1), trainable="tail/.*")
