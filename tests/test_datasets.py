"""Data sets: the embedded digits, fixed splits, readers, and every way a file can be bad."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtl_jax import datasets

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 4, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.uint8)
ROWS = [1, 5, 6, 9, 12, 14, 15, 16]  # the first test rows of the digits, with seed 0


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    """An array as the idx format has it: big-endian."""
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def test_the_digits_ship_with_the_package() -> None:
    actual = datasets.digits()
    assert (actual.inputs.shape, actual.inputs.dtype) == ((1797, 8, 8, 1), np.float32)
    assert (actual.labels.shape, actual.labels.dtype, actual.classes) == ((1797,), np.int32, 10)
    # Published with the data: the number of images of each digit, values 0..16.
    assert np.bincount(actual.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (actual.inputs.min(), actual.inputs.max()) == (0, 16)
    assert float(actual.inputs.sum(dtype=np.float64)) == 561718


def test_datasets_print_their_shapes() -> None:
    data = datasets.digits()
    assert repr(data) == (
        "Dataset('UCI handwritten digits', inputs float32[1797, 8, 8, 1], labels int32[1797], "
        "10 classes)"
    )
    assert len(repr(datasets.stratified(data, validation=0.2, test=0.3))) < 400


def test_splits_are_disjoint_stratified_and_fixed() -> None:
    data = datasets.digits()
    marked = data._replace(inputs=np.arange(1797, dtype=np.float32)[:, None])
    parts = datasets.stratified(marked, validation=0.2, test=0.3)
    rows = [part.inputs[:, 0].astype(int) for part in parts]
    assert sorted(np.concatenate(rows).tolist()) == list(range(1797))
    assert all((np.diff(part) > 0).all() for part in rows), "each part keeps the order"
    whole = np.bincount(data.labels)
    for part, share in zip(parts, (0.5, 0.2, 0.3), strict=True):
        assert np.abs(np.bincount(part.labels) - share * whole).max() <= 1
    again = datasets.stratified(marked, validation=0.2, test=0.3)
    other = datasets.stratified(marked, validation=0.2, test=0.3, seed=1)
    assert all((a.inputs == b.inputs).all() for a, b in zip(parts, again, strict=True))
    assert (other.test.inputs != parts.test.inputs).any()
    assert rows[2][:8].tolist() == ROWS, "recorded: the same on every machine"


@pytest.mark.parametrize(
    ("validation", "test", "words"),
    [
        (0.5, 0.5, "sum below 1"),
        (0.2, -0.1, "fractions >= 0"),
        (0.001, 0.2, "class 0 has 178 examples, too few"),
    ],
)
def test_impossible_splits_are_refused(validation: float, test: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        datasets.stratified(datasets.digits(), validation=validation, test=test)


def test_standardizing_reads_the_training_part_alone() -> None:
    parts = datasets.stratified(datasets.digits(), validation=0.2, test=0.3)
    spoilt = parts._replace(test=parts.test._replace(inputs=parts.test.inputs * 1000 + 7))
    a, b = datasets.standardized(parts), datasets.standardized(spoilt)
    np.testing.assert_array_equal(a.train.inputs, b.train.inputs)
    np.testing.assert_allclose(a.train.inputs.mean(), 0, atol=1e-4)
    np.testing.assert_allclose(a.train.inputs.std(), 1, atol=1e-4)
    measured = datasets.standardizer(parts.train)
    expected = (spoilt.test.inputs - measured.mean) / measured.scale
    np.testing.assert_array_equal(b.test.inputs, expected)
    # Vectors: entry by entry, and a constant entry is only shifted.
    vectors = datasets.checked("v", np.array([[1, 5], [3, 5], [5, 5]]), np.array([0, 1, 0]))
    fitted = datasets.standardizer(vectors).apply(vectors).inputs
    np.testing.assert_allclose(fitted[:, 0], [-1.2247449, 0, 1.2247449], rtol=1e-6)
    np.testing.assert_array_equal(fitted[:, 1], 0)


def test_few_labels_and_some_classes() -> None:
    data = datasets.digits()
    few = datasets.per_class(data, 7, seed=3)
    assert np.bincount(few.labels).tolist() == [7] * 10
    np.testing.assert_array_equal(few.inputs, datasets.per_class(data, 7, seed=3).inputs)
    with pytest.raises(ValueError, match="class 0 has 178 examples, but 179 are needed"):
        datasets.per_class(data, 179)
    upper = datasets.only_classes(data, range(5, 10))
    assert upper.names == tuple("56789") and datasets.only_classes(data, range(5)).names == ()
    assert upper.classes == 5 and np.bincount(upper.labels).tolist() == [182, 181, 179, 174, 180]
    with pytest.raises(ValueError, match="no example of classes"):
        datasets.only_classes(data, range(10, 12))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx_pairs(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    # Whatever the name says: the first bytes tell whether a file is packed.
    (tmp_path / "images-idx3-ubyte").write_bytes(pack(idx(IMAGES)))
    (tmp_path / "labels-idx1-ubyte.gz").write_bytes(pack(idx(LABELS)))
    actual = datasets.read(tmp_path / "images-idx3-ubyte", tmp_path / "labels-idx1-ubyte.gz")
    np.testing.assert_array_equal(actual.inputs, IMAGES[..., None])
    np.testing.assert_array_equal(actual.labels, LABELS)
    assert (actual.inputs.dtype, actual.labels.dtype, actual.classes) == (np.float32, np.int32, 3)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_every_idx_type(tmp_path: Path, kind: int, dtype: str) -> None:
    array = np.array([[1, 2, 3], [100, 0, 5]], dtype) * (-1 if dtype != "u1" else 1)
    (tmp_path / "x").write_bytes(idx(array, kind))
    actual = datasets.read_idx_array(tmp_path / "x")
    assert actual.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(actual, array)


def test_npz_and_csv(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS, images=IMAGES + 1)
    actual = datasets.read(tmp_path / "a.npz")
    assert actual.inputs.shape == (6, 4, 3, 1) and actual.classes == 3
    other = datasets.read(tmp_path / "a.npz", inputs="images", label="y_train", classes=9)
    assert other.classes == 9
    np.testing.assert_array_equal(other.inputs[..., 0], (IMAGES + 1).astype(np.float32))
    text = "\ufeffsize, kind ,weight\n1,cat,2.5\n-3e2,ant,0\n\n4,cat,1\n"  # as spreadsheets do
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    actual = datasets.read(tmp_path / "a.csv", label="kind")
    np.testing.assert_array_equal(actual.inputs, np.array([[1, 2.5], [-300, 0], [4, 1]]))
    assert actual.labels.tolist() == [1, 0, 1] and actual.classes == 2
    (tmp_path / "b.csv").write_text("label,a\n10,1\n2,0\n")
    assert datasets.read(tmp_path / "b.csv").labels.tolist() == [1, 0], "codes are numbered by size"


def npz(**arrays: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    return write


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(content), None)[1]


def spoilt(path: Path) -> None:
    """A zip whose compressed stream was altered."""
    npz(x_train=IMAGES, y_train=LABELS)(path)
    content = bytearray(path.read_bytes())
    content[70:90] = bytes(20)
    path.write_bytes(content)


def cut(path: Path) -> None:
    npz(x_train=IMAGES, y_train=LABELS)(path)
    path.write_bytes(path.read_bytes()[:-30])


NAN = np.where(np.arange(12).reshape(6, 2) == 5, np.nan, 1.0)
BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("a.npz", raw(b""), "the file is empty"),
    ("a.npz", raw(b"not a zip at all"), "not a readable npz"),
    ("a.npz", cut, "not a readable npz"),
    ("a.npz", spoilt, "not a readable npz"),
    ("a.npz", lambda path: np.save(path.open("wb"), IMAGES), "a single array, not an npz"),
    ("a.npz", npz(x_train=IMAGES, y=LABELS), r"no array 'y_train'; it has \['x_train', 'y'\]"),
    ("a.npz", npz(x_train=IMAGES, y_train=LABELS[:5]), r"inputs \[6, 4, 3, 1\] and labels \[5\]"),
    ("a.npz", npz(x_train=IMAGES[:0], y_train=LABELS[:0]), "holds no examples"),
    ("a.npz", npz(x_train=NAN, y_train=LABELS), "1 of 6 examples hold NaN .* row 2"),
    (
        "a.npz",
        npz(x_train=np.full((6, 1), 1e300), y_train=LABELS),
        "6 of 6 examples hold NaN or infinity",
    ),
    ("a.npz", npz(x_train=NAN.astype("U3"), y_train=LABELS), "inputs must be numbers, got <U3"),
    ("a.npz", npz(x_train=IMAGES, y_train=np.zeros(6)), "every label is 0: one class"),
    ("a.npz", npz(x_train=IMAGES, y_train=LABELS - 1.0), "0..1, got -1 at row 0"),
    ("a.npz", npz(x_train=IMAGES, y_train=LABELS + 0.5), "whole numbers, got 0.5 at row 0"),
    ("a.npz", npz(x_train=IMAGES, y_train=LABELS + np.nan), "whole numbers, got nan at row 0"),
    ("a.npz", npz(x_train=IMAGES, y_train=[0, 1, 0, 1, 0, np.inf]), "got inf at row 5"),
    ("a.csv", raw(b""), "a header line and at least one row, got 0 line"),
    ("a.csv", raw(b"a,label\n"), "a header line and at least one row, got 1 line"),
    ("a.csv", raw(b"a,lable\n1,2\n"), "no column 'label'. Nearest: 'lable'"),
    ("a.csv", raw(b"a,label\n1,2\nx,3\n"), "row 3, column 'a': 'x' is not a number"),
    ("a.csv", raw(b"a,label\n1,2\n1\n"), "row 3 has 1 cells, but the header has 2"),
    ("a.csv", raw(b"a,label\n1,2\n1,\n"), "row 3 has no label"),
    ("a.csv", raw(b"a,label\n1,0\nnan,1\n"), "row 3, column 'a': no value .1 of 2 are missing"),
    ("a.csv", raw(b"a,label\n1,4\n2,4\n"), "every label is 4: one class"),
    ("a.csv", raw(b"\xff\x00a"), "not a CSV text file"),
    ("images", raw(b""), "the file is empty"),
    ("images", raw(idx(IMAGES)[:-1]), r"holds 87 bytes, but its header \[6, 4, 3\] of uint8 asks"),
    ("images", raw(idx(IMAGES)[:9]), "holds 9 bytes"),
    ("images", raw(idx(IMAGES) + b"x"), "holds 89 bytes"),
    ("images", raw(b"\x01" + idx(IMAGES)), "not an idx file: the first bytes are 01 00 00 08"),
    ("images", raw(idx(IMAGES, 0x07)), "not an idx file"),
    ("images", raw(gzip.compress(idx(IMAGES))[:-9]), "damaged gzip"),
    ("images", raw(gzip.compress(idx(IMAGES))[:12] + bytes(60)), "damaged gzip"),
    ("images", raw(idx(IMAGES[:5])), "Are these two files of one split"),
]


@pytest.mark.parametrize(("name", "write", "words"), BAD)
def test_bad_files_say_what_is_wrong(
    tmp_path: Path, name: str, write: Callable[[Path], None], words: str
) -> None:
    (tmp_path / "labels").write_bytes(idx(LABELS))
    write(tmp_path / name)
    with pytest.raises(ValueError, match=words) as caught:
        datasets.read(tmp_path / name, tmp_path / "labels", target="classes")
    assert str(tmp_path / name) in str(caught.value), "the file is named"


@pytest.mark.parametrize("name", ["a.npz", "a.csv", "images"])
def test_missing_and_unreadable_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        datasets.read(tmp_path / name, tmp_path / "labels")
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: has no train-images-idx file.*it has nothing"):
        datasets.read(tmp_path / name, tmp_path / "labels")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, x_train=IMAGES, y_train=np.array([{}] * 6, object))
    with pytest.raises(ValueError, match="not a readable npz .*allow_pickle"):
        datasets.read(tmp_path / "a.npz")


def test_images_need_a_file_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an idx file of images needs a second one"):
        datasets.read(tmp_path / "train-images-idx3-ubyte")


def test_given_classes_bound_the_labels() -> None:
    part = datasets.checked("part", np.ones((3, 2)), np.zeros(3, int), classes=4)
    assert part.classes == 4, "a part may lack classes"
    with pytest.raises(ValueError, match=r"labels must lie in 0..3, got 4 at row 1"):
        datasets.checked("part", np.ones((3, 2)), np.array([0, 4, 1]), classes=4)
