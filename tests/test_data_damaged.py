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

from kdtl_jax import datasets


def arrow() -> bytes:
    out, found = io.BytesIO(), image_table(slice(0, 6))
    with pa.ipc.new_stream(out, found.schema) as writer:
        writer.write_table(found)
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
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(found)), rng.random()
        if how < 0.5:
            found[at] = rng.randrange(256)
        elif how < 0.7:
            del found[at : at + rng.randint(1, 30)]
        elif how < 0.9:
            found[at:at] = rng.randbytes(rng.randint(1, 6))
        else:
            found[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(found)


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
            found = datasets.read(read)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(tmp_path) in str(error) and len(str(error)) < 1000
        else:
            assert np.isfinite(found.inputs).all()
    assert refused
