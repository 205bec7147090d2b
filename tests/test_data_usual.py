"""Data in the forms that people have them in: folders, encodings, cells, lists of images."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import NAMES, PIXELS, N, Y, columns, image_folder, png, table

from kdtl_jax import datasets
from kdtl_jax.datasets import _csv

TEXT = [NAMES[y] for y in Y]


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "val_images", "test_images"),
        ("training_set", "validation_set", "test_set"),
        ("seg_train", "seg_dev", "seg_test"),
        ("Train", "Valid", "Test"),
    ],
)
def test_folders_of_parts_by_their_usual_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        image_folder(tmp_path / name, PIXELS[i::3][:9], [NAMES[j % 3] for j in range(9)])
    splits = datasets.read_splits(str(tmp_path))
    assert splits.train.names == NAMES and [len(part.labels) for part in splits] == [9, 9, 9]


def test_a_class_that_is_called_like_a_part_stays_one(tmp_path: Path) -> None:
    image_folder(tmp_path, labels=[("train_set", "car", "bus")[y] for y in Y])
    assert datasets.read_splits(str(tmp_path)).train.names == ("bus", "car", "train_set")


def test_what_is_left_out_of_a_folder_of_images_is_said(tmp_path: Path) -> None:
    """Folders beside the parts, a part without classes, folders within classes, hidden copies."""
    image_folder(tmp_path / "train" / "inner")
    for name in ("one", "two"):
        image_folder(tmp_path / "train" / name / "deep", PIXELS[:10], ["x"] * 10)
    image_folder(tmp_path / "train" / "one" / ".ipynb_checkpoints", PIXELS[:2])
    image_folder(tmp_path / "train" / "one" / "@eaDir", PIXELS[:2])
    image_folder(tmp_path / "holdout", PIXELS[:3])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(png(PIXELS[0]))
    whole = datasets.read_splits(str(tmp_path), validation=0, test=0).train
    assert np.bincount(whole.labels).tolist() == [N, 10, 10]
    assert any("have no folders of classes, left out: holdout, test" in x for x in whole.notices)
    assert any("folders within 'inner' and others are not told apart" in x for x in whole.notices)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("archive/ant", "below one folder, 'archive'.*classes in .*archive[?] Name that"),
        (".", "not in one folder per class, as in cat/1.png; it has .'00.png'"),
    ],
)
def test_images_that_are_not_in_folders_of_classes(
    tmp_path: Path, inside: str, message: str
) -> None:
    image_folder(tmp_path / inside, labels=["."] * N)
    with pytest.raises(ValueError, match=message):
        datasets.read_splits(str(tmp_path))


def test_one_class_of_a_model_is_enough_for_it(tmp_path: Path) -> None:
    form = datasets.read(image_folder(tmp_path / "a")).form._replace(names=NAMES, outputs=3)
    some = image_folder(tmp_path / "b", PIXELS[Y == 1], ["bee"] * 20)
    assert datasets.read(some, preprocessing=form).labels.tolist() == [1] * 20
    with pytest.raises(ValueError, match="below one folder, 'bee'"):
        datasets.read(some)


def test_a_table_that_names_its_images(tmp_path: Path) -> None:
    """Beside them or in a folder, as the table alone or with its folder; read again by a model."""
    folder = image_folder(tmp_path / "a" / "images", labels=["."] * N).parent
    cells = {"file_name": [f"{i:02d}.png" for i in range(N)], "size": [4] * N, "label": TEXT}
    file = table(folder / "metadata.csv", cells)
    for path in (file, folder):
        whole = datasets.read(path)
        np.testing.assert_array_equal(whole.inputs[..., 0], PIXELS)
        assert [whole.names[y] for y in whole.labels] == TEXT
        assert any("'file_name' names, columns size are left out" in x for x in whole.notices)
        form = whole.form._replace(names=whole.names, outputs=3)
        again = datasets.read_splits(str(path), preprocessing=form, validation=0, test=0)
        np.testing.assert_array_equal(again.train.inputs, whole.inputs)
        actual = datasets.read_unlabeled(path, form)
        np.testing.assert_array_equal(actual.inputs, whole.inputs)
        assert actual.files[1].endswith("01.png")
    same = datasets.read(file, inputs="file_name")
    np.testing.assert_array_equal(same.inputs, whole.inputs)
    with pytest.raises(ValueError, match="has no column 'size' that names image files"):
        datasets.read(file, inputs="size")
    assert datasets.files_of(str(file)) == (file, folder / "images"), "both make a run's identity"
    (folder / "images" / "07.png").unlink()
    with pytest.raises(ValueError, match="row 9: there is no file .*07.png"):
        datasets.read(file)
    other = table(tmp_path / "b.csv", columns(label=TEXT))
    with pytest.raises(ValueError, match="no column names image files beside it"):
        datasets.read_inputs(other, form)


@pytest.mark.parametrize("inside", [".", "train"])
def test_a_table_beside_folders_of_classes(tmp_path: Path, inside: str) -> None:
    """The folders are the classes, unless the table names the images, or its labels are asked."""
    image_folder(tmp_path / inside)
    other = table(tmp_path / "stats.csv", columns(kind=Y, label=TEXT))
    whole = datasets.read_splits(str(tmp_path), validation=0, test=0).train
    assert whole.names == NAMES and whole.inputs.shape == (N, 4, 4, 1)
    assert any("name none of them, left out: stats.csv" in note for note in whole.notices)
    form = whole.form._replace(names=NAMES, outputs=3)
    actual = datasets.read_unlabeled(tmp_path, form)
    np.testing.assert_array_equal(actual.inputs, whole.inputs)
    again = datasets.read_splits(str(tmp_path), preprocessing=form, validation=0, test=0).train
    np.testing.assert_array_equal(again.labels, whole.labels)
    asked = datasets.read_splits(str(tmp_path), label="kind", drop=["label"]).train
    assert asked.inputs.shape[1:] == (3,)
    other.unlink()
    files = [f"{inside}/{NAMES[y]}/{i:02d}.png" for i, y in enumerate(Y)]
    cells = {"file": files, "label": [f"{x}s" for x in TEXT]}
    table(tmp_path / "labels.csv", cells)
    assert datasets.read(tmp_path).names == ("ants", "bees", "cats")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_text_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    cells = columns(größe=Y, label=[f"é{y}" for y in Y])
    text = table(tmp_path / "a.csv", cells).read_text()
    file = tmp_path / "A.CSV"
    file.write_bytes(text.encode(encoding))
    actual = datasets.read(file)
    assert actual.names == ("é0", "é1", "é2") and actual.form.columns[-1].name == "größe"
    assert any("Windows-1252" in note for note in actual.notices) == (encoding == "latin-1")


def test_words_for_a_missing_number_are_text_elsewhere(tmp_path: Path) -> None:
    words = ["-", "None", "#N/A", "nil"]
    cells = columns(d=[*words, *range(N - 4)], label=["none" if y else "mild" for y in Y])
    actual = datasets.read(table(tmp_path / "a.csv", cells), missing="mean")
    assert actual.inputs[:4, 3].tolist() == [np.mean(range(N - 4))] * 4
    assert actual.names == ("mild", "none")


@pytest.mark.parametrize(
    ("cells", "label", "names", "first"),
    [
        ({"m": ["yes", "no"] * 30, "k": ["Y", "Y", "N"] * 20}, "m,k", ("m", "k"), [1, 1]),
        ({"label": ["\"['u', 'v']\"", '"[]"'] * 30}, "label", ("u", "v"), [1, 1]),
        ({"label": [-1, 1] * 30}, "label", ("-1", "1"), 0),
    ],
)
def test_cells_of_labels(
    tmp_path: Path, cells: dict[str, list[str]], label: str, names: tuple[str, ...], first: object
) -> None:
    actual = datasets.read(table(tmp_path / "a.csv", columns(**cells)), label=label)
    assert actual.names == names and actual.labels[0].tolist() == first
    assert actual.kind == ("classes" if names == ("-1", "1") else "labels")


def test_booleans_keep_their_names_in_every_file(tmp_path: Path) -> None:
    flags = [y == 0 for y in Y]
    pq.write_table(pa.table(columns(label=flags)), tmp_path / "A.PARQUET")
    for file in (tmp_path / "A.PARQUET", table(tmp_path / "a.csv", columns(label=flags))):
        actual = datasets.read(file)
        assert actual.names == ("False", "True") and actual.labels.tolist() == [
            int(x) for x in flags
        ]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"d": ['"1.234,5"'] * N, "label": TEXT}, "Write plain numbers, such as 1234.5"),
        ({"d": ["31/1/2024"] * N, "label": TEXT}, "is a date.*Write it as in 2024-01-31"),
        ({"d": ["31-Jan-2024"] * N, "label": TEXT}, "is a date"),
        ({"d": ['"Jan 31, 2024"'] * N, "label": TEXT}, "is a date"),
        ({"d": ["192.168.0.1"] * N, "label": TEXT}, "is not a number. Make it one input"),
        ({"1.5": Y, "x": TEXT}, "is the line with the columns' names missing"),
        ({"label": range(100, 100 + N)}, "or learn numbers .--target numbers."),
    ],
)
def test_repairs_that_help(tmp_path: Path, cells: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.read_splits(str(table(tmp_path / "a.csv", columns(**cells))))


def test_names_of_rows_are_told(tmp_path: Path) -> None:
    """A decimal comma in a table with commas looks just like them."""
    file = table(tmp_path / "a.csv", {"a": Y, "label": TEXT})
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *(f"{i},{row}" for i, row in enumerate(lines[1:]))]))
    actual = datasets.read(file)
    assert actual.inputs.shape == (N, 1)
    assert any("taken for row names, as written by R" in note for note in actual.notices)


def test_columns_of_labels_that_are_text_are_named(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", columns(m=TEXT, k=Y))
    with pytest.raises(ValueError, match="column 'm' holds text such as ant. Several columns"):
        datasets.read_splits(str(file), label="m,k")


def test_a_column_that_is_the_label_is_told(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", columns(code=10 - Y, flag=Y == 0, label=TEXT))
    [message] = [x for x in datasets.summary(datasets.read_splits(str(file))) if "one class" in x]
    assert re.search("'?code'?: each of its values stands for one class", message), message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_a_gzipped_table_is_read(tmp_path: Path, encoding: str) -> None:
    plain = table(tmp_path / "a.csv", columns(label=[f"é{y}" for y in Y]))
    plain.write_bytes(plain.read_text().encode(encoding))
    packed = tmp_path / "b" / "A.CSV.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected = datasets.read(plain)
    for path in (packed, packed.parent):
        actual = datasets.read(path)
        np.testing.assert_array_equal(actual.inputs, expected.inputs)
        assert actual.names == expected.names and actual.notices == expected.notices
        assert actual.labels.tolist() == expected.labels.tolist()


def test_a_gzipped_table_that_is_damaged_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gzip.compress(table(tmp_path / "a.csv", columns(label=TEXT)).read_bytes())
    path = tmp_path / "a.csv.gz"
    for content in (whole[:2], whole[:-200], whole[:-8] + bytes(8), b"a,label", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.csv\.gz: (not a CSV text file|needs a header)"):
            datasets.read_splits(str(path))
    monkeypatch.setattr(_csv, "LARGE_BYTES", 2**20)
    for start in (b"a,label\n", "a,label\n".encode("utf-16")):
        path.write_bytes(gzip.compress(start + bytes(2**22)))
        with pytest.raises(ValueError, match="unpack it first: gunzip a.csv.gz"):
            datasets.read_splits(str(path))
    path.rename(tmp_path / "a.parquet.gz")
    with pytest.raises(ValueError, match="Unpack it first: gunzip a.parquet.gz"):
        datasets.read_splits(str(tmp_path / "a.parquet.gz"))
