"""`kdtl sweep`: every path gives the same students; halving, settings, files, and mistakes."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHORT, kdtl, results

from kdtl_jax import datasets
from kdtl_jax._types import Variables
from kdtl_jax.cli import main, parse
from kdtl_jax.datasets import Splits, digits
from kdtl_jax.interop import model_files, networks
from kdtl_jax.models import mlp
from kdtl_jax.recipes import (
    _axes,
    _halving,
    _optimizers,
    _pair,
    _stored_results,
    _sweep_report,
    _training,
    sweep,
)
from kdtl_jax.recipes._optimizers import TrainingSettings
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.train import TrainState
from kdtl_jax.train import sweep as sweeps

BATCH = 16


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    """A method's student, the arrays that its points read, and what they are measured on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        data = digits()
        few = data.subset(np.arange(32))._replace(inputs=data.inputs[:32] / 16)
        example = jnp.zeros((1, 8, 8, 1), jnp.float32)
        student, teacher = (networks.network(mlp(w, 10), example) for w in ((4,), (8,)))
        frozen = teacher.init(jax.random.key(7), example)
        index = np.arange(32, dtype=np.int32)
        arrays = {"inputs": few.inputs, "labels": few.labels, "index": index}
        made = _pair.Pair(
            Splits(few, few, few),
            model_files.About(),
            arrays,
            "mlp:8",
            teacher,
            student,
            None,
            {},
            example,
        )
        setup = _pair.setup(made, frozen, steps=4, batch_size=BATCH)
        entry = _pair.entries()["kd"]
        learner = sweep.student(
            made,
            entry,
            setup,
            lambda point: _optimizers.optimizer(TrainingSettings(), 4, rate=point["learning_rate"]),
        )
        outputs = {"logits": _training.outputs(teacher, frozen, few.inputs)["logits"]}
        shared = sweep.Shared(jax.tree.map(jnp.asarray, {**arrays, "teacher": outputs}), frozen)
        held = {"inputs": jnp.asarray(few.inputs), "labels": jnp.asarray(few.labels)}
    return learner, shared, held


POINTS = {
    "seed": np.array([0, 1, 1], np.int32),
    "temperature": np.array([1.0, 4.0, 4.0], np.float32),
    "task": np.array([0.1, 0.1, 1.0], np.float32),
    "weight": np.array([1.0, 2.0, 1.0], np.float32),
    "learning_rate": np.array([1e-2, 1e-2, 3e-2], np.float32),
    "alpha": np.array([0.5, 1.0, 1.0], np.float32),
}


