"""Tables with columns of labels: text files, parquet and Arrow, one file or a folder of them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdtl_jax.datasets import _arrow, _csv, _source, _tables
from kdtl_jax.datasets._arrays import PARTS
from kdtl_jax.datasets._arrow import ArrowTable
from kdtl_jax.datasets._images import Pictures, is_image
from kdtl_jax.datasets._source import Choices, Source
from kdtl_jax.datasets._tables import Table


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name."""
    return _csv.is_text_table(path) or path.suffix.lower() in _arrow.SUFFIXES


def table_files(folder: Path) -> dict[str, list[Path]]:
    """The files of tables in a folder and in the folders inside it, by part."""
    found: dict[str, list[Path]] = {}
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        is_hidden = path.name.startswith((".", "cache-"))
        if not is_table(path) or is_hidden or not path.is_file():
            continue
        words = set(re.split(r"[^a-z0-9]+", "/".join(path.relative_to(folder).parts).lower()))
        parts = [part for part, names in PARTS.items() if words & set(names)]
        found.setdefault(parts[0] if parts else "whole", []).append(path)
    if "train" in found:
        found.pop("whole", None)
    return found


def labeled(files: Mapping[str, Sequence[Path]], choices: Choices) -> dict[str, Source]:
    """The parts of tables; one without labels, as in competitions, is left out.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if a file is damaged or lacks the label column.
    """
    found: dict[str, Source] = {}
    for part in ("whole", "train", "validation", "test"):
        paths = files.get(part, ())
        if not paths:
            continue
        first = found.get("train")
        if paths[0].suffix.lower() in _arrow.SUFFIXES:
            source = _of_arrow(paths, choices, first)
        elif len(paths) == 1:
            source = _of_csv(paths[0], choices, first)
        else:
            raise ValueError(
                f"{paths[0].parent}: {paths[0].name} and {paths[1].name} both hold the {part} "
                "part. Name one file."
            )
        if source is not None:
            found[part] = source
        elif first is not None:
            note = f"{paths[0].name} has no labels: left out"
            found["train"] = first._replace(notices=(*first.notices, note))
    return found


def _of_csv(path: Path, choices: Choices, first: Source | None) -> Source | None:
    header, _ = _csv.header_of(path)
    is_of_images = choices.takes is not None and choices.takes.images is not None
    if not choices.with_targets:
        if header and not is_of_images:
            _source.check_columns(str(path), _csv.distinct(header), choices.takes)
        table = _inputs_alone(_csv.read_csv(path, choices.targets), choices)
        return _with_images(path, Source(str(path), table), choices)
    if not header:
        _csv.read_csv(path)  # raises: it is empty
    if first is not None and not set(first.columns) & set(header):
        return None
    names = _label_columns(str(path), header, choices)
    if not is_of_images:
        _source.check_columns(str(path), _csv.distinct(header), choices.takes)
    source = _of_table(_csv.read_csv(path, names), names, choices)
    return _with_images(path, source, choices)


def _with_images(path: Path, source: Source, choices: Choices) -> Source:
    """The source with the images that a column of its table names, if there is one.

    Raises:
      ValueError: naming the first row without its image, or the table if it must name images.
    """
    table = source.inputs
    assert isinstance(table, Table)
    if choices.kept:  # the model reads columns
        return source
    for name, column in table.columns.items():
        folder = image_folder(path, column[0]) if table.size else None
        if folder is None or not all(isinstance(cell, str) for cell in column):
            continue
        files = [folder / cell for cell in column]
        lacking = next((row for row, file in enumerate(files) if not file.is_file()), None)
        if lacking is not None:
            raise ValueError(f"{path}: {table.at(lacking)}: there is no file {files[lacking]}.")
        others = [other for other in table.columns if other != name]
        left = f", columns {', '.join(others)} are left out" if others else ""
        note = f"inputs are the images that the column {name!r:.80} names{left:.200}"
        return source._replace(inputs=Pictures(str(path), files), notices=(*source.notices, note))
    if choices.takes is not None and choices.takes.images is not None:
        raise ValueError(f"{path}: no column names image files beside it, which the model takes.")
    return source


