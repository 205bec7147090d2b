"""Tables with columns of labels: text files, parquet and Arrow, one file or a folder of them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdtl_jax.datasets import _arrow, _csv, _source, _tables
from kdtl_jax.datasets._arrays import PARTS
from kdtl_jax.datasets._arrow import ArrowTable
from kdtl_jax.datasets._images import EncodedImages, is_image
from kdtl_jax.datasets._source import Choices, StoredPart
from kdtl_jax.datasets._tables import ColumnTable


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name."""
    return _csv.is_text_table(path) or path.suffix.lower() in _arrow.SUFFIXES


def table_files(folder: Path) -> dict[str, list[Path]]:
    """The files of tables in a folder and in the folders inside it, by part."""
    result: dict[str, list[Path]] = {}
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        is_hidden = path.name.startswith((".", "cache-"))
        if not is_table(path) or is_hidden or not path.is_file():
            continue
        words = set(re.split(r"[^a-z0-9]+", "/".join(path.relative_to(folder).parts).lower()))
        parts = [part for part, names in PARTS.items() if words & set(names)]
        result.setdefault(parts[0] if parts else "whole", []).append(path)
    if "train" in result:
        result.pop("whole", None)
    return result


def labeled_sources(files: Mapping[str, Sequence[Path]], choices: Choices) -> dict[str, StoredPart]:
    """The parts of tables; a part without labels, as in competitions, is left out.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if a file is damaged or lacks the label column.
    """
    result: dict[str, StoredPart] = {}
    for part in ("whole", "train", "validation", "test"):
        paths = files.get(part, ())
        if not paths:
            continue
        first = result.get("train")
        if paths[0].suffix.lower() in _arrow.SUFFIXES:
            source = _arrow_source(paths, choices, first)
        elif len(paths) == 1:
            source = _csv_source(paths[0], choices, first)
        else:
            raise ValueError(
                f"{paths[0].parent}: {paths[0].name} and {paths[1].name} both hold the {part} "
                "part. Name one file."
            )
        if source is not None:
            result[part] = source
        elif first is not None:
            notice = f"{paths[0].name} has no labels: left out"
            result["train"] = first._replace(notices=(*first.notices, notice))
    return result


def _csv_source(path: Path, choices: Choices, first: StoredPart | None) -> StoredPart | None:
    header, _ = _csv.header_of(path)
    if not header:
        _csv.read_csv(path)  # raises: it is empty
    names = choices.targets
    if choices.with_targets:
        if first is not None and not set(first.columns) & set(header):
            return None
        names = _label_columns(str(path), header, choices)
    if choices.model is None or choices.model.images is None:
        _source.check_columns(str(path), _csv.unique_names(header), choices.model)
    table = _csv.read_csv(path, names)
    if choices.with_targets:
        source = _table_source(table, names, choices)
    else:
        source = StoredPart(str(path), _drop_targets(table, choices))
    return _with_named_images(path, source, choices)


def _with_named_images(path: Path, source: StoredPart, choices: Choices) -> StoredPart:
    """Replaces a table's inputs by the images that one of its columns names, if any does.

    Raises:
      ValueError: naming the first row without its image, or the table if `inputs` or the model
        asks for images.
    """
    table = source.inputs
    assert isinstance(table, ColumnTable)
    if choices.model_columns:  # the model reads columns
        return source
    wanted = choices.inputs if choices.model is None else None
    for name, column in table.columns.items():
        if wanted not in (None, name):
            continue
        folder = image_folder(path, column[0]) if table.size else None
        if folder is None or not all(isinstance(cell, str) for cell in column):
            continue
        files = [folder / cell for cell in column]
        missing_row = next((row for row, file in enumerate(files) if not file.is_file()), None)
        if missing_row is not None:
            raise ValueError(
                f"{path}: {table.at(missing_row)}: there is no file {files[missing_row]}."
            )
        others = [other for other in table.columns if other != name]
        ignored = f", columns {', '.join(others)} are left out" if others else ""
        notice = f"inputs are the images that the column {name!r:.80} names{ignored:.200}"
        return source._replace(
            inputs=EncodedImages(str(path), files), notices=(*source.notices, notice)
        )
    if wanted is not None:
        raise ValueError(f"{path}: has no column {wanted!r:.80} that names image files (--inputs).")
    if choices.model is not None and choices.model.images is not None:
        raise ValueError(f"{path}: no column names image files beside it, which the model takes.")
    return source