@pytest.mark.usefixtures("standard_promotion")
def test_every_path_trains_the_same_students(pair: tuple[Any, Any, Any]) -> None:
    learner, shared, held = pair
    how = _training.FitOptions(2, BATCH, checks=2, keep=lambda state: state.params)
    fit = _training.fit(learner, how)
    together = sweeps.vmap(fit)(POINTS, shared, held, held)
    for program in (
        sweeps.map(fit),
        sweeps.vmap(fit, chunk=2),
        _training.fit_one_by_one(learner, how),
    ):
        actual = program(POINTS, shared, held, held)
        np.testing.assert_allclose(actual.losses, together.losses, rtol=1e-4)
        np.testing.assert_allclose(actual.test, together.test, atol=0.04)
        np.testing.assert_allclose(actual.curve, together.curve, atol=0.04)
        for a, b in zip(
            jax.tree.leaves(actual.variables), jax.tree.leaves(together.variables), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert len(np.unique(np.asarray(together.losses[:, -1]))) == 3, "every axis matters"


@pytest.mark.usefixtures("standard_promotion")
def test_two_rungs_train_as_one(pair: tuple[Any, Any, Any]) -> None:
    learner, shared, held = pair
    once = _training.FitOptions(1, BATCH)

    def twice(point: Any, shared: sweep.Shared) -> Any:
        state = learner.start(point, shared)
        for _ in range(2):
            state, *_ = _training.advance(learner, state, point, shared, shared.arrays, held, once)
        return state

    fit = _training.fit(learner, _training.FitOptions(2, BATCH, keep=lambda state: state))
    after = jax.jit(jax.vmap(twice, in_axes=(0, None)))(POINTS, shared)
    straight = sweeps.vmap(fit)(POINTS, shared, held, held).variables
    assert after.step.tolist() == [4, 4, 4]
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(straight.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_a_scaled_start_is_alpha_times_the_teacher(pair: tuple[Any, Any, Any]) -> None:
    learner, shared, _ = pair
    point = {"seed": jnp.int32(0), "alpha": jnp.float32(0.5), "learning_rate": jnp.float32(0.1)}
    start = jax.jit(learner.start)(point, shared).params
    bias = shared.teacher.params["head"]["bias"]
    np.testing.assert_allclose(start["head"]["bias"], 0.5 * bias)
    kernel = np.asarray(shared.teacher.params["dense_0"]["kernel"])
    columns = np.asarray(start["dense_0"]["kernel"]).T
    assert all((np.abs(0.5 * kernel.T - c).max(axis=1) < 1e-7).any() for c in columns)


def settings(*flags: str) -> dict[str, np.ndarray]:
    return _axes.columns_of(parse(["sweep", *flags]))


def test_axes_become_columns() -> None:
    assert settings()["temperature"].tolist() == [1, 2, 4, 8]
    grid = settings("--grid", "temperature=1,4", "lr=1e-3,1e-2,1e-1")
    assert grid["temperature"].tolist() == [1, 1, 1, 4, 4, 4] and len(grid["learning_rate"]) == 6
    repeated = settings("--grid", "temperature=1,4", "--grid", "lr=1e-3,1e-2,1e-1")
    assert all((repeated[axis] == grid[axis]).all() for axis in grid)
    assert _axes.grid("temperature=1,4 lr=1,2") == {"temperature": (1, 4), "learning_rate": (1, 2)}
    drawn = settings("--sample", "16", "--range", "temperature=1..20:log", "kd=0..2")
    assert len(drawn["kd"]) == 16 and drawn["temperature"].max() > 10
    assert (drawn["temperature"] < np.sqrt(20)).sum() in (7, 8, 9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "temperature=0,1"], "temperature must be above 0"),
        (["--grid", "kd=-1,1"], "kd must be 0 or more"),
        (["--grid", "lr=1,2", "learning_rate=3"], "axis 'learning_rate' is given twice"),
        (["--grid", "seed=1,2"], "--seeds N"),
        (["--range", "rate=1..2"], "say how many settings"),
        (["--sample", "4"], "needs --range"),
        (["--sample", "4", "--range", "rate=0..1:log"], "0 < low < high"),
    ],
)
def test_axes_that_make_no_sense_say_why(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "temperature"], "not axis=number"),
        (["--range", "temperature=1"], "low..high"),
        (["--memory", "much"], "500MB or 2GB"),
        (["--methods", "kdd"], "is not a method"),
        (["--halving", "7"], "must divide the 30 epochs"),
        (["--halving", "2", "--early-stopping", "3"], "Give one of them"),
        (["--grid", "kd=" + ",".join("1" * 1100), "task=" + ",".join("1" * 1100)], "more than"),
        (["--devices", "99"], "there are 8 devices"),
    ],
)
def test_mistakes_are_usage_errors(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("standard_promotion")
def test_an_unknown_axis_does_not_hinder_the_next_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["sweep", "--grid", "temprature=1,2", "--out", str(tmp_path / "run")]) == 2
        assert "'temprature' is not an axis of kd" in capsys.readouterr().err


