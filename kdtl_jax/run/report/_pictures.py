"""Small pictures within a page: inline PNG data, so that nothing is loaded from outside."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_SIDE = 64  # pixels per side drawn in full; larger images are subsampled


class Picture(NamedTuple):
    """An image and the words below it."""

    image: str  # a PNG in base64
    caption: str


class Pictures(NamedTuple):
    """Pictures side by side."""

    pictures: Sequence[Picture]


def png(image: np.ndarray) -> str:
    """Encodes an image `[H, W]`, `[H, W, 1]` or `[H, W, 3]` as a PNG in base64.

    Its smallest value is black and its largest is white.

    Raises:
      ValueError: for other shapes.
    """
    from PIL import Image  # only reports with pictures need it

    pixels = np.asarray(image, np.float64)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"expected an image [H, W], [H, W, 1] or [H, W, 3], got {list(pixels.shape)}."
        )
    step = -(-max(pixels.shape[:2]) // MAX_SIDE)
    pixels = np.nan_to_num(pixels[::step, ::step])
    low, high = pixels.min(), pixels.max()
    levels = np.round(255 * (pixels - low) / (high - low or 1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
