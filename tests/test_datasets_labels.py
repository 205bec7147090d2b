"""One rule for labels in every reader, and readers that survive any bytes within their bounds."""

import gzip
import io
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax import datasets

ROWS = np.arange(60)
X = ROWS[:, None].astype(np.float32)
Y = ROWS % 3
SAME = {
    "plain": Y,
    "[N, 1]": Y[:, None],
    "one-hot": np.eye(3)[Y],
    "one-hot of bools": np.eye(3, dtype=bool)[Y],
    "floats": Y.astype(np.float64),
    "text": np.array(["ant", "bee", "cat"])[Y],
    "text [N, 1]": np.array(["ant", "bee", "cat"])[Y][:, None],
    "bytes": np.array([b"ant", b"bee", b"cat"])[Y],
    "codes 10, 20, 30": (Y + 1) * 10,
    "codes from 1": Y + 1,
    "beyond int32": Y.astype(np.int64) * 2**32,
    "beyond int64": np.array([0, 5, 2**64 - 1], np.uint64)[Y],
    "halves": Y.astype(np.float16),
    "leading zeros": np.array(["007", "07", "7"])[Y],
    "numbers as text": np.array(["9", "10", "30"])[Y],
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_label_gives_the_same_classes(form: str) -> None:
    actual = datasets.checked("data", X, SAME[form])
    assert (actual.labels.dtype, actual.classes) == (np.int32, 3)
    assert actual.labels.tolist() == Y.tolist()
    assert len(actual.class_names()) == 3


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("plain", ("0", "1", "2")),
        ("codes 10, 20, 30", ("10", "20", "30")),
        ("beyond int32", ("0", "4294967296", "8589934592")),
        ("text", ("ant", "bee", "cat")),
        ("numbers as text", ("9", "10", "30")),
    ],
)
def test_names_are_kept_and_numbering_is_told(form: str, names: tuple[str, ...]) -> None:
    actual = datasets.checked("data", X, SAME[form])
    assert actual.class_names() == names
    assert actual.subset(ROWS[:2]).class_names() == names
    if form == "plain":
        assert actual.notices == ()
    else:
        listed = ", ".join(names)
        assert actual.notices == (f"labels {listed} are numbered 0..2 in this order",)


def test_names_of_classes_do_not_control_the_terminal() -> None:
    names = np.array(["a\x1b[2J", "b", "c"])
    named = datasets.checked("data", X, names[Y])
    assert named.notices == (r"labels a\x1b[2J, b, c are numbered 0..2 in this order",)
    refused = {
        r"class a\x1b\[2J has 20 examples, but 21": lambda: datasets.per_class(named, 21),
        r"class a\x1b\[2J has 1 examples, too few": lambda: datasets.stratified(
            named.subset(ROWS[:1])
        ),
        r"every label is a\x1b\[2J: one class": lambda: datasets.checked("d", X, names[0 * Y]),
        r"classes are a\x1b\[2J, b, c": lambda: datasets.checked("d", X, Y + 5, like=named),
        r"label 'd\x1b\[2J' at row 0": lambda: datasets.checked(
            "d", X, np.full(60, "d\x1b[2J"), like=named
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message.replace(r"\x", r"\\x")) as raised:
            call()
        assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.eye(3)[Y] + np.eye(3)[(Y + 1) % 3], "not one-hot, see row 0.*Several labels"),
        (np.eye(3)[Y] * 0.5, "not one-hot"),
        (ROWS, "60 different labels in 60 examples: an id or a measurement"),
        (np.array([f"user {i}" for i in ROWS]), "60 different labels"),
        (Y - 1, r"0..1, got -1 at row 0 \(20 such rows\)"),
        (np.where(ROWS == 7, "", "a"), "row 7 has no label"),
        (Y * 1e300, "whole numbers, got 1e"),
        (Y * 1j, "numbers or text, got complex128"),
        (np.array([None, 1, 2] * 20, object), "numbers or text, got object"),
        (Y[:, None, None], r"labels \[60, 1, 1\]"),
    ],
)
def test_what_is_no_label_is_refused(labels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"data: .*{words}"):
        datasets.checked("data", X, labels)


def test_parts_follow_the_numbering_of_the_first() -> None:
    train = datasets.checked("train", X, SAME["codes 10, 20, 30"])
    part = datasets.checked("test", X[:2], np.array([30, 10]), like=train)
    assert part.labels.tolist() == [2, 0] and part.class_names() == ("10", "20", "30")
    with pytest.raises(ValueError, match="test: label '40' at row 1 .* classes are 10, 20, 30"):
        datasets.checked("test", X[:2], np.array([30, 40]), like=train)
    plain = datasets.checked("train", X, Y)
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, got 3 at row 0"):
        datasets.checked("test", X[:1], np.array([3]), like=plain)
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, got 'ant' at row 0"):
        datasets.checked("test", X[:1], np.array(["ant"]), like=plain)


