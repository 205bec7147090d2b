"""Batches of a model with batch statistics: only real rows reach them, on every path."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import train
from kdtl_jax.run import data, loop

SIZE, BATCH, STEPS = 10, 4, 7
INPUTS = (np.arange(2 * SIZE, dtype=np.float32) ** 1.5 + 40).reshape(SIZE, 2)
ARRAYS = {"inputs": INPUTS, "labels": (np.arange(SIZE) % 2).astype(np.int32)}


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    """A running mean, and the largest batch so far."""
    if train:
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(inputs, axis=0)
        model_state = {"mean": mean, "rows": jnp.maximum(model_state["rows"], inputs.shape[0])}
    return {"logits": (inputs - model_state["mean"]) * params["w"]}, model_state


def terms(x: Any) -> Any:
    logits, labels = x.student["logits"], x.batch["labels"]
    return {"task": optax.softmax_cross_entropy_with_integer_labels(logits, labels)}


def batches(short: int) -> list[tuple[np.ndarray, np.ndarray]]:
    starts = range(0, SIZE - short, BATCH)
    return [(INPUTS[i : i + BATCH], ARRAYS["labels"][i : i + BATCH]) for i in starts]


def resident(short: int) -> data.Resident:
    return data.resident(ARRAYS, BATCH, key=None, drop_remainder=short > 0)


def streamed(short: int) -> data.Source:
    def read(epoch: int, rows: np.ndarray) -> data.Batch:
        return data.take_rows(ARRAYS, rows)

    return data.stream(read, SIZE, BATCH, key=None, drop_remainder=short > 0)


def iterated(short: int) -> data.Source:
    return data.iterate(batches(short))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("short", [0, 2], ids=["whole", "dropped"])
@pytest.mark.parametrize("make", [resident, streamed, iterated])
def test_batch_statistics_are_those_of_the_real_rows(
    make: Callable[[int], Any], short: int
) -> None:
    tx = optax.sgd(0.01)
    step = train.make_step(model, terms, {"task": 1.0}, tx)
    start = {"mean": jnp.zeros(2), "rows": jnp.zeros((), jnp.int32)}
    state = train.init_state({"w": jnp.ones(2)}, tx, key=jax.random.key(0), model_state=start)
    actual = loop.run(step, state, make(short), steps=STEPS, log_every=2).state.model_state
    each, mean = batches(short), np.zeros(2)
    for i in range(STEPS):
        mean = 0.9 * mean + 0.1 * each[i % len(each)][0].mean(axis=0)
    np.testing.assert_allclose(actual["mean"], mean, rtol=1e-5)
    assert int(actual["rows"]) == BATCH


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", ["resident", "iterated"])
def test_one_row_alone_is_filled_up_and_said(make: str) -> None:
    """A batch of one has no variance: a DataLoader of 9 rows in batches of 4."""
    arrays = {name: x[:9] for name, x in ARRAYS.items()}
    pairs = [(arrays["inputs"][i : i + 4], arrays["labels"][i : i + 4]) for i in (0, 4, 8)]
    resident = data.resident(arrays, 4, key=None, drop_remainder=False)
    source: Any = resident if make == "resident" else data.iterate(pairs)
    tx = optax.sgd(0.01)
    step = train.make_step(model, terms, {"task": 1.0}, tx)

    def begin() -> train.TrainState:
        start = {"mean": jnp.zeros(2), "rows": jnp.zeros((), jnp.int32)}
        return train.init_state({"w": jnp.ones(2)}, tx, key=jax.random.key(0), model_state=start)

    with pytest.warns(UserWarning, match="A last batch of one row"):
        actual = loop.run(step, begin(), source, steps=3).state
    others = [0, 1, 2] if make == "resident" else [5, 6, 7]
    mean = np.zeros(2)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, *others]):
        mean = 0.9 * mean + 0.1 * INPUTS[rows].mean(axis=0)
    np.testing.assert_allclose(actual.model_state["mean"], mean, rtol=1e-5)
    if make == "iterated":  # a run that is resumed at that batch makes the same one
        two = loop.run(step, begin(), source, steps=2).state
        with pytest.warns(UserWarning, match="A last batch of one row"):
            again = loop.run(step, two, source, steps=3).state
        np.testing.assert_array_equal(again.params["w"], actual.params["w"])


def test_unpad_gives_back_what_pad_filled_up() -> None:
    short = {"inputs": INPUTS[:3], "nested": {"x": np.arange(3)}}
    actual = data.unpad(data.pad(short, BATCH))
    assert actual.keys() == short.keys()
    np.testing.assert_array_equal(actual["inputs"], short["inputs"])
    np.testing.assert_array_equal(actual["nested"]["x"], [0, 1, 2])
    weighted = data.pad(short | {"weights": np.array([1, 0.5, 1])}, BATCH)
    assert data.unpad(weighted)["weights"].tolist() == [1, 0.5, 1, 0], "these are the user's own"
    stacked = {"inputs": INPUTS[None, :3], "weights": np.array([[1, 1, 0]])}
    assert data.unpad(stacked).keys() == stacked.keys(), "the weights of several runs"
