"""Every form of data gives the same examples: folders of images, arrays, tables, parquet, idx."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    NAMES,
    PIXELS,
    N,
    X,
    Y,
    columns,
    features,
    idx_folder,
    image_folder,
    image_table,
    png,
    table,
)  # fmt: skip
from PIL import Image

from kdtl_jax import datasets
from kdtl_jax.datasets import Images, Missing

ORDER = np.argsort(Y, kind="stable")  # of the files of a folder of classes
WHOLE: dict[str, Any] = {"validation": 0.0, "test": 0.0}
KINDS = np.array(NAMES)[Y]


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def parquet(path: Path, of: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(of, path)
    return path


def saved_to_disk(folder: Path) -> Path:
    """As `DatasetDict.save_to_disk` lays it out."""
    for part, rows in (("train", slice(0, 45)), ("test", slice(45, N))):
        inside, result = folder / part, image_table(rows)
        inside.mkdir(parents=True)
        with pa.OSFile(str(inside / "data-00000-of-00001.arrow"), "wb") as sink:
            with pa.ipc.new_stream(sink, result.schema) as writer:
                writer.write_table(result)
        (inside / "dataset_info.json").write_text(json.dumps(features()))
        (inside / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [("X", "Y"), ("x", "y"), ("data", "target"), ("images", "labels"), ("features", "class")],
)
def test_arrays_under_usual_names(tmp_path: Path, inputs: str, labels: str) -> None:
    stored = {inputs: X, labels: Y + 1}
    actual = datasets.read(npz(tmp_path / "a.npz", **stored))
    np.testing.assert_array_equal(actual.inputs, X.astype(np.float32))
    assert actual.labels.tolist() == Y.tolist() and actual.names == ("1", "2", "3")
    parts = {f"{inputs}_train": X, f"{labels}_train": Y, f"{inputs}_val": X, f"{labels}_val": Y}
    split = datasets.read_splits(str(npz(tmp_path / "b.npz", **parts)), **WHOLE)
    assert [len(part.labels) for part in split] == [N, N, 0]
    (tmp_path / "npy").mkdir()
    for name, array in stored.items():
        np.save(tmp_path / "npy" / f"{name}.npy", array)
    for path in (tmp_path / "npy", tmp_path / "npy" / f"{inputs}.npy"):
        np.testing.assert_array_equal(datasets.read(path).inputs, actual.inputs)


def test_arrays_under_other_names(tmp_path: Path) -> None:
    arrays = {"cells_train": X, "kinds_train": Y, "cells_test": X[:6], "kinds_test": Y[:6]}
    path = npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="no training data.*cells_test.*--inputs and --label"):
        datasets.read_splits(str(path))
    actual = datasets.read_splits(str(path), inputs="cells_train", label="kinds_train", **WHOLE)
    assert [len(part.labels) for part in actual] == [N, 0, 6]
    form = datasets.prepared(actual)[1]
    again = datasets.read_splits(str(path), preprocessing=form, **WHOLE)
    assert [len(part.labels) for part in again] == [N, 0, 6]
    assert len(datasets.read_inputs(path, form)) == N + 6
    assert len(datasets.read_inputs(npz(tmp_path / "new.npz", x=X[:4]), form)) == 4
    with pytest.raises(ValueError, match="has no array 'cell'; it has .*'cells_train'"):
        datasets.read_splits(str(path), inputs="cell")


def test_one_set_with_a_test_part_of_its_own(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", x=X, y=Y, x_test=X[:6], y_test=Y[:6])
    actual = datasets.read_splits(str(path), validation=0.2)
    assert [len(part.labels) for part in actual] == [48, 12, 6]
    np.testing.assert_array_equal(actual.test.inputs, X[:6].astype(np.float32))
    expected = np.concatenate([X, X[:6]]).astype(np.float32)
    np.testing.assert_array_equal(datasets.read(path).inputs, expected)
    form = datasets.prepared(actual)[1]
    np.testing.assert_array_equal(datasets.read_inputs(path, form), expected)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_text_tables(tmp_path: Path, delimiter: str) -> None:
    path = table(tmp_path / "a.csv", {"": range(N), **columns(kind=KINDS)}, delimiter)
    actual = datasets.read(path, label="kind")
    np.testing.assert_array_equal(actual.inputs, X.astype(np.float32))
    assert actual.labels.tolist() == Y.tolist() and actual.names == NAMES
    assert any("without a name counts the rows: left out" in notice for notice in actual.notices)
    assert [column.name for column in actual.form.columns] == ["a", "b", "c"]


def test_quoted_cells_booleans_and_decimal_commas(tmp_path: Path) -> None:
    text = '"a";"the ""b""";ok;class\n"1,5";"-2,25";TRUE;x\n3;0,5;false;y\n'
    (tmp_path / "a.csv").write_text(text)
    actual = datasets.read(tmp_path / "a.csv")
    assert actual.inputs.tolist() == [[1.5, -2.25, 1], [3, 0.5, 0]]
    assert [column.name for column in actual.form.columns] == ["a", 'the "b"', "ok"]
    (tmp_path / "r.csv").write_text('a b class\n"1" 2 3 x\n'.replace(" ", ",") + '"2",4,5,y\n')
    assert datasets.read(tmp_path / "r.csv").inputs.tolist() == [[2, 3], [4, 5]], "names of rows"