def image_folder(path: Path, cell: Any) -> Path | None:
    """The path of the image that a table's cell names: beside the table, or one folder below."""
    if not isinstance(cell, str) or not is_image(Path(cell)):
        return None
    below = sorted(each for each in path.parent.iterdir() if each.is_dir())
    return next((each for each in (path.parent, *below) if (each / cell).is_file()), None)


def _label_columns(name: str, header: Sequence[str], choices: Choices) -> tuple[str, ...]:
    there = [column for column in header if column not in choices.drop]
    return _tables.label_columns(name, there, choices.label)


def _of_table(table: Table, names: Sequence[str], choices: Choices) -> Source:
    if choices.kept:
        _tables.check_read(table.name, choices.kept, list(table.columns))
        others = [name for name in table.columns if name not in (*choices.kept, *names)]
        table = _tables.dropped(table, others)
        table = table._replace(notices=(*table.notices, *_left_out(others, choices)))
    table = _tables.without_index(_tables.dropped(table, choices.drop), names)
    if choices.missing == "drop":
        table = _tables.complete(table)
    table, targets = _tables.targets_of(table, names, may_be_none=choices.may_be_none)
    several = tuple(names) if len(names) > 1 else ()
    return Source(
        table.name, table, targets, several, tuple(names), table.notices, table.decimal_comma
    )


def _left_out(names: Sequence[str], choices: Choices) -> tuple[str, ...]:
    """Notices about columns that a model does not read."""
    others = [name for name in names if name not in choices.drop]
    note = f"columns that the model does not read are left out: {', '.join(others)}"
    return (f"{note:.300}",) if others else ()


def _inputs_alone(table: Table, choices: Choices) -> Table:
    return _tables.dropped(table, [name for name in choices.targets if name in table.columns])


def _of_arrow(paths: Sequence[Path], choices: Choices, first: Source | None) -> Source | None:
    header = _arrow.header_of(paths[0])
    if first is not None and not set(first.columns) & set(header):
        return None
    names = choices.targets
    if choices.with_targets:
        names = _label_columns(str(paths[0]), header, choices)
    _tables.check_there(str(paths[0]), choices.drop, header)
    kept = [name for name in header if name not in (*names, *choices.drop)]
    left_out: tuple[str, ...] = ()
    if choices.kept and set(choices.kept) <= {*header}:
        read = (*choices.kept, choices.inputs)
        left_out = _left_out([name for name in kept if name not in read], choices)
        kept = [name for name in kept if name in read]
    asked = [choices.inputs] if choices.inputs in kept else kept
    _check_row(paths[0], asked, kept, choices)
    found = _arrow.read_arrow(paths, [*asked, *(names if choices.with_targets else ())])
    choices = choices._replace(drop=())  # they were not read
    wide = _wide(found, kept, choices)
    table = Table(found.name, found.scalars)
    if wide is None:
        if lists := [name for name in kept if name in found.lists]:
            raise ValueError(
                f"{found.name}: column {lists[0]!r:.80} holds lists of different lengths. Drop it "
                "(--drop-columns)."
            )
        if not choices.with_targets:
            return Source(found.name, _inputs_alone(table, choices))
        if all(name in found.scalars for name in names):
            source = _of_table(table, names, choices)
            known = found.names.get(names[0], ()) if len(names) == 1 else ()
            notices = (*left_out, *source.notices)
            return source._replace(names=known or source.names, notices=notices)
    inputs: Any = table if wide is None else _columns_inputs(found, wide)
    notices = ()
    if others := [name for name in kept if wide is not None and name != wide]:
        notices = (f"columns {', '.join(others)[:200]} are left out: inputs are {wide!r}",)
    if not choices.with_targets:
        return Source(found.name, inputs, notices=notices)
    targets, known = _targets(found, names)
    if wide is None:  # lists of labels with columns of numbers
        columns = {name: found.scalars[name] for name in kept}
        inputs = _tables.without_index(Table(found.name, columns, np.arange(len(targets))), ())
        if choices.missing == "drop":
            inputs = _tables.complete(inputs)
        targets, notices = targets[inputs.rows], inputs.notices
    if known and targets.dtype == np.float64 and len(targets) and (targets == -1).all():
        return None if first is not None else Source(found.name, inputs, targets)
    several = tuple(names) if len(names) > 1 else known
    return Source(found.name, inputs, targets, several, tuple(names), notices)