def check_student(run: Path, best: dict[str, Any]) -> None:
    """The best setting's file holds the student whose score is reported; a curve ends in it."""
    record = json.loads((run / "results.json").read_text())
    assert record["data"]["recommended"] == best["file"] == "students/kd.safetensors"
    assert best["file_seed"] == int(np.argmax(best["validation_accuracy"]["values"]))
    model = model_files.load(run / best["file"])
    splits = datasets.read_splits("digits", preprocessing=model.about.preprocessing)
    named = model.predict(splits.test.inputs).argmax(axis=-1)
    expected = best["test_accuracy"]["values"][best["file_seed"]]
    assert np.mean(named == splits.test.labels) == pytest.approx(expected, abs=1e-6)
    assert model_files.about(run / "teacher.safetensors").model == "mlp:32"
    curve = record["curves"]["learning"]["kd"]
    assert len(curve["loss"]) == 4 and curve["epoch"] == [2, 4]
    assert curve["validation_accuracy"][-1] == pytest.approx(best["validation_accuracy"]["mean"])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_sweep_ends_in_table_csv_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["sweep", "--quick", "--teacher", "mlp:32", "--student", "mlp:8", "--halving", "2"]
    axes = ["--grid", "temperature=1,4", "lr=1e-4,3e-2", "--methods", "kd,hint"]
    assert main([*command, *axes, "--path", "together", "--memory", "1GB", "--out", str(out)]) == 0
    record = json.loads((out / "results.json").read_text())
    rows = record["rows"]
    assert len(rows) == 4 and record["best"] == rows[0]
    assert rows[0]["setting"]["learning_rate"] == 0.03 and not rows[0]["stopped_early"]
    assert [row["epochs"] for row in rows] == [4, 4, 2, 2]
    means = [row["validation_accuracy"]["mean"] for row in rows[:2]]
    assert means[0] >= means[1] > 0.5 and len(rows[0]["test_accuracy"]["values"]) == 2
    assert record["programs"][0]["path"] == "together"
    assert any("hint" in note for note in record["notes"])
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 and {line["seed"] for line in lines} == {"0", "1"}
    assert all(0 <= float(line["validation"]) <= 1 for line in lines)
    page = (out / "report.html").read_text()
    marks = re.findall("<title>(.*?)</title>", page)[1:]
    assert sum("validation %" in mark for mark in marks) == 4, "a line per setting"
    assert sum("validation %" not in mark for mark in marks) >= 2, "cells of the heat map"
    assert "http" not in page
    assert "<h2>Confusion</h2>" in page and "Where teacher and student differ" in page
    assert "The best setting of kd" in page and "Recommended by validation: students/kd" in page
    assert "How it was run" in page and record["run"]["grid"]["learning_rate"] == [1e-4, 3e-2]
    assert "validation %" in capsys.readouterr().out
    assert main(["sweep", "--config", str(out / "config.yaml"), "--print-config"]) == 0
    check_student(out, rows[0])