def test_missing_values_and_text(tmp_path: Path) -> None:
    colors = [("red", "green", "blue")[i % 3] for i in range(N)]
    b = [f"{x}" for x in X[:, 1]]
    b[5], colors[7] = "NA", ""
    path = table(tmp_path / "a.csv", {**columns(color=colors, kind=KINDS), "b": b})
    with pytest.raises(ValueError, match="row 7, column 'b': no value .1 of 60 are missing.*drop"):
        datasets.read(path, label="kind", one_hot=True)
    with pytest.raises(ValueError, match="row 2, column 'color': 'red' is not a number.*one-hot"):
        datasets.read(path, label="kind", missing="mean")
    fills: list[tuple[Missing, Any]] = [("mean", np.mean), ("median", np.median)]
    for how, expected in fills:
        actual = datasets.read(path, label="kind", missing=how, one_hot=True)
        assert actual.inputs.shape == (N, 6)
        assert actual.inputs[5, 1] == pytest.approx(expected(np.delete(X[:, 1], 5)))
        assert actual.inputs[7, 3:].tolist() == [1, 0, 0], "blue, among the most frequent"
    actual = datasets.read(path, label="kind", missing="drop", one_hot=True)
    assert len(actual.labels) == N - 2 and "2 of 60 rows" in " ".join(actual.notices)
    again = datasets.read(path, preprocessing=actual.form)
    np.testing.assert_array_equal(again.inputs, actual.inputs)
    with pytest.raises(ValueError, match="row 7, column 'b': no value, and the training data had"):
        datasets.read_inputs(path, actual.form)
    actual = datasets.read(path, label="kind", drop=("color", "b"))
    assert actual.inputs.shape == (N, 2)


def test_what_fills_and_categories_are_the_training_parts(tmp_path: Path) -> None:
    for part, shift, colors in (("train", 0, "rg"), ("test", 100, "rb")):
        a = [f"{x + shift}" for x in range(20)]
        a[3] = ""
        cells = {"a": a, "color": [colors[i % 2] for i in range(20)], "label": [0, 1] * 10}
        table(tmp_path / f"{part}.csv", cells)
    actual = datasets.read_splits(
        str(tmp_path), missing="mean", one_hot=True, validation=0.0
    )  # fmt: skip
    fill = np.mean(np.delete(np.arange(20), 3))
    assert actual.test.inputs[3, 0] == pytest.approx(fill)
    assert actual.test.inputs[1, 1:].tolist() == [0, 0], "a color that was never seen"
    assert "'b' does not occur in the training part" in " ".join(actual.train.notices)
    form = datasets.prepared(actual)[1]
    assert form.columns[1].categories == ("g", "r")
    later = datasets.read_inputs(tmp_path / "test.csv", form)
    np.testing.assert_array_equal(later, actual.test.inputs)
    table(tmp_path / "new.csv", {"color": ["g"], "other": ["?"], "a": [1]})
    assert datasets.read_inputs(tmp_path / "new.csv", form).tolist() == [[1, 1, 0]]
    table(tmp_path / "new.csv", {"color": ["g"], "aa": [1]})
    with pytest.raises(ValueError, match="has no column 'a', which the model reads. Nearest: 'aa'"):
        datasets.read_inputs(tmp_path / "new.csv", form)
    table(tmp_path / "new.csv", {"A": [1, 2], "B": [1, 2], "label": [0, 1]})  # not one of them
    with pytest.raises(ValueError, match="has no column 'a', which the model reads"):
        datasets.read_splits(str(tmp_path / "new.csv"), preprocessing=form)


