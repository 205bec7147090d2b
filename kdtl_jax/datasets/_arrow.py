"""Parquet and Arrow files, and folders of Hugging Face `datasets`, read with pyarrow alone.

    pip install 'kdtl_jax[data]'

Names of classes come from the `datasets` features in its files. Images are read from the bytes in
the file; files that it only points to are never opened.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import _columnar
from kdtl_jax._text import shown

SUFFIXES = (".parquet", ".arrow", ".feather")
BUFFER = 2**16  # bytes of a file read at once
ROWS = 2**16  # of a parquet file, if its texts have to be counted
STARTS = (
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
    """The names of a file's columns; nothing else is read.

    Raises:
      ImportError: if pyarrow is not installed.
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is damaged.
    """
    return list(_schema(_columnar.pyarrow(path), path).names)


def wide_columns(path: Path) -> list[str]:
    """The columns that may hold images or arrays, by their types; raises as `header_of`."""
    pa = _columnar.pyarrow(path)
    plain = (pa.types.is_primitive, pa.types.is_string, pa.types.is_large_string)
    return [x.name for x in _schema(pa, path) if not any(is_so(x.type) for is_so in plain)]


def _schema(pa: Any, path: Path) -> Any:
    with _readable(pa, path):
        if path.suffix.lower() == ".parquet":
            with pa.parquet.ParquetFile(path) as opened:
                return opened.schema_arrow
        with pa.memory_map(str(path)) as source:
            return _stream(pa, path, source).schema


def read_arrow(paths: Sequence[Path], columns: Sequence[str]) -> ArrowTable:
    """One table of these columns, from the files of one part.

    Raises:
      ImportError: if pyarrow is not installed.
      OSError: if a file does not exist or cannot be read.
      ValueError: if a file is damaged, or files have different columns.
    """
    pa = _columnar.pyarrow(paths[0])
    tables = [_read(pa, path, columns) for path in paths]
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0]}: files of one part differ ({_said(error)}).") from None
    del tables
    return _columns(pa, paths[0], table)


def first_row(path: Path, columns: Sequence[str]) -> ArrowTable:
    """The first row of these columns, if there is one; little more of the file is read.

    Raises:
      ImportError, OSError, ValueError: as `read_arrow`.
    """
    if not columns:
        return ArrowTable(str(path), {}, {}, {}, {}, {})
    pa = _columnar.pyarrow(path)
    return _columns(pa, path, _read(pa, path, columns, only_first=True))


def _columns(pa: Any, path: Path, table: Any) -> ArrowTable:
    """The contents of a table; each column is released as soon as it is converted."""
    features = _features(table.schema.metadata or {})
    found = ArrowTable(str(path), {}, {}, {}, {}, _class_names(features))
    for name in table.column_names:
        chunks, kind = table.column(0).chunks, table.field(0).type
        table = table.remove_column(0)
        try:
            whole = (
                chunks[0] if len(chunks) == 1 else pa.chunked_array(chunks, kind).combine_chunks()
            )
            del chunks
            _columnar.check_unpacked(path, _columnar.written_out(pa, whole))
            _put(pa, found, name, whole)
        except _broken(pa) as error:
            raise ValueError(
                f"{path}: column {shown(name, 80)!r} cannot be read ({_said(error)})."
            ) from None
    return found


def _broken(pa: Any) -> tuple[type[Exception], ...]:
    """What pyarrow raises on damaged files."""
    known = (ValueError, KeyError, IndexError, TypeError, MemoryError, SystemError, OverflowError)
    return (pa.ArrowException, *known)


def _said(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 200)


def _read(pa: Any, path: Path, columns: Sequence[str], *, only_first: bool = False) -> Any:
    with _readable(pa, path):
        if path.suffix.lower() == ".parquet":
            found = _read_parquet(pa, path, columns, only_first=only_first)
        else:
            _columnar.check_unpacked(path, _columnar.arrow_bytes(path, pa))
            names = _schema(pa, path).names
            places = [i for i, name in enumerate(names) if name in columns]
            places = None if len(places) == len(names) else places  # which maps them, uncopied
            with pa.memory_map(str(path)) as source:
                reader = _stream(pa, path, source, places)
                count = getattr(reader, "num_record_batches", None)
                parts = reader if count is None else map(reader.get_batch, range(count))
                batches = _batches(path, parts, len(columns))
                if only_first:
                    found = _first(pa, batches, reader.schema)
                else:
                    found = pa.Table.from_batches([*batches], reader.schema)
        # A column's name may be another's prefix: "a" also selects "a.b".
        found = found.select([i for i, name in enumerate(found.column_names) if name in columns])
        found.validate(full=True)  # offsets in a damaged file may point anywhere
        return found


def _read_parquet(pa: Any, path: Path, columns: Sequence[str], *, only_first: bool) -> Any:
    with pa.parquet.ParquetFile(path) as opened:
        about = opened.metadata
    stored = list(_columnar.chunks(about, columns))
    values = sum(column.num_values for column in stored)  # a list row has many
    _check_announced(path, about.num_rows, len(columns), values)
    _columnar.check_unpacked(path, _columnar.parquet_bytes(path, stored))
    rows, texts = _columnar.rows_at_once(path, about, columns, ROWS), _columnar.texts_of(stored)
    # Buffered: data not decoded are not kept.
    with pa.parquet.ParquetFile(
        path, buffer_size=BUFFER, pre_buffer=False, read_dictionary=texts
    ) as opened:
        if rows == ROWS and not only_first:
            return opened.read(columns=list(columns))
        parts = opened.iter_batches(1 if only_first else rows, columns=list(columns))
        batches = _batches(path, parts, len(columns))
        if only_first:
            return _first(pa, batches, opened.schema_arrow)
        return pa.Table.from_batches([*batches], opened.schema_arrow)


def _first(pa: Any, parts: Iterator[Any], schema: Any) -> Any:
    """A table with the first row, or none."""
    part = next((part for part in parts if len(part)), None)
    return schema.empty_table() if part is None else pa.Table.from_batches([part.slice(0, 1)])


def _stream(pa: Any, path: Path, source: Any, places: Sequence[int] | None = None) -> Any:
    """A reader of the columns at these positions; `datasets` writes streams, Feather files."""
    options = pa.ipc.IpcReadOptions(included_fields=None if places is None else list(places))
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    make = pa.ipc.open_file if is_file else pa.ipc.open_stream
    return make(source, options=options)


def _batches(path: Path, parts: Iterable[Any], columns: int) -> Iterator[Any]:
    """These batches, until they are too large for their file."""
    rows = values = 0
    for batch in parts:
        rows += batch.num_rows
        values += batch.nbytes // 8
        _check_announced(path, rows, columns, values)
        yield batch


def _check_announced(path: Path, rows: int, columns: int, values: int) -> None:
    """Refuses a table that unpacks to thousands of times its stored size."""
    asked = max(rows * columns, values)
    what = f"{rows:,} rows of {columns} columns, {asked:,} values,"
    _columnar.check_unpacked(path, 8 * asked, what)


@contextlib.contextmanager
def _readable(pa: Any, path: Path) -> Iterator[None]:
    """Turns what pyarrow raises into one error that names the file."""
    try:
        yield
    except (*_broken(pa), OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = path.suffix[1:]
        raise ValueError(f"{path}: not a readable {kind} file ({_said(error)}).") from None


def _put(pa: Any, found: ArrowTable, name: str, column: Any) -> None:
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
        if cells and all(cell is not None and cell.startswith(STARTS) for cell in cells):
            found.pictures[name] = cells
        else:
            found.scalars[name] = objects(_decoded(cells) or ["<binary>"] * len(cells))
    elif _is_list(types, kind):
        lengths, inner = _unnested(pa, column)
        if inner is None or column.null_count:
            found.lists[name] = objects(column.to_pylist())
        else:
            found.vectors[name] = inner.reshape(len(column), *lengths)
    elif types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or (
        types.is_decimal(kind) or types.is_null(kind)
    ):  # fmt: skip
        if types.is_boolean(kind):
            found.names[name] = BOOLEANS
        values = column.cast(pa.uint8()) if types.is_boolean(kind) else column
        values = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        found.scalars[name] = np.array(values, np.float64)
    else:
        cells = _cells(pa, column)
        found.scalars[name] = objects([None if c is None else str(c) for c in cells])


def _decoded(cells: list[Any]) -> list[str | None] | None:
    """Bytes that are all printable text, as text; None for others."""
    try:
        texts = [None if cell is None else str(cell, "utf-8") for cell in cells]
    except UnicodeDecodeError:
        return None
    return texts if all(text is None or text.isprintable() for text in texts) else None


def _cells(pa: Any, column: Any) -> list[Any]:
    """The cells as Python objects; cells in a dictionary share one object."""
    if not pa.types.is_dictionary(column.type):
        return column.to_pylist()
    known = [*column.dictionary.to_pylist(), None]  # the last for -1, a missing one
    return [known[i] for i in column.indices.fill_null(-1).to_pylist()]


def _is_text(types: Any, kind: Any) -> bool:
    plain = types.is_string(kind) or types.is_binary(kind)
    return plain or types.is_large_string(kind) or types.is_large_binary(kind)


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _unnested(pa: Any, column: Any) -> tuple[list[int], np.ndarray | None]:
    """The lengths of nested lists and their numbers, if all have the same length."""
    lengths: list[int] = []
    while _is_list(pa.types, column.type):
        count, inner = len(column), column.flatten()
        if not count or inner.null_count or len(inner) % count:
            return [], None
        if len(pa.compute.list_value_length(column).unique()) != 1:
            return [], None
        lengths.append(len(inner) // count)
        column = inner
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return [], None
    return lengths, np.array(column.to_numpy(zero_copy_only=False))


def objects(cells: Sequence[Any]) -> np.ndarray:
    """`[N]` of anything, which NumPy would otherwise split up."""
    found = np.empty(len(cells), object)
    found[:] = cells
    return found


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """What `datasets` records about the columns."""
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
        if isinstance(inner, list) and len(inner) == 1:  # an old way to write a list
            inner = inner[0]
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[name] = tuple(map(str, inner.get("names") or ()))
    return found
