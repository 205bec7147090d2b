"""Metrics files that were cut, signals outside the loop, and what the loop asks how often."""

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from kdtl_jax import objective, train
from kdtl_jax.run import data, loop, processes

LINES = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


@pytest.mark.parametrize(
    ("content", "says", "stay"),
    [
        (LINES[:-9], "line 2 cannot be read", [1]),
        (LINES[:-1], None, [1, 2]),  # only the end of the line is missing
        (LINES[:-9] + LINES[:25], "line 2 cannot be read", [1]),  # appended to a cut line
        (LINES + b"[1, 2]\n\x00\xff\n", "line 3 and 1 more cannot be read", [1, 2]),
        (b"", None, []),
        (None, "is missing", []),
    ],
)
@pytest.mark.parametrize("act", ["read", "resume"])
def test_a_cut_file_is_mended_and_said(
    tmp_path: Path, content: bytes | None, says: str | None, stay: list[int], act: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)

    def go() -> list[int]:
        if act == "read":
            return [line["step"] for line in loop.read_metrics(path)]
        with loop.metrics_file(path, resume_at=2) as log:
            log({"step": 3})
        lines = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
        assert lines.pop() == 3
        return lines

    if says is None or (content is None and act == "resume"):
        assert go() == stay
    else:
        with pytest.warns(UserWarning, match=says):
            assert go() == stay


def test_a_metrics_file_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with loop.metrics_file(path) as log:
        for step in (5, 10, 15):
            log({"step": step, "loss": float("nan") if step == 10 else 0.5})
    with path.open("a") as file:
        file.write('{"step": 12, "lo')
    with (
        pytest.warns(UserWarning, match="line 4 cannot be read"),
        loop.metrics_file(path, resume_at=10) as log,
    ):
        log({"step": 15, "loss": 0.25})
    actual = loop.read_metrics(path)
    assert actual == [
        {"step": 5, "loss": 0.5}, {"step": 10, "loss": None}, {"step": 15, "loss": 0.25}
    ]  # fmt: skip


def test_any_value_makes_a_line_of_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    odd = {"step": np.int32(1), "seeds": [float("nan"), 1.0], "array": jnp.asarray([jnp.inf, 2.0]),
           "name": os.fsdecode(b"caf\xe9"), "type": np.dtype("f4")}  # fmt: skip
    with loop.metrics_file(tmp_path / "m") as log:
        log(odd)
    actual = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert actual["seeds"] == [None, 1.0] and actual["array"] == [None, 2.0] and actual["step"] == 1


@settings(max_examples=30)
@given(place=st.integers(0, 60), put=st.binary(max_size=9), cut=st.integers(0, 60))
def test_any_bytes_are_lines_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, place: int, put: bytes, cut: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "m.jsonl"
    path.write_bytes(LINES[:place] + put + LINES[place + cut :])
    with warnings.catch_warnings(action="ignore"):
        first = loop.read_metrics(path)
        with loop.metrics_file(path, stays=lambda line: True) as log:
            log({"step": 9})
    assert loop.read_metrics(path) == [*first, {"step": 9}]


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    return {"logits": inputs @ params["w"]}, model_state


def terms(x: Any) -> Any:
    bent = jnp.sum(x.connectors["c"] * jnp.where(x.step == 3, jnp.nan, 1.0))
    task = optax.softmax_cross_entropy_with_integer_labels(x.student["logits"], x.batch["labels"])
    return {"task": task, "connector": jnp.zeros_like(task) + bent}


TX = optax.sgd(0.1)
ARRAYS = {"inputs": np.eye(8, 3, dtype=np.float32), "labels": np.arange(8, dtype=np.int32) % 2}


def go(steps: int, **options: Any) -> loop.Result:
    step = train.make_step(model, terms, {"task": 1.0, "connector": 1.0}, TX)
    connectors = {"c": jnp.ones(2)}
    state = train.init_state(
        {"w": jnp.ones((3, 2))}, TX, key=jax.random.key(0), connectors=connectors
    )
    source = data.resident(ARRAYS, 4, key=None)
    return loop.run(step, state, source, steps=steps, **options)


@pytest.mark.usefixtures("standard_promotion")
def test_a_connector_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"step 3 gave .* in 'connectors/c', 'loss'"):
        go(6)


@pytest.mark.usefixtures("standard_promotion")
def test_labels_without_a_class_are_not_blamed_on_the_learning_rate() -> None:
    arrays = ARRAYS | {"labels": ARRAYS["labels"] + 1}  # 1 and 2 for two classes
    step = train.make_step(model, objective.classification, {"task": 1.0}, TX)
    state = train.init_state({"w": jnp.ones((3, 2))}, TX, key=jax.random.key(0))
    with pytest.raises(FloatingPointError, match=r"in 'loss'\..* labels outside 0") as error:
        loop.run(step, state, data.resident(arrays, 4, key=None), steps=2)
    assert "learning rate" not in str(error.value)


