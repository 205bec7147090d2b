"""Splits of the data that a text names: digits, an npz, a folder of idx files, a CSV."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtl_jax import datasets

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (40, 4, 4), dtype=np.uint8)
LABELS = np.arange(40, dtype=np.uint8) % 4


def test_digits_are_split_and_standardized_from_the_training_part_alone() -> None:
    splits = datasets.standardized(datasets.read_splits("digits"))
    assert sum(len(part.labels) for part in splits) == 1797
    assert abs(float(splits.train.inputs.mean())) < 1e-5
    assert abs(float(splits.train.inputs.std()) - 1) < 1e-5
    assert abs(float(splits.test.inputs.mean())) > 1e-5


@pytest.mark.parametrize("choice", [{"inputs": "b"}, {"label": "b"}])
def test_a_choice_of_columns_that_nothing_reads_is_refused(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"digits: has no columns or arrays to choose"):
        datasets.read_splits("digits", **choice)
    table = tmp_path / "table.csv"
    table.write_text("a,b,c,label\n" + "".join(f"{i},{i % 3},{-i},{i % 2}\n" for i in range(40)))
    if "label" in choice:
        assert datasets.read_splits(str(table), **choice).train.classes == 3
        return
    with pytest.raises(ValueError, match="has no column 'b' that names image files"):
        datasets.read_splits(str(table), **choice)


def test_npz_in_mnist_style_keeps_its_test_part(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:8], y_test=LABELS[:8])
    splits = datasets.read_splits(str(path), validation=0.2)
    assert [len(part.labels) for part in splits] == [32, 8, 8]
    assert splits.train.inputs.shape == (32, 4, 4, 1)
    assert np.array_equal(splits.test.inputs[..., 0], IMAGES[:8])


def test_npz_with_one_set_is_split(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=RNG.normal(size=(40, 3)), y=LABELS)
    splits = datasets.read_splits(str(path), validation=0.2, test=0.2)
    assert [len(part.labels) for part in splits] == [24, 8, 8]
    assert splits.train.classes == 4


def test_npz_with_its_own_validation_part(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    parts = {"x_train": IMAGES, "x_val": IMAGES, "x_test": IMAGES}
    np.savez(path, y_train=LABELS, y_val=LABELS, y_test=LABELS, allow_pickle=False, **parts)
    assert [len(part.labels) for part in datasets.read_splits(str(path))] == [40, 40, 40]


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def test_a_folder_of_idx_files_zipped_or_not(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES[:4]))
    with pytest.raises(ValueError, match="has no t10k-labels-idx file"):
        datasets.read_splits(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    splits = datasets.read_splits(str(tmp_path), validation=0.5)
    assert [len(part.labels) for part in splits] == [20, 20, 4]
    assert splits.train.inputs.shape[1:] == (4, 4, 1)


def test_csv_by_its_label_column(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    rows = [f"{i / 10},{i % 3},{'ab'[i % 2]}" for i in range(20)]
    path.write_text("\n".join(["height,width,kind", *rows]))
    splits = datasets.read_splits(str(path), label="kind", validation=0.2, test=0.2)
    assert [len(part.labels) for part in splits] == [12, 4, 4]
    assert splits.train.inputs.shape[1:] == (2,)
    with pytest.raises(ValueError, match=r"no column 'label'.*'kind'"):
        datasets.read_splits(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.npz", b"", "is empty"),
        ("torn.npz", b"PK\3\4 but no more", "npz"),
        ("empty.csv", b"", "header line"),
        ("data.txt", b"1 2 3", "not recognized by its name"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        datasets.read_splits(str(path))
    assert name in str(error.value)


def test_missing_files_and_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        datasets.read_splits(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="has no train-images-idx file"):
        datasets.read_splits(str(tmp_path))
    path = tmp_path / "data.npz"
    np.savez(path, pictures=IMAGES)
    with pytest.raises(ValueError, match="it has \\['pictures'\\]"):
        datasets.read_splits(str(path))
    np.savez(path, x_train=IMAGES, labels=LABELS)
    with pytest.raises(ValueError, match="has 'x_train' but not 'y_train'"):
        datasets.read_splits(str(path))
    np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS + 5)
    with pytest.raises(ValueError, match="labels must lie in 0..3, got 5"):
        datasets.read_splits(str(path))
