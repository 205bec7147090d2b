"""Data against the model that reads them: order of classes and columns, units, choices, code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import kdtl

from kdtl_jax import datasets
from kdtl_jax._types import Variables
from kdtl_jax.datasets import Column, Dataset, Images, Preprocessing, Splits, Standardizer
from kdtl_jax.interop import model_files, safetensors, sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.recipes import _data, _models
from kdtl_jax.recipes.settings import Data, UsageError

X = np.random.default_rng(0).normal(size=(40, 2))
Y = (X[:, 0] > 0).astype(np.int64)
COLUMNS = (Column("u"), Column("v"))
Captured = pytest.CaptureFixture[str]


def parquet(path: Path, labels: np.ndarray, names: tuple[str, ...]) -> Path:
    """A table as `datasets` writes it: numbers of classes, and what they are called."""
    features = {"label": {"_type": "ClassLabel", "names": names}}
    about = json.dumps({"info": {"features": features}}).encode()
    table = pa.table({"u": X[:, 0], "v": X[:, 1], "label": labels})
    pq.write_table(table.replace_schema_metadata({b"huggingface": about}), path)
    return path


def table(path: Path, targets: dict[str, np.ndarray]) -> Path:
    columns = {"u": X[:, 0], "v": X[:, 1], **targets}
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [columns, *rows]))
    return path


def test_classes_are_found_by_their_names_in_every_part(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", Y, ("ape", "bee"))
    parquet(tmp_path / "test.parquet", 2 - Y, ("cat", "bee", "ape"))
    splits = datasets.read_splits(str(tmp_path))
    assert splits.test.names == ("ape", "bee")
    np.testing.assert_array_equal(splits.test.labels, splits.test.inputs[:, 0] > 0)
    whole = datasets.read(tmp_path)
    np.testing.assert_array_equal(whole.labels, whole.inputs[:, 0] > 0)
    form = Preprocessing("classes", ("bee", "cow", "ape"), 3, (2,), ("label",), COLUMNS)
    train = datasets.read(tmp_path / "train.parquet", preprocessing=form)
    assert train.names == form.names
    np.testing.assert_array_equal(train.labels, np.where(train.inputs[:, 0] > 0, 0, 2))
    with pytest.raises(ValueError, match="'ape' at row . .* or the model, .* are bee, cat"):
        other = form._replace(names=("bee", "cat", "dog"))
        datasets.read(tmp_path / "train.parquet", preprocessing=other)


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_columns_of_targets_are_found_by_their_names(kind: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(40, 3))
    if kind != "numbers":
        values = np.eye(3, dtype=int)[values.argmax(axis=1)]
    if kind == "labels":
        values[::2] = 1
    file = str(table(tmp_path / "d.csv", dict(zip("abc", values.T, strict=True))))
    form = Preprocessing(kind, ("a", "b", "c"), 3, (2,), ("a", "b", "c"), COLUMNS)
    usual, turned = (
        datasets.read(file, label=label, preprocessing=form) for label in ("a,b,c", "c,a,b")
    )
    assert turned.names == usual.names == ("a", "b", "c")
    np.testing.assert_array_equal(turned.labels, usual.labels)
    if kind != "classes":
        with pytest.raises(ValueError, match=r"columns of targets are a, b, v, expected a, b, c"):
            other = {"a": values[:, 0], "b": values[:, 1], "c": values[:, 2]}
            file = str(table(tmp_path / "e.csv", {**other, "v": values[:, 2]}))
            datasets.read(file, label="a,b,v", preprocessing=form._replace(columns=COLUMNS[:1]))


def test_labels_without_names_need_their_columns() -> None:
    like = Dataset("first", X, X, 2, form=Preprocessing("labels", (), 2))
    with pytest.raises(ValueError, match="have no names with which to match a cell such as cat"):
        datasets.from_arrays("later", X[:2], np.array(["cat", "dog"]), like=like)


def test_the_digits_are_read_as_a_model_reads_them() -> None:
    def read(kind: Any, names: tuple[str, ...], count: int) -> Splits:
        return datasets.read_splits(
            "digits", preprocessing=Preprocessing(kind, names, count, (8, 8, 1))
        )

    turned = tuple(map(str, range(9, -1, -1)))
    actual, usual = read("classes", turned, 10), datasets.read_splits("digits")
    np.testing.assert_array_equal(np.sort(actual.train.labels), np.sort(9 - usual.train.labels))
    assert read("numbers", ("digit",), 1).test.labels.shape == (539, 1)
    for names in (("a", "b"), ()):
        with pytest.raises(ValueError, match=r"label '0' at row 0 does not|must lie in 0\.\.1"):
            read("classes", names, 2)
    with pytest.raises(ValueError, match="'0' at row 0 does not occur"):
        read("labels", ("a", "b"), 2)
    assert datasets.read_splits("digits", target="numbers").train.kind == "numbers"


def splits_of(names: tuple[str, ...], classes: int = 3) -> Splits:
    part = Dataset("d", np.zeros((3, 2)), np.arange(3, dtype=np.int32), classes, names)
    return Splits(part, part, part)


def test_a_sources_classes_in_another_order(capsys: Captured) -> None:
    about = About("mlp:2", 3, names=("ape", "bee", "cat"))
    actual = _data.in_classes_of("t", about, splits_of(("cat", "Ape", "bee ")))
    assert actual.train.names == about.names and actual.test.labels.tolist() == [2, 0, 1]
    # A Hugging Face folder says names alone.
    folder = about._replace(classes=None)
    actual = _data.in_classes_of("t", folder, splits_of(("cat", "ape", "bee")))
    assert actual.validation.labels.tolist() == [2, 0, 1]
    assert _data.in_classes_of("t", folder, splits_of(())).train.names == ()
    assert "note: classes 0..2 are t's ape, bee, cat" in capsys.readouterr().err
    for names in (("cat", "ape", "dog"), ()):
        with pytest.raises(ValueError, match="was trained on the classes ape, bee, cat"):
            _data.in_classes_of("t", about, splits_of(names))
    with pytest.raises(ValueError, match=r"remove id2label from its config\.json"):
        _data.in_classes_of("t", folder, splits_of(("n01", "n02", "n03")))


def test_a_folders_names_of_classes(tmp_path: Path) -> None:
    def named(**config: Any) -> tuple[str, ...]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return sources.class_names(str(tmp_path))

    assert named(id2label={"1": "bee", "0": "ape"}) == ("ape", "bee")
    assert named(id2label={"0": "LABEL_0", "1": "LABEL_1"}) == named() == ()
    with pytest.raises(
        ValueError, match=r"id2label must name the classes 0\.\.1, got \['1', '2'\]"
    ):
        named(id2label={"1": "a", "2": "b"})


def test_choices_that_the_model_has_made_otherwise() -> None:
    read = Preprocessing("classes", (), 2, (2,), ("label",), COLUMNS)
    drawn = Preprocessing("classes", (), 2, (16, 16, 3), images=Images("RGB"))
    for form, chosen, words in (
        (read, Data(drop_columns=("v",)), "--drop-columns v: t reads this column"),
        (read, Data(missing="mean"), "--missing mean: t was trained on columns in which nothing"),
        (drawn, Data(image_size=(8, 8)), "--image-size 8x8: t takes images of 16x16"),
    ):
        with pytest.raises(UsageError, match=words):
            _data.check_choices(chosen, "t", About("mlp:2", preprocessing=form))
    filled = read._replace(columns=(Column("u", (), 0.5), Column("v")))
    for form, chosen in (
        (read, Data(drop_columns=("w",), missing="drop")),
        (filled, Data(missing="median")),
        (drawn, Data(image_size=(16, 16))),
        (None, Data(drop_columns=("v",))),
    ):
        _data.check_choices(chosen, "t", About("mlp:2", preprocessing=form))


def test_rows_are_left_out_and_images_resized_for_a_model(tmp_path: Path) -> None:
    """And its students' files say so."""
    lines = ["u,v,label", *(f"{u},{v if i else ''},{y}" for i, ((u, v), y) in
                            enumerate(zip(X, Y, strict=True)))]  # fmt: skip
    (tmp_path / "d.csv").write_text("\n".join(lines))
    form = Preprocessing("classes", (), 2, (2,), ("label",), COLUMNS)
    with pytest.raises(ValueError, match="column 'v': no value"):
        datasets.read(tmp_path / "d.csv", preprocessing=form)
    actual = datasets.read(tmp_path / "d.csv", missing="drop", preprocessing=form)
    assert len(actual.labels) == 39 and actual.form.leaves_out
    assert len(datasets.read(tmp_path / "d.csv", preprocessing=actual.form).labels) == 39
    for i in range(4):
        (folder := tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6), 40 * i, np.uint8)).save(folder / f"{i}.png")
    form = Preprocessing("classes", ("a", "b"), 2, (3, 3, 1), images=Images("L"))
    with pytest.raises(ValueError, match="6x6 .* 3x3 is expected"):
        datasets.read(tmp_path / "images", preprocessing=form)
    actual = datasets.read(tmp_path / "images", image_size=(3, 3), preprocessing=form)
    assert actual.inputs.shape == (4, 3, 3, 1) and actual.form.images == Images("L", True)


