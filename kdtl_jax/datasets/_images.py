"""Images: folders of classes (`train/cat/1.png`), and bytes of image files in other data.

Gray images have one channel, color images three, or four with transparency; 16-bit and float images
are gray. Pixels are as stored: 0 to 255, 0 to 65535, or any numbers. A mixture is converted to a
common form: 8-bit gray images among 16-bit ones are multiplied by 257, and 16-bit ones among color
images are divided by it. Floats have no scale that others could be converted to.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from kdtl_jax.datasets._arrays import PARTS
from kdtl_jax.datasets._preprocessing import Images

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jfif", ".jpe", ".jp2", ".avif"),
)
# Filler words in the names of the folders of parts: train_images, seg_train.
FILLING = {"images", "image", "imgs", "img", "pictures", "photos", "data", "set", "split", "seg"}
HIDDEN = (".", "__", "@")  # prefixes of folders that programs create: .ipynb_checkpoints, @eaDir
MOST_PIXELS = 2**26  # of one image
CHANNELS = {"L": 1, "I;16": 1, "F": 1, "RGB": 3, "RGBA": 4}
DEEPER = 257  # 65535 / 255: from 8 bits to 16
ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)  # of EXIF
# What Pillow raises on broken files.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, MemoryError),
    *(OverflowError, struct.error, zlib.error, Image.DecompressionBombError),
)


class Pictures(NamedTuple):
    """Encoded images, one per example: files, or their bytes."""

    name: str
    files: Sequence[Path | bytes]

    @property
    def size(self) -> int:
        """How many images."""
        return len(self.files)

    def at(self, row: int) -> str:
        """An image as messages name it."""
        found = self.files[row]
        return str(found) if isinstance(found, Path) else f"{self.name}: image {row}"


class Folder(NamedTuple):
    """One part of a folder of images."""

    files: list[Path]
    classes: list[str]  # of every file: the folder it is in
    notices: tuple[str, ...]


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def parts_of(folder: Path) -> dict[str, Path]:
    """The folders of parts by part, if the folder is divided: `train`, `test`, …"""
    found: dict[str, Path] = {}
    inside = _folders(folder)
    for part, names in PARTS.items():
        plain = [path for path in inside if path.name.lower() in names]
        filled = [path for path in inside if _stands_for(path, names)]
        if either := plain + filled:
            found[part] = either[0]
    # A class may be called train_set; a divided folder has two parts or more.
    is_divided = len(found) > 1 or any(path.name.lower() in PARTS["train"] for path in inside)
    return found if "train" in found and is_divided else {}


def others_of(folder: Path, parts: Mapping[str, Path]) -> list[str]:
    """The folders with images beside those of the parts."""
    beside = [path for path in _folders(folder) if path not in parts.values()]
    return [path.name for path in beside if any(map(is_image, path.rglob("*")))]


def in_classes(folder: Path) -> Folder:
    """The images of a folder with one folder per class, in the order of their names."""
    files, classes, notices, others = [], [], [], 0
    deep = []
    for inside in _folders(folder):
        own = all_images(inside)
        deep += [inside.name] if any(path.parent != inside for path in own) else []
        others += sum(p.is_file() and not p.name.startswith(".") for p in inside.iterdir())
        others -= sum(path.parent == inside for path in own)
        if not own:
            notices.append(f"folder {inside.name!r:.80} has no image: left out")
        files += own
        classes += [inside.name] * len(own)
    if deep:
        listed = f"{deep[0]!r:.80}{' and others' if deep[1:] else ''}"
        notices.append(f"folders within {listed} are not told apart: the class is the outer one")
    if others > 0:
        notices.append(f"files that are not images are left out: {others}")
    return Folder(files, classes, tuple(notices))


def all_images(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their names."""
    return sorted(
        path
        for path in folder.rglob("*")
        if is_image(path)
        and path.is_file()
        and not any(name.startswith(HIDDEN) for name in path.relative_to(folder).parts[:-1])
    )