def test_splits_of_an_npz_share_names_and_unpack_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    test = {"x_test": X[:3], "y_test": np.array(["cat", "ant", "cat"])}
    np.savez(path, x_train=X, y_train=SAME["text"], **test)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("notes.npy", b"no array at all")  # fails if it is ever read
    actual = datasets.read_splits(str(path), validation=0.2)
    assert actual.test.labels.tolist() == [2, 0, 2]
    assert actual.train.class_names() == actual.test.class_names() == ("ant", "bee", "cat")


def test_a_second_label_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("label,a,label \n0,1,0\n1,2,1\n")
    with pytest.raises(ValueError, match="has 2 columns called 'label'"):
        datasets.read(tmp_path / "a.csv")


def test_large_whole_numbers_in_a_csv_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"label,a\n{2**53},1\n{2**53 + 1},2\n4294967296,3\n")
    actual = datasets.read(tmp_path / "a.csv")
    assert actual.labels.tolist() == [1, 2, 0] and actual.names[2] == str(2**53 + 1)


def test_standardizing_has_no_scale_of_its_own() -> None:
    """Units of a billionth, and seconds since 1970, are standardized as any others."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(60, 2))
    expected = (plain - plain.mean(0)) / plain.std(0)
    for unit, origin in ((1e-9, 0.0), (1e9, 0.0), (30.0, 1.7e9)):
        data = datasets.checked("data", plain * unit + origin, Y)
        actual = datasets.standardizer(data).apply(data).inputs
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    constant = datasets.checked("data", np.full((60, 1), 0.1), Y)
    assert datasets.standardizer(constant).apply(constant).inputs.tolist() == [[0.0]] * 60


def idx(shape: tuple[int, ...], content: bytes, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content


def test_a_gz_is_not_unpacked_past_its_header(tmp_path: Path) -> None:
    """A few kilobytes that unpack to many megabytes; their header speaks of six."""
    bomb = gzip.compress(idx((6,), bytes(50 * 2**20)))
    (tmp_path / "a").write_bytes(bomb)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"holds at least 15 bytes, but its header \[6\]"):
        datasets.read_idx_array(tmp_path / "a")
    (tmp_path / "b").write_bytes(gzip.compress(idx((2**32 - 1, 2**32 - 1), b"short")))
    with pytest.raises(ValueError, match="its header .* asks for"):
        datasets.read_idx_array(tmp_path / "b")
    assert time.process_time() - start < 2


def test_an_npz_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "<f8", "fortran_order": False, "shape": (10**11,)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x_train.npy", content.getvalue())
        file.writestr("y_train.npy", content.getvalue())
    with pytest.raises(ValueError, match="asks for 800000000000 bytes"):
        datasets.read(tmp_path / "a.npz")


def whole_npz() -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, x_train=X[:6], y_train=Y[:6])
    return content.getvalue()


WHOLE = {
    "a.npz": whole_npz(),
    "a.csv": b"label,a,b\n0,1,2\n1,3,4\n0,5,6\n",
    "a": idx((6, 2, 2), bytes(range(24))),
    "a.gz": gzip.compress(idx((6, 2, 2), bytes(range(24)))),
}


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(WHOLE)),
    place=st.integers(0, 400),
    put=st.binary(max_size=6),
    cut=st.integers(0, 3),
)
def test_any_bytes_are_data_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: int, put: bytes, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = WHOLE[name]
    place %= len(content)
    (folder / name).write_bytes(content[:place] + put + content[place + cut :])
    (folder / "labels").write_bytes(idx((6,), bytes([0, 1, 2, 0, 1, 2])))
    start = time.process_time()
    try:
        actual = datasets.read(folder / name, folder / "labels")
    except (ValueError, OSError) as error:
        assert name in str(error) and len(str(error)) < 1000
    else:
        assert len(actual.inputs) == len(actual.labels) and np.isfinite(actual.inputs).all()
    assert time.process_time() - start < 2


def test_codes_with_leading_zeros_keep_their_names_and_number_classes_that_have_none() -> None:
    codes = np.array(["007", "08", "1"])[Y]
    actual = datasets.checked("data", X, codes)
    assert actual.names == ("007", "08", "1")
    np.testing.assert_array_equal(datasets.checked("new", X, codes, like=actual).labels, Y)
    plain = datasets.checked("data", X, Y)
    padded = datasets.checked("new", X, np.array(["00", "01", "02"])[Y], like=plain)
    np.testing.assert_array_equal(padded.labels, Y)


def test_bytes_of_a_column_are_text_where_they_are(tmp_path: Path) -> None:
    kinds = {"text": [b"ant", b"bee", b"cat"], "other": [b"\xff", b"\x00", b"c"]}
    for name, cells in kinds.items():
        table = pa.table({"x": X[:, 0], "label": pa.array([cells[y] for y in Y], pa.binary())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    actual = datasets.read_splits(str(tmp_path / "text.parquet"))
    assert actual.train.names == ("ant", "bee", "cat")
    with pytest.raises(ValueError, match="<binary>"):
        datasets.read_splits(str(tmp_path / "other.parquet"))
