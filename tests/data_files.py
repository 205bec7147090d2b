"""Small files of every kind that people's data come in, all of the same examples."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

N = 60
Y = np.arange(N) % 3
NAMES = ("ant", "bee", "cat")
RNG = np.random.default_rng(0)
# Gray images whose class is their bright row.
PIXELS = RNG.integers(0, 60, (N, 4, 4), dtype=np.uint8)
PIXELS[np.arange(N), Y] += 180
X = np.round(RNG.normal(size=(N, 3)) + 2 * np.eye(3)[Y], 3)


def png(pixels: np.ndarray) -> bytes:
    """An encoded image."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def image_folder(
    folder: Path, pixels: np.ndarray = PIXELS, labels: Sequence[str] | None = None
) -> Path:
    """`ant/00.png`, …; in the order of the files the examples are sorted by class."""
    for i, image in enumerate(pixels):
        inside = folder / (NAMES[Y[i]] if labels is None else labels[i])
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{i:02d}.png").write_bytes(png(image))
    return folder


def table(path: Path, columns: dict[str, Any], delimiter: str = ",") -> Path:
    """A text table."""
    rows = zip(*columns.values(), strict=True)
    lines = [columns, *rows]
    path.write_text("\n".join(delimiter.join(map(str, line)) for line in lines))
    return path


def columns(**more: Any) -> dict[str, Any]:
    """The three numbers of every example, and more columns."""
    return {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], **more}


def idx(array: np.ndarray) -> bytes:
    """An idx file of bytes."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def idx_folder(folder: Path, *, test: int = 15) -> Path:
    """The four files of Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(test, N)), ("t10k", slice(0, test))):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(PIXELS[rows]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(Y[rows]))
    return folder


def features(names: Sequence[str] = NAMES) -> dict[str, Any]:
    """What `datasets` says of images with classes."""
    label = {"names": list(names), "_type": "ClassLabel"}
    return {"features": {"image": {"_type": "Image"}, "label": label}}


def image_table(rows: slice) -> Any:
    """A part as `datasets` stores it."""
    import pyarrow as pa

    images = [{"bytes": png(image), "path": None} for image in PIXELS[rows]]
    made = pa.table({"image": images, "label": Y[rows]})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": features()})})