def test_columns_that_a_model_does_not_read_and_inputs_without_names_are_told(
    tmp_path: Path,
) -> None:
    form = Preprocessing("classes", (), 2, (1,), ("label",), COLUMNS[:1])
    table(tmp_path / "d.csv", {"label": Y})
    parquet(tmp_path / "d.parquet", Y, ())
    for name in ("d.csv", "d.parquet"):
        notices = datasets.read(tmp_path / name, preprocessing=form).notices
        assert "columns that the model does not read are left out: v" in notices
    np.savez(tmp_path / "d.npz", x=X[:, :1], y=Y)
    notices = datasets.read_splits(str(tmp_path / "d.npz"), preprocessing=form).train.notices
    assert "inputs have no column names: they are taken for u in this order" in notices


def test_numbers_in_other_units() -> None:
    targets = np.random.default_rng(0).normal(size=(30, 2))
    assert _data.other_target_units(targets, ("a", "b")) is None
    for wrong in (targets * [1, 100], targets / [1, 100], targets + [0, 27]):
        assert "the target 'b' has" in str(_data.other_target_units(wrong, ("a", "b")))
    assert "the targets have" in str(_data.other_target_units(100 * targets, ()))


def test_inputs_from_another_zero() -> None:
    inputs = np.random.default_rng(0).normal(size=(_data.FEW_ROWS, 4))
    kelvins = inputs + [0, 27, 0, 0]
    assert "half of the column 'b', scaled, lies between 2" in str(
        _data.other_units(kelvins, "abcd")
    )
    assert _data.other_units(kelvins) is None  # a pixel may be dark in most images
    assert "half of the data, scaled," in str(_data.other_units(kelvins - [30, 0, 30, 30]))
    assert _data.other_units(kelvins[:10], "abcd") is None
    inputs[:, 1] = np.where(np.arange(_data.FEW_ROWS) == 3, 0.0, 31.0)  # a category
    assert _data.other_units(inputs, "abcd") is None


