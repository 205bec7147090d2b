"""The loop: equal results however a run is cut, exact resumes, honest stops, nothing leaked."""

import gc
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import Variables, train
from kdtl_jax.run import checkpoint, data, loop, sharding

KEY = jax.random.key(3)
SIZE, BATCH = 50, 8


@pytest.fixture(autouse=True)
def relaxed(standard_promotion: None) -> None:
    """The steps call optax."""


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(SIZE, 4)).astype(np.float32)
    return {"inputs": inputs, "labels": rng.integers(0, 3, SIZE).astype(np.int32)}


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    x = jnp.tanh(inputs @ params["w"])
    if train and key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0.0)
        model_state = model_state + jnp.mean(x)
    return {"logits": x @ params["v"]}, model_state


def task(x: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(x.student["logits"], x.batch["labels"])


def terms(x: Any) -> Any:
    return {"task": task(x)}


TX = optax.adam(1e-2)
STEP = train.make_step(model, terms, {"task": 1.0}, TX)


def fresh() -> train.TrainState:
    params = {"w": jnp.eye(4) * 0.5, "v": jnp.ones((4, 3)) * 0.1}
    return train.init_state(params, TX, key=KEY, model_state=jnp.zeros(()))


def resident(**options: Any) -> data.Resident:
    return data.resident(arrays(), BATCH, key=KEY, **options)


def streamed(**options: Any) -> data.Source:
    given = arrays()
    return data.stream(
        lambda epoch, rows: data.take_rows(given, rows), SIZE, BATCH, key=KEY, **options
    )


def bits(state: Any) -> list[bytes]:
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_equals_plain_steps() -> None:
    source, state, step = resident(), fresh(), jax.jit(STEP)
    lines: list[dict[str, Any]] = []
    result = loop.run(STEP, fresh(), source, steps=20, log=lines.append, log_every=10)
    losses = []
    for i in range(20):
        rows = data.epoch_rows(source, jnp.int32(i // 6))[i % 6]
        state, metrics = step(state, train.take(arrays(), rows))
        losses.append(float(metrics["loss"].total))
    for actual, expected in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert (result.step, result.stopped, result.path) == (20, "finished", "scan")
    assert [line["step"] for line in lines] == [10, 20]
    np.testing.assert_allclose(lines[1]["loss"], np.mean(losses[10:]), rtol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_streamed_and_resident_runs_agree(ragged: bool) -> None:
    a = loop.run(STEP, fresh(), resident(drop_remainder=not ragged), steps=15)
    b = loop.run(STEP, fresh(), streamed(drop_remainder=not ragged), steps=15)
    assert (a.path, b.path) == ("scan", "steps")
    for x, y in zip(jax.tree.leaves(a.state.params), jax.tree.leaves(b.state.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def convolving(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    x = jnp.reshape(inputs, (-1, 2, 2, 1))
    x = jax.lax.conv_general_dilated(
        x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return {"logits": jnp.mean(x, axis=(1, 2))}, model_state


def test_convolutions_run_step_by_step_on_cpu() -> None:
    step = train.make_step(convolving, terms, {"task": 1.0}, TX)
    state = train.init_state({"k": jnp.ones((2, 2, 1, 3))}, TX, key=KEY)
    path = "steps" if jax.default_backend() == "cpu" else "scan"
    assert loop.run(step, state, resident(), steps=7).path == path


@pytest.mark.parametrize("make", [resident, partial(resident, drop_remainder=False), streamed])
def test_resume_is_exact(make: Callable[[], Any], tmp_path: Path) -> None:
    measure = train.make_eval_step(model, terms)
    evaluate = loop.evaluation(
        measure,
        lambda: data.in_order(arrays(), 16),
        variables=lambda s: Variables(s.params, s.model_state),
    )

    def go(folder: Path, stop_at: int | None = None) -> list[bytes]:
        state, meta = fresh(), None
        with checkpoint.open_folder(folder / "c") as checkpoints:
            if checkpoint.steps(folder / "c"):
                state, _, meta, *_ = checkpoint.restore(folder / "c", state)
            with loop.metrics_file(folder / "m", resume_at=int(state.step)) as log:

                def kill(line: dict[str, Any]) -> None:
                    log(line)
                    if line["step"] == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)

                result = loop.run(
                    STEP, state, make(), steps=40, log=kill, log_every=6,
                    evaluate=evaluate, evaluate_every=15,
                    save=partial(checkpoint.save, checkpoints), save_every=11, meta=meta,
                )  # fmt: skip
        return bits(result.state)

    expected = go(tmp_path / "straight")
    for stop_at in (6, 15, 24, 36):
        with pytest.raises(SystemExit) as caught:
            go(tmp_path / "cut", stop_at)
        assert caught.value.code == 143
    assert go(tmp_path / "cut") == expected
    assert (tmp_path / "cut/m").read_bytes() == (tmp_path / "straight/m").read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/m").open()]
    assert steps == [6, 12, 15, 18, 24, 30, 30, 36, 40]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    saved: list[tuple[int, list[bytes], Any]] = []

    def save(step: int, state: Any, meta: Any) -> None:
        saved.append((step, bits(state), meta))

    def log(line: dict[str, Any]) -> None:
        if line["step"] == 4:  # a second signal would end the process at once
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as caught:
        loop.run(STEP, fresh(), resident(), steps=10**6, log=log, log_every=4, save=save)
    assert caught.value.code == 128 + number
    assert len(saved) == 1 and saved[0][0] >= 4
    assert signal.getsignal(number) is before
    straight = loop.run(STEP, fresh(), resident(), steps=saved[0][0])
    assert bits(straight.state) == saved[0][1]


def test_a_signal_breaks_off_an_evaluation_and_the_resumed_run_repeats_it() -> None:
    saved: list[tuple[Any, Any]] = []
    lines: list[Any] = []

    def interrupted(state: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    def save(step: int, state: Any, meta: Any) -> None:
        saved.append((jax.tree.map(jnp.copy, state), meta))

    with pytest.raises(SystemExit):
        loop.run(STEP, fresh(), resident(), steps=9, evaluate=interrupted,
                 evaluate_every=3, save=save)  # fmt: skip
    state, meta = saved[0]
    assert int(state.step) == 3 and meta["evaluations"] == []
    loop.run(STEP, state, resident(), steps=9, evaluate=lambda s: {"x": s.step},
             evaluate_every=3, meta=meta, log=lines.append)  # fmt: skip
    assert lines == [{"step": 3, "eval/x": 3}, {"step": 6, "eval/x": 6}, {"step": 9, "eval/x": 9}]


def test_outside_the_main_thread_nothing_is_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    actual: list[Any] = []

    def work() -> None:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            actual.append(loop.run(STEP, fresh(), resident(), steps=3).step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert actual == [3] and signal.getsignal(signal.SIGTERM) is before


def breaking(at: int) -> train.Step:
    """The step, with a gradient of NaN for one leaf at one step."""

    def broken(state: train.TrainState, batch: Any, teacher_params: Any = None) -> Any:
        new, metrics = STEP(state, batch, teacher_params)
        spoil = jnp.where(state.step == at, jnp.nan, 1.0)
        return new._replace(params=new.params | {"v": new.params["v"] * spoil}), metrics

    return broken


@pytest.mark.parametrize("make", [resident, streamed])
def test_nonfinite_updates_raise_and_name_step_and_leaf(make: Callable[[], Any]) -> None:
    saved: list[tuple[int, list[bytes]]] = []
    with pytest.raises(FloatingPointError, match=r"step 11 gave .* not finite in 'v'\."):
        loop.run(breaking(11), fresh(), make(), steps=30, log_every=5,
                 save=lambda step, state, meta: saved.append((step, bits(state))))  # fmt: skip
    good = loop.run(breaking(11), fresh(), make(), steps=11)
    assert saved == [(11, bits(good.state))], "the state before the bad update is saved"


def test_nonfinite_updates_can_stop_the_run() -> None:
    result = loop.run(breaking(11), fresh(), resident(), steps=30, on_nonfinite=loop.stop_nonfinite)
    assert result.step == 11 and result.stopped == (
        "not finite: step 11 gave values that are not finite in 'v'"
    )
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(result.state.params))


def test_nonfinite_updates_can_be_skipped() -> None:
    lines: list[dict[str, Any]] = []
    step = loop.skip_nonfinite(breaking(11))
    result = loop.run(step, fresh(), resident(), steps=20, log=lines.append, log_every=10)
    assert result.step == 20 and result.stopped == "finished"
    assert [line["skipped"] for line in lines] == [0.0, pytest.approx(0.1)]
    assert np.isfinite(lines[1]["loss"])
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(result.state.params))


def test_unchecked_runs_go_on() -> None:
    result = loop.run(breaking(1), fresh(), resident(), steps=4, on_nonfinite=None)
    assert result.step == 4 and bool(jnp.any(jnp.isnan(result.state.params["v"])))


def test_early_stopping() -> None:
    errors = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    result = loop.run(
        STEP, fresh(), resident(), steps=100, evaluate=lambda s: {"error": next(errors)},
        evaluate_every=5, stop=loop.no_improvement("error", patience=2),
    )  # fmt: skip
    assert (result.step, result.stopped) == (20, "early stopping")
    assert [line["eval/error"] for line in result.evaluations] == [3.0, 2.0, 2.5, 2.2]
    rising = loop.no_improvement("a", 1, minimize=False)
    assert not rising([{"eval/a": 1.0}, {"eval/a": 2.0}])
    assert rising([{"eval/a": 1.0}, {"eval/a": 2.0}, {"eval/a": 2.0}])


def test_a_finite_source_ends_the_run_with_an_evaluation_and_a_save() -> None:
    saved: list[int] = []
    batches = [{"inputs": arrays()["inputs"][:n], "labels": arrays()["labels"][:n]} for n in (8, 5)]
    result = loop.run(
        STEP, fresh(), data.iterate(iter(batches)), steps=10,
        evaluate=lambda s: {"step": s.step}, save=lambda step, state, meta: saved.append(step),
    )  # fmt: skip
    assert (result.step, result.stopped, saved) == (2, "data ended", [2])
    assert result.evaluations == [{"step": 2, "eval/step": 2}]
    with pytest.raises(ValueError, match="no batch from step 2 on"):
        loop.run(STEP, result.state, data.iterate(iter(batches)), steps=10)


def test_evaluation_is_exact_over_ragged_batches() -> None:
    measure = train.make_eval_step(model, terms)
    state = fresh()
    evaluate = loop.evaluation(
        measure,
        lambda: data.in_order(arrays(), 16),
        variables=lambda s: Variables(s.params, s.model_state),
    )
    whole = measure(Variables(state.params, state.model_state), arrays())
    assert evaluate(state)["task"] == pytest.approx(float(whole["task"].value()), rel=1e-6)


@pytest.mark.parametrize("make", [resident, streamed])
def test_one_compilation_whatever_the_number_of_steps(make: Callable[[], Any]) -> None:
    traces: list[None] = []

    def counted(x: Any) -> Any:
        traces.append(None)
        return terms(x)

    def count(steps: int) -> int:
        traces.clear()
        step = train.make_step(model, counted, {"task": 1.0}, TX)
        loop.run(step, fresh(), make(), steps=steps, log_every=7,
                 evaluate=lambda s: {}, evaluate_every=10)  # fmt: skip
        return len(traces)

    assert count(150) == count(1) == 1, "a trace serves the shapes, the path and the program"


@pytest.mark.parametrize("where", ["mesh", "one device", "anywhere"])
@pytest.mark.parametrize("make", [resident, streamed])
def test_one_compilation_wherever_the_state_lies(
    make: Callable[[], Any], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes back from a call lies where the first call's arguments lay."""
    state, step, place = fresh(), STEP, jax.device_put
    if where == "one device":
        state = jax.device_put(state, jax.devices()[0])
    elif where == "mesh":
        mesh = sharding.make_mesh(data=2, fsdp=2)
        state = sharding.place(state, mesh)
        step, place = sharding.keep_placement(STEP, state), partial(sharding.place_batch, mesh=mesh)
    with jax.log_compiles():
        loop.run(step, state, make(), steps=20, place=place, log=print, log_every=7)
    assert len([x for x in caplog.messages if re.match(r"Compiling .*advance", x)]) == 1


@pytest.mark.parametrize("make", [resident, partial(resident, drop_remainder=False), streamed])
def test_no_implicit_transfers_and_no_leaks(make: Callable[[], Any]) -> None:
    source, state = make(), fresh()
    with jax.transfer_guard("disallow"), jax.checking_leaks():
        result = loop.run(STEP, state, source, steps=15, log=lambda line: None, log_every=4)
    assert result.step == 15


def watched() -> Iterator[tuple[int, int]]:
    """Live device arrays and resident memory in KiB, when asked.

    What earlier tests left is looked through once and then set aside, so that the count changes
    by what runs here alone and each look is quick.
    """
    gc.collect()
    gc.freeze()
    while True:
        gc.collect()
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else ["VmRSS: 0 kB"]
        memory = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        yield len(jax.live_arrays()), memory


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_steps() -> None:
    seen: list[tuple[int, int]] = []
    watch = watched()
    next(watch)

    def log(line: dict[str, Any]) -> None:
        if line["step"] % 1000 == 0:
            seen.append(next(watch))

    loop.run(STEP, fresh(), resident(), steps=10_000, log=log, log_every=50)
    loop.run(STEP, fresh(), streamed(), steps=10_000, log=log, log_every=50)
    for half in (seen[:10], seen[10:]):
        # What is in flight varies by some; one array kept per logged window would add up to 200.
        assert max(n for n, _ in half) - min(n for n, _ in half) <= 32, half
        assert half[-1][1] - half[1][1] < 8 * 1024, half


@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": -1}, "steps must be at least 0"), ({"steps": 1, "log_every": 0}, "log_every")],
)
def test_senseless_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loop.run(STEP, fresh(), resident(), **options)
