"""Keys are consumed once: steps, epochs, sweeps and online teachers under JAX's own check."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, train
from kdtl_jax.train import mean_teachers, online, sweep

pytestmark = pytest.mark.usefixtures("standard_promotion", "checked")

DATA = {
    "inputs": jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32),
    "labels": jnp.asarray([0, 1] * 4, jnp.int32),
}


@pytest.fixture
def checked() -> Iterator[None]:
    with jax.debug_key_reuse(True):
        yield


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    if train:
        inputs = inputs * jax.random.bernoulli(key, 0.5, inputs.shape)
    return {"logits": inputs @ params["w"]}, model_state


def terms(x: Any) -> dict[str, jax.Array]:
    student = x.student["logits"] + jax.random.normal(x.key, x.student["logits"].shape)
    return {"match": losses.last_axis_mse(student, x.teacher["logits"])}


TX = optax.sgd(0.1)
TEACHER = {"w": jnp.ones((3, 2))}


def start(key: Any) -> train.TrainState:
    init, steps = jax.random.split(key)
    return train.init_state({"w": jax.random.normal(init, (3, 2))}, TX, key=steps)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_steps_and_epochs(microbatches: int) -> None:
    step = train.make_step(
        model, terms, {"match": 1.0}, TX, teacher=model, microbatches=microbatches
    )
    state, order = start(jax.random.key(0)), jax.random.key(1)
    for epoch in range(2):
        index = train.epoch_index(order, epoch, 8, 4)
        state, _ = jax.jit(train.scan_epoch(step))(state, DATA, index, TEACHER)
    state, _ = train.jit_step(step)(state, DATA, TEACHER)
    assert int(state.step) == 5


def test_sweeps_and_online_teachers() -> None:
    step = train.make_step(model, terms, {"match": 1.0}, TX, teacher=model)

    def experiment(point: Any, data: Any) -> Any:
        _, metrics = step(start(jax.random.key(point["seed"])), data, TEACHER)
        return metrics["loss"].value()

    for program in (sweep.vmap, sweep.map, sweep.sequential):
        assert program(experiment)({"seed": jnp.arange(3)}, DATA).shape == (3,)
    following = jax.jit(mean_teachers.follow(step))
    state = mean_teachers.begin(start(jax.random.key(2)))
    for _ in range(2):
        state, _ = following(state, DATA)

    def trainer(teacher: Any, key: Any) -> Any:
        state = start(key)
        return state.params if teacher is None else step(state, DATA, teacher)[0].params

    assert len(online.born_again(trainer, jax.random.key(3), generations=2)) == 3