def form_of(
    pictures: Pictures, rows: Sequence[int] | np.ndarray, image_size: tuple[int, int] | None
) -> tuple[Images, tuple[int, ...], list[str]]:
    """How these images become arrays, the shape of one, and notices.

    Raises:
      ValueError: naming two files of different sizes, if no size is given, or a broken file.
    """
    kinds = dict.fromkeys(CHANNELS, 0)
    first: dict[tuple[int, int], int] = {}
    of_kind: dict[str, int] = {}
    for row in rows:
        kind, size = _header(pictures, row)
        kinds[kind] += 1
        of_kind.setdefault(kind, row)
        first.setdefault(size, row)
        if image_size is None and len(first) > 1:
            one, other = [(f"{h}x{w}", pictures.at(at)) for (h, w), at in first.items()][:2]
            raise ValueError(
                f"{pictures.name}: images differ in size: {one[1]} is {one[0]} (height x width), "
                f"{other[1]} is {other[0]}. Resize all of them with --image-size."
            )
    there = [kind for kind, count in kinds.items() if count]
    if "F" in there and len(there) > 1:
        other = next(kind for kind in there if kind != "F")
        raise ValueError(
            f"{pictures.name}: {pictures.at(of_kind['F'])} has floats as pixels, but "
            f"{pictures.at(of_kind[other])} has whole numbers. Save them all in one form."
        )
    mode, notices = there[-1], []
    if len(there) > 1:
        listed = ", ".join(f"{kinds[kind]} {kind}" for kind in there)
        scaled = ""
        if "I;16" in there:
            how = "8 bits times" if mode == "I;16" else "16 bits divided by"
            scaled = f", those of {how} {DEEPER}"
        notices.append(f"images of different kinds ({listed}) are all read as {mode}{scaled}")
    height, width = image_size or next(iter(first))
    return Images(mode, image_size is not None), (height, width, CHANNELS[mode]), notices


def decoded(
    pictures: Pictures, rows: Sequence[int] | np.ndarray, images: Images, shape: tuple[int, ...]
) -> np.ndarray:
    """The images `rows` as float32 `[N, H, W, C]`.

    Raises:
      ValueError: naming a broken file, or one of another size if nothing is resized.
    """
    out = np.empty((len(rows), *shape), np.float32)

    def put(place: int) -> None:
        out[place] = _decoded(pictures, rows[place], images, shape)

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")  # from Pillow, about odd files that it can read
        for _ in pool.map(put, range(len(rows))):
            pass
    return out


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(HIDDEN))


def _stands_for(path: Path, names: Sequence[str]) -> bool:
    """Whether a folder's name is one of a part's names, apart from `FILLING`."""
    words = {*re.split(r"[^a-z0-9]+", path.name.lower())} - {"", *FILLING}
    return len(words) == 1 and words <= {*names}


def _opened(pictures: Pictures, row: int) -> Any:
    found = pictures.files[row]
    return Image.open(found if isinstance(found, Path) else io.BytesIO(found))


def _header(pictures: Pictures, row: int) -> tuple[str, tuple[int, int]]:
    """Kind, height and width, without decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _opened(pictures, row) as image:
                width, height = image.size
                if image.getexif().get(ORIENTATION) in SIDEWAYS:
                    width, height = height, width
                if width * height > MOST_PIXELS:
                    raise ValueError(f"{width} x {height} pixels are too many")
                return _kind(image), (height, width)
        except _BROKEN as error:
            raise _broken(pictures, row, error) from None


def _kind(image: Any) -> str:
    if image.mode in ("1", "L"):
        return "L"
    if image.mode.startswith(("I", "F")):
        return "F" if image.mode[0] == "F" else "I;16"
    alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return "RGBA" if alpha else "RGB"


def _decoded(pictures: Pictures, row: int, images: Images, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with _opened(pictures, row) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image = ImageOps.exif_transpose(image)
            image = _in_mode(image, images.mode)
            height, width = shape[:2]
            size = f"{image.height}x{image.width}"
            if images.resize and (image.width, image.height) != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            found = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    except _BROKEN as error:
        raise _broken(pictures, row, error) from None
    if found.shape != tuple(shape):
        raise ValueError(
            f"{pictures.at(row)}: an image of {size} (height x width), but {height}x{width} is "
            "expected. Resize it, or train with --image-size, which resizes all images."
        )
    return found


def _in_mode(image: Any, mode: str) -> Any:
    """The image with pixels of another kind, in that kind's scale.

    Raises:
      ValueError: if the two have no common scale.
    """
    kind = _kind(image)
    if kind != mode and "F" in (kind, mode):
        found = "floats" if kind == "F" else "whole numbers"
        raise ValueError(f"its pixels are {found}, but {mode} is expected")
    if mode in ("I;16", "F"):  # as floats, which Pillow resizes
        shallow = kind != mode
        values = np.asarray(image.convert("L") if shallow else image).astype(np.float32)
        return Image.fromarray(values * DEEPER if shallow else values)
    if kind == "I;16":
        values = np.asarray(image) / DEEPER
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"its pixels are not 16-bit, but {mode} is expected")
        image = Image.fromarray(values.round().astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _broken(pictures: Pictures, row: int, error: Exception) -> ValueError:
    return ValueError(f"{pictures.at(row)}: not a readable image ({str(error)[:120]}).")
