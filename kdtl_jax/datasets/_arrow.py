"""Parquet and Arrow files, and folders of Hugging Face `datasets`, read with pyarrow alone.

    pip install 'kdtl_jax[data]'

Names of classes come from the `datasets` features in its files. Images are read from the bytes in
the file; files that it only points to are never opened.

Raises ImportError if pyarrow is not installed, OSError if a file does not exist or cannot be read,
and ValueError if it is damaged.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import _columnar
from kdtl_jax._text import shown

SUFFIXES = (".parquet", ".arrow", ".feather")
BUFFER_BYTES = 2**16  # bytes of a file read at once
ROWS = 2**16  # of a parquet file read at once, if its texts have to be counted
IMAGE_SIGNATURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"BM",
    b"RIFF",
    b"II*\x00",
    b"MM\x00*",
    b"P5",
    b"P6",
)
BOOLEANS = ("False", "True")  # the names of their classes


class ArrowTable(NamedTuple):
    """The columns of a table by kind."""

    name: str
    scalars: dict[str, np.ndarray]  # float64 with NaN, or objects, text and None
    vectors: dict[str, np.ndarray]  # [N, ...], from lists of equal length
    lists: dict[str, np.ndarray]  # objects, lists of any length
    pictures: dict[str, list[bytes]]  # encoded images
    names: dict[str, tuple[str, ...]]  # of classes, by column


def header_of(path: Path) -> list[str]:
    """The names of a file's columns; nothing else is read."""
    return list(_schema(_columnar.pyarrow(path), path).names)


def array_columns(path: Path) -> list[str]:
    """The columns whose types may hold images or arrays."""
    pa = _columnar.pyarrow(path)
    scalar_types = (pa.types.is_primitive, pa.types.is_string, pa.types.is_large_string)
    return [
        field.name
        for field in _schema(pa, path)
        if not any(is_type(field.type) for is_type in scalar_types)
    ]


def _schema(pa: Any, path: Path) -> Any:
    with _named_errors(pa, path):
        if path.suffix.lower() == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                return file.schema_arrow
        with pa.memory_map(str(path)) as source:
            return _stream(pa, path, source).schema


def read_arrow(paths: Sequence[Path], columns: Sequence[str]) -> ArrowTable:
    """One table of these columns, from the files of one part.

    Raises:
      ValueError: if the files have different columns.
    """
    pa = _columnar.pyarrow(paths[0])
    tables = [_read(pa, path, columns) for path in paths]
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0]}: files of one part differ ({_message(error)}).") from None
    del tables
    return _columns(pa, paths[0], table)


def first_row(path: Path, columns: Sequence[str]) -> ArrowTable:
    """The first row of these columns, if there is one; little more of the file is read."""
    if not columns:
        return ArrowTable(str(path), {}, {}, {}, {}, {})
    pa = _columnar.pyarrow(path)
    return _columns(pa, path, _read(pa, path, columns, only_first=True))


def _columns(pa: Any, path: Path, table: Any) -> ArrowTable:
    """Converts a table; each column is released as soon as it is converted."""
    features = _features(table.schema.metadata or {})
    result = ArrowTable(str(path), {}, {}, {}, {}, _class_names(features))
    for name in table.column_names:
        chunks, dtype = table.column(0).chunks, table.field(0).type
        table = table.remove_column(0)
        try:
            if len(chunks) != 1:
                chunks = [pa.chunked_array(chunks, dtype).combine_chunks()]
            column = chunks.pop()
            _columnar.check_unpacked(path, _columnar.expanded_bytes(pa, column))
            _add_column(pa, result, name, column)
        except _read_errors(pa) as error:
            raise ValueError(
                f"{path}: column {shown(name, 80)!r} cannot be read ({_message(error)})."
            ) from None
    return result


def _read_errors(pa: Any) -> tuple[type[Exception], ...]:
    """The errors that pyarrow raises on damaged files."""
    errors = (ValueError, KeyError, IndexError, TypeError, MemoryError, SystemError, OverflowError)
    return (pa.ArrowException, *errors)


def _message(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 200)


def _read(pa: Any, path: Path, columns: Sequence[str], *, only_first: bool = False) -> Any:
    with _named_errors(pa, path):
        if path.suffix.lower() == ".parquet":
            table = _read_parquet(pa, path, columns, only_first=only_first)
        else:
            _columnar.check_unpacked(path, _columnar.arrow_bytes(path, pa))
            names = _schema(pa, path).names
            positions = [i for i, name in enumerate(names) if name in columns]
            # Without a selection the columns are memory-mapped, not copied.
            positions = None if len(positions) == len(names) else positions
            with pa.memory_map(str(path)) as source:
                reader = record_batches = _stream(pa, path, source, positions)
                if hasattr(reader, "num_record_batches"):
                    record_batches = map(reader.get_batch, range(reader.num_record_batches))
                batches = _batches(path, record_batches, len(columns))
                table = _table(pa, batches, reader.schema, only_first=only_first)
        # A column's name may be another's prefix: "a" also selects "a.b".
        table = table.select([i for i, name in enumerate(table.column_names) if name in columns])
        table.validate(full=True)  # offsets in a damaged file may point anywhere
        return table


def _read_parquet(pa: Any, path: Path, columns: Sequence[str], *, only_first: bool) -> Any:
    with pa.parquet.ParquetFile(path) as file:
        metadata = file.metadata
    values = sum(chunk.num_values for chunk in _columnar.chunks(metadata, columns))
    _check_size(path, metadata.num_rows, len(columns), values)  # a list row has many values
    rows, dictionaries = _columnar.rows_per_read(path, metadata, columns, ROWS)
    # Buffered, so that encoded data are not kept in memory.
    with pa.parquet.ParquetFile(
        path, buffer_size=BUFFER_BYTES, pre_buffer=False, read_dictionary=dictionaries
    ) as file:
        if rows == ROWS and not only_first:
            return file.read(columns=list(columns))
        record_batches = file.iter_batches(1 if only_first else rows, columns=list(columns))
        batches = _batches(path, record_batches, len(columns))
        return _table(pa, batches, file.schema_arrow, only_first=only_first)


