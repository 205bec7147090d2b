"""Small pictures within a page: PNG files as data, so that nothing is loaded from outside."""

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LARGEST = 64  # pixels per side drawn in full; larger images are subsampled


class Picture(NamedTuple):
    """An image and the words below it."""

    image: str  # a PNG in base64
    caption: str


class Pictures(NamedTuple):
    """Pictures side by side."""

    pictures: Sequence[Picture]


def png(image: np.ndarray) -> str:
    """An image `[H, W]`, `[H, W, 1]` or `[H, W, 3]` as a PNG in base64.

    Its smallest value is black and its largest is white.

    Raises:
      ValueError: for other shapes.
    """
    x = np.asarray(image, np.float64)
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[-1] not in (1, 3) or 0 in x.shape:
        raise ValueError(f"expected an image [H, W], [H, W, 1] or [H, W, 3], got {list(x.shape)}.")
    step = -(-max(x.shape[:2]) // LARGEST)
    x = np.nan_to_num(x[::step, ::step])
    low, high = x.min(), x.max()
    levels = np.round(255 * (x - low) / (high - low or 1)).astype(np.uint8)
    height, width, channels = levels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each starts with its filter: none
    lines[:, 1:] = levels.reshape(height, -1)
    color = {1: 0, 3: 2}[channels]
    header = struct.pack(">2I5B", width, height, 8, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    written = b"\x89PNG\r\n\x1a\n"
    for kind, content in parts:
        check = struct.pack(">I", zlib.crc32(kind + content))
        written += struct.pack(">I", len(content)) + kind + content + check
    return base64.b64encode(written).decode()
