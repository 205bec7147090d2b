"""From files as people have them to predictions: kdtl distill, then kdtl predict and evaluate."""

import csv
import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import NAMES, N, X, Y, columns, idx, png, table
from documents import DOCS, blocks
from tiny import kdtl, results

from kdtl_jax import datasets, metrics, models
from kdtl_jax.interop import linen, model_files

Captured = pytest.CaptureFixture[str]
GUIDE = (DOCS / "guides" / "own-data.md").read_text()
HOT = np.stack([np.arange(N) % 2, np.arange(N) % 3 == 0], axis=1).astype(int)
PRICE = np.round(100 + 3 * X[:, 0] + 0.25, 3)
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()
SHORT = ["--batch-size", "12", "--seeds", "1", "--epochs", "2", "--teacher-epochs", "1"]


def cifar10(path: Path) -> None:
    """The layout of CIFAR-10 as images, with few of them: the class is the hue."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for i, name in enumerate(CIFAR):
            (path / part / name).mkdir(parents=True)
            for number in range(1, count + 1):
                pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[..., i % 3] += np.uint8(15 * i)
                (path / part / name / f"{number:04d}.png").write_bytes(png(pixels))


def fashion(path: Path) -> None:
    """Its four files, zipped as they are downloaded."""
    rng = np.random.default_rng(0)
    path.mkdir()
    for part, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 90, (count, 28, 28)) + 15 * labels[:, None, None]
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            (path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


def animals(path: Path) -> None:
    cells = {**columns(color=np.array(["r", "g"])[np.arange(N) % 2]), "kind": np.array(NAMES)[Y]}
    pq.write_table(pa.table(cells), path)


# By the names that they have in the guide: what makes a small one, and what is measured.
DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "cifar10": (cifar10, "accuracy"),
    "fashion-mnist": (fashion, "accuracy"),
    "animals.parquet": (animals, "accuracy"),
    "scans.csv": (
        lambda path: table(path, columns(cough=HOT[:, 0], fever=HOT[:, 1])),
        "mean_average_precision",
    ),
    "houses.csv": (lambda path: table(path, {"": range(N), **columns(price=PRICE)}), "r2"),
}


def in_guide(name: str) -> list[list[str]]:
    """The words of all commands of the guide that speak of a name."""
    lines = [line for block in blocks(GUIDE, "sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if name in line]


def scored(logits: np.ndarray, labels: np.ndarray, score: str) -> float:
    if score == "accuracy":
        return metrics.accuracy(logits.argmax(-1), labels)
    if score == "r2":
        return metrics.r_squared(logits, labels)
    return float(np.nanmean(metrics.average_precision(logits, labels)))


@pytest.mark.parametrize("name", DATA)
def test_the_guide_leads_from_files_to_predictions(
    name: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands as they stand there, but for the length of the training."""
    monkeypatch.chdir(tmp_path)
    make, score = DATA[name]
    data = Path(name)
    make(data)
    distill, predict, *others = in_guide(name)
    assert kdtl(*distill, *SHORT) == 0
    output = capsys.readouterr()
    assert f"data: {name}: " in output.err and "\ntargets: " in output.err
    assert kdtl(*predict) == 0
    run, student = Path(distill[distill.index("--out") + 1]), Path(predict[1])
    method = distill[distill.index("--methods") + 1]
    row = next(row for row in results(run)["rows"] if row["method"] == method)
    assert student == run / row["settings"]["file"]
    # The same numbers in Python, from the student's file and the data alone.
    model = model_files.load(student)
    known = model.about.preprocessing
    assert known is not None
    parts = datasets.read_splits(str(data), preprocessing=known)
    logits = model.predict(parts.test.inputs)
    actual = scored(logits, parts.test.labels, score)
    assert row[f"test_{score}"]["values"] == [pytest.approx(actual, abs=1e-5)]
    assert f"validation_{score}" in results(run)["curves"]["learning"][method]
    with Path(predict[predict.index("--out") + 1]).open(newline="") as file:
        rows = list(csv.reader(file))
    whole = datasets.read_inputs(data, known)
    assert len(rows) == len(whole) + 1
    if name == "cifar10":
        assert rows[0][-1] == "file" and rows[1][-1] == "cifar10/test/airplane/0001.png"
    logits = model.predict(whole)
    if score == "accuracy":
        assert [row[1] for row in rows[1:]] == [known.names[i] if known.names else str(i)
                                                for i in logits.argmax(-1)]  # fmt: skip
    elif score == "r2":
        assert rows[0] == ["row", "price"]
        said_numbers = np.array([[float(row[1])] for row in rows[1:]])
        np.testing.assert_allclose(said_numbers, logits, rtol=1e-5)
        assert row["settings"]["mean_absolute_error"] > 0
    for words in others or [["evaluate", student, data, "--out", "scores.json"]]:
        assert kdtl(*words) == 0
    scores = json.loads(Path("scores.json").read_text())
    assert scores[score] == pytest.approx(actual, abs=1e-5)
    page = (run / "report.html").read_text()
    titles = {"r2": "R²", "mean_average_precision": "Mean average precision"}
    assert f"{titles.get(score, 'Accuracy')} by method" in page


def test_the_guide_exports_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flatbuffers", reason="the export extra is not installed")
    monkeypatch.chdir(tmp_path)
    [words] = in_guide("kdtl export")
    student = Path(words[1])
    student.parent.mkdir(parents=True)
    variables = linen.model(models.mlp([4], classes=3)).init(jax.random.key(0), jnp.ones((1, 5)))
    model_files.save(student, variables, model_files.About("mlp:4", 3, shape=(5,)), {})
    assert kdtl(*words) == 0
    exported = jax.export.deserialize(bytearray(Path("animals.stablehlo").read_bytes()))
    assert np.asarray(exported.call(np.ones((7, 5), np.float32))).shape == (7, 3)


@pytest.mark.usefixtures("standard_promotion")
def test_the_guide_trains_code_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(GUIDE, "python")
    exec(next(block for block in code if "people.csv" in block), {})  # the guide's
    for name in ("my_model.py", "my_loss.py"):
        Path(name).write_text(next(block for block in code if block.startswith(f"# {name}")))
    for name, run, more in (
        ("my_model.py:Net", "distill", []),
        ("my_loss.py:squares", "squares", ["--methods", "squares"]),
    ):
        [words] = [words for words in in_guide(name) if words[0] == "distill"]
        assert kdtl(*words, *SHORT, *more) == 0
        student = "squares" if more else "kd"
        assert (Path("runs") / run / "students" / f"{student}.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("distill", ["--methods", "kd"], "targets are numbers: kd does not apply.*logit_mse"),
        ("distill", ["--label-smoothing", "0.1"], "are for classes, but the targets are numbers"),
        ("distill", ["--per-class", "3"], "targets are numbers: there is no number per class"),
        ("distill", ["--target", "classes"], "labels must be whole numbers"),
        ("transfer", [], "targets are numbers. Name a source with --source-weights"),
        ("sweep", ["--methods", "kd,dkd"], "no method is left. kd is left out"),
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
