"""Mean teachers: the average, batch statistics, the loop."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, train
from kdtl_jax.run import checkpoint, data, loop
from kdtl_jax.train import mean_teachers

pytestmark = pytest.mark.usefixtures("standard_promotion")

B, C = 4, 5
LABELS = jnp.asarray([0, 4, 2, 2], jnp.int32)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    """Linear, on inputs centered by a running mean where the state has one."""
    if model_state is not None:
        mean = jnp.mean(inputs, axis=0) if train else model_state["mean"]
        inputs = inputs - mean
        if train:
            running = 0.5 * model_state["mean"] + 0.5 * mean
            model_state = {"mean": running, "seen": model_state["seen"] + 1}
    return {"logits": inputs @ params["w"]}, model_state


def terms(inputs: Any) -> dict[str, jax.Array]:
    student = inputs.student["logits"]
    hard = optax.softmax_cross_entropy_with_integer_labels(student, inputs.batch["labels"])
    return {"task": hard, "mean": losses.mse(student, inputs.teacher["logits"])}


TX = optax.sgd(0.5)
BARE = train.make_step(model, terms, {"task": 1.0, "mean": 1.0}, TX, teacher=model)
STEP = mean_teachers.follow(BARE, decay=mean_teachers.ema_decay(0.6))
STATISTICS = {"mean": jnp.zeros(6), "seen": jnp.zeros((), jnp.int32)}


def start(model_state: Any = None) -> train.TrainState:
    state = train.init_state(
        {"w": normal(6, C)}, TX, key=jax.random.key(0), model_state=model_state, memory=jnp.ones(2)
    )
    return mean_teachers.begin(state)


def test_the_decay_ramps_to_its_value() -> None:
    decay = mean_teachers.ema_decay(0.9)
    ramp = [float(decay(jnp.int32(i))) for i in (0, 1, 3, 1000)]
    np.testing.assert_allclose(ramp, [0, 0.5, 0.75, 0.9], rtol=1e-6)


def test_the_ramp_makes_a_plain_mean_first() -> None:
    update, decay = mean_teachers.ema_update, mean_teachers.ema_decay()
    teacher, seen = {"w": jnp.full(2, 100.0)}, []
    for step in range(5):
        student = {"w": normal(2, seed=step)}
        seen.append(student["w"])
        teacher = update(teacher, student, jnp.int32(step), decay=decay)
        np.testing.assert_allclose(teacher["w"], np.mean(seen, 0), rtol=1e-4, atol=1e-5)
    fixed = update(teacher, {"w": jnp.zeros(2)}, jnp.int32(9), decay=0.75)
    np.testing.assert_allclose(fixed["w"], 0.75 * teacher["w"], rtol=1e-6)


@pytest.mark.parametrize("statistics", [None, STATISTICS], ids=["bare", "batch statistics"])
def test_a_mean_teacher_follows_its_student_in_one_compilation(statistics: Any) -> None:
    traces = []

    def counted(state: train.TrainState, batch: Any, teacher_params: Any = None) -> Any:
        traces.append(0)
        return STEP(state, batch)

    step, state = train.jit_step(counted), start(statistics)
    params, running = np.asarray(state.params["w"]), np.zeros(6)
    for i, decay in enumerate((0.0, 0.5, 0.6)):
        state, _ = step(state, {"inputs": normal(B, 6, seed=i), "labels": LABELS})
        params = decay * params + (1 - decay) * np.asarray(state.params["w"])
        teacher = state.memory.teacher
        np.testing.assert_allclose(teacher.params["w"], params, rtol=1e-5, atol=1e-6)
        if statistics is not None:
            own = state.model_state
            running = decay * running + (1 - decay) * np.asarray(own["mean"])
            np.testing.assert_allclose(teacher.model_state["mean"], running, rtol=1e-5, atol=1e-6)
            assert int(teacher.model_state["seen"]) == int(own["seen"]) == i + 1
    np.testing.assert_array_equal(state.memory.memory, jnp.ones(2))
    assert len(traces) == 1


def test_the_teachers_outputs_are_those_of_the_average() -> None:
    state = start(STATISTICS)
    average = {"mean": normal(6, seed=3), "seen": jnp.int32(0)}
    held = state.memory._replace(teacher=state.memory.teacher._replace(model_state=average))
    batch = {"inputs": normal(B, 6), "labels": LABELS}
    _, metrics = jax.jit(STEP)(state._replace(memory=held), batch)
    student, _ = model(state.params, STATISTICS, batch["inputs"], train=True)
    teacher, _ = model(state.params, average, batch["inputs"])
    want = jnp.mean(losses.mse(student["logits"], teacher["logits"]))
    np.testing.assert_allclose(metrics["mean"].value(), want, rtol=1e-5)


def test_a_run_logs_saves_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    arrays = {"inputs": normal(8, 6), "labels": jnp.tile(LABELS, 2)}
    source = data.resident(arrays, 4, key=jax.random.key(1))
    straight = loop.run(STEP, start(STATISTICS), source, steps=5)
    lines: list[Any] = []
    with checkpoint.open_folder(tmp_path) as folder:

        def save(step: int, state: train.TrainState, meta: dict[str, Any]) -> None:
            checkpoint.save(folder, step, state, meta)

        loop.run(STEP, start(STATISTICS), source, steps=3, save=save)
    result = checkpoint.restore(tmp_path, start(STATISTICS))
    again = loop.run(
        STEP, result.state, source, steps=5, meta=result.meta, log=lines.append, log_every=5
    )
    for a, b in zip(
        jax.tree.leaves((again.state.params, again.state.memory)),
        jax.tree.leaves((straight.state.params, straight.state.memory)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert {"task", "mean", "loss"} < lines[-1].keys()


def test_misuse_is_told() -> None:
    state, batch = start(), {"inputs": normal(B, 6), "labels": LABELS}
    with pytest.raises(ValueError, match=r"Start from begin\(init_state"):
        jax.eval_shape(STEP, state._replace(memory=None), batch)
    with pytest.raises(ValueError, match="leave teacher_params out"):
        jax.eval_shape(STEP, state, batch, state.params)
    with pytest.raises(ValueError, match="decay"):
        mean_teachers.ema_decay(1.5)


def test_half_precision_is_averaged_in_float32() -> None:
    """In bfloat16 a step of .001 rounds to none: the teacher stood still."""
    tx = optax.sgd(0.0)
    step = train.make_step(model, terms, {"task": 1.0, "mean": 1.0}, tx, teacher=model)
    state = train.init_state({"w": jnp.ones((2, C), jnp.bfloat16)}, tx, key=jax.random.key(0))
    state = mean_teachers.begin(state)
    state = state._replace(params={"w": jnp.full((2, C), 2, jnp.bfloat16)})
    batch = {"inputs": normal(B, 2), "labels": LABELS}
    after, _ = mean_teachers.follow(step, decay=0.999)(state, batch)
    np.testing.assert_allclose(after.memory.teacher.params["w"], 1.001, rtol=1e-6)


@pytest.mark.parametrize("guard", ["loss scaling", "apply_if_finite"])
def test_a_teacher_stays_in_a_step_that_is_skipped(guard: str) -> None:
    sgd = optax.sgd(0.1)
    tx = train.precision.loss_scaling(sgd) if "loss" in guard else optax.apply_if_finite(sgd, 3)
    step = train.make_step(model, terms, {"task": 1.0, "mean": 1.0}, tx, teacher=model)
    step = jax.jit(mean_teachers.follow(step, decay=0.9))
    batch = {"inputs": normal(B, 2), "labels": LABELS}
    state = train.init_state({"w": jnp.ones((2, C))}, tx, key=jax.random.key(0))
    first, _ = step(mean_teachers.begin(state), batch)
    skipped, _ = step(first, batch | {"inputs": batch["inputs"].at[0].set(jnp.inf)})
    third, _ = step(skipped, batch)
    weights = [s.memory.teacher.params["w"] for s in (first, skipped, third)]
    np.testing.assert_array_equal(weights[1], weights[0])
    assert not np.array_equal(weights[2], weights[1])