def _check_row(path: Path, asked: Sequence[str], kept: Sequence[str], choices: Choices) -> None:
    """Refuses, by the first row and before reading the rest, what a model does not take."""
    if choices.takes is None:
        return
    row = _arrow.first_row(path, [name for name in _arrow.wide_columns(path) if name in asked])
    if row.lists:  # no row, or one with something missing
        return
    wide = _wide(row, kept, choices)
    if wide is None:
        _source.check_columns(row.name, kept, choices.takes)
    elif wide in row.pictures:
        _source.check_pictures(row.name, choices.takes)
    else:
        _source.check_shape(row.name, row.vectors[wide].shape, choices.takes)


def _wide(found: ArrowTable, kept: Sequence[str], choices: Choices) -> str | None:
    """The column whose images or arrays are the inputs; None if all number columns are."""
    if choices.inputs is not None:
        if choices.inputs not in found.pictures and choices.inputs not in found.vectors:
            raise ValueError(
                f"{found.name}: has no column {choices.inputs!r:.80} of images or arrays; it has "
                f"{list(kept)!s:.300}."
            )
        return choices.inputs
    wide = [name for name in (*found.pictures, *found.vectors) if name in kept]
    if len(wide) > 1:
        raise ValueError(
            f"{found.name}: columns {', '.join(wide)[:200]} all hold inputs. Choose one with "
            "--inputs."
        )
    return wide[0] if wide else None


def _columns_inputs(found: ArrowTable, name: str) -> Pictures | np.ndarray:
    if name in found.pictures:
        return Pictures(f"{found.name}: column {name!r}", found.pictures[name])
    return _source.with_channels(found.vectors[name])


def _targets(found: ArrowTable, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets `[N]` or `[N, K]`, and the names of their classes."""
    columns = []
    for name in names:
        if name in found.scalars:
            column = found.scalars[name]
            if (lacking := _tables.empty(column)).any():
                raise ValueError(
                    f"{found.name}: row {np.flatnonzero(lacking)[0]} has no label "
                    f"({int(lacking.sum())} such rows)."
                )
        elif name in found.lists:
            column = found.lists[name]
        elif name in found.vectors:
            column = found.vectors[name]
        else:
            raise ValueError(f"{found.name}: column {name!r:.80} holds images, not labels.")
        columns.append(column)
    if len(columns) > 1:
        return np.stack(columns, axis=1), ()
    known = found.names.get(names[0], ())
    column = columns[0]
    if column.ndim == 2 and (
        known or (column.dtype.kind in "iu" and not np.isin(column, (0, 1)).all())
    ):  # lists that happen to have one length
        column = _arrow.objects(column.tolist())
    if known and column.dtype == object:  # several classes in a list
        named = [_named(found.name, row, cell, known) for row, cell in enumerate(column)]
        column = _arrow.objects(named)
    return column, known


def _named(name: str, row: int, cell: Any, known: Sequence[str]) -> list[str] | None:
    """The names of a list of class numbers; None is kept, and refused with other empty cells."""
    if cell is None or None in cell:
        return None
    if any(i not in range(len(known)) for i in cell):
        raise ValueError(
            f"{name}: labels must lie in 0..{len(known) - 1}, got {cell!s:.80} at row {row}."
        )
    return [known[int(i)] for i in cell]
