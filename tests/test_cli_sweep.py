"""`kdtl sweep`: every path gives the same students; halving, settings, files, and mistakes."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax.cli import main, parse
from kdtl_jax.cli import sweep as cli_sweep
from kdtl_jax.cli._config import UsageError
from kdtl_jax.cli.sweep import BY_NAME
from kdtl_jax.datasets import Splits, digits
from kdtl_jax.models import mlp
from kdtl_jax.recipes import _networks, _sweep_pair, _sweep_runs
from kdtl_jax.train import sweep as sweeps

BATCH = 16


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A method's functions, and the arrays that its points read."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        data = digits()
        few = data.subset(np.arange(32))._replace(inputs=data.inputs[:32] / 16)
        splits = Splits(few, few, few)
        example = jnp.zeros((1, 64), jnp.float32)
        student, teacher = (_networks.network(mlp(w, 10), example) for w in ((4,), (8,)))
        frozen = teacher.init(jax.random.key(7), example)
        setup = _sweep_pair.setup_of(
            student, teacher, frozen, splits, epochs=2, batch_size=BATCH, example=example
        )
        made = _sweep_runs.program(
            BY_NAME["kd"],
            setup,
            student,
            cli_sweep.optimizer("adam"),
            {"rate": 1e-2, "weight_decay": 0.0},
            BATCH,
            example,
        )
        shared = _sweep_pair.shared_arrays(splits, teacher, frozen, [BY_NAME["kd"]])
    return made, shared


POINTS = {
    "seed": np.array([0, 1, 1], np.int32),
    "temperature": np.array([1.0, 4.0, 4.0], np.float32),
    "task": np.array([0.1, 0.1, 1.0], np.float32),
    "weight": np.array([1.0, 2.0, 1.0], np.float32),
    "rate": np.array([1e-2, 1e-2, 3e-2], np.float32),
    "alpha": np.array([0.5, 1.0, 1.0], np.float32),
}


@pytest.mark.usefixtures("standard_promotion")
def test_every_path_trains_the_same_students(pair: tuple[Any, Any]) -> None:
    made, shared = pair
    whole = _sweep_runs.trained(made, 2)
    together, one = sweeps.run(whole, POINTS, shared)
    runners = (sweeps.sequential, _sweep_runs.step_by_step(made, 2))
    for runner in runners:
        state, scores = sweeps.run(whole, POINTS, shared, runner=runner)
        np.testing.assert_allclose(scores.loss, one.loss, rtol=1e-4)
        for a, b in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(together.params), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert len(np.unique(np.asarray(one.loss))) == 3, "every axis matters"


@pytest.mark.usefixtures("standard_promotion")
def test_two_rungs_train_as_one(pair: tuple[Any, Any]) -> None:
    made, shared = pair
    first, further = _sweep_runs.trained(made, 1), _sweep_runs.trained(made, 1)
    state, _ = sweeps.run(first, POINTS, shared)
    on = {**POINTS, "state": state, "epoch": np.ones(3, np.int32)}
    after, _ = sweeps.run(further, on, shared)
    straight, _ = sweeps.run(_sweep_runs.trained(made, 2), POINTS, shared)
    assert after.step.tolist() == [4, 4, 4]
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(straight.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_a_scaled_start_is_alpha_times_the_teacher(pair: tuple[Any, Any]) -> None:
    made, shared = pair
    point = {"seed": jnp.int32(0), "alpha": jnp.float32(0.5)}
    start = jax.jit(made.start)(point, shared).params
    bias = shared.teacher.params["head"]["bias"]
    np.testing.assert_allclose(start["head"]["bias"], 0.5 * bias)
    kernel = np.asarray(shared.teacher.params["dense_0"]["kernel"])
    columns = np.asarray(start["dense_0"]["kernel"]).T
    assert all((np.abs(0.5 * kernel.T - c).max(axis=1) < 1e-7).any() for c in columns)


def settings(*flags: str) -> dict[str, np.ndarray]:
    return cli_sweep.settings_of(parse(["sweep", *flags]))


def test_axes_become_columns() -> None:
    assert settings()["temperature"].tolist() == [1, 2, 4, 8]
    grid = settings("--grid", "temperature=1,4", "rate=1e-3,1e-2,1e-1")
    assert grid["temperature"].tolist() == [1, 1, 1, 4, 4, 4] and len(grid["rate"]) == 6
    drawn = settings("--sample", "16", "--range", "temperature=1..20:log", "kd=0..2")
    assert len(drawn["kd"]) == 16 and drawn["temperature"].max() > 10
    assert (drawn["temperature"] < np.sqrt(20)).sum() in (7, 8, 9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "temperature=0,1"], "temperature must be above 0"),
        (["--grid", "kd=-1,1"], "kd must be 0 or more"),
        (["--grid", "rate=1,2", "rate=3"], "axis 'rate' is given twice"),
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
        (["--methods", "kdd"], "no method"),
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
        assert main(["sweep", "--grid", "temprature=1,2", "--out", str(tmp_path / "run")]) == 1
        assert "'temprature' is no axis of kd" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_sweep_ends_in_table_csv_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["sweep", "--quick", "--teacher", "mlp:32", "--student", "mlp:8", "--halving", "2"]
    axes = ["--grid", "temperature=1,4", "rate=1e-4,3e-2", "--methods", "kd,hint"]
    assert main([*command, *axes, "--path", "together", "--memory", "1GB", "--out", str(out)]) == 0
    record = json.loads((out / "results.json").read_text())
    rows = record["rows"]
    assert len(rows) == 4 and record["best"] == rows[0]
    assert rows[0]["setting"]["rate"] == 0.03 and not rows[0]["stopped_early"]
    assert [row["epochs"] for row in rows] == [4, 4, 2, 2]
    means = [row["validation_accuracy"]["mean"] for row in rows[:2]]
    assert means[0] >= means[1] > 0.5 and len(rows[0]["test_accuracy"]["values"]) == 2
    assert record["programs"][0]["path"] == "vectorized"
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
    assert "validation %" in capsys.readouterr().out
    assert main(["sweep", "--config", str(out / "config.yaml"), "--print-config"]) == 0
