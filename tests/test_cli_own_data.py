"""From files as people have them to predictions: kdtl distill, then kdtl predict and evaluate."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import NAMES, N, X, Y, columns, idx_folder, image_folder, table
from tiny import kdtl, results

from kdtl_jax import datasets, metrics
from kdtl_jax.interop import model_files

Captured = pytest.CaptureFixture[str]
HOT = np.stack([np.arange(N) % 2, np.arange(N) % 3 == 0], axis=1).astype(int)
PRICE = np.round(100 + 3 * X[:, 0] + 0.25, 3)
TINY = ["--teacher", "mlp:6", "--student", "mlp:3", "--batch-size", "12", "--lr", "0.01",
        "--seeds", "1", "--epochs", "2", "--teacher-epochs", "1"]  # fmt: skip


def parquet(folder: Path) -> Path:
    cells = {**columns(color=np.array(["r", "g"])[np.arange(N) % 2]), "kind": np.array(NAMES)[Y]}
    pq.write_table(pa.table(cells), folder / "a.parquet")
    return folder / "a.parquet"


def of_labels(folder: Path) -> Path:
    tags = ["|".join(np.array(["p", "q"])[row == 1]) or "none" for row in HOT]
    return table(folder / "a.csv", columns(tags=tags))


FORMS: dict[str, tuple[Callable[[Path], Path], list[str], str, str]] = {
    "images": (lambda f: image_folder(f / "images"), ["--methods", "kd"], "kd", "accuracy"),
    "idx": (lambda f: idx_folder(f / "idx"), ["--methods", "kd"], "kd", "accuracy"),
    "parquet": (
        parquet, ["--label", "kind", "--text-columns", "one-hot", "--methods", "KD"], "kd",
        "accuracy",
    ),
    "labels": (
        of_labels, ["--label", "tags", "--methods", "binary_kd"], "binary_kd",
        "mean_average_precision",
    ),
    "numbers": (
        lambda f: table(f / "a.csv", {"": range(N), **columns(price=PRICE)}),
        ["--label", "price", "--methods", "logit_mse"], "logit_mse", "r2",
    ),
}  # fmt: skip


def scored(logits: np.ndarray, labels: np.ndarray, score: str) -> float:
    if score == "accuracy":
        return metrics.accuracy(logits.argmax(-1), labels)
    if score == "r2":
        return metrics.r_squared(logits, labels)
    return float(np.nanmean(metrics.average_precision(logits, labels)))


@pytest.mark.parametrize("form", FORMS)
def test_from_files_to_predictions(form: str, tmp_path: Path, capsys: Captured) -> None:
    make, words, method, score = FORMS[form]
    data, run = make(tmp_path), tmp_path / "run"
    assert kdtl("distill", "--data", data, *words, *TINY, "--out", run) == 0
    said = capsys.readouterr()
    assert f"data: {data.name}: " in said.err and "\ntargets: " in said.err
    row = next(row for row in results(run)["rows"] if row["method"] == method)
    student = run / row["settings"]["file"]
    # The same numbers in Python, from the student's file and the data alone.
    model = model_files.load(student)
    known = model.about.preprocessing
    assert known is not None
    parts = datasets.read_splits(str(data), preprocessing=known)
    logits = model.predict(parts.test.inputs)
    answers = logits
    if known.target_scaling is not None:
        answers = logits * known.target_scaling.scale + known.target_scaling.mean
    found = scored(answers, parts.test.labels, score)
    assert row[f"test_{score}"]["values"] == [pytest.approx(found, abs=1e-5)]
    assert f"validation_{score}" in results(run)["curves"]["learning"][method]
    assert kdtl("predict", student, data, "--out", tmp_path / "out.csv") == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    whole = datasets.read_inputs(data, known)
    assert len(rows) == len(whole) + 1
    logits = model.predict(whole)
    if score == "accuracy":
        assert [row[1] for row in rows[1:]] == [known.names[i] if known.names else str(i)
                                                for i in logits.argmax(-1)]  # fmt: skip
    elif score == "r2":
        assert rows[0] == ["row", "price"]
        said_numbers = np.array([[float(row[1])] for row in rows[1:]])
        assert known.target_scaling is not None
        wanted = logits * known.target_scaling.scale + known.target_scaling.mean
        np.testing.assert_allclose(said_numbers, wanted, rtol=1e-5)
        assert row["settings"]["mean_absolute_error"] > 0
    assert kdtl("evaluate", student, data, "--out", tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores[score] == pytest.approx(found, abs=1e-5)
    page = (run / "report.html").read_text()
    name = {"r2": "R²", "mean_average_precision": "Mean average precision"}
    assert f"{name.get(score, 'Accuracy')} by method" in page


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("distill", ["--methods", "kd"], "targets are numbers: kd does not apply.*logit_mse"),
        ("distill", ["--label-smoothing", "0.1"], "are for classes, the targets are numbers"),
        ("distill", ["--per-class", "3"], "targets are numbers: there is no number per class"),
        ("distill", ["--target", "classes"], "labels must be whole numbers"),
        ("transfer", [], "targets are numbers .regression., and this command learns one class"),
        ("sweep", [], "targets are numbers .regression., and this command learns one class"),
    ],
)
def test_what_numbers_cannot_do_is_said_before_training(
    tmp_path: Path, capsys: Captured, command: str, words: list[Any], message: str
) -> None:
    data = table(tmp_path / "a.csv", columns(price=PRICE))
    assert kdtl(command, "--data", data, "--label", "price", *words, "--out", tmp_path / "x") != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"kdtl {command}: ") and len(last) < 500
    assert re.search(message, last), last
    assert not (tmp_path / "x" / "results.json").exists()
