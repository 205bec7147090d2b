"""Targets of three kinds, what describes how they are read, and what is said of data beforehand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import NAMES, N, X, Y, columns, idx_folder, image_folder, table

from kdtl_jax import datasets
from kdtl_jax.datasets import Column, Images, Preprocessing, Standardizer

HOT = np.stack([np.arange(N) % 2, np.arange(N) % 3 == 0, np.arange(N) % 5 == 0], axis=1)
TAGS = ["|".join(name for name, on in zip(NAMES, row, strict=True) if on) for row in HOT]
PRICE = np.round(3 * X[:, 0] + 0.25, 3)


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("form", ["cells", "columns", "array", "lists"])
def test_several_labels_at_once(tmp_path: Path, form: str) -> None:
    if form == "cells":
        filled = [tags or "none" for tags in TAGS]
        path, label = table(tmp_path / "a.csv", columns(tags=filled)), "tags"
    elif form == "columns":
        flags = {name: HOT[:, i] for i, name in enumerate(NAMES)}
        path, label = table(tmp_path / "a.csv", columns(**flags)), ",".join(NAMES)
    elif form == "array":
        path, label = Path(npz(tmp_path / "a.npz", x=X, y=HOT)), "label"
    else:
        lists = [tags.split("|") if tags else [] for tags in TAGS]
        path, label = tmp_path / "a.parquet", "tags"
        pq.write_table(pa.table(columns(tags=lists)), path)
    actual = datasets.read(path, label=label)
    assert actual.kind == "labels" and actual.labels.dtype == np.float32
    expected = HOT if form != "cells" else np.column_stack([HOT, HOT.sum(1) == 0])
    np.testing.assert_array_equal(actual.labels, expected)
    names = {"cells": (*NAMES, "none"), "array": ("0", "1", "2")}
    assert actual.class_names() == names.get(form, NAMES)
    split, form_ = datasets.prepared(datasets.read_splits(str(path), label=label))
    assert (form_.kind, form_.outputs) == ("labels", expected.shape[1])
    assert [len(part.labels) for part in split] == [30, 12, 18]
    with pytest.raises(ValueError, match="targets are labels: there is no number per class"):
        datasets.per_class(actual, 2)


@pytest.mark.parametrize("mark", ["|", ";", ", "])
def test_an_empty_cell_of_labels_is_an_example_without_any(tmp_path: Path, mark: str) -> None:
    cells = columns(tags=[tags.replace("|", mark) for tags in TAGS])
    path = table(tmp_path / "a.tsv", cells, "\t")
    with pytest.raises(ValueError, match="empty one means none, use --target labels"):
        datasets.read(path, label="tags")
    actual = datasets.read(path, label="tags", target="labels")
    np.testing.assert_array_equal(actual.labels, HOT)
    assert actual.names == NAMES
    # Another part, read as the model of the first one reads it; its labels hold no mark.
    few = table(tmp_path / "b.csv", columns(tags=[NAMES[i % 3] for i in range(N)]))
    again = datasets.read(few, label="tags", preprocessing=actual.form)
    np.testing.assert_array_equal(again.labels, np.eye(3)[np.arange(N) % 3])
    whole = datasets.read(path, label="tags", preprocessing=actual.form)
    np.testing.assert_array_equal(whole.labels, HOT)


def test_a_known_label_is_not_divided() -> None:
    cells = np.array(["Bonn;Rhine|Ulm", "Ulm", "Bonn;Rhine", "Ulm|Bonn;Rhine"])
    train = datasets.from_arrays("train", X[:4], cells, target="labels")
    assert train.names == ("Bonn;Rhine", "Ulm")
    part = datasets.from_arrays("test", X[:2], np.array(["Bonn;Rhine", "Ulm"]), like=train)
    assert part.labels.tolist() == [[1, 0], [0, 1]]


def test_rows_are_left_out_with_their_lists_of_labels(tmp_path: Path) -> None:
    lists = [tags.split("|") if tags else [] for tags in TAGS]
    cells = columns(tags=lists) | {"b": [None if i == 4 else x for i, x in enumerate(X[:, 1])]}
    pq.write_table(pa.table(cells), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 4, column 'b': no value"):
        datasets.read(tmp_path / "a.parquet", label="tags")
    actual = datasets.read(tmp_path / "a.parquet", label="tags", missing="drop")
    np.testing.assert_array_equal(actual.labels, np.delete(HOT, 4, axis=0))
    np.testing.assert_array_equal(actual.inputs, np.delete(X, 4, axis=0).astype(np.float32))
    assert "1 of 60 rows have missing values: left out" in actual.notices


def test_one_hot_columns_are_one_class_each(tmp_path: Path) -> None:
    flags = {name: (Y == i).astype(int) for i, name in enumerate(NAMES)}
    path = table(tmp_path / "a.csv", columns(**flags))
    actual = datasets.read(path, label=",".join(NAMES))
    assert (actual.kind, actual.names) == (
        "classes",
        NAMES,
    ) and actual.labels.tolist() == Y.tolist()
    actual = datasets.read(path, label=",".join(NAMES), target="labels")
    assert actual.kind == "labels" and actual.labels.shape == (N, 3)


@pytest.mark.parametrize("form", [int, bool, "yes", "true"])
def test_one_column_of_answers_is_one_label(form: Any, tmp_path: Path) -> None:
    """As binary cross-entropy on one logit has it; not two labels, its 0 and its 1."""
    flags = Y == 1
    values = (
        np.where(flags, form, {"yes": "no", "true": "False"}[form])
        if isinstance(form, str)
        else flags.astype(form)
    )
    path = table(tmp_path / "a.csv", columns(flag=values))
    splits = datasets.read_splits(str(path), label="flag", target="labels")
    whole = datasets.read(path, label="flag", target="labels")
    assert (whole.kind, whole.classes, whole.names) == ("labels", 1, ("flag",))
    np.testing.assert_array_equal(whole.labels[:, 0], flags)
    assert splits.test.labels.shape[1] == 1 and splits.test.names == ("flag",)
    assert "targets: 1 label: flag" in datasets.summary(splits)[2]
    # Names of labels stay what they are.
    named = table(tmp_path / "b.csv", columns(tag=np.where(flags, "cat", "dog")))
    assert datasets.read(named, label="tag", target="labels").names == ("cat", "dog")


def test_numbers(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", columns(price=PRICE, size=2 * PRICE + 1))
    actual = datasets.read(path, label="price", drop=("size",))
    assert (actual.kind, actual.names, actual.labels.shape) == ("numbers", ("price",), (N, 1))
    np.testing.assert_allclose(actual.labels[:, 0], PRICE)
    actual = datasets.read(path, label="price,size")
    assert actual.names == ("price", "size") and actual.labels.dtype == np.float64
    split, form = datasets.prepared(datasets.read_splits(str(path), label="price,size"))
    assert split.train.labels.dtype == np.float32
    np.testing.assert_allclose(split.train.labels.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(split.train.labels.std(0), 1, atol=1e-6)
    scale = form.target_scaling
    assert scale is not None
    raw = datasets.read_splits(str(path), label="price,size")
    np.testing.assert_allclose(split.test.labels * scale.scale + scale.mean, raw.test.labels, 1e-5)
    whole = npz(tmp_path / "b.npz", x=X, y=np.arange(N) % 7)
    assert datasets.read(whole).kind == "classes"
    assert datasets.read(whole, target="numbers").labels.ravel().tolist()[:8] == [*range(7), 0]


@pytest.mark.parametrize(
    ("target", "labels", "words"),
    [
        ("auto", np.stack([Y, Y], 1), r"\[60, 2\] of int64 are neither 0 and 1.*--target numbers"),
        ("numbers", np.full(N, 2.5), "every target 0 is 2.5: nothing can be learned"),
        ("numbers", np.where(Y == 1, np.nan, Y), r"finite numbers, got \[nan\] at row 1"),
        ("numbers", np.where(Y == 1, 1e300, Y), r"finite numbers, got \[1e\+300\] at row 1"),
        ("numbers", np.array(NAMES)[Y], "targets must be numbers, got 'ant' at row 0"),
        ("labels", np.stack([Y, Y], 1), r"must be 0 or 1, got \[2, 2\] at row 2"),
        ("labels", np.array(["a"] * N), "1 different labels in 60 examples"),
        ("labels", HOT[:50], r"inputs \[60, 3\] and targets \[50, 3\]"),
        ("classes", PRICE, "whole numbers, got"),
        ("numbers", np.zeros(0), r"inputs \[60, 3\] and targets \[0\]"),
        ("text", Y, "target must be one of auto, classes, labels, numbers, got 'text'"),
    ],
)
def test_targets_of_another_kind(target: Any, labels: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        datasets.from_arrays("data", X, labels, target=target)


@pytest.mark.parametrize("target", ["auto", "classes", "labels", "numbers"])
def test_nothing_is_no_data(target: Any) -> None:
    with pytest.raises(ValueError, match=r"data: holds no examples, got inputs \[0, 3\]"):
        datasets.from_arrays("data", X[:0], PRICE[:0], target=target)


def test_parts_follow_the_labels_of_the_first() -> None:
    train = datasets.from_arrays("train", X, np.array([tags or "none" for tags in TAGS]))
    part = datasets.from_arrays("test", X[:2], np.array(["cat|ant", "bee"]), like=train)
    assert part.labels.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    with pytest.raises(ValueError, match="test: label 'dog' at row 1 does not occur .*ant, bee"):
        datasets.from_arrays("test", X[:2], np.array(["cat", "ant|dog"]), like=train)


def test_later_data_are_read_in_the_models_way(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", columns(kind=np.array(NAMES)[Y]))
    form = datasets.prepared(datasets.read_splits(str(path), label="kind"))[1]
    few = table(
        tmp_path / "few.csv", {"kind": ["cat", "bee"], "c": [1, 2], "b": [3, 4], "a": [5, 6]}
    )
    actual = datasets.read(few, preprocessing=form)
    assert actual.labels.tolist() == [2, 1] and actual.inputs.tolist() == [[5, 3, 1], [6, 4, 2]]
    table(few, {"kind": ["cat", "dog"], "c": [1, 2], "b": [3, 4], "a": [5, 6]})
    with pytest.raises(ValueError, match="label 'dog' at row 1 does not occur"):
        datasets.read(few, preprocessing=form)
    assert datasets.read_inputs(few, form).tolist() == [[5, 3, 1], [6, 4, 2]]
    with pytest.raises(ValueError, match="the model was not trained on such files"):
        datasets.read_inputs(image_folder(tmp_path / "images"), form)
    with pytest.raises(ValueError, match=r"examples are \[4, 4, 1\], but the model takes \[3\]"):
        datasets.read_inputs(idx_folder(tmp_path / "idx") / "t10k-images-idx3-ubyte", form)


def test_the_description_goes_to_text_and_back() -> None:
    third = np.array([1 / 3, 1e-30], np.float32)
    whole = Preprocessing(
        "numbers", ("a", "ü"), 2, (3,), ("p", "q"),
        (Column("x", (), 0.1), Column("y", ("r", "g"), "r"), Column("z")), Images("RGB", True),
        Standardizer(third, third + 1), Standardizer(np.array([1 / 3]), np.array([2.0])),
    )  # fmt: skip
    for one in (whole, Preprocessing()):
        back = datasets.preprocessing_from_json(datasets.preprocessing_to_json(one))
        assert datasets.preprocessing_to_json(back) == datasets.preprocessing_to_json(one)
    assert back.scaling is None
    actual = datasets.preprocessing_from_json(datasets.preprocessing_to_json(whole)).scaling
    assert actual is not None and actual.mean.dtype == np.float32
    np.testing.assert_array_equal(actual.mean, third)
    for text in (
        "",
        "[]",
        "{}",
        '{"kind": 3}',
        datasets.preprocessing_to_json(whole).replace("numbers", "odd"),
    ):
        with pytest.raises(ValueError, match="no description of preprocessing"):
            datasets.preprocessing_from_json(text)


def split_of(inputs: np.ndarray, labels: np.ndarray, **given: Any) -> datasets.Splits:
    return datasets.stratified(datasets.from_arrays("data", inputs, labels), **given)


def test_the_summary_says_what_the_data_are() -> None:
    lines = datasets.summary(split_of(X, np.array(NAMES)[Y]))
    assert lines[0] == "data: data: 36 training, 12 validation and 12 test examples"
    assert lines[1].startswith("inputs: 3 numbers, from -") and not lines[4:]
    assert lines[2] == "targets: 3 classes: ant 12, bee 12, cat 12"
    assert lines[3] == "note: labels ant, bee, cat are numbered 0..2 in this order"
    lines = datasets.summary(split_of(X, PRICE))
    assert lines[2].startswith("targets: target from ") and "regression" in lines[3]
    assert "3 labels, several at once: 0 " in datasets.summary(split_of(X, HOT))[2]


def test_what_looks_wrong_is_said() -> None:
    first = np.zeros((N, 3, 6, 7), np.uint8) + np.arange(N, dtype=np.uint8)[:, None, None, None]
    assert "look like channels first" in datasets.warnings(split_of(first, Y))[0]
    steps = np.random.default_rng(0).normal(size=(N, 9, 4))  # [N, T, C]
    [message] = datasets.warnings(split_of(steps[..., None], Y))
    assert "inputs 9 x 4 are taken for gray images. If each is a sequence" in message
    assert not datasets.warnings(split_of(steps[:, :8, :, None], Y))
    index = np.column_stack([np.arange(N), X, np.ones(N)])
    message = "\n".join(datasets.warnings(split_of(index, Y)))
    assert "'number 0' rises from row to row: is it an index?" in message
    assert "'number 4': the same in every training example" in message
    z = (X - X.mean(0)) / X.std(0)
    whole = split_of(z, Y, validation=0.0, test=0.0)
    assert "inputs are already standardized" in datasets.warnings(whole)[-1]
    rare = np.zeros(400, int)
    rare[:3] = 1
    many = np.random.default_rng(0).normal(size=(400, 2)) + 5
    message = datasets.warnings(split_of(many, rare, test=0.3))
    assert message == ["99.5% of the training examples are '0': accuracy says little"]
    parts = split_of(X, Y)
    twice = parts._replace(test=parts.train)
    assert "36 of 36 test examples are also in the training part" in datasets.warnings(twice)[0]
    lacking = parts._replace(train=parts.train.subset(np.flatnonzero(parts.train.labels != 1)))
    assert "no train example of '1'" in datasets.warnings(lacking)
    assert not datasets.warnings(datasets.read_splits("digits"))


@pytest.mark.parametrize(
    ("cells", "target", "words"),
    [
        ([None, [1], [2, 0]] * 20, "auto", "a label is missing at row 0, got None"),
        ([[1, None], [1], [2, 0]] * 20, "auto", r"a label is missing at row 0, got \[1, None\]"),
        ([["x", None], ["y"]] * 30, "auto", r"a label is missing at row 0, got \['x', None\]"),
        ([[1, 3], [0, 2]] * 30, "auto", "Say which: --target labels or --target numbers"),
        ([2**60, 2**60 + 1] * 30, "auto", r"above 2\^53 they cannot be told apart"),
        ([[1, 3], [0, 2]] * 30, "labels", None),
        ([[1, 3], [0, 2]] * 30, "numbers", None),
    ],
)
def test_lists_in_arrow_columns(
    tmp_path: Path, cells: list[Any], target: Any, words: str | None
) -> None:
    pq.write_table(pa.table(columns(tags=cells)), tmp_path / "a.parquet")

    def read() -> Any:
        return datasets.read(tmp_path / "a.parquet", label="tags", target=target)

    if words is not None:
        with pytest.raises(ValueError, match=words):
            read()
        return
    expected = [[0, 1, 0, 1], [1, 0, 1, 0]] if target == "labels" else cells[:2]
    np.testing.assert_array_equal(read().labels[:2], expected)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([[-1, 0], [2]] * 30, r"lie in 0\.\.2, got \[-1, 0\] at row 0"),
        ([[0], [0.5, 1]] * 30, r"lie in 0\.\.2, got \[0.5, 1.0\] at row 1"),
        ([[0.0, 7.0]] * 60, r"lie in 0\.\.2, got \[0.0, 7.0\] at row 0"),
        ([["x"], ["y", "x"]] * 30, r"lie in 0\.\.2, got \['x'\] at row 0"),
        ([[[0]], [[1], [2]]] * 30, r"lie in 0\.\.2, got \[\[0\]\] at row 0"),
        ([None, [2], [0, 1]] * 20, "a label is missing at row 0"),
    ],
)
def test_numbers_of_named_classes_in_lists(tmp_path: Path, cells: list[Any], words: str) -> None:
    feature = {"feature": {"names": ["a", "b", "c"], "_type": "ClassLabel"}, "_type": "Sequence"}
    about = json.dumps({"info": {"features": {"tags": feature}}})
    whole = pa.table(columns(tags=cells))
    whole = whole.replace_schema_metadata({b"huggingface": about.encode()})
    pq.write_table(whole, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=words):
        datasets.read(tmp_path / "a.parquet", label="tags")
