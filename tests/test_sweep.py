"""Sweeps: every runner and chunk gives the same numbers as one experiment after another."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, train
from kdtl_jax.train import sweep

DATA = {
    "inputs": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32),
    "labels": np.arange(16, dtype=np.int32) % 3,
}
INDEX = np.arange(16, dtype=np.int32).reshape(4, 4)


def _model(
    params: Any, model_state: Any, inputs: jax.Array, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    return {"logits": inputs @ params["kernel"]}, model_state


def _experiment(
    point: dict[str, jax.Array], teacher: Any, data: Any, index: jax.Array
) -> jax.Array:
    key = jax.random.key(point["seed"])
    kernel = jax.random.normal(key, (4, 3))
    tx = optax.sgd(point["rate"])

    def terms(x: Any) -> dict[str, jax.Array]:
        kd = losses.kd_kl(
            x.student["logits"], x.teacher["logits"], temperature=point["temperature"]
        )
        return {"kd": kd}

    step = train.make_step(_model, terms, {"kd": point["weight"]}, tx, teacher=_model)
    state = train.init_state({"kernel": kernel}, tx, key=key)
    _, metrics = train.scan_epoch(step)(state, data, index, teacher)
    return train.values(metrics)["kd"]


POINTS = sweep.grid(seed=range(2), temperature=[1.0, 4.0], weight=[0.5], rate=[0.1, 0.2])


@pytest.fixture(scope="module")
def shared() -> tuple[Any, ...]:
    teacher = {"kernel": jax.random.normal(jax.random.key(9), (4, 3))}
    return teacher, DATA, INDEX


@pytest.fixture(scope="module")
def one_after_another(shared: tuple[Any, ...]) -> np.ndarray:
    with jax.numpy_dtype_promotion("standard"):
        out = sweep.sequential(_experiment)(POINTS, *shared)
    return np.asarray(out)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("program", [sweep.vmap, sweep.map])
@pytest.mark.parametrize("chunk", [None, 3])
def test_programs_and_chunks_agree(
    program: Any,
    chunk: int | None,
    shared: tuple[Any, ...],
    one_after_another: np.ndarray,
) -> None:
    got = program(_experiment, chunk=chunk)(POINTS, *shared)
    assert got.shape == (8, 4)
    np.testing.assert_allclose(got, one_after_another, rtol=1e-4, atol=1e-6)
    assert len(np.unique(np.asarray(got)[:, -1])) == 8, "every point must matter"


def test_grid_is_the_product_last_axis_fastest() -> None:
    points = sweep.grid(seed=[3, 4], rate=[0.1, 0.2, 0.3])
    assert points["seed"].tolist() == [3, 3, 3, 4, 4, 4]
    np.testing.assert_allclose(points["rate"], [0.1, 0.2, 0.3] * 2, rtol=1e-6)
    assert points["seed"].dtype == jnp.int32 and points["rate"].dtype == jnp.float32


def test_bad_sweeps_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="axis 'seed' is empty"):
        sweep.grid(seed=[])
    with pytest.raises(ValueError, match="axis 'x' is empty"):
        sweep.sample(3, x=[])
    with pytest.raises(TypeError, match=r"axis 'a' must be a sequence, got 3.0"):
        sweep.grid(a=3.0)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match=r"'a' must have one shape, got \[\(1,\), \(2,\)\]"):
        sweep.grid(a=[[1], [2, 3]])
    for seed in (2**40, -(2**31) - 1):
        with pytest.raises(ValueError, match="'seed' must fit int32"):
            sweep.grid(seed=[seed])
    for value in (1e39, -1e39, 1e-46):
        with pytest.raises(ValueError, match="values of axis 'a' must fit float32.*got"):
            sweep.grid(a=[1.0, value])
    with pytest.raises(ValueError, match="axis 'a' must fit float32.*got"):
        sweep.sample(3, a=sweep.Range(1, 1e40, log=True))
    with pytest.raises(ValueError, match=r"single values at \['x/0', 'x/1'\].*jnp.asarray"):
        sweep.vmap(lambda p: p["x"])({"x": [1.0, 2.0]})
    with pytest.raises(ValueError, match="loop over them in Python"):
        sweep.grid(method=["kd", "dkd"])
    with pytest.raises(ValueError, match="equally long"):
        sweep.vmap(lambda p: p["a"])({"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        sweep.vmap(lambda p: p["a"], chunk=0)


def test_a_sample_covers_every_axis_evenly() -> None:
    points = sweep.sample(
        64,
        1,
        temperature=sweep.Range(1, 100, log=True),
        weight=sweep.Range(0, 1),
        seed=[3, 7],
    )
    assert {name: len(column) for name, column in points.items()} == dict.fromkeys(points, 64)
    unit = np.log(np.asarray(points["temperature"])) / np.log(100)
    assert (np.histogram(unit, bins=8, range=(0, 1))[0] >= 5).all()
    assert (np.histogram(points["weight"], bins=8, range=(0, 1))[0] >= 5).all()
    assert abs(int((points["seed"] == 3).sum()) - 32) <= 3
    again = sweep.sample(64, 2, temperature=sweep.Range(1, 100, log=True))
    assert not np.allclose(again["temperature"], points["temperature"])
    with pytest.raises(ValueError, match="0 < low < high"):
        sweep.sample(4, rate=sweep.Range(0, 1, log=True))


def test_points_spread_over_devices(
    shared: tuple[Any, ...], one_after_another: np.ndarray, standard_promotion: None
) -> None:
    got = sweep.vmap(_experiment, devices=jax.devices()[:4])(POINTS, *shared)
    np.testing.assert_allclose(got, one_after_another, rtol=1e-4, atol=1e-6)
    assert len(got.sharding.device_set) == 4


def test_the_chunk_follows_the_memory_budget(
    shared: tuple[Any, ...], standard_promotion: None
) -> None:
    def wide(point: dict[str, jax.Array]) -> jax.Array:
        return jnp.cumsum(jnp.full((1000,), point["a"]))

    points = {"a": jnp.arange(50, dtype=jnp.float32)}
    small = sweep.chunk_for_memory(wide, points, bytes=20_000)
    assert 1 <= small <= 5 and sweep.chunk_for_memory(wide, points, bytes=10**9) == 50
    with pytest.raises(ValueError, match="one point needs about"):
        sweep.chunk_for_memory(wide, points, bytes=100)


def test_the_fastest_program_is_measured() -> None:
    quick = sweep.vmap(lambda p: p["a"] * 2)

    def slow(points: sweep.Points, /, *shared: Any) -> Any:
        time.sleep(0.2)
        return quick(points, *shared)

    points = {"a": jnp.arange(8, dtype=jnp.float32)}
    assert sweep.fastest([slow, quick], points) == 1


@pytest.mark.parametrize(
    ("make", "compilations"),
    [
        (lambda f: sweep.vmap(f), 2),  # one per number of points
        (lambda f: sweep.vmap(f, chunk=2), 1),
        (lambda f: sweep.map(f, chunk=2), 1),
        (lambda f: sweep.sequential(f), 1),
    ],
    ids=["vmap", "chunks", "mapped chunks", "sequential"],
)
def test_a_program_compiles_once_and_is_called_often(make: Any, compilations: int) -> None:
    traces = []

    def experiment(point: Any, offset: Any) -> Any:
        traces.append(0)
        return point["a"] + offset

    program = make(experiment)
    for n in (4, 7, 7, 4):
        got = program({"a": np.arange(n, dtype=np.float32)}, jnp.float32(n))
        np.testing.assert_array_equal(got, np.arange(n) + n)
    assert len(traces) == compilations


def test_keys_and_states_are_columns_too() -> None:
    points = {"key": jax.random.split(jax.random.key(0), 5), "state": {"w": jnp.ones((5, 2))}}

    def experiment(point: Any) -> Any:
        return jax.random.normal(point["key"], (2,)) * point["state"]["w"]

    for program in (sweep.vmap(experiment, chunk=2), sweep.map(experiment, chunk=3)):
        want = jax.vmap(lambda k: jax.random.normal(k, (2,)))(points["key"])
        np.testing.assert_allclose(program(points), want, rtol=1e-6)


def test_successive_halving_keeps_the_best() -> None:
    points = {"rate": jnp.asarray([0.1, jnp.nan, 0.4, 0.2, 0.3], jnp.float32)}
    endless = {"rate": jnp.asarray([0.1, jnp.inf, 0.4], jnp.float32)}  # a loss of -inf
    assert sweep.successive_halving(
        lambda p: p["rate"], lambda s, p: s, lambda s, p: s, endless, rungs=2
    ).survivors.tolist() == [2, 0]
    result = sweep.successive_halving(
        lambda p: jnp.zeros(()),
        lambda state, p: state + p["rate"],
        lambda state, p: state,
        points,
        rungs=3,
        keep=0.5,
    )
    assert result.survivors.tolist() == [2, 4]
    np.testing.assert_allclose(result.state, [1.2, 0.9], rtol=1e-6)
    assert np.isfinite(result.scores).sum(axis=1).tolist() == [4, 3, 2]
    by_seed = sweep.successive_halving(
        lambda p: jnp.zeros(()),
        lambda state, p: state + p["rate"],
        lambda state, p: jnp.stack([state, -state / 2]),
        points,
        rungs=2,
        chunk=2,
        devices=jax.devices()[:2],
    )
    assert by_seed.survivors.tolist() == [2, 4, 3] and by_seed.scores.shape == (2, 5, 2)
    with pytest.raises(ValueError, match="keep in"):
        sweep.successive_halving(jnp.sum, jnp.sum, jnp.sum, points, rungs=1, keep=0.0)


def test_halving_goes_on_from_the_rung_that_is_stored() -> None:
    points = {"rate": jnp.asarray([0.1, 0.5, 0.4, 0.2, 0.3], jnp.float32)}
    stored: dict[int, sweep.Halving] = {}
    trained: list[int] = []

    def kept(rung: int, make: Any) -> sweep.Halving:
        if rung not in stored:
            stored[rung] = make()
            trained.append(rung)
        return stored[rung]

    def halved() -> sweep.Halving:
        return sweep.successive_halving(
            lambda p: jnp.zeros(()), lambda state, p: state + p["rate"], lambda state, p: state,
            points, rungs=3, kept=kept,
        )  # fmt: skip

    whole = halved()
    assert trained == [0, 1, 2]
    for rung, left in stored.items():
        reached = np.isfinite(left.scores).any(axis=1)
        assert reached.tolist() == [r <= rung for r in range(3)], "of a rung, not of later ones"
    del stored[2], stored[0]  # a run that was stopped in its last rung; rung 0 is no longer needed
    again = halved()
    assert trained == [0, 1, 2, 2]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_are_flat_python_numbers() -> None:
    points = sweep.grid(seed=[1, 2])
    got = sweep.rows(points, {"loss": jnp.asarray([[3.0, 2.0], [5.0, 4.0]])})
    assert got == [{"seed": 1, "loss": 2.0}, {"seed": 2, "loss": 4.0}]