def test_a_column_without_a_value_is_filled_whatever_its_type(tmp_path: Path) -> None:
    colors = ["red", "green", "red"] * 20
    path = table(tmp_path / "a.csv", {"a": X[:, 0], "color": colors, "label": Y})
    result = datasets.read_splits(str(path), missing="mean", one_hot=True)
    form = datasets.prepared(result)[1]
    mean = form.columns[0].fill
    for name, color in (("empty", [None, None]), ("numbers", ["inf", None])):
        new = table(tmp_path / f"{name}.csv", {"a": [1, 2], "color": [c or "" for c in color]})
        assert datasets.read_inputs(new, form)[1].tolist() == [2, 0, 1], "red, the most frequent"
    of_text = pa.table({"a": pa.array([None, None], pa.string()), "color": ["red", "green"]})
    later = datasets.read_inputs(parquet(tmp_path / "b.parquet", of_text), form)
    np.testing.assert_allclose(later, [[mean, 0, 1], [mean, 1, 0]], rtol=1e-6)


@pytest.mark.parametrize("form", ["a.csv", "a.parquet"])
def test_dropped_columns_are_not_there(tmp_path: Path, form: str) -> None:
    cells = columns(label=Y, target=Y + 1)
    path = tmp_path / form
    path = table(path, cells) if path.suffix == ".csv" else parquet(path, pa.table(cells))
    assert datasets.read(path, drop=("label",)).names == ("1", "2", "3"), "of target"
    with pytest.raises(ValueError, match="has no column 'label'"):
        datasets.read(path, drop=("label", "target"))
    with pytest.raises(ValueError, match="columns of labels and of inputs, got 1 and 0"):
        datasets.read(path, drop=("a", "b", "c", "target"))
    with pytest.raises(ValueError, match="has no column 'aa'. Nearest: 'a'"):
        datasets.read(path, drop=("aa",))


