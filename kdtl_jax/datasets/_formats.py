"""Detects the format of a path and returns its parts, each with inputs and targets as stored.

Digits, npz, npy files, CSV and its relatives, parquet and Arrow, folders of `datasets`, idx, and
folders of images all become a `StoredPart` per part: "train", "validation", "test", or "whole".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kdtl_jax import _files
from kdtl_jax.datasets import _arrays, _csv, _images
from kdtl_jax.datasets._arrays import Arrays
from kdtl_jax.datasets._idx import idx_file, idx_shape, is_idx_folder, read_idx_array
from kdtl_jax.datasets._images import EncodedImages
from kdtl_jax.datasets._source import Choices, StoredPart, check_shape, with_channels
from kdtl_jax.datasets._table_files import image_folder, is_table, labeled_sources, table_files

# The formats that `read_splits` reads, for messages.
FORMATS = (
    "digits (built in), .npz or .npy files (x_train, y_train, x_test, y_test, or x, y), a .csv or "
    ".tsv (also .gz), .parquet or .arrow file with a label column (and possibly one that names "
    "image files), or a folder: of images (cat/1.png, or train/cat/1.png), of idx files "
    "(train-images-idx3-ubyte, …, .gz too), of tables (train.csv, test.csv), of Hugging Face "
    "datasets"
)


def sources(path: Path, choices: Choices) -> dict[str, StoredPart]:
    """The parts of the data at a path.

    Raises:
      OSError: if it does not exist or cannot be read.
      ValueError: if its format is unknown, or its contents are not valid.
    """
    if path.exists():
        _files.regular(path)
    if path.is_dir():
        return _folder_sources(path, choices)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _array_sources(_arrays.npz(path), choices)
    if path.suffix == ".npy":
        return _npy_sources(path, choices)
    if is_table(path):
        return labeled_sources({"whole": [path]}, choices)
    if suffix == ".gz" and is_table(Path(path.stem)):
        raise ValueError(f"{path}: a compressed table. Unpack it first: gunzip {path.name}")
    if _images.is_image(path) and not choices.with_targets:
        return {"whole": StoredPart(str(path), EncodedImages(str(path), [path]))}
    if not choices.with_targets and _has_idx_magic(path):
        return {"whole": StoredPart(str(path), _idx_inputs(path, choices))}
    if "idx" in path.name or _has_idx_magic(path):
        raise ValueError(
            f"{path}: an idx file of images needs a second one with labels, as in "
            "train-labels-idx1-ubyte.gz. Name the folder that holds both."
        )
    raise ValueError(f"{path}: not recognized by its name. Expected {FORMATS}.")


def files_of(text: str, *, label: str = "label", inputs: str | None = None) -> tuple[Path, ...]:
    """The files that reading the data opens: a file or folder, or an .npy file and its siblings.

    The arguments are those of `read_splits`.
    """
    path = Path(text)
    if _csv.is_text_table(path) and path.is_file():
        return (path, *_image_paths(path))
    if path.suffix != ".npy" or not path.is_file():
        return (path,)
    names_by_part = _arrays.pairs(
        _arrays.npy_folder(path.parent), inputs=inputs or path.stem, label=label
    )
    names = {path.stem, *(name for part in names_by_part for name in part.values())}
    return tuple(path.parent / f"{name}.npy" for name in sorted(names))


def _image_paths(path: Path) -> tuple[Path, ...]:
    """The folders of images named by a table, from its first row."""
    for cell in _csv.first_row(path):
        folder = image_folder(path, cell)
        if folder is not None:
            first, *subfolders = Path(cell).parts
            return (folder / first if subfolders else folder,)
    return ()


def _folder_sources(folder: Path, choices: Choices) -> dict[str, StoredPart]:
    if is_idx_folder(folder):
        return _idx_sources(folder, choices)
    tables = table_files(folder)
    ignored_tables = _tables_beside_images(folder, tables, choices)
    if tables and not ignored_tables:
        return labeled_sources(tables, choices)
    arrays = _arrays.npy_folder(folder)
    if arrays.names:
        return _array_sources(arrays, choices)
    if not choices.with_targets and (files := _images.all_images(folder)):
        return {"whole": StoredPart(str(folder), EncodedImages(str(folder), files))}
    result = _image_sources(folder, () if choices.model is None else choices.model.names)
    if result:
        _check_no_drop(folder, choices)
        if ignored_tables:
            notice = (
                "tables beside the folders of images that name none of them, left out: "
                f"{', '.join(ignored_tables):.200}"
            )
            first = "train" if "train" in result else "whole"
            result[first] = result[first]._replace(notices=(*result[first].notices, notice))
        return result
    entries = sorted(entry.name for entry in folder.iterdir())[:8]
    if _images.all_images(folder):
        raise ValueError(
            f"{folder}: its images are not in one folder per class, as in cat/1.png; it has "
            f"{entries}."
        )
    raise ValueError(
        f"{folder}: has no train-images-idx file, no folders of images, no npy files and no "
        f"tables; it has {entries or 'nothing'}. Expected {FORMATS}."
    )


def _tables_beside_images(
    folder: Path, tables: Mapping[str, Sequence[Path]], choices: Choices
) -> list[str]:
    """The tables to ignore in a folder whose data are its images; none if the tables are the data.

    Tables are the data if they name images or hold the requested label column, if the model reads
    columns, or if there are fewer than two folders of images to be classes.
    """
    paths = [path for files in tables.values() for path in files]
    reads_columns = choices.model is not None and choices.model.images is None
    if not paths or reads_columns or not all(map(_csv.is_text_table, paths)):
        return []
    for path in paths:
        header, _ = _csv.header_of(path)
        has_label = choices.label != "label" and choices.label.split(",")[0].strip() in header
        if has_label or any(image_folder(path, cell) for cell in _csv.first_row(path)):
            return []
    parts = _images.part_folders(folder) or {"whole": folder}
    classes = _images.images_by_class(parts.get("train", folder)).classes
    return [path.name for path in paths] if len({*classes}) > 1 else []


def _image_sources(folder: Path, class_names: Sequence[str]) -> dict[str, StoredPart]:
    """The parts of a folder of classes; a single class is enough if the model knows its name."""
    parts = _images.part_folders(folder)
    others = _images.other_folders(folder, parts) if parts else []
    parts = parts or {"whole": folder}
    result = {}
    for part, root in parts.items():
        images = _images.images_by_class(root)
        if not images.files and _images.all_images(root):
            others.append(root.name)
        if images.files:
            pictures = EncodedImages(str(root), images.files)
            labels, first_class = np.array(images.classes), images.classes[0]
            needs_classes = part in ("train", "whole") and first_class not in class_names
            if needs_classes and not (labels != first_class).any():
                raise ValueError(
                    f"{root}: all of its images are below one folder, {first_class!r:.80}, but "
                    f"every class needs a folder. Or are the classes in {root / first_class}? "
                    "Name that."
                )
            result[part] = StoredPart(str(root), pictures, labels, notices=images.notices)
    if others and "train" in result:
        other_list = ", ".join(others)
        notice = (
            f"folders that are no part, or have no folders of classes, left out: {other_list:.200}"
        )
        notices = (*result["train"].notices, notice)
        result["train"] = result["train"]._replace(notices=notices)
    return result if "train" in result or "whole" in result else {}


def _idx_sources(folder: Path, choices: Choices) -> dict[str, StoredPart]:
    _check_no_drop(folder, choices)
    result = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        images = idx_file(folder, name, "images")
        targets = None
        if choices.with_targets:
            targets = read_idx_array(idx_file(folder, name, "labels"))
        result[part] = StoredPart(str(images), _idx_inputs(images, choices), targets)
    return result


def _idx_inputs(path: Path, choices: Choices) -> np.ndarray:
    check_shape(str(path), idx_shape(path), choices.model)
    return with_channels(read_idx_array(path))


def _has_idx_magic(path: Path) -> bool:
    with path.open("rb") as file:
        magic = file.read(3)
    return magic[:2] in (b"\0\0", b"\x1f\x8b")


def _check_no_drop(path: Path, choices: Choices) -> None:
    if choices.drop:
        raise ValueError(
            f"{path}: is no table, so it has no column {choices.drop[0]!r:.80} to leave out "
            "(--drop-columns)."
        )


# Arrays.


def _npy_sources(path: Path, choices: Choices) -> dict[str, StoredPart]:
    if not choices.with_targets:
        check_shape(str(path), _arrays.npy_shape(path), choices.model)
        return {"whole": StoredPart(str(path), with_channels(_arrays.read_npy(path)))}
    folder = _arrays.npy_folder(path.parent)
    if path.stem not in folder.names:
        path.stat()  # raises
    return _array_sources(folder, choices._replace(inputs=choices.inputs or path.stem))


def _array_sources(arrays: Arrays, choices: Choices) -> dict[str, StoredPart]:
    _check_no_drop(arrays.path, choices)
    label, inputs = choices.label, choices.inputs
    if not choices.with_targets:
        label = "label"
        inputs = inputs if inputs in arrays.names else None  # new data may use the usual names
    input_names, target_names = _arrays.pairs(arrays, inputs=inputs, label=label)
    if not choices.with_targets:
        if not input_names and len(arrays.names) == 1:
            input_names = {"whole": arrays.names[0]}
        if not input_names:
            raise ValueError(f"{arrays.path}: has no inputs; {_arrays.list_names(arrays)}.")
        return {
            part: StoredPart(str(arrays.path), _array_inputs(arrays, name, choices))
            for part, name in input_names.items()
        }
    if "train" not in input_names and "whole" not in input_names:
        raise ValueError(
            f"{arrays.path}: has no training data. Expected arrays x_train, y_train, x_test, "
            f"y_test, or x, y; {_arrays.list_names(arrays)}. Name others with --inputs and --label."
        )
    result = {}
    for part, name in input_names.items():
        if part not in target_names:
            expected = "y" if part == "whole" else f"y_{name.rpartition('_')[2]}"
            raise ValueError(
                f"{arrays.path}: has {name!r} but not {expected!r}: no array {expected!r}; "
                f"{_arrays.list_names(arrays)}. Name the array of labels with --label."
            )
        inputs, targets = _array_inputs(arrays, name, choices), arrays.load(target_names[part])
        result[part] = StoredPart(str(arrays.path), inputs, targets, columns=(target_names[part],))
    return result


def _array_inputs(arrays: Arrays, name: str, choices: Choices) -> np.ndarray:
    check_shape(str(arrays.path), arrays.shape(name), choices.model)
    return with_channels(arrays.load(name))
