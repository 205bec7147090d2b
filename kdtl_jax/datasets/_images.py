"""Images: folders of classes (`train/cat/1.png`), and encoded images within other data.

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
FILLERS = {"images", "image", "imgs", "img", "pictures", "photos", "data", "set", "split", "seg"}
# Of folders that programs create: .ipynb_checkpoints, @eaDir.
HIDDEN_PREFIXES = (".", "__", "@")
MAX_PIXELS = 2**26  # of one image
CHANNELS = {"L": 1, "I;16": 1, "F": 1, "RGB": 3, "RGBA": 4}
DEPTH_SCALE = 257  # 65535 / 255: from 8 bits to 16
ORIENTATION, ROTATED = 274, (5, 6, 7, 8)  # of EXIF
# What Pillow raises on broken files.
_READ_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, MemoryError),
    *(OverflowError, struct.error, zlib.error, Image.DecompressionBombError),
)


class EncodedImages(NamedTuple):
    """Encoded images, one per example: files, or their bytes."""

    name: str
    files: Sequence[Path | bytes]

    @property
    def size(self) -> int:
        """How many images."""
        return len(self.files)

    def at(self, row: int) -> str:
        """The name of an image in messages."""
        file = self.files[row]
        return str(file) if isinstance(file, Path) else f"{self.name}: image {row}"


class ImageFolder(NamedTuple):
    """One part of a folder of images."""

    files: list[Path]
    classes: list[str]  # of every file: the folder it is in
    notices: tuple[str, ...]


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def part_folders(folder: Path) -> dict[str, Path]:
    """`{part: folder}` if the folder is divided into parts: `train`, `test`, …"""
    result: dict[str, Path] = {}
    folders = _folders(folder)
    for part, names in PARTS.items():
        exact = [path for path in folders if path.name.lower() in names]
        approximate = [path for path in folders if _is_part_name(path, names)]
        if matches := exact + approximate:
            result[part] = matches[0]
    # A class may be called train_set; a divided folder has two parts or more.
    is_divided = len(result) > 1 or any(path.name.lower() in PARTS["train"] for path in folders)
    return result if "train" in result and is_divided else {}


def other_folders(folder: Path, parts: Mapping[str, Path]) -> list[str]:
    """The names of other folders with images."""
    others = [path for path in _folders(folder) if path not in parts.values()]
    return [path.name for path in others if any(map(is_image, path.rglob("*")))]


def images_by_class(folder: Path) -> ImageFolder:
    """The images of a folder with one folder per class, in the order of their names."""
    files, classes, notices, other_files = [], [], [], 0
    nested = []
    for class_folder in _folders(folder):
        images = all_images(class_folder)
        nested += [class_folder.name] if any(path.parent != class_folder for path in images) else []
        other_files += sum(
            p.is_file() and not p.name.startswith(".") for p in class_folder.iterdir()
        )
        other_files -= sum(path.parent == class_folder for path in images)
        if not images:
            notices.append(f"folder {class_folder.name!r:.80} has no image: left out")
        files += images
        classes += [class_folder.name] * len(images)
    if nested:
        folder_list = f"{nested[0]!r:.80}{' and others' if nested[1:] else ''}"
        notices.append(
            f"folders within {folder_list} are not told apart: the class is the outer one"
        )
    if other_files > 0:
        notices.append(f"files that are not images are left out: {other_files}")
    return ImageFolder(files, classes, tuple(notices))


def all_images(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their names."""
    return sorted(
        path
        for path in folder.rglob("*")
        if is_image(path)
        and path.is_file()
        and not any(
            name.startswith(HIDDEN_PREFIXES) for name in path.relative_to(folder).parts[:-1]
        )
    )