def test_a_test_table_without_labels_is_left_out(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", columns(label=KINDS))
    table(tmp_path / "test.csv", columns())
    actual = datasets.read_splits(str(tmp_path), validation=0.2, test=0.2)
    assert [len(part.labels) for part in actual] == [36, 12, 12]
    assert "test.csv has no labels: left out" in actual.train.notices
    form = datasets.prepared(actual)[1]
    np.testing.assert_array_equal(
        datasets.read_inputs(tmp_path / "test.csv", form), X.astype(np.float32)
    )


def test_parquet_with_text_labels(tmp_path: Path) -> None:
    b = [None if i == 4 else x for i, x in enumerate(X[:, 1])]
    cells = {"a": X[:, 0], "b": b, "color": pa.array(KINDS).dictionary_encode(), "kind": KINDS}
    path = parquet(tmp_path / "a.parquet", pa.table(cells))
    with pytest.raises(ValueError, match="row 4, column 'b': no value"):
        datasets.read(path, label="kind", one_hot=True)
    actual = datasets.read(path, label="kind", one_hot=True, missing="most_frequent")
    assert actual.inputs.shape == (N, 5) and actual.names == NAMES
    digits = parquet(tmp_path / "c.parquet", pa.table({"a": [str(y) for y in Y], "label": Y}))
    with pytest.raises(ValueError, match="row 0, column 'a': '0' is text, not a number.*one-hot"):
        datasets.read(digits)
    assert datasets.read(digits, one_hot=True).inputs.shape == (N, 3)
    pa_lists = pa.table({"x": list(X), "label": KINDS})
    actual = datasets.read(parquet(tmp_path / "b.parquet", pa_lists))
    np.testing.assert_array_equal(actual.inputs, X.astype(np.float32))


@pytest.mark.parametrize("form", ["hub", "disk", "one file"])
def test_folders_of_datasets(tmp_path: Path, form: str) -> None:
    if form == "hub":
        parquet(tmp_path / "data/train-00000-of-00002-0f.parquet", image_table(slice(0, 30)))
        parquet(tmp_path / "data/train-00001-of-00002-0f.parquet", image_table(slice(30, 45)))
        path = parquet(tmp_path / "data/test-00000-of-00001-0f.parquet", image_table(slice(45, N)))
        path = path.parent.parent
    elif form == "disk":
        path = saved_to_disk(tmp_path / "disk")
    else:
        path = parquet(tmp_path / "all.parquet", image_table(slice(0, N)))
    actual = datasets.read(path)
    np.testing.assert_array_equal(actual.inputs[..., 0], PIXELS)
    assert actual.labels.tolist() == Y.tolist() and actual.names == NAMES


def test_folders_of_images_with_and_without_parts(tmp_path: Path) -> None:
    actual = datasets.read(image_folder(tmp_path / "all"))
    np.testing.assert_array_equal(actual.inputs[..., 0], PIXELS[ORDER])
    assert actual.labels.tolist() == Y[ORDER].tolist() and actual.names == NAMES
    for part, rows in (("Train", slice(0, 45)), ("val", slice(0, 3)), ("test", slice(45, N))):
        image_folder(tmp_path / "parts" / part, PIXELS[rows], list(KINDS[rows]))
    (tmp_path / "parts/Train/ant/Thumbs.txt").write_text("no image")
    split = datasets.read_splits(str(tmp_path / "parts"))
    assert [len(part.labels) for part in split] == [45, 3, 15]
    assert "files that are not images are left out: 1" in split.train.notices
    form = datasets.prepared(split)[1]
    later = datasets.read_inputs(tmp_path / "all" / "ant", form)
    np.testing.assert_array_equal(later[..., 0], PIXELS[Y == 0])


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 4), ("LA", 4)]
)
def test_kinds_of_images(tmp_path: Path, mode: str, channels: int) -> None:
    for i in range(4):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        gray = Image.fromarray(PIXELS[i])
        image = gray.convert("RGB").quantize(16) if mode == "P" else gray.convert(mode)
        image.save(tmp_path / "ab"[i % 2] / f"{i}.png")
    actual = datasets.read(tmp_path)
    assert actual.inputs.shape == (4, 4, 4, channels)
    if mode != "1":
        np.testing.assert_array_equal(actual.inputs[0, ..., 0], PIXELS[0])


def test_deep_images_and_images_of_several_sizes(tmp_path: Path) -> None:
    deep = PIXELS.astype(np.uint16) * 257
    actual = datasets.read(image_folder(tmp_path / "deep", deep))
    np.testing.assert_array_equal(actual.inputs[..., 0], deep[ORDER])
    mixed = image_folder(tmp_path / "mixed")
    (mixed / "bee" / "x.png").write_bytes(png(np.full((6, 8, 3), 9, np.uint8)))
    with pytest.raises(ValueError, match=r"00.png is 4x4 .*x.png is 6x8. Resize .*--image-size"):
        datasets.read(mixed)
    actual = datasets.read(mixed, image_size=(5, 4))
    assert actual.inputs.shape == (N + 1, 5, 4, 3) and actual.form.images == Images("RGB", True)
    assert "(60 L, 1 RGB) are all read as RGB" in " ".join(actual.notices)
    (mixed / "bee" / "y.png").write_bytes(png(PIXELS[0])[:40])
    with pytest.raises(ValueError, match="y.png: not a readable image"):
        datasets.read(mixed, image_size=(5, 4))


def test_images_of_floats_are_as_stored(tmp_path: Path) -> None:
    floats = PIXELS.astype(np.float32) / 255
    for i, image in enumerate(floats[:4]):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i}.tif")
    np.testing.assert_array_equal(datasets.read(tmp_path).inputs[..., 0], floats[[0, 2, 1, 3]])
    gray = datasets.prepared(datasets.read_splits(str(image_folder(tmp_path / "gray"))))[1]
    with pytest.raises(ValueError, match="0.tif: not a readable image .its pixels are floats"):
        datasets.read_inputs(tmp_path / "a", gray)
    image_folder(tmp_path)
    with pytest.raises(ValueError, match="0.tif has floats as pixels, .* whole numbers"):
        datasets.read(tmp_path)