def _table(pa: Any, batches: Iterable[Any], schema: Any, *, only_first: bool) -> Any:
    """A table of the batches, or of their first row, if there is one."""
    if only_first:
        rows = (batch.slice(0, 1) for batch in batches if len(batch))
        batches = itertools.islice(rows, 1)
    batches = [*batches]  # of the selected columns, the schema's or fewer
    return pa.Table.from_batches(batches) if batches else schema.empty_table()


def _stream(pa: Any, path: Path, source: Any, positions: Sequence[int] | None = None) -> Any:
    """A reader of the columns at these positions; `datasets` writes streams, Feather files."""
    options = pa.ipc.IpcReadOptions(included_fields=None if positions is None else list(positions))
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    open_stream = pa.ipc.open_file if is_file else pa.ipc.open_stream
    return open_stream(source, options=options)


def _batches(path: Path, batches: Iterable[Any], columns: int) -> Iterator[Any]:
    """Yields the batches; raises when they get too large for their file."""
    rows = values = 0
    for batch in batches:
        rows += batch.num_rows
        values += batch.nbytes // 8
        _check_size(path, rows, columns, values)
        yield batch


def _check_size(path: Path, rows: int, columns: int, values: int) -> None:
    """Refuses a table that unpacks to thousands of times its stored size."""
    total = max(rows * columns, values)
    subject = f"{rows:,} rows of {columns} columns, {total:,} values,"
    _columnar.check_unpacked(path, 8 * total, subject)


@contextlib.contextmanager
def _named_errors(pa: Any, path: Path) -> Iterator[None]:
    """Converts pyarrow's errors into a ValueError that names the file."""
    try:
        yield
    except (*_read_errors(pa), OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = path.suffix[1:]
        raise ValueError(f"{path}: not a readable {kind} file ({_message(error)}).") from None


def _add_column(pa: Any, table: ArrowTable, name: str, column: Any) -> None:
    kind, types = column.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        column, kind = column.storage, kind.storage_type
    if types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        column = column.field("bytes")
        kind = column.type if types.is_dictionary(column.type) else pa.binary()
    if types.is_dictionary(kind):
        kind = kind.value_type
        column = column if _is_text(types, kind) else column.dictionary_decode()
    if types.is_binary(kind) or types.is_large_binary(kind):
        cells = _cells(pa, column)
        if cells and all(cell is not None and cell.startswith(IMAGE_SIGNATURES) for cell in cells):
            table.pictures[name] = cells
        else:
            table.scalars[name] = objects(_decode_text(cells) or ["<binary>"] * len(cells))
    elif _is_list(types, kind):
        lengths, inner = _flatten_lists(pa, column)
        if inner is None or column.null_count:
            table.lists[name] = objects(column.to_pylist())
        else:
            table.vectors[name] = inner.reshape(len(column), *lengths)
    elif _is_number(types, kind) or types.is_decimal(kind) or types.is_null(kind):
        if types.is_boolean(kind):
            table.names[name] = BOOLEANS
        values = column.cast(pa.uint8()) if types.is_boolean(kind) else column
        values = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        table.scalars[name] = np.array(values, np.float64)
    else:
        cells = _cells(pa, column)
        table.scalars[name] = objects([None if c is None else str(c) for c in cells])


def _decode_text(cells: list[Any]) -> list[str | None] | None:
    """The cells as text; None unless all are printable."""
    try:
        texts = [None if cell is None else str(cell, "utf-8") for cell in cells]
    except UnicodeDecodeError:
        return None
    return texts if all(text is None or text.isprintable() for text in texts) else None


def _cells(pa: Any, column: Any) -> list[Any]:
    """The cells as Python objects; cells in a dictionary share one object."""
    if not pa.types.is_dictionary(column.type):
        return column.to_pylist()
    values = [*column.dictionary.to_pylist(), None]  # the last for -1, a missing one
    return [values[i] for i in column.indices.fill_null(-1).to_pylist()]


def _is_text(types: Any, kind: Any) -> bool:
    plain = types.is_string(kind) or types.is_binary(kind)
    return plain or types.is_large_string(kind) or types.is_large_binary(kind)


def _is_number(types: Any, kind: Any) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _flatten_lists(pa: Any, column: Any) -> tuple[list[int], np.ndarray | None]:
    """The lengths of nested lists and their flattened numbers, if all have the same length."""
    lengths: list[int] = []
    while _is_list(pa.types, column.type):
        length, inner = len(column), column.flatten()
        if not length or inner.null_count or len(inner) % length:
            return [], None
        if len(pa.compute.list_value_length(column).unique()) != 1:
            return [], None
        lengths.append(len(inner) // length)
        column = inner
    if not _is_number(pa.types, column.type):
        return [], None
    return lengths, np.array(column.to_numpy(zero_copy_only=False))


def objects(cells: Sequence[Any]) -> np.ndarray:
    """An object array `[N]`; NumPy would stack lists of equal length."""
    array = np.empty(len(cells), object)
    array[:] = cells
    return array


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """The features that `datasets` records for the columns."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    class_names = {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
        if isinstance(inner, list) and len(inner) == 1:  # an old way to write a list
            inner = inner[0]
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            class_names[name] = tuple(map(str, inner.get("names") or ()))
    return class_names
