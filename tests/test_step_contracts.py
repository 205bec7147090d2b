"""What a step says to slips, and padding that would enter batch statistics."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kdtl_jax import Variables, interop, losses, methods, objective, train
from kdtl_jax.datasets import Dataset, stratified
from kdtl_jax.interop import linen
from kdtl_jax.run import loop
from kdtl_jax.run.data import iterate, resident

pytestmark = pytest.mark.usefixtures("standard_promotion")

TX = optax.sgd(0.1)
BATCH = {
    "inputs": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32) + 5,
    "labels": jnp.asarray([0, 1, 1, 0], jnp.int32),
}
LINEAR = interop.function(lambda params, x: x @ params["w"])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(x))


def step_of(model: Any, **options: Any) -> train.Step:
    return train.make_step(model, objective.classification, {"task": 1.0}, TX, **options)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Net(), "got Net.*interop.linen.model"),
        (linen.model(Net()), "got Linen.*[.]apply"),
        (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "got Linear.*nnx"),
        (lambda params, x: x, r"got <lambda>\(params, x\).*interop.function"),
        (Variables({}), "got Variables"),
    ],
    ids=["linen", "pair", "nnx", "plain", "variables"],
)
def test_what_is_no_model_function_is_told_at_once(model: Any, words: str) -> None:
    for given in ({"model": model}, {"model": LINEAR, "teacher": model}):
        with pytest.raises(TypeError, match=words):
            step_of(**given)


def test_what_a_model_returns_and_what_a_batch_is() -> None:
    def bare(params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False):
        return inputs @ params["w"]

    def unnamed(params: Any, model_state: Any, inputs: Any, **_: Any) -> Any:
        return inputs @ params["w"], model_state

    state = train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))
    for model, got in ((bare, r"an array of shape \[4, 2\]"), (unnamed, "tuple of 2: ")):
        with pytest.raises(TypeError, match=rf"model must return \(outputs, model_state\).*{got}"):
            step_of(model)(state, BATCH)
        with pytest.raises(TypeError, match="the teacher must return"):
            step_of(LINEAR, teacher=model)(state, BATCH, state.params)
        with pytest.raises(TypeError, match="the model must return"):
            train.make_eval_step(model, objective.classification)(state.params, BATCH)
    pair = (BATCH["inputs"], BATCH["labels"])
    with pytest.raises(TypeError, match="a dict with 'inputs', got tuple of 2.*'labels': y"):
        jax.eval_shape(step_of(LINEAR), state, pair)
    with pytest.raises(TypeError, match=r"got Variables.*init_state\(v.params"):
        train.init_state(Variables({"w": jnp.zeros(2)}), TX, key=jax.random.key(0))


def test_a_state_without_the_connectors_of_a_method() -> None:
    def terms(inputs: objective.Inputs) -> Any:
        return {"task": inputs.connectors["pair_0"](inputs.student["logits"])}

    state = train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))
    with pytest.raises(KeyError) as error:
        train.make_step(LINEAR, terms, {"task": 1.0}, TX)(state, BATCH)
    notes = "\n".join(error.value.__notes__)  # JAX adds its own
    assert "no connectors" in notes and "connectors=method.connectors(key)" in notes


def test_a_data_set_is_no_batch() -> None:
    state = train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))
    data = Dataset("few", np.ones((4, 3), np.float32), np.zeros(4, np.int32), 2)
    with pytest.raises(TypeError, match=r"got Dataset.*\{'inputs': data.inputs, 'labels'"):
        step_of(LINEAR)(state, data)  # pyright: ignore[reportArgumentType]  # wrong on purpose


def test_batch_statistics_that_were_left_behind() -> None:
    model = linen.model(Net())
    v = model.init(jax.random.key(0), BATCH["inputs"])
    state = train.init_state(v.params, TX, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"batch statistics.*init_state.*model_state=v.model_s"):
        step_of(model.apply)(state, BATCH)
    own = train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"teacher has a state.*Variables\(params, model_state\)"):
        step_of(LINEAR, teacher=model.apply)(own, BATCH, v.params)
    step_of(LINEAR, teacher=model.apply)(own, BATCH, v)
    evaluate = train.make_eval_step(model.apply, objective.classification)
    with pytest.raises(ValueError, match=r"the step got none. Write Variables\(params, model_"):
        evaluate(v.params, BATCH)


def test_a_donated_state_is_not_used_twice() -> None:
    step = train.jit_step(step_of(LINEAR))
    first = train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))
    second, _ = step(first, BATCH)
    with pytest.raises(RuntimeError, match="already given to a jitted step.*state, metrics = "):
        step(first, BATCH)
    with pytest.raises(TypeError, match="a dict with 'inputs'"):
        step(second, (1, 2))  # pyright: ignore[reportArgumentType]  # wrong on purpose
    step(second, BATCH)


def begun() -> train.TrainState:
    return train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))


@pytest.mark.parametrize("jit", [train.jit_step, train.jit_epoch], ids=["step", "epoch"])
def test_a_loader_may_fill_its_arrays_again_while_a_step_runs(jit: Any) -> None:
    """JAX reads host arrays at suitable addresses where they are, even after the call returns."""
    rows, width = 8192, 512
    memory = np.zeros(4 * rows * width + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 4 * rows * width].view(np.float32).reshape(rows, width)
    model = interop.function(lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"])
    step = train.make_step(
        model, lambda x: {"mean": x.student["logits"].mean(-1)}, {"mean": 1.0}, TX
    )
    run, index = jit(step), () if jit is train.jit_step else (jnp.arange(rows)[None],)

    def updated(inputs: Any, fill: Any) -> Any:
        state = train.init_state({"w": jnp.eye(width)}, TX, key=jax.random.key(0))
        state, _ = run(state, {"inputs": inputs}, *index)
        fill()
        return state.params["w"]

    array[:] = 1
    expected = updated(jnp.array(array), lambda: None)
    assert np.any(expected != jnp.eye(width))
    np.testing.assert_array_equal(updated(array, lambda: array.fill(0)), expected)


def test_a_donated_state_can_be_printed() -> None:
    state = begun()
    train.jit_step(step_of(LINEAR))(state, BATCH)
    assert repr(state).startswith("TrainState(step=deleted, params: 6 numbers")


ROWS = jnp.arange(2, dtype=jnp.int32)[None]  # one batch of two rows


def follow(inputs: objective.Inputs) -> dict[str, Any]:
    return {"task": losses.forward_kl(inputs.student["logits"], inputs.teacher["logits"])}


DISTILL = train.make_step(LINEAR, follow, {"task": 1.0}, TX, teacher=LINEAR)


@pytest.mark.parametrize(
    "run",
    [
        train.jit_step(DISTILL),
        lambda state, batch, teacher: train.jit_epoch(DISTILL)(state, batch, ROWS, teacher),
        lambda state, batch, teacher: loop.run(DISTILL, state, iterate([batch]), teacher, steps=1),
    ],
    ids=["jit_step", "jit_epoch", "loop.run"],
)
def test_what_is_donated_is_named(run: Any) -> None:
    """A teacher of the state's own arrays, one deleted by a step before, an array in two places."""
    state = begun()
    with pytest.raises(RuntimeError, match=r"an array of the state is also in .*teacher_params"):
        run(state, BATCH, state.params)
    run(state, BATCH, jax.tree.map(jnp.copy, state.params))
    with pytest.raises(RuntimeError, match="this state was already given to a jitted step"):
        run(state, BATCH, begun().params)
    with pytest.raises(RuntimeError, match="teacher_params holds arrays of a state that was given"):
        run(begun(), BATCH, state.params)
    state = begun()
    shared = state._replace(memory=state.params["w"])
    with pytest.raises(RuntimeError, match="an array is in the state twice"):
        run(shared, BATCH, begun().params)
    run(jax.tree.map(jnp.copy, shared), BATCH, begun().params)


