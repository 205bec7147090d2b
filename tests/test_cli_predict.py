"""`kdtl predict` and `kdtl evaluate` on a run's students, against the same numbers in Python."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHORT, kdtl, results

from kdtl_jax import datasets, metrics, models
from kdtl_jax.datasets import Preprocessing, Standardizer
from kdtl_jax.interop import model_files, networks, safetensors
from kdtl_jax.interop.model_files import About

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = [*SHORT, "--epochs", 2, "--methods", "kd,simkd"]
    assert kdtl("distill", "--data", file, *flags, "--out", folder) == 0
    return folder


def test_a_run_says_which_file_to_take(run: Path) -> None:
    actual = results(run)
    rows = {row["method"]: row for row in actual["rows"] if row["method"] != "teacher"}
    assert {path.stem for path in (run / "students").glob("*.safetensors")} == rows.keys()
    best = max(rows.values(), key=lambda row: row["validation_accuracy"]["mean"])
    assert actual["data"]["recommended"] == best["settings"]["file"]
    assert (run / actual["data"]["recommended"]).is_file()
    assert any("Recommended by validation: students/" in note for note in actual["notes"])


@pytest.mark.parametrize("method", ["kd", "simkd", "student_alone"])
def test_the_scores_are_those_of_the_run(
    run: Path, file: Path, tmp_path: Path, method: str, capsys: Captured
) -> None:
    """On the run's own data its held-out test examples are scored."""
    student, out = run / "students" / f"{method}.safetensors", tmp_path / "scores.json"
    assert kdtl("evaluate", student, file, "--out", out) == 0
    output = capsys.readouterr()
    assert "27 test examples, of the data that the model was trained on" in output.err
    row = next(row for row in results(run)["rows"] if row["method"] == method)
    expected = row["test_accuracy"]["values"][row["settings"]["file_seed"]]
    actual = json.loads(out.read_text())
    assert actual["accuracy"] == pytest.approx(expected) and actual["examples"] == 27
    assert f"accuracy                   {100 * expected:.2f}%" in output.out
    # The same in Python.
    test = datasets.read_splits(str(file)).test
    named = model_files.load(student).predict(test.inputs).argmax(-1)
    assert actual["confusion"] == metrics.confusion(named, test.labels, 3).tolist()
    each = metrics.per_class(named, test.labels, 3)
    assert [row["support"] for row in actual["per_class"]] == each.support.tolist()
    np.testing.assert_allclose([row["recall"] for row in actual["per_class"]], each.recall)
    assert actual["balanced_accuracy"] == pytest.approx(each.recall.mean())
    assert 0 <= actual["calibration_error"] <= 1 and actual["brier"] <= 2
    assert sum(actual["calibration"]["counts"]) == 27


def test_predictions_are_in_the_order_of_the_data(
    run: Path, file: Path, tmp_path: Path, capsys: Captured
) -> None:
    student = run / "students" / "kd.safetensors"
    with np.load(file) as stored:
        x = stored["x"]
    np.save(tmp_path / "new.npy", x)
    words = ["predict", student, tmp_path / "new.npy", "--probabilities"]
    assert kdtl(*words, "--out", tmp_path / "p.csv") == 0
    assert "p.csv: 90 examples" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    logits = model_files.load(student).predict(x).astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert [int(row["row"]) for row in rows] == list(range(90))
    assert [int(row["class"]) for row in rows] == logits.argmax(-1).tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], p.max(-1), rtol=1e-5)
    np.testing.assert_allclose([float(row["p(2)"]) for row in rows], p[:, 2], rtol=1e-5)
    # Labels are not needed, and not in the way; without --out it is printed.
    assert kdtl("predict", student, file, "--part", "all") == 0
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["class"] for row in printed] == [row["class"] for row in rows]


