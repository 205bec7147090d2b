"""What a path holds, detected automatically: its parts, each with inputs and targets as stored.

Digits, npz, npy files, CSV and its relatives, parquet and Arrow, folders of `datasets`, idx, and
folders of images all come out as `Source`s by part: "train", "validation", "test", or "whole".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kdtl_jax import _files
from kdtl_jax.datasets import _arrays, _csv, _images
from kdtl_jax.datasets._arrays import Arrays
from kdtl_jax.datasets._idx import idx_file, idx_shape, is_idx_folder, read_idx_array
from kdtl_jax.datasets._images import Pictures
from kdtl_jax.datasets._source import Choices, Source, check_shape, with_channels
from kdtl_jax.datasets._table_files import image_folder, is_table, labeled, table_files

# What `read_splits` reads, in words, for messages.
FORMATS = (
    "digits (built in), .npz or .npy files (x_train, y_train, x_test, y_test, or x, y), a .csv or "
    ".tsv (also .gz), .parquet or .arrow file with a label column (and possibly one that names "
    "image files), or a folder: of images (cat/1.png, or train/cat/1.png), of idx files "
    "(train-images-idx3-ubyte, …, .gz too), of tables (train.csv, test.csv), of Hugging Face "
    "datasets"
)


def sources(path: Path, choices: Choices) -> dict[str, Source]:
    """The parts of what a path holds.

    Raises:
      OSError: if it does not exist or cannot be read.
      ValueError: if it is none of these, or its contents are not valid.
    """
    if path.exists():
        _files.regular(path)
    if path.is_dir():
        return _of_folder(path, choices)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _of_arrays(_arrays.npz(path), choices)
    if path.suffix == ".npy":
        return _of_npy(path, choices)
    if is_table(path):
        return labeled({"whole": [path]}, choices)
    if suffix == ".gz" and is_table(Path(path.stem)):
        raise ValueError(f"{path}: a compressed table. Unpack it first: gunzip {path.name}")
    if _images.is_image(path) and not choices.with_targets:
        return {"whole": Source(str(path), Pictures(str(path), [path]))}
    if not choices.with_targets and _starts_as_idx(path):
        return {"whole": Source(str(path), _idx_inputs(path, choices))}
    if "idx" in path.name or _starts_as_idx(path):
        raise ValueError(
            f"{path}: an idx file of images needs a second one with labels, as in "
            "train-labels-idx1-ubyte.gz. Name the folder that holds both."
        )
    raise ValueError(f"{path}: not recognized by its name. Expected {FORMATS}.")


def files_of(text: str, *, label: str = "label", inputs: str | None = None) -> tuple[Path, ...]:
    """What reading the data opens: one file or folder, or an .npy file and those beside it.

    Args:
      text: as for `read_splits`.
      label: as for `read_splits`.
      inputs: as for `read_splits`.
    """
    path = Path(text)
    if _csv.is_text_table(path) and path.is_file():
        return (path, *_images_of(path))
    if path.suffix != ".npy" or not path.is_file():
        return (path,)
    found = _arrays.pairs(_arrays.npy_folder(path.parent), inputs=inputs or path.stem, label=label)
    names = {path.stem, *(name for part in found for name in part.values())}
    return tuple(path.parent / f"{name}.npy" for name in sorted(names))


def _images_of(path: Path) -> tuple[Path, ...]:
    """The folders of images named by a table, from its first row."""
    for cell in _csv.first_row(path):
        folder = image_folder(path, cell)
        if folder is not None:
            first, *below = Path(cell).parts
            return (folder / first if below else folder,)
    return ()


def _of_folder(folder: Path, choices: Choices) -> dict[str, Source]:
    if is_idx_folder(folder):
        return _of_idx(folder, choices)
    tables = table_files(folder)
    beside = _beside_images(folder, tables, choices)
    if tables and not beside:
        return labeled(tables, choices)
    arrays = _arrays.npy_folder(folder)
    if arrays.names:
        return _of_arrays(arrays, choices)
    if not choices.with_targets and (files := _images.all_images(folder)):
        return {"whole": Source(str(folder), Pictures(str(folder), files))}
    found = _of_images(folder, () if choices.takes is None else choices.takes.names)
    if found:
        _check_no_columns(folder, choices)
    if found and beside:
        listed = ", ".join(beside)
        note = (
            f"tables beside the folders of images that name none of them, left out: {listed:.200}"
        )
        first = "train" if "train" in found else "whole"
        found[first] = found[first]._replace(notices=(*found[first].notices, note))
    if found:
        return found
    there = sorted(entry.name for entry in folder.iterdir())[:8]
    if _images.all_images(folder):
        raise ValueError(
            f"{folder}: its images are not in one folder per class, as in cat/1.png; it has "
            f"{there}."
        )
    raise ValueError(
        f"{folder}: has no train-images-idx file, no folders of images, no npy files and no "
        f"tables; it has {there or 'nothing'}. Expected {FORMATS}."
    )


def _beside_images(
    folder: Path, tables: Mapping[str, Sequence[Path]], choices: Choices
) -> list[str]:
    """The tables of a folder whose data are its images; none if the tables are the data.

    Tables are the data if they name images or hold the requested label column, if the model reads
    columns, or if there are fewer than two folders of images to be classes.
    """
    paths = [path for each in tables.values() for path in each]
    of_columns = choices.takes is not None and choices.takes.images is None
    if not paths or of_columns or not all(map(_csv.is_text_table, paths)):
        return []
    for path in paths:
        header, _ = _csv.header_of(path)
        is_asked = choices.label != "label" and choices.label.split(",")[0].strip() in header
        if is_asked or any(image_folder(path, cell) for cell in _csv.first_row(path)):
            return []
    parts = _images.parts_of(folder) or {"whole": folder}
    classes = _images.in_classes(parts.get("train", folder)).classes
    return [path.name for path in paths] if len({*classes}) > 1 else []


def _of_images(folder: Path, known: Sequence[str]) -> dict[str, Source]:
    """The parts of a folder of classes; one class is enough if the model knows its name."""
    parts = _images.parts_of(folder)
    others = _images.others_of(folder, parts) if parts else []
    parts = parts or {"whole": folder}
    found = {}
    for part, inside in parts.items():
        made = _images.in_classes(inside)
        if not made.files and _images.all_images(inside):
            others.append(inside.name)
        if made.files:
            pictures = Pictures(str(inside), made.files)
            labels, first = np.array(made.classes), made.classes[0]
            is_whole = part in ("train", "whole") and first not in known
            if is_whole and not (labels != first).any():
                raise ValueError(
                    f"{inside}: all of its images are below one folder, {first!r:.80}, but every "
                    f"class needs a folder. Or are the classes in {inside / first}? Name that."
                )
            found[part] = Source(str(inside), pictures, labels, notices=made.notices)
    if others and "train" in found:
        listed = ", ".join(others)
        note = f"folders that are no part, or have no folders of classes, left out: {listed:.200}"
        notices = (*found["train"].notices, note)
        found["train"] = found["train"]._replace(notices=notices)
    return found if "train" in found or "whole" in found else {}


def _of_idx(folder: Path, choices: Choices) -> dict[str, Source]:
    _check_no_columns(folder, choices)
    found = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        images = idx_file(folder, name, "images")
        targets = None
        if choices.with_targets:
            targets = read_idx_array(idx_file(folder, name, "labels"))
        found[part] = Source(str(images), _idx_inputs(images, choices), targets)
    return found


def _idx_inputs(path: Path, choices: Choices) -> np.ndarray:
    check_shape(str(path), idx_shape(path), choices.takes)
    return with_channels(read_idx_array(path))


def _starts_as_idx(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(3)
    return start[:2] in (b"\0\0", b"\x1f\x8b")


def _check_no_columns(path: Path, choices: Choices) -> None:
    if choices.drop:
        raise ValueError(
            f"{path}: is no table, so it has no column {choices.drop[0]!r:.80} to leave out "
            "(--drop-columns)."
        )


# Arrays.


def _of_npy(path: Path, choices: Choices) -> dict[str, Source]:
    if not choices.with_targets:
        check_shape(str(path), _arrays.npy_shape(path), choices.takes)
        return {"whole": Source(str(path), with_channels(_arrays.read_npy(path)))}
    folder = _arrays.npy_folder(path.parent)
    if path.stem not in folder.names:
        path.stat()  # raises
    return _of_arrays(folder, choices._replace(inputs=choices.inputs or path.stem))


def _of_arrays(arrays: Arrays, choices: Choices) -> dict[str, Source]:
    _check_no_columns(arrays.path, choices)
    label = choices.label
    inputs = choices.inputs
    if not choices.with_targets:
        label = "label"
        inputs = inputs if inputs in arrays.names else None  # new data may use the usual names
    x, y = _arrays.pairs(arrays, inputs=inputs, label=label)
    if not choices.with_targets:
        if not x and len(arrays.names) == 1:
            x = {"whole": arrays.names[0]}
        if not x:
            raise ValueError(f"{arrays.path}: has no inputs; {_arrays.described(arrays)}.")
        return {
            part: Source(str(arrays.path), _array_inputs(arrays, name, choices))
            for part, name in x.items()
        }
    if "train" not in x and "whole" not in x:
        raise ValueError(
            f"{arrays.path}: has no training data. Expected arrays x_train, y_train, x_test, "
            f"y_test, or x, y; {_arrays.described(arrays)}. Name others with --inputs and --label."
        )
    found = {}
    for part, name in x.items():
        if part not in y:
            wanted = "y" if part == "whole" else f"y_{name.rpartition('_')[2]}"
            raise ValueError(
                f"{arrays.path}: has {name!r} but not {wanted!r}: no array {wanted!r}; "
                f"{_arrays.described(arrays)}. Name the array of labels with --label."
            )
        inputs, targets = _array_inputs(arrays, name, choices), arrays.load(y[part])
        found[part] = Source(str(arrays.path), inputs, targets, columns=(y[part],))
    return found


def _array_inputs(arrays: Arrays, name: str, choices: Choices) -> np.ndarray:
    check_shape(str(arrays.path), arrays.shape(name), choices.takes)
    return with_channels(arrays.load(name))