@pytest.mark.usefixtures("standard_promotion")
def test_moments_that_overflow_are_told() -> None:
    """The weight would stand still in silence: the update of an infinite second moment is 0."""

    def terms(inputs: objective.Inputs) -> dict[str, Any]:
        logits = inputs.student["logits"]
        return {"task": 1e21 * jnp.sum(logits, axis=-1)}

    def run(tx: Any, **options: Any) -> Any:
        step = train.make_step(model, terms, {"task": 1.0}, tx)
        state = train.init_state({"w": jnp.ones((3, 2))}, tx, key=jax.random.key(0))
        return loop.run(step, state, data.resident(ARRAYS, 4, key=None), steps=2, **options)

    with pytest.warns(UserWarning, match=r"step 2: 'opt_state/0/nu/w' of the optimizer is not fin"):
        assert run(optax.adam(0.1)).stopped == "finished"
    run(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
    run(optax.adam(0.1), on_nonfinite=None)
    best = optax.contrib.reduce_on_plateau()  # begins with an infinite loss, on purpose
    run(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1), best))


@pytest.mark.usefixtures("standard_promotion")
def test_a_running_statistic_that_overflows_is_an_update_that_is_not_applied() -> None:
    def step(state: Any, batch: Any, teacher_params: Any = None) -> Any:
        at = state.step
        state = state._replace(step=at + 1, model_state={"var": jnp.where(at == 2, jnp.inf, 1.0)})
        return state, objective.Metrics(("loss",), jnp.ones((1, 2)))

    def start() -> train.TrainState:
        variance = {"var": jnp.ones(())}
        return train.init_state({"w": jnp.ones(2)}, TX, key=jax.random.key(0), model_state=variance)

    source = data.resident(ARRAYS, 4, key=None)
    with pytest.raises(FloatingPointError, match="step 2 gave .* in 'model_state/var'"):
        loop.run(step, start(), source, steps=4)
    result = loop.run(loop.skip_nonfinite(step), start(), source, steps=4)
    assert float(result.state.model_state["var"]) == 1.0


@pytest.mark.usefixtures("standard_promotion")
def test_stopping_is_judged_once_per_evaluation() -> None:
    """Looking at all evaluations at every step would grow with the square of their number."""
    asked: list[int] = []

    def stop(evaluations: list[dict[str, Any]]) -> bool:
        asked.append(len(evaluations))
        return False

    go(20, stop=stop, evaluate=lambda state: {"x": 0.0}, evaluate_every=5, on_nonfinite=None)
    assert asked == [1, 2, 3]


def test_early_stopping_looks_at_every_evaluation_once() -> None:
    """Asked after each of n, it must not take time that grows with n squared."""
    looked: list[float] = []

    class Line(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            looked.append(self[key])
            return super().get(key, default)

    values = [3.0, np.nan, 2.0, 2.0, 2.5, 1.0, 1.5, np.nan, 1.2]
    lines = [Line({"eval/loss": value}) for value in values]
    stop = loop.no_improvement("loss", 3)
    asked = [stop([*lines[: i + 1]]) for i in range(len(lines))]
    assert asked == [False] * 8 + [True]
    np.testing.assert_array_equal(looked, values)
    # Those of another run are judged by themselves.
    assert [stop([*lines[3 : i + 1]]) for i in range(3, 9)] == [False] * 5 + [True]
    assert stop([*lines[:2], *lines[1:2] * 2]) and not stop([])


def test_signals_outside_a_loop_end_one_process_and_are_shared_within() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, processes.signals() as outer:
        with processes.signals() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    with processes.signals() as actual, actual.polled():
        os.kill(os.getpid(), signal.SIGINT)
        assert actual.asked() and actual.number == signal.SIGINT


def test_processes_meet_before_they_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their first collective waits 30 seconds for the others, who may be busy for longer."""
    happened: list[str] = []

    def barrier(*, key: str, timeout_ms: int) -> None:
        assert timeout_ms >= 3_600_000
        happened.append(key)

    def collective(value: Any) -> Any:
        happened.append("collective")
        return np.asarray(value)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: barrier)
    for name in ("broadcast_one_to_all", "process_allgather"):
        monkeypatch.setattr(multihost_utils, name, collective)
    assert processes.broadcast({"a": 1}) == {"a": 1} and processes.largest(3) == 3
    first, *_, second, last = happened
    assert first != second and {first, second}.isdisjoint({"collective"}), happened
    assert last == "collective"


def test_one_process_decides_by_itself() -> None:
    def fail() -> None:
        raise FileExistsError("there")

    assert processes.decide(lambda: {"a": 1}) == {"a": 1} == processes.broadcast({"a": 1})
    assert processes.largest(3) == 3
    with pytest.raises(FileExistsError):
        processes.decide(fail)
    with pytest.raises(ValueError, match="give all of coordinator"):
        processes.initialize(processes=2)