def test_examples_without_an_answer_have_no_class() -> None:
    from kdtl_jax.recipes import predict

    actual = list(predict.class_rows(np.array([[np.nan, 0.0], [1.0, 1.0]]), ("a", "b"), False))
    assert actual == [["row", "class", "probability"], ["0", "", ""], ["1", "a", "0.5"]]
    labels = np.array([[np.nan, 1.0], [-1.0, -1.0], [1.0, 1.0]])
    cells = [row[1] for row in predict.label_rows(labels, ("a", "b"), False)]
    assert cells == ["labels", "nan", "", "a;b"]


def test_examples_without_an_answer_are_counted_aloud(
    run: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from kdtl_jax.recipes import _inputs

    used = _inputs.load

    def with_gaps(*args: Any, **options: Any) -> Any:
        model, result = used(*args, **options)
        gap = np.zeros((len(result.inputs), 1), np.float32)
        gap[[4, 7]] = np.nan
        return model._replace(predict=lambda x: model.predict(x) + gap), result

    monkeypatch.setattr(_inputs, "load", with_gaps)
    assert kdtl("predict", run / "students" / "kd.safetensors", file, "--part", "all") == 0
    output = capsys.readouterr()
    assert "answers 2 of 90 examples with numbers that are not finite, row 4 first" in output.err
    assert output.out.splitlines()[5] == "4,,"


def test_data_of_something_else_are_refused(run: Path, tmp_path: Path, capsys: Captured) -> None:
    student = run / "students" / "kd.safetensors"

    def refused(*words: Any) -> str:
        assert kdtl(*words) in (1, 2)
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    rng = np.random.default_rng(0)
    wide, more = tmp_path / "wide.npz", tmp_path / "more.npz"
    np.savez(wide, x=rng.normal(size=(40, 6)), y=np.arange(40) % 3)
    same = tmp_path / "same.npz"
    np.savez(same, x=rng.normal(size=(40, 5)), y=np.arange(40) % 3)
    np.savez(more, x=rng.normal(size=(40, 5)), y=np.arange(40) % 4)
    for command in ("predict", "evaluate"):
        assert "its examples are [6], but the model takes [5]" in refused(command, student, wide)
        assert "name STUDENT and DATA" in refused(command)
        assert "is a run folder, with students/kd.safetensors" in refused(command, run, wide)
        assert "checkpoints. Name a model's file" in refused(
            command, run / "checkpoints" / "kd", wide
        )
        assert "no such file" in refused(command, tmp_path / "nothing", wide)
    assert "labels must lie in 0..2, got 3 at row 3" in refused("evaluate", student, more)
    assert "has no such part" in refused("evaluate", student, same, "--part", "test")
    for factor in (1000, 1e-3):
        np.savez(more, x=factor * rng.normal(size=(40, 5)), y=np.arange(40) % 3)
        assert "Are the data in other units" in refused("evaluate", student, more)
        assert kdtl("predict", student, more) == 0  # a table's rows may be meant so
        assert "note: the model scales inputs" in capsys.readouterr().err
    safetensors.save(tmp_path / "weights.safetensors", {"w": np.ones(2)})
    message = refused("predict", tmp_path / "weights.safetensors", more)
    assert "does not say which model they belong to" in message


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """Data without some of the classes, in their own numbering, are scored in the model's."""
    net = networks.network(models.mlp((4,), 3), np.zeros((1, 2), np.float32))
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 2)))
    names, student = ("ape", "bee", "cat"), tmp_path / "kd.safetensors"
    model_files.save(student, variables, About("mlp:4", 3, None, names, (2,)), {})
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.array(["bee", "cat"] * 20)
    lines = [f"{a},{b},{name}" for (a, b), name in zip(x, y, strict=True)]
    (tmp_path / "few.csv").write_text("\n".join(["a,b,kind", *lines]))
    words = ["evaluate", student, tmp_path / "few.csv", "--label", "kind"]
    assert kdtl(*words, "--out", tmp_path / "scores.json") == 0
    actual = json.loads((tmp_path / "scores.json").read_text())
    assert actual["classes"] == list(names)
    assert [row["support"] for row in actual["per_class"]] == [0, 20, 20]
    named = np.array(names)[model_files.load(student).predict(x).argmax(-1)]
    assert actual["accuracy"] == pytest.approx(np.mean(named == y))


