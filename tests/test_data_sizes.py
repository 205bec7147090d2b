"""What a model does not take is refused by its header, before it is read; the rest is read once."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounds import bounded
from data_files import table

from kdtl_jax import datasets
from kdtl_jax.datasets import Column, Preprocessing

ROWS, WIDTH = 30_000, 500  # bytes, 60 MB as float32
FORM = Preprocessing("classes", (), 2, (7,))


def sparse_npy(path: Path, dtype: str = "u1") -> Path:
    """An array of zeros that takes no room on the disk."""
    np.lib.format.open_memmap(path, "w+", dtype, (ROWS, WIDTH))
    return path


def npy_folder(folder: Path) -> Path:
    np.save(folder / "y.npy", np.arange(ROWS) % 2)
    sparse_npy(folder / "x.npy")
    return folder


def npz(folder: Path) -> Path:
    x = np.zeros((ROWS, WIDTH), np.uint8)
    np.savez_compressed(folder / "data.npz", x=x, y=np.arange(ROWS) % 2)
    return folder / "data.npz"


def idx(folder: Path) -> Path:
    head = bytes([0, 0, 8, 3]) + struct.pack(">III", ROWS, 20, 25)
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", ROWS) + bytes([0, 1]) * (ROWS // 2)
    for part in ("train", "t10k"):
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        with (folder / f"{part}-images-idx3-ubyte").open("wb") as file:
            file.write(head)
            file.truncate(len(head) + ROWS * WIDTH)
    return folder


def lists() -> pa.Table:
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(ROWS * WIDTH, np.uint8)), WIDTH)
    return pa.table({"x": x, "y": pa.array(np.arange(ROWS) % 2)})


def parquet(folder: Path) -> Path:
    pq.write_table(lists(), folder / "data.parquet", use_dictionary=False)
    return folder / "data.parquet"


def arrow(folder: Path) -> Path:
    return write_arrow(folder / "data.arrow", lists())


def write_arrow(path: Path, whole: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file:
        with pa.ipc.new_file(file, whole.schema) as writer:
            writer.write_table(whole)
    return path


def csv(folder: Path) -> Path:
    line = ",".join(["0"] * 50) + "\n"
    header = ",".join(f"c{i}" for i in range(49)) + ",y\n"
    (folder / "data.csv").write_text(header + line * 100_000)
    return folder / "data.csv"


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a reader imports on first use is no part of what a file costs."""
    small = pa.table({"x": [1.0, 2.0], "y": [0, 1]})
    path = write_arrow(tmp_path_factory.mktemp("small") / "small.arrow", small)
    with pytest.raises(ValueError, match="a table"):
        datasets.read_inputs(str(path), FORM)


@pytest.mark.parametrize("make", [npy_folder, npz, idx, parquet, arrow, csv])
def test_other_shapes_are_refused_before_they_are_read(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    data, message = str(make(tmp_path)), r"its examples are .*, but the model takes \[7\]"
    if make is csv:
        message = r"a table, but the model takes \[7\]"
    with bounded(0.5, megabytes=30):
        with pytest.raises(ValueError, match=message):
            datasets.read_inputs(data, FORM)
        with pytest.raises(ValueError, match=message):
            datasets.read_splits(data, label="y" if make is csv else "label", preprocessing=FORM)


def test_one_array_of_another_shape(tmp_path: Path) -> None:
    path = sparse_npy(tmp_path / "new.npy")
    with bounded(0.2, megabytes=30), pytest.raises(ValueError, match=r"are \[500\], .* \[7\]"):
        datasets.read_inputs(str(path), FORM)


@pytest.mark.parametrize("end", ["csv", "parquet"])
def test_columns_that_a_model_reads_are_looked_for_first(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"data.{end}"
    columns = {"width": [1.0, 2.0], "heigth": [1.0, 2.0], "label": [0, 1]}
    if end == "csv":
        table(path, columns)
    else:
        pq.write_table(pa.table(columns), path)
    form = FORM._replace(columns=(Column("width"), Column("height")), shape=(2,))
    for read in (datasets.read_inputs, lambda p, f: datasets.read(p, preprocessing=f)):
        with pytest.raises(ValueError, match="no column 'height', which the model reads. Nearest"):
            read(str(path), form)


@pytest.mark.parametrize("end", ["npy", "npz"])
def test_what_is_read_is_held_once(tmp_path: Path, end: str) -> None:
    """60 MB of it."""
    path = tmp_path / f"x.{end}"
    x = np.zeros((ROWS, WIDTH), np.float32)
    np.save(path, x) if end == "npy" else np.savez(path, x=x)
    del x
    with bounded(megabytes=90):
        assert datasets.read_inputs(str(path), FORM._replace(shape=(WIDTH,))).shape[0] == ROWS