def array_form(
    pictures: EncodedImages, rows: Sequence[int] | np.ndarray, image_size: tuple[int, int] | None
) -> tuple[Images, tuple[int, ...], list[str]]:
    """Decides how to convert images to arrays; also returns the shape of one, and notices.

    Raises:
      ValueError: naming two files of different sizes if `image_size` is None, or a broken file.
    """
    kinds = dict.fromkeys(CHANNELS, 0)
    row_by_size: dict[tuple[int, int], int] = {}
    row_by_kind: dict[str, int] = {}
    for row in rows:
        kind, size = _header(pictures, row)
        kinds[kind] += 1
        row_by_kind.setdefault(kind, row)
        row_by_size.setdefault(size, row)
        if image_size is None and len(row_by_size) > 1:
            (first, i), (other, j) = row_by_size.items()
            raise ValueError(
                f"{pictures.name}: images differ in size: {pictures.at(i)} is "
                f"{first[0]}x{first[1]} (height x width), {pictures.at(j)} is "
                f"{other[0]}x{other[1]}. Resize all of them with --image-size."
            )
    present = [kind for kind, count in kinds.items() if count]
    if "F" in present and len(present) > 1:
        other = next(kind for kind in present if kind != "F")
        raise ValueError(
            f"{pictures.name}: {pictures.at(row_by_kind['F'])} has floats as pixels, but "
            f"{pictures.at(row_by_kind[other])} has whole numbers. Save them all in one form."
        )
    mode, notices = present[-1], []
    if len(present) > 1:
        kind_counts = ", ".join(f"{kinds[kind]} {kind}" for kind in present)
        scaling = ""
        if "I;16" in present:
            conversion = "8 bits times" if mode == "I;16" else "16 bits divided by"
            scaling = f", those of {conversion} {DEPTH_SCALE}"
        notices.append(f"images of different kinds ({kind_counts}) are all read as {mode}{scaling}")
    height, width = image_size or next(iter(row_by_size))
    return Images(mode, image_size is not None), (height, width, CHANNELS[mode]), notices


def decode_images(
    pictures: EncodedImages, rows: Sequence[int] | np.ndarray, form: Images, shape: tuple[int, ...]
) -> np.ndarray:
    """The images `rows` as float32 `[N, H, W, C]`.

    Raises:
      ValueError: naming a broken file, or one of another size if nothing is resized.
    """
    images = np.empty((len(rows), *shape), np.float32)

    def decode(i: int) -> None:
        images[i] = _decode(pictures, rows[i], form, shape)

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")  # from Pillow, about odd files that it can read
        for _ in pool.map(decode, range(len(rows))):
            pass
    return images


def _folders(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(HIDDEN_PREFIXES)
    )


def _is_part_name(path: Path, names: Sequence[str]) -> bool:
    """Whether a folder's name is one of a part's names, ignoring `FILLERS`."""
    words = {*re.split(r"[^a-z0-9]+", path.name.lower())} - {"", *FILLERS}
    return len(words) == 1 and words <= {*names}


def _open(pictures: EncodedImages, row: int) -> Any:
    file = pictures.files[row]
    return Image.open(file if isinstance(file, Path) else io.BytesIO(file))


def _header(pictures: EncodedImages, row: int) -> tuple[str, tuple[int, int]]:
    """Kind, height and width, without decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _open(pictures, row) as image:
                width, height = image.size
                if image.getexif().get(ORIENTATION) in ROTATED:
                    width, height = height, width
                if width * height > MAX_PIXELS:
                    raise ValueError(f"{width} x {height} pixels are too many")
                return _kind(image), (height, width)
        except _READ_ERRORS as error:
            raise _read_error(pictures, row, error) from None


def _kind(image: Any) -> str:
    if image.mode in ("1", "L"):
        return "L"
    if image.mode.startswith(("I", "F")):
        return "F" if image.mode[0] == "F" else "I;16"
    alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return "RGBA" if alpha else "RGB"


def _decode(pictures: EncodedImages, row: int, form: Images, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with _open(pictures, row) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image = ImageOps.exif_transpose(image)
            image = _convert(image, form.mode)
            height, width = shape[:2]
            size = f"{image.height}x{image.width}"
            if form.resize and (image.width, image.height) != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            array = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    except _READ_ERRORS as error:
        raise _read_error(pictures, row, error) from None
    if array.shape != tuple(shape):
        raise ValueError(
            f"{pictures.at(row)}: an image of {size} (height x width), but {height}x{width} is "
            "expected. Resize it, or train with --image-size, which resizes all images."
        )
    return array


def _convert(image: Any, mode: str) -> Any:
    """Converts pixels to another kind, in that kind's scale.

    Raises:
      ValueError: if the two have no common scale.
    """
    kind = _kind(image)
    if kind != mode and "F" in (kind, mode):
        pixels = "floats" if kind == "F" else "whole numbers"
        raise ValueError(f"its pixels are {pixels}, but {mode} is expected")
    if mode in ("I;16", "F"):  # as floats, which Pillow resizes
        is_8_bit = kind != mode
        values = np.asarray(image.convert("L") if is_8_bit else image).astype(np.float32)
        return Image.fromarray(values * DEPTH_SCALE if is_8_bit else values)
    if kind == "I;16":
        values = np.asarray(image) / DEPTH_SCALE
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"its pixels are not 16-bit, but {mode} is expected")
        image = Image.fromarray(values.round().astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _read_error(pictures: EncodedImages, row: int, error: Exception) -> ValueError:
    return ValueError(f"{pictures.at(row)}: not a readable image ({str(error)[:120]}).")