def test_a_changed_source_is_told(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')
    text = f"huggingface:{tmp_path}"
    known = {"source_sha256": _models.record.made_from({"x": _models.files_of(text)}).files["x"]}
    _models.note_changed(text, known)
    _models.note_changed("mlp:2", known)
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    _models.note_changed(text, known)
    assert "config.json has changed since the model was trained" in capsys.readouterr().err


def test_a_student_with_connectors_is_no_network(tmp_path: Path) -> None:
    file = tmp_path / "simkd.safetensors"
    about = {"kind": model_files.CONNECTED, "method": "simkd", "model": "mlp:2", "classes": "2"}
    safetensors.save(file, {"student": {"w": np.ones(2)}}, metadata=about)
    with pytest.raises(ValueError, match="a student of 'simkd', which answers through connectors"):
        sources.variables(sources.opened(str(file)), Variables({"w": np.ones(2)}))


def test_what_an_export_cannot_keep_is_refused(tmp_path: Path, capsys: Captured) -> None:
    """float32 holds no Unix times of a minute; and an export has the model's own shape."""
    file, out = tmp_path / "m.safetensors", tmp_path / "m.stablehlo"
    for mean, code in ((1.6e9, 1), (1.6e4, 2)):
        form = Preprocessing(
            "classes", (), 2, (1,), ("label",), COLUMNS[:1],
            scaling=Standardizer(np.array([mean]), np.array([60.0])),
        )  # fmt: skip
        variables = Variables({"head": {"kernel": np.ones((1, 2)), "bias": np.ones(2)}})
        model_files.save(file, variables, About("mlp:", 2, form.scaling, (), (1,), form), {})
        shape = [] if code == 1 else ["--shape", 2]
        assert kdtl("export", file, "--out", out, *shape) == code and not out.exists()
    errors = capsys.readouterr().err
    assert "the column 'u' lies at 1.6e+09 with a deviation of 60, which float32 rounds" in errors
    assert "--shape 2: " in errors and "takes inputs [1]. Leave the flag out." in errors