@pytest.mark.slow
def test_halving_is_resumed_after_its_last_rung(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sweep", "--data", file, *SHORT, "--halving", "4", "--grid", "lr=1e-3,3e-2"]
    words += ["--path", "together"]
    assert kdtl(*words, "--out", tmp_path / "whole") == 0
    once = _stored_results.load_or_run

    def interrupted(finished: Any, name: str, make: Any) -> Any:
        def stopped() -> Any:
            made = make()
            if name == "kd_rung_2":
                raise KeyboardInterrupt
            return made

        return once(finished, name, stopped)

    with monkeypatch.context() as patch:
        patch.setattr(_stored_results, "load_or_run", interrupted)
        assert kdtl(*words, "--out", tmp_path / "a") == 130
    kept = [path.name for path in (tmp_path / "a" / "finished").glob("*.npz")]
    assert kept == ["kd_rung_1.npz"]
    trained: list[str] = []

    def watched(finished: Any, name: str, make: Any) -> Any:
        return once(finished, name, lambda: (trained.append(name), make())[1])

    monkeypatch.setattr(_stored_results, "load_or_run", watched)
    assert kdtl(*words, "--out", tmp_path / "a", "--resume") == 0
    assert trained == ["kd", "kd_rung_2"]
    assert [path.name for path in (tmp_path / "a" / "finished").glob("*.npz")] == ["kd.npz"]
    assert results(tmp_path / "a")["rows"] == results(tmp_path / "whole")["rows"]


@pytest.mark.slow
def test_averages_and_early_stops_are_those_of_distill(tmp_path: Path, file: Path) -> None:
    """One student, by every path; its file is the student that was scored, and it is logged."""
    words: list[Any] = ["--data", file, *SHORT, "--seeds", "1", "--ema", "0.5", "--log", "csv"]
    words += ["--early-stopping", "1", "--epochs", "12", "--lr", "0.1"]
    assert kdtl("distill", *words, "--temperature", "2", "--out", tmp_path / "distill") == 0
    expected = next(r for r in results(tmp_path / "distill")["rows"] if r["method"] == "kd")
    assert expected["settings"]["epoch_kept"] < 11
    for path in ("together", "one-by-one"):
        out = tmp_path / path
        assert kdtl("sweep", *words, "--grid", "temperature=2", "--path", path, "--out", out) == 0
        (row,) = results(out)["rows"]
        assert row["epochs"] == expected["settings"]["epoch_kept"]
        for part in ("validation_accuracy", "test_accuracy"):
            assert row[part]["values"] == pytest.approx(expected[part]["values"], abs=1e-6)
        first, second = (
            model_files.load(folder / "students" / "kd.safetensors")
            for folder in (out, tmp_path / "distill")
        )
        x = np.random.default_rng(1).normal(size=(9, 5))
        np.testing.assert_allclose(first.predict(x), second.predict(x), atol=1e-3)
        with (out / "metrics.csv").open() as lines:
            methods = [line["method"] for line in csv.DictReader(lines)]
        assert {*methods} == {"teacher", "kd"} and methods.count("kd") == 24


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_setting_that_diverges_ranks_last(tmp_path: Path) -> None:
    """Where one class is four fifths of the data, the argmax of NaN would be right most often."""
    rng = np.random.default_rng(0)
    y = np.where(rng.random(400) < 0.8, 0, 1 + np.arange(400) % 2)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    out = tmp_path / "run"
    words = "sweep --teacher mlp:8 --student mlp:4 --batch-size 8 --teacher-epochs 1 --epochs 1"
    more = ["--seeds", "2", "--path", "mapped", "--grid", "lr=1e-5,1e30"]
    data = ["--data", str(tmp_path / "data.npz"), "--out", str(out)]
    assert main([*words.split(), *more, *data]) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["best"]["setting"]["learning_rate"] == pytest.approx(1e-5)
    last = record["rows"][-1]
    assert last["setting"]["learning_rate"] == pytest.approx(1e30)
    assert last["validation_accuracy"]["mean"] is None


def test_a_setting_that_diverges_in_its_last_rung_is_shown_as_such(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It came first after the earlier rung; that score must not stand for it."""

    def advance(learner: Any, state: Any, point: Any, *rest: Any, **sizes: Any) -> Any:
        result = jnp.where((point["alpha"] > 0.8) & (state.step == 1), jnp.nan, point["alpha"])
        return state._replace(step=state.step + 1), result[None], jnp.zeros((1,))

    monkeypatch.setattr(_training, "advance", advance)
    learner: Any = SimpleNamespace(
        start=lambda point, shared: TrainState(
            jnp.zeros(()), {}, {}, None, None, None, jax.random.key(0)
        ),
        logits=lambda state, inputs, shared: inputs,
        judge=lambda logits, labels: (labels, jnp.float32(0.5)),
    )
    held = {"inputs": jnp.zeros((2,)), "labels": jnp.zeros((2,))}
    shared: Any = sweep.Shared({}, Variables({}))
    settings: Any = SimpleNamespace(seeds=2, epochs=2, halving=2, batch_size=1)
    finished = _stored_results.open_store(tmp_path, "run", resume=False, kinds=())
    work = sweep.SweepInputs(settings, shared, (held, held), None, print, finished)

    def found(*alphas: float) -> Any:
        columns = {"alpha": np.asarray(alphas, np.float32)}
        made = _halving.run_halving("kd", learner, columns, work, None)
        swept = sweep.Swept("kd", columns, *made, "together", 1, 0.0, {})
        measure = SimpleNamespace(score_name=_sweep_report.report.ACCURACY)
        return _sweep_report.lines(
            SimpleNamespace(swept=[swept], pair=SimpleNamespace(measure=measure))  # pyright: ignore[reportArgumentType]  # a stand-in
        )

    first, stopped, last = found(0.5, 0.9, 0.7)
    assert first.setting["alpha"] == pytest.approx(0.7) and first.complete
    assert stopped.validation.mean == pytest.approx(0.5) and stopped.epochs == (1, 1)
    assert last.setting["alpha"] == pytest.approx(0.9) and np.isnan(last.validation.mean)
    only = found(0.5, 0.9)
    assert only[0].setting["alpha"] == pytest.approx(0.5)
    assert np.isnan(only[1].validation.mean) and only[1].epochs == (2, 2)
    assert only[0].student is None and only[1].student is None and first.student is not None