def image_folder(path: Path, cell: Any) -> Path | None:
    """The path of the image that a table's cell names: beside the table, or one folder below."""
    if not isinstance(cell, str) or not is_image(Path(cell)):
        return None
    subfolders = sorted(folder for folder in path.parent.iterdir() if folder.is_dir())
    return next(
        (folder for folder in (path.parent, *subfolders) if (folder / cell).is_file()), None
    )


def _label_columns(name: str, header: Sequence[str], choices: Choices) -> tuple[str, ...]:
    columns = [column for column in header if column not in choices.drop]
    return _tables.label_columns(name, columns, choices.label)


def _table_source(table: ColumnTable, names: Sequence[str], choices: Choices) -> StoredPart:
    if choices.model_columns:
        _tables.check_model_columns(table.name, choices.model_columns, list(table.columns))
        ignored = [name for name in table.columns if name not in (*choices.model_columns, *names)]
        table = _tables.without_columns(table, ignored)
        table = table._replace(notices=(*table.notices, *_ignored_notices(ignored, choices)))
    table = _tables.without_index(_tables.without_columns(table, choices.drop), names)
    if choices.missing == "drop":
        table = _tables.without_missing(table)
    table, targets = _tables.split_targets(table, names, allow_unlabeled=choices.allow_unlabeled)
    target_names = tuple(names) if len(names) > 1 else ()
    return StoredPart(
        table.name, table, targets, target_names, tuple(names), table.notices, table.decimal_comma
    )


def _ignored_notices(names: Sequence[str], choices: Choices) -> tuple[str, ...]:
    """Notices about columns that a model does not read."""
    ignored = [name for name in names if name not in choices.drop]
    notice = f"columns that the model does not read are left out: {', '.join(ignored)}"
    return (f"{notice:.300}",) if ignored else ()


def _drop_targets(table: ColumnTable, choices: Choices) -> ColumnTable:
    return _tables.without_columns(
        table, [name for name in choices.targets if name in table.columns]
    )


def _arrow_source(
    paths: Sequence[Path], choices: Choices, first: StoredPart | None
) -> StoredPart | None:
    header = _arrow.header_of(paths[0])
    if first is not None and not set(first.columns) & set(header):
        return None
    names = choices.targets
    if choices.with_targets:
        names = _label_columns(str(paths[0]), header, choices)
    _tables.check_columns_exist(str(paths[0]), choices.drop, header)
    input_columns = [name for name in header if name not in (*names, *choices.drop)]
    ignored_notices: tuple[str, ...] = ()
    if choices.model_columns and set(choices.model_columns) <= {*header}:
        model_inputs = (*choices.model_columns, choices.inputs)
        ignored_notices = _ignored_notices(
            [name for name in input_columns if name not in model_inputs], choices
        )
        input_columns = [name for name in input_columns if name in model_inputs]
    columns = [choices.inputs] if choices.inputs in input_columns else input_columns
    _check_first_row(paths[0], columns, input_columns, choices)
    data = _arrow.read_arrow(paths, [*columns, *(names if choices.with_targets else ())])
    choices = choices._replace(drop=())  # these columns were not read
    array_column = _array_column(data, input_columns, choices)
    table = ColumnTable(data.name, data.scalars)
    if array_column is None:
        if lists := [name for name in input_columns if name in data.lists]:
            raise ValueError(
                f"{data.name}: column {lists[0]!r:.80} holds lists of different lengths. Drop it "
                "(--drop-columns)."
            )
        if not choices.with_targets:
            return StoredPart(data.name, _drop_targets(table, choices))
        if all(name in data.scalars for name in names):
            source = _table_source(table, names, choices)
            class_names = data.names.get(names[0], ()) if len(names) == 1 else ()
            notices = (*ignored_notices, *source.notices)
            return source._replace(names=class_names or source.names, notices=notices)
    inputs: Any = table
    if array_column in data.pictures:
        pictures = data.pictures[array_column]
        inputs = EncodedImages(f"{data.name}: column {array_column!r}", pictures)
    elif array_column is not None:
        inputs = _source.with_channels(data.vectors[array_column])
    notices = ()
    ignored = [name for name in input_columns if name != array_column]
    if array_column is not None and ignored:
        notices = (f"columns {', '.join(ignored)[:200]} are left out: inputs are {array_column!r}",)
    if not choices.with_targets:
        return StoredPart(data.name, inputs, notices=notices)
    targets, class_names = _targets(data, names)
    if array_column is None:  # lists of labels with columns of numbers
        scalars = {name: data.scalars[name] for name in input_columns}
        inputs = _tables.without_index(ColumnTable(data.name, scalars, np.arange(len(targets))), ())
        if choices.missing == "drop":
            inputs = _tables.without_missing(inputs)
        targets, notices = targets[inputs.rows], inputs.notices
    if class_names and targets.dtype == np.float64 and len(targets) and (targets == -1).all():
        return None if first is not None else StoredPart(data.name, inputs, targets)
    target_names = tuple(names) if len(names) > 1 else class_names
    return StoredPart(data.name, inputs, targets, target_names, tuple(names), notices)


