"""Damaged arrays, images, parquet and Arrow files: data, or one clear error that names the file."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import NAMES, PIXELS, X, Y, columns, image_table, png

from kdtl_jax import _columnar, datasets


def arrow() -> bytes:
    out, result = io.BytesIO(), image_table(slice(0, 6))
    with pa.ipc.new_stream(out, result.schema) as writer:
        writer.write_table(result)
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns(label=np.array(NAMES)[Y])), out)
    return out.getvalue()


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, X)
    return out.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, left out or put in."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(result)), rng.random()
        if how < 0.5:
            result[at] = rng.randrange(256)
        elif how < 0.7:
            del result[at : at + rng.randint(1, 30)]
        elif how < 0.9:
            result[at:at] = rng.randbytes(rng.randint(1, 6))
        else:
            result[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(result)


MADE = {"a.arrow": arrow, "a.parquet": parquet, "x.npy": npy, "a/1.png": lambda: png(PIXELS[0])}


@pytest.mark.parametrize(("name", "make"), MADE.items())
def test_any_bytes_are_data_or_one_clear_error(
    tmp_path: Path, name: str, make: Callable[[], bytes]
) -> None:
    content, rng, path = make(), random.Random(0), tmp_path / name
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(png(PIXELS[0]))
    np.save(tmp_path / "y.npy", Y)
    read = {".npy": path, ".png": tmp_path}.get(path.suffix, path)
    if path.suffix == ".png":
        (tmp_path / "y.npy").unlink()
    refused = 0
    for _ in range(150):
        path.write_bytes(damaged(content, rng))
        try:
            actual = datasets.read(read)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(tmp_path) in str(error) and len(str(error)) < 1000
        else:
            assert np.isfinite(actual.inputs).all()
    assert refused


def test_columns_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    """Their pages are broken here: whoever reads them fails."""
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet())
    whole = datasets.read(path)
    stored = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[stored.data_page_offset : stored.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable parquet file"):
        datasets.read(path)
    actual = datasets.read(path, drop=["b"])
    np.testing.assert_array_equal(actual.inputs, whole.inputs[:, [0, 2]])
    # A model's own columns, with targets and without.
    for same in (datasets.read(path, preprocessing=actual.form).inputs,
                 datasets.read_inputs(path, actual.form)):  # fmt: skip
        np.testing.assert_array_equal(same, actual.inputs)
    with pytest.raises(ValueError, match="has no column 'd'. Nearest: "):
        datasets.read(path, drop=["d"])


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_columns_of_arrow_files_are_chosen_too(tmp_path: Path, kind: str) -> None:
    table, out = pa.table(columns(label=np.array(NAMES)[Y])), io.BytesIO()
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(out, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(out.getvalue())
    np.testing.assert_array_equal(
        datasets.read(tmp_path / "a.arrow", drop=["b"]).inputs, X[:, [0, 2]].astype(np.float32)
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_a_table_that_unpacks_to_thousands_of_times_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(_columnar, "LARGE_BYTES", 2**18)
    monkeypatch.setattr(_columnar, "MAX_COMPRESSION_RATIO", 100)
    rows, path = 1_000_000, tmp_path / f"a.{kind}"
    zeros = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([0.0]))
    table = pa.table({"label": zeros, "a": zeros})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        make = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with make(path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=rows // 2)
    message = "1,000,000 rows of 2 columns, " if kind == "parquet" else "bytes, unpacked,"
    with pytest.raises(ValueError, match=f"{message}.* in .* bytes"):
        datasets.read(path)


def test_lists_that_unpack_to_thousands_of_times_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_columnar, "LARGE_BYTES", 2**18)
    zeros = pa.array(np.zeros(1_000_000, np.int8))
    x = pa.FixedSizeListArray.from_arrays(zeros, 25_000)
    pq.write_table(pa.table({"x": x, "label": [0, 1] * 20}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="40 rows of 2 columns, 1,000,040 values, in "):
        datasets.read(tmp_path / "a.parquet")
