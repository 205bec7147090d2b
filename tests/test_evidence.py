"""What a page shows of the examples themselves: confusions, differences, pictures."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdtl_jax import datasets
from kdtl_jax.datasets import Dataset
from kdtl_jax.recipes import _evidence
from kdtl_jax.run import report


def decoded(text: str) -> np.ndarray:
    """The values of a PNG, `[H, W, C]`."""
    data = base64.b64decode(text)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG" and picture.mode in ("L", "RGB")
        pixels = np.asarray(picture)
    assert data.endswith(b"IEND\xaeB`\x82")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def test_pictures_are_png_files() -> None:
    image = np.arange(6.0).reshape(2, 3, 1) - 1
    np.testing.assert_array_equal(decoded(report.png(image)), 51 * np.arange(6).reshape(2, 3, 1))
    np.testing.assert_array_equal(decoded(report.png(image[..., 0])), decoded(report.png(image)))
    assert decoded(report.png(np.zeros((2, 2, 3)))).shape == (2, 2, 3), "one value is black"
    assert decoded(report.png(np.random.default_rng(0).random((130, 65, 1)))).shape == (44, 22, 1)
    assert decoded(report.png(np.array([[np.nan, 1.0]]))).shape == (1, 2, 1)
    with pytest.raises(ValueError, match=r"got \[2, 2, 2\]"):
        report.png(np.zeros((2, 2, 2)))


def split(classes: int = 3, shape: tuple[int, ...] = (8,)) -> Dataset:
    labels = np.array([0, 0, 1, 2], np.int32)
    inputs = np.random.default_rng(0).random((4, *shape)).astype(np.float32)
    return Dataset("toy", inputs, labels, classes, ("<cat>", "dog", "eel"))


NAMED = np.array([[0, 1, 1, -1], [0, 1, 0, 2]])  # by two seeds
TEACHER = np.array([[0, 0, 1, 2]])


def test_confusions_are_counted_over_seeds() -> None:
    actual = _evidence.confusion_counts(split().labels, NAMED, 3)
    assert actual.tolist() == [[2, 2, 0], [1, 1, 0], [0, 0, 1]]


def test_differing_examples_are_shown_as_rows_or_pictures() -> None:
    student = _evidence.Predictions("KD", NAMED)
    confusion, differences = _evidence.sections(split(), student, TEACHER)
    assert "all 2 seeds" in confusion.notes[0]
    [table] = differences.parts
    assert isinstance(table, report.Table)
    [(_, rows)] = table.groups
    assert [row[:4] for row in rows] == [
        ("1", "<cat>", "<cat> (1 of 1)"[:5], "dog (2 of 2)"),  # most often apart comes first
        ("2", "dog", "dog", "<cat> (1 of 2)"),
        ("3", "eel", "eel", "nothing (1 of 2)"),
    ]
    _, shown = _evidence.sections(split(shape=(4, 4, 1)), student, TEACHER)
    [pictures] = shown.parts
    assert isinstance(pictures, report.Pictures)
    assert pictures.pictures[0].caption == "is <cat>, teacher <cat>, student dog (2 of 2)"
    page = report.page("t", [confusion, differences, shown])
    assert "<cat>" not in page and page.count('src="data:image/png;base64,') == 3
    assert len(_evidence.sections(split(), _evidence.Predictions("KD", TEACHER), TEACHER)) == 1


def test_rows_of_a_table_are_shown_as_its_file_has_them(tmp_path: Path) -> None:
    """In their own units and by their names, though the student reads them scaled."""
    colors = ["red" if i % 2 else "blue" for i in range(60)]
    lines = [
        f"{1000 + i},{i}%,{color},2024-03-{1 + i % 28:02d},{i % 5},1,2,{'ab'[i % 2]}"
        for i, color in enumerate(colors)
    ]
    header = "size,share,color,day,e,f,g,label"
    (tmp_path / "a.csv").write_text("\n".join([header, *lines]))
    read = datasets.read_splits(str(tmp_path / "a.csv"), one_hot=True)
    test = datasets.prepared(read)[0].test
    student = _evidence.Predictions("KD", 1 - test.labels[None])
    [table] = _evidence.sections(test, student, test.labels[None])[1].parts
    assert isinstance(table, report.Table)
    [(_, rows)] = table.groups
    for row in rows:
        i = round(read.test.inputs[int(str(row[0])), 1])
        day = f"2024-03-{1 + i % 28:02d}"
        assert row[4:] == (f"{1000 + i}", f"{i}%", colors[i], day, f"{i % 5}", "1", "…")
    assert table.header[4:] == ("size", "share", "color", "day", "e", "f", "…")


def test_examples_that_differ_alike_are_of_all_classes() -> None:
    count = 40
    data = Dataset("t", np.zeros((count, 2), np.float32), np.arange(count) // 20, 2, ("a", "b"))
    wrong = _evidence.Predictions("KD", np.ones((1, count), np.int64) - data.labels)
    _, differences = _evidence.sections(data, wrong, data.labels[None])
    [table] = differences.parts
    assert isinstance(table, report.Table)
    [(_, rows)] = table.groups
    assert [row[0] for row in rows[:4]] == ["0", "20", "1", "21"]


def test_of_many_classes_the_most_frequent_confusions_are_listed() -> None:
    data = split()._replace(classes=30, names=())
    [section] = _evidence.sections(data, _evidence.Predictions("KD", NAMED), NAMED)
    [table] = section.parts
    assert isinstance(table, report.Table)
    assert list(table.groups[0][1]) == [("0", "1", "2"), ("1", "0", "1")]