def stored(path: Path, form: Preprocessing) -> model_files.Model:
    """A linear model's file, for data of this form."""
    net = networks.network(models.mlp((), form.outputs), np.zeros((1, 2), np.float32))
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 2)))
    about = About("mlp:", form.outputs, form.scaling, form.names, form.shape, form)
    model_files.save(path, variables, about, {})
    return model_files.load(path)


def test_images_in_other_units_get_no_answer(tmp_path: Path, capsys: Captured) -> None:
    scaling = Standardizer(np.array([128.0]), np.array([64.0]))
    form = Preprocessing("classes", (), 2, (4, 4, 1), scaling=scaling)
    about = About("mlp:", 2, scaling, (), (4, 4, 1), form)
    images = np.random.default_rng(0).random((3, 4, 4, 1), np.float32)
    net = networks.network(models.mlp((), 2), images[:1])
    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    model_files.save(tmp_path / "m.safetensors", variables, about, {})
    for factor, code in ((255, 0), (1, 1)):
        np.save(tmp_path / "x.npy", factor * images)
        assert kdtl("predict", tmp_path / "m.safetensors", tmp_path / "x.npy") == code
    assert "pixels from 0 to 255 and from 0 to 1" in capsys.readouterr().err


X = np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32)


def test_several_labels_at_once(tmp_path: Path, capsys: Captured) -> None:
    form = Preprocessing("labels", ("a", "b", "c"), 3, (2,))
    model = stored(tmp_path / "m.safetensors", form)
    targets = (np.random.default_rng(2).random((30, 3)) < 0.4).astype(np.int64)
    np.savez(tmp_path / "d.npz", x=X, y=targets)
    words = [tmp_path / "m.safetensors", tmp_path / "d.npz"]
    assert kdtl("evaluate", *words, "--out", tmp_path / "s.json") == 0
    actual, logits = json.loads((tmp_path / "s.json").read_text()), model.predict(X)
    precision = metrics.average_precision(logits, targets)
    assert actual["mean_average_precision"] == pytest.approx(precision.mean())
    assert actual["micro_f1"] == pytest.approx(metrics.micro_f1(logits > 0, targets))
    assert actual["exact"] == pytest.approx(np.mean(((logits > 0) == targets).all(1)))
    assert [row["class"] for row in actual["per_class"]] == ["a", "b", "c"]
    capsys.readouterr()
    assert kdtl("predict", *words, "--probabilities") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    for row, each in zip(rows, logits, strict=True):
        assert row["labels"] == ";".join(n for n, v in zip("abc", each, strict=True) if v > 0)
        assert float(row["p(b)"]) == pytest.approx(1 / (1 + np.exp(-each[1])), rel=1e-4)


def test_numbers_are_in_the_units_of_the_targets(tmp_path: Path, capsys: Captured) -> None:
    scaling = Standardizer(np.array([100.0]), np.array([20.0]))
    form = Preprocessing("numbers", ("price",), 1, (2,), target_scaling=scaling)
    model = stored(tmp_path / "m.safetensors", form)
    targets = 100 + 20 * X[:, :1].astype(np.float64)
    np.savez(tmp_path / "d.npz", x=X, y=targets)
    words = [tmp_path / "m.safetensors", tmp_path / "d.npz"]
    assert kdtl("evaluate", *words, "--out", tmp_path / "s.json") == 0
    actual = json.loads((tmp_path / "s.json").read_text())
    plain = stored(tmp_path / "plain.safetensors", form._replace(target_scaling=None))
    expected = 100 + 20 * plain.predict(X).astype(np.float64)
    np.testing.assert_allclose(model.predict(X), expected)
    assert actual["r2"] == pytest.approx(metrics.r_squared(expected, targets))
    assert actual["mean_absolute_error"] == pytest.approx(np.mean(np.abs(expected - targets)))
    capsys.readouterr()
    assert kdtl("predict", *words) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    np.testing.assert_allclose([float(row["price"]) for row in rows], expected[:, 0], rtol=1e-6)
    assert kdtl("export", words[0], "--out", tmp_path / "m.stablehlo") == 0
    assert "float32 [N, 2] -> numbers [N, 1]" in capsys.readouterr().err
    run = jax.export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes())).call
    np.testing.assert_allclose(run(X), expected, rtol=1e-5)