def test_a_step_that_fails_while_it_runs_says_so_itself() -> None:
    """Its state is deleted by then, though it was given to no step before."""

    def broken(x: Any) -> Any:
        raise RuntimeError("no memory left")

    def terms(inputs: objective.Inputs) -> dict[str, jax.Array]:
        logits = jax.lax.stop_gradient(inputs.student["logits"])
        return {"task": jax.pure_callback(broken, jax.typeof(logits[:, 0]), logits)}

    step = train.jit_step(train.make_step(LINEAR, terms, {"task": 1.0}, TX))
    state = train.init_state({"w": jnp.zeros((3, 2))}, TX, key=jax.random.key(0))
    with pytest.raises(RuntimeError, match="no memory left"):
        jax.block_until_ready(step(state, BATCH))


def normalized() -> tuple[Any, train.TrainState]:
    model = linen.model(Net())
    v = model.init(jax.random.key(0), BATCH["inputs"])
    return model.apply, train.init_state(
        v.params, TX, key=jax.random.key(0), model_state=v.model_state
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_padding_that_would_enter_batch_statistics_is_refused(microbatches: int) -> None:
    model, state = normalized()
    step = step_of(model, microbatches=microbatches)
    padded = {**BATCH, "weights": jnp.asarray([1.0, 1.0, 1.0, 0.0])}
    with pytest.raises(ValueError, match="'batch_stats/BatchNorm_0/mean'.*own shape"):
        jax.jit(step)(state, padded)
    if microbatches == 1:  # values are known where nothing is traced
        with pytest.raises(ValueError, match="rows of weight 0"):
            step(state, padded)
        step(state, {**BATCH, "weights": jnp.asarray([1.0, 2.0, 1.0, 1.0])})
    jax.eval_shape(step, state, BATCH)


def test_frozen_statistics_and_counters_may_be_padded() -> None:
    padded = {**BATCH, "weights": jnp.asarray([1.0, 1.0, 1.0, 0.0])}

    def counting(params: Any, model_state: Any, inputs: Any, **_: Any) -> Any:
        outputs, _ = LINEAR(params, None, inputs)
        return outputs, {"mean": model_state["mean"], "seen": model_state["seen"] + 1}

    state = train.init_state(
        {"w": jnp.zeros((3, 2))},
        TX,
        key=jax.random.key(0),
        model_state={"mean": jnp.zeros(3), "seen": jnp.int32(0)},
    )
    after, _ = jax.jit(step_of(counting))(state, padded)
    assert int(after.model_state["seen"]) == 1


def test_weighted_examples_of_a_model_with_statistics_go_into_the_term() -> None:
    model, state = normalized()
    weights = jnp.asarray([1.0, 2.0, 0.5, 0.0])

    def terms(x: objective.Inputs) -> Any:
        values, w = objective.classification(x)["task"], x.batch["example_weights"]
        return {"task": objective.Mean(jnp.sum(w * values), jnp.sum(w))}

    step = train.make_step(model, terms, {"task": 1.0}, TX)
    _, metrics = jax.jit(step)(state, {**BATCH, "example_weights": weights})
    assert float(metrics["task"].weight) == 3.5


def test_one_message_for_every_other_slip() -> None:
    variables = linen.model(Net()).init(jax.random.key(0), BATCH["inputs"])
    model, w, key = linen.model(Net()).apply, {"w": jnp.zeros((3, 2))}, jax.random.key(0)
    collections = {"params": variables.params, **variables.model_state}
    data: Any = Dataset("", np.zeros((4, 3), np.float32), np.zeros(4, np.int32), 2)
    wrong: list[Any] = [optax.adam, 0, Net(), lambda p, x: x, [BATCH], (1, 2)]
    unmade, no_key, module, plain, listed, pair = wrong
    state = train.init_state(w, TX, key=key)
    taught = step_of(LINEAR, teacher=linen.model(nn.Dense(2)).apply)
    of_setup: Any = {"inputs": BATCH["inputs"], "examples": 4, "steps": 1}
    of_setup |= {f"{name}_variables": Variables(w) for name in ("student", "teacher")}
    for slip, error, words in (
        (lambda: step_of(model)(train.init_state(collections, TX, key=key), BATCH), TypeError,
         r"those alone, got the collections \['batch_stats', 'params'\]"),
        (lambda: taught(state, BATCH), ValueError, "teacher_params got none"),
        (lambda: train.init_state(w, unmade, key=key), TypeError, "Call it, as in"),
        (lambda: train.init_state(w, TX, key=no_key), TypeError, "jax.random.key"),
        (lambda: methods.setup(module, LINEAR, **of_setup), TypeError, "student must be a model"),
        (lambda: methods.setup(LINEAR, plain, **of_setup), TypeError, "teacher must be"),
        (lambda: loop.run(step_of(LINEAR), state, listed, steps=1), TypeError, "data.iterate"),
        (lambda: resident(data, 2, key=key), TypeError, "'inputs': data.inputs"),
        (lambda: resident(pair, 2, key=key), TypeError, "arrays must be a dict"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            slip()
    with pytest.raises(KeyError) as info:
        step_of(LINEAR)(state, {"inputs": BATCH["inputs"]})
    assert info.value.__notes__[0] == "The batch has ['inputs'], the model returns ['logits']."
    assert repr(stratified(data)) == (
        "Splits('', inputs float32[3], 2 classes: train 2, validation 1, test 1)"
    )