def _check_first_row(
    path: Path, columns: Sequence[str], input_columns: Sequence[str], choices: Choices
) -> None:
    """Refuses data that a model does not take, from the first row, before reading the rest."""
    if choices.model is None:
        return
    row = _arrow.first_row(path, [name for name in _arrow.array_columns(path) if name in columns])
    if row.lists:  # no row, or one with missing values
        return
    array_column = _array_column(row, input_columns, choices)
    if array_column is None:
        _source.check_columns(row.name, input_columns, choices.model)
    elif array_column in row.pictures:
        _source.check_images(row.name, choices.model)
    else:
        _source.check_shape(row.name, row.vectors[array_column].shape, choices.model)


def _array_column(table: ArrowTable, input_columns: Sequence[str], choices: Choices) -> str | None:
    """The column of images or arrays that is the inputs; None if the inputs are number columns."""
    if choices.inputs is not None:
        if choices.inputs not in table.pictures and choices.inputs not in table.vectors:
            raise ValueError(
                f"{table.name}: has no column {choices.inputs!r:.80} of images or arrays; it has "
                f"{list(input_columns)!s:.300}."
            )
        return choices.inputs
    matches = [name for name in (*table.pictures, *table.vectors) if name in input_columns]
    if len(matches) > 1:
        raise ValueError(
            f"{table.name}: columns {', '.join(matches)[:200]} all hold inputs. Choose one with "
            "--inputs."
        )
    return matches[0] if matches else None


def _targets(table: ArrowTable, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets `[N]` or `[N, K]`, and the names of their classes."""
    columns = []
    for name in names:
        if name in table.scalars:
            column = table.scalars[name]
            if (missing := _tables.missing_mask(column)).any():
                raise ValueError(
                    f"{table.name}: row {np.flatnonzero(missing)[0]} has no label "
                    f"({int(missing.sum())} such rows)."
                )
        elif name in table.pictures:
            raise ValueError(f"{table.name}: column {name!r:.80} holds images, not labels.")
        else:
            column = table.lists[name] if name in table.lists else table.vectors[name]
        columns.append(column)
    if len(columns) > 1:
        return np.stack(columns, axis=1), ()
    class_names = table.names.get(names[0], ())
    column = columns[0]
    if column.ndim == 2 and (
        class_names or (column.dtype.kind in "iu" and not np.isin(column, (0, 1)).all())
    ):  # lists that happen to have one length
        column = _arrow.objects(column.tolist())
    if class_names and column.dtype == object:  # several classes in a list
        class_lists = [
            _class_names(table.name, row, cell, class_names) for row, cell in enumerate(column)
        ]
        column = _arrow.objects(class_lists)
    return column, class_names


def _class_names(name: str, row: int, cell: Any, class_names: Sequence[str]) -> list[str] | None:
    """The names of a list of class numbers; None stays, and is refused with other empty cells."""
    if cell is None or None in cell:
        return None
    if any(i not in range(len(class_names)) for i in cell):
        raise ValueError(
            f"{name}: labels must lie in 0..{len(class_names) - 1}, got {cell!s:.80} at row {row}."
        )
    return [class_names[int(i)] for i in cell]