def test_gray_images_of_8_and_16_bits_have_one_scale(tmp_path: Path) -> None:
    deep, shallow = (tmp_path / "x" / name for name in ("a", "b"))
    deep.mkdir(parents=True)
    shallow.mkdir()
    large = PIXELS[:2].astype(np.uint16) * 257
    large[0, 0, 0] += 100  # what 8 bits cannot hold stays
    for i in range(2):
        Image.fromarray(large[i]).save(deep / f"{i}.png")
        Image.fromarray(PIXELS[i]).save(shallow / f"{i}.png")
    actual = datasets.read(tmp_path / "x")
    assert "(2 L, 2 I;16) are all read as I;16, those of 8 bits times 257" in actual.notices[-1]
    np.testing.assert_array_equal(actual.inputs[:2, ..., 0], large)
    np.testing.assert_array_equal(actual.inputs[2:, ..., 0], PIXELS[:2] * 257.0)
    np.testing.assert_array_equal(datasets.read_inputs(shallow, actual.form), actual.inputs[2:])
    # Colors stay colors.
    Image.fromarray(PIXELS[0]).convert("RGB").save(shallow / "2.png")
    actual = datasets.read(tmp_path / "x")
    assert "are all read as RGB, those of 16 bits divided by 257" in actual.notices[-1]
    np.testing.assert_array_equal(actual.inputs[1], np.repeat(PIXELS[1][..., None], 3, axis=-1))
    np.testing.assert_array_equal(actual.inputs[4], np.repeat(PIXELS[0][..., None], 3, axis=-1))


def test_idx_folders(tmp_path: Path) -> None:
    actual = datasets.read_splits(str(idx_folder(tmp_path)), validation=0.0)
    assert [len(part.labels) for part in actual] == [45, 0, 15]
    form = datasets.prepared(actual)[1]
    later = datasets.read_inputs(tmp_path / "t10k-images-idx3-ubyte", form)
    np.testing.assert_array_equal(later[..., 0], PIXELS[:15])


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    bomb = bytearray(png(PIXELS[0]))
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2
    (folder / "ant" / "bomb.png").write_bytes(bytes(bomb))
    with pytest.raises(ValueError, match="bomb.png: not a readable image"):
        datasets.read(folder, image_size=(4, 4))


def test_choices_that_do_nothing_are_refused(tmp_path: Path) -> None:
    x, y = np.arange(60, dtype=np.float32).reshape(30, 2), np.arange(30) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    (tmp_path / "a.csv").write_text(
        "u,v,label\n" + "".join(f"{u},{v},{w}\n" for (u, v), w in zip(x, y, strict=True))
    )
    folder = image_folder(tmp_path / "images")
    for name in ("digits", tmp_path / "a.npz", folder):
        with pytest.raises(ValueError, match=r"no column.*--drop-columns"):
            datasets.read_splits(str(name), drop=("u",))
    for name in ("digits", tmp_path / "a.npz", tmp_path / "a.csv"):
        with pytest.raises(ValueError, match=r"no image files.*--image-size"):
            datasets.read_splits(str(name), image_size=(4, 4))
    np.savez(
        tmp_path / "pictures.npz",
        x=np.zeros((30, 4, 4, 1), np.float32),
        y=np.array(["ant", "bee"])[y],
    )
    arrays, pictures = (datasets.read(name).form for name in (tmp_path / "a.npz", folder))
    assert pictures is not None and pictures.shape == (4, 4, 1)
    for name, form in (("a.npz", arrays), ("pictures.npz", pictures)):
        with pytest.raises(ValueError, match=r"no image files.*--image-size"):
            datasets.read(tmp_path / name, image_size=(4, 4), preprocessing=form)
    with pytest.raises(ValueError, match=r"image_size must be that of the model, \(4, 4\), got"):
        datasets.read(folder, image_size=(3, 2), preprocessing=pictures)
