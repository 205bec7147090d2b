"""Data of others, whatever their bytes: read, or refused in one clear line, at a small cost."""

import gzip
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounds import bounded, is_plain
from data_files import NAMES, PIXELS, columns, idx_folder, image_folder, table
from data_files import Y as CLASSES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_foreign_files import edited, edits, read_or_refused

from kdtl_jax import datasets

ENCODED = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small data set of every kind."""
    folder = tmp_path_factory.mktemp("data")
    y = np.arange(30) % 3
    np.savez_compressed(folder / "a.npz", x=np.ones((30, 2), np.float32), y=y)
    np.savez(folder / "b.npz", x_train=np.ones((30, 2)), y_train=y, x_test=np.ones((9, 2)),
             y_test=y[:9])  # fmt: skip
    rows = "".join(f"{label},{i},{-i}\n" for i, label in enumerate(y))
    (folder / "a.csv").write_text("label,a,b\n" + rows)
    for name in ("idx", "gz"):
        idx_folder(folder / name)
    packed = folder / "gz/train-images-idx3-ubyte"
    packed.with_suffix(".gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    result = pa.table(columns(label=np.array(NAMES)[CLASSES]))
    pq.write_table(result, folder / "a.parquet")
    with pa.ipc.new_stream(folder / "a.arrow", result.schema) as writer:
        writer.write_table(result)
    with pa.ipc.new_file(folder / "a.feather", result.schema) as writer:
        writer.write_table(result)
    (folder / "npy").mkdir()
    np.save(folder / "npy/x.npy", PIXELS)
    np.save(folder / "npy/y.npy", CLASSES)
    image_folder(folder / "images", PIXELS[:9])
    for kind in ENCODED:
        out = io.BytesIO()
        Image.fromarray(PIXELS[0]).save(out, kind)
        (folder / f"images/ant/0.{kind.lower()}").write_bytes(out.getvalue())
    return folder


PARTS = (
    *("a.npz", "b.npz", "a.csv", "a.parquet", "a.arrow", "a.feather", "npy/x.npy", "npy/y.npy"),
    *("idx/train-images-idx3-ubyte", "idx/train-labels-idx1-ubyte", "idx/t10k-labels-idx1-ubyte"),
    *("gz/train-images-idx3-ubyte.gz",),
    *(f"images/ant/0.{kind.lower()}" for kind in ENCODED),
)


@settings(max_examples=80)
@example(name="a.csv", edit=(31830, b"\0", 0))  # a label of one example
@given(name=st.sampled_from(PARTS), edit=edits)
def test_any_data_set(data: Path, name: str, edit: tuple[int, bytes, int]) -> None:
    path = data / name
    whole = path.read_bytes()
    named = data / Path(name).parts[0]
    path.write_bytes(edited(whole, edit))
    try:
        with read_or_refused():
            result = datasets.read_splits(str(named))
            for part in result:
                assert len(part.inputs) == len(part.labels) and np.isfinite(part.inputs).all()
                assert 0 <= part.labels.min() <= part.labels.max() < part.classes
    finally:
        path.write_bytes(whole)


# --- what is no file -----------------------------------------------------------------------------

SUFFIXES = ("csv", "npz", "npy", "parquet", "arrow", "png", "safetensors", "idx")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def end_of_a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # its name may not be long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.skipif(os.name != "posix", reason="there are no such files")
@pytest.mark.parametrize("make", [pipe, device, end_of_a_socket])
def test_pipes_devices_and_sockets(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A pipe that nobody writes to would be waited for, and a device has no end."""
    form = datasets.read_splits("digits").train.form
    for suffix in SUFFIXES:
        path = tmp_path / f"x.{suffix}"
        make(path)
        for read in (
            lambda at=path: datasets.read_splits(str(at)),
            lambda at=path: datasets.read_inputs(at, form),
        ):
            with bounded(), pytest.raises(ValueError, match=r"is a (pipe|device|socket), not"):
                read()


@pytest.mark.skipif(os.name != "posix", reason="there are no such files")
def test_they_are_no_part_of_a_folder(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    pipe(images / "ant/x.png")
    device(images / "bee/y.png")
    (images / "bee/z.png").mkdir()
    (images / "cat/loop").symlink_to(images)
    tables = tmp_path / "tables"
    tables.mkdir()
    table(tables / "train.csv", columns(label=CLASSES))
    pipe(tables / "test.csv")
    four = idx_folder(tmp_path / "four")
    pipe(four / "train-images-idx3-ubyte.gz")
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    for name, array in (("x", PIXELS), ("y", CLASSES)):
        np.save(arrays / f"{name}.npy", array)
    pipe(arrays / "z.npy")
    for folder in (images, tables, four, arrays):
        with bounded():
            assert sum(len(part.labels) for part in datasets.read_splits(str(folder))) == 60


# --- bombs ---------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_of(width: int, height: int, content: bytes = b"") -> bytes:
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(5 * min(height, 100)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + content
            + chunk(b"IDAT", rows) + chunk(b"IEND", b""))  # fmt: skip


LONG = 40 * 2**20
BOMBS: dict[str, Callable[[], bytes]] = {
    "2^62 pixels": lambda: png_of(2**31 - 1, 2**31 - 1)[:100],
    "10^9 pixels": lambda: png_of(10**9, 1),
    "text": lambda: png_of(4, 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(LONG), 1)) * 4),
    "profile": lambda: png_of(4, 4, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(LONG), 1))),
    "a program": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    ),
    "many pages": lambda: b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(12 * 10),
}


@pytest.mark.parametrize("name", BOMBS)
def test_images_that_unpack_to_gigabytes(tmp_path: Path, name: str) -> None:
    folder = image_folder(tmp_path / "images", PIXELS[:9])
    (folder / "ant/bomb.png").write_bytes(BOMBS[name]())
    for size in (None, (4, 4)):
        with bounded():
            try:
                actual = datasets.read_splits(str(folder), image_size=size)
            except ValueError as error:
                assert "bomb.png" in str(error) and is_plain(str(error))
            else:
                assert name in ("text", "profile") and actual.train.inputs.shape[1:] == (4, 4, 1)


def test_headers_of_arrays_that_are_gigabytes(tmp_path: Path) -> None:
    head = b"\x93NUMPY\x02\0" + struct.pack("<I", 2**31)
    (tmp_path / "x.npy").write_bytes(head + b" " * 100)
    np.save(tmp_path / "y.npy", CLASSES)
    with bounded(), pytest.raises(ValueError, match=f"a header of {2**31} bytes"):
        datasets.read_splits(str(tmp_path))


def test_gzip_that_cannot_hold_what_its_header_announces(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "idx")
    (folder / "train-images-idx3-ubyte").unlink()
    head = bytes([0, 0, 8, 3]) + struct.pack(">III", 45, 30_000, 30_000)
    packed = gzip.compress(head + bytes(3 * 10**7), 1)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with bounded(), pytest.raises(ValueError, match=r"asks for 40500000016"):
        datasets.read_splits(str(folder))
