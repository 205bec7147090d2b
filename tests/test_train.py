"""Steps: compiled once, frozen means frozen, and the transformations compose."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, train, trees
from kdtl_jax._types import Outputs, Params, PyTree, Variables
from kdtl_jax.objective import Inputs, Mean
from kdtl_jax.train import TrainState

pytestmark = pytest.mark.usefixtures("standard_promotion")

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