def test_categories_that_the_model_does_not_know_are_told(tmp_path: Path, capsys: Captured) -> None:
    columns = (datasets.Column("a"), datasets.Column("color", ("red",)))
    form = Preprocessing("classes", ("x", "y"), 2, (2,), ("kind",), columns)
    stored(tmp_path / "m.safetensors", form)
    (tmp_path / "d.csv").write_text("color,a,kind\nred,1,x\nviolet,2,y\n")
    for command in ("predict", "evaluate"):
        assert kdtl(command, tmp_path / "m.safetensors", tmp_path / "d.csv") == 0
        assert "note: column 'color': 'violet' does not occur" in capsys.readouterr().err


def test_an_exported_student_gives_the_same_logits_for_any_batch(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = Standardizer(np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32))
    form = Preprocessing("classes", (), 3, (2,), scaling=scaling)
    model, out = stored(tmp_path / "m.safetensors", form), tmp_path / "m.stablehlo"
    words = ["export", tmp_path / "m.safetensors", "--out"]
    assert kdtl(*words, out) == 0
    assert "float32 [N, 2] -> logits [N, 3]" in capsys.readouterr().err
    run = jax.export.deserialize(bytearray(out.read_bytes())).call
    for rows in (X, X[:1], X[:7]):
        np.testing.assert_allclose(run(rows), model.predict(rows), rtol=1e-5, atol=1e-6)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert kdtl(*words, tmp_path / "m.onnx", "--format", "onnx") == 1
    assert "ONNX needs jax2onnx: pip install" in capsys.readouterr().err
    assert kdtl(*words, out, "--platforms", "abacus") == 2
    assert "'abacus' is not one of cpu, cuda, tpu, rocm" in capsys.readouterr().err
    assert kdtl("export", tmp_path / "m.safetensors") == 2
    assert not (tmp_path / "m.onnx").exists()


def test_a_file_that_is_there_is_replaced_with_force_alone(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Preprocessing("classes", ("a", "\x1b[2J\nb", "c"), 3, (2,))
    student, out = tmp_path / "m.safetensors", tmp_path / "out"
    stored(student, form)
    np.savez(tmp_path / "d.npz", x=X, y=np.array(form.names)[np.arange(30) % 3])
    for words in (["predict", student, tmp_path / "d.npz"], ["export", student],
                  ["evaluate", student, tmp_path / "d.npz"]):  # fmt: skip
        out.write_text("mine")
        assert kdtl(*words, "--out", out) == 1 and out.read_text() == "mine"
        assert "exists. Name another file, or pass --force" in capsys.readouterr().err
        assert kdtl(*words, "--out", student) == 1, "nor is what is read"
        assert kdtl(*words, "--out", tmp_path, "--force") == 1, "a folder is never replaced"
        assert kdtl(*words, "--out", "/dev/null", "--force") == 1
        assert kdtl(*words, "--out", tmp_path / "no/where") == 1
        capsys.readouterr()
        assert kdtl(*words, "--out", out, "--force") == 0 and out.read_bytes() != b"mine"
        output = capsys.readouterr()
        assert all(map(str.isprintable, (output.out + output.err).split("\n")))
        # Nor one that another command has written since this one began.
        out.unlink()
        asked = model_files.load

        def meanwhile(*args: Any, asked: Any = asked, **more: Any) -> Any:
            out.write_text("theirs")
            return asked(*args, **more)

        with monkeypatch.context() as patched:
            patched.setattr(model_files, "load", meanwhile)
            assert kdtl(*words, "--out", out) == 1 and out.read_text() == "theirs"
        assert "exists. Name another file, or pass --force" in capsys.readouterr().err
    assert not Path("/dev/null").is_file()
