"""Text tables: CSV, TSV and files with semicolons, read row by row.

A first pass reads every column as numbers; columns that are not numbers are then read again as
text. Booleans are 0 and 1; empty cells and the usual words for a missing value are missing.
Files are UTF-8, or UTF-16 with a byte-order mark; any other is read as Windows-1252, with a notice.
They may be gzipped, as in `people.csv.gz`.

Raises OSError if a file does not exist or cannot be read, and ValueError if it is not text, a row
is longer than any in a table, or a gzipped file unpacks to hundreds of times its size.
"""

import array
import codecs
import csv
import gzip
import io
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kdtl_jax.datasets._tables import BOOLEANS, ColumnTable

DELIMITERS = (",", ";", "\t", "|")
# Words for a missing value, in columns of text and of numbers.
MISSING_TEXT = frozenset(("", "na", "n/a", "nan", "null", "?"))
MISSING_NUMBERS = MISSING_TEXT | {"none", "nil", "-", "--", ".", "#n/a", "#na", "<na>", "-nan"}
NAN = float("nan")
ROWS_PER_READ = 4096  # rows read at once
MAX_ROW_LENGTH = 2**22  # characters of a row, including line ends within quotes
SUFFIXES = (".csv", ".tsv", ".tab")
FALLBACK_ENCODING = "cp1252"
# A gzipped table of more than `LARGE` bytes is refused if it unpacks to this many times its size.
LARGE_BYTES, MAX_COMPRESSION_RATIO = 2**28, 200
READ_ERRORS = (UnicodeDecodeError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile)


def is_text_table(path: Path) -> bool:
    """Whether a file is a text table by its name, gzipped or not."""
    return Path(path.stem if _is_gzipped(path) else path).suffix.lower() in SUFFIXES


def header_of(path: Path) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter."""
    header, cells, delimiter = _header_and_first_row(path)
    names = [name.strip() for name in header]
    if names and len(cells) == len(names) + 1 and "" not in names:
        names = ["", *names]  # R writes row names in such a column
    return names, delimiter


def first_row(path: Path) -> list[str]:
    """The cells of the first row; none if the file is not a table."""
    try:
        return [cell.strip() for cell in _header_and_first_row(path)[1]]
    except ValueError:
        return []


def _header_and_first_row(path: Path) -> tuple[list[str], list[str], str]:
    """The cells of the header and of the first row, and the delimiter."""
    try:
        with _open_text(path) as stream:
            lines = iter(lambda: _read_line(path, stream), "")
            header_line = next((line for line in lines if line.strip()), "")
        delimiter = max(DELIMITERS, key=lambda candidate: _cell_count(header_line, candidate))
        rows = (row for _, row in _nonblank_rows(path, delimiter))
        header, cells = next(rows, []), next(rows, [])
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not a CSV text file ({error}).") from None
    return header, cells, delimiter


def encoding_of(path: Path) -> str:
    """UTF-8 or UTF-16 if the file is valid, else Windows-1252, a superset of printable Latin-1."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    if _is_gzipped(path):
        _check_unpacked(path)
    with _open_bytes(path) as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        stream.seek(0)
        try:
            while chunk := stream.read(2**20):
                if b"\0" in chunk:
                    break  # not text: decoding reports it
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return FALLBACK_ENCODING
    return "utf-8-sig"


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if _is_gzipped(path) else path.open("rb")


def _open_text(path: Path) -> TextIO:
    encoding = encoding_of(path)
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline="")


def _check_unpacked(path: Path) -> None:
    size, max_size = 0, max(LARGE_BYTES, MAX_COMPRESSION_RATIO * path.stat().st_size)
    with gzip.open(path) as stream:
        while chunk := stream.read(2**20):
            size += len(chunk)
            if size > max_size:
                raise ValueError(
                    f"{path}: more than {MAX_COMPRESSION_RATIO} times as large unpacked, which is "
                    f"unusual for a table. If it is one, unpack it first: gunzip {path.name}"
                )


def read_csv(path: Path, targets: Sequence[str] = ()) -> ColumnTable:
    """A text table; the second of two columns with one name is called `name.1`.

    Args:
      path: the file.
      targets: columns to always read as text.

    Raises:
      ValueError: if it is empty, or a row has a wrong number of cells (its line is named).
    """
    header, delimiter = header_of(path)
    names = unique_names(header)
    text_columns = {i for i, name in enumerate(names) if name in targets}
    try:
        numbers, lines, commas = _number_columns(path, names, delimiter, text_columns)
        texts = _text_columns(path, names, delimiter, text_columns)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not a CSV text file ({error}).") from None
    if not len(lines):
        raise ValueError(
            f"{path}: needs a header line and at least one row, got {int(bool(header))} line."
        )
    columns: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        columns[name] = texts[i] if i in texts else np.frombuffer(numbers[i], np.float64)
    notices = ["numbers with a decimal comma are read as such"] if commas else []
    if len(_header_and_first_row(path)[0]) < len(names):
        notices.append(
            "rows have one cell more than the first line: their first cells are taken for "
            "row names, as written by R"
        )
    if encoding_of(path) == FALLBACK_ENCODING:
        notices.append("the file is not UTF-8: its text is read as Windows-1252 (Latin-1)")
    line_numbers = np.frombuffer(lines, np.int64)
    return ColumnTable(str(path), columns, line_numbers, tuple(notices), delimiter == ";")


def _rows(path: Path, names: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of every row after the header."""
    rows = _nonblank_rows(path, delimiter)
    next(rows, None)
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}: row {number} has {len(row)} cells, but the header has {len(names)}."
            )
        yield number, row


def _nonblank_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of every row that is not blank, each at most `MAX_ROW_LENGTH` long."""
    length = 0

    def lines() -> Iterator[str]:
        nonlocal length
        while line := _read_line(path, stream):
            length += len(line)
            if length > MAX_ROW_LENGTH:
                raise _too_long(path)
            yield line

    with _open_text(path) as stream:
        reader = csv.reader(lines(), delimiter=delimiter)
        for row in reader:
            length = 0
            if len(row) > 1 or (row and row[0].strip()):
                yield reader.line_num, row


def _cell_count(line: str, delimiter: str) -> int:
    """The number of cells in a line; 0 if a cell is too long."""
    try:
        return len(next(csv.reader([line], delimiter=delimiter), ()))
    except csv.Error:
        return 0


def _read_line(path: Path, stream: TextIO) -> str:
    line = stream.readline(MAX_ROW_LENGTH + 1)
    if len(line) > MAX_ROW_LENGTH:
        raise _too_long(path)
    return line


def _too_long(path: Path) -> ValueError:
    return ValueError(
        f"{path}: a row has more than {MAX_ROW_LENGTH:,} characters, which no table has. If a "
        "quotation mark is missing, close it; store wide data in an npz or parquet file."
    )


def _number_columns(
    path: Path, names: Sequence[str], delimiter: str, text_columns: set[int]
) -> tuple[dict[int, Any], Any, bool]:
    """Columns of numbers, the line number of every row, and whether commas were decimal.

    Columns that are not numbers are added to `text_columns`.
    """
    columns = {i: array.array("d") for i in range(len(names)) if i not in text_columns}
    lines, commas, rows = array.array("q"), False, _rows(path, names, delimiter)
    while batch := list(itertools.islice(rows, ROWS_PER_READ)):
        lines.extend(line for line, _ in batch)
        for i in tuple(columns):
            cells = [row[i] for _, row in batch]
            try:
                columns[i].extend(array.array("d", map(float, cells)))
            except ValueError:
                values = [_number(cell.strip(), delimiter) for cell in cells]
                if None in values:
                    text_columns.add(i)
                    del columns[i]
                else:
                    columns[i].extend(x for x in values if x is not None)
                    commas |= delimiter == ";" and any(map(_has_decimal_comma, cells))
    return columns, lines, commas


def _number(cell: str, delimiter: str) -> float | None:
    """A cell as a number; NaN if it is missing, None if it is not a number."""
    try:
        return float(cell)
    except ValueError:
        pass
    word = cell.lower()
    if word in MISSING_NUMBERS:
        return NAN
    if delimiter == ";" and _has_decimal_comma(cell):
        return float(cell.replace(",", "."))
    return BOOLEANS.get(word)


def _text_columns(
    path: Path, names: Sequence[str], delimiter: str, text_columns: set[int]
) -> dict[int, np.ndarray]:
    """Columns of text; equal cells share one object, and missing ones are None."""
    if not text_columns:
        return {}
    cells: dict[int, list[str | None]] = {i: [] for i in text_columns}
    for _, row in _rows(path, names, delimiter):
        for i in text_columns:
            text = row[i].strip()
            cells[i].append(None if text.lower() in MISSING_TEXT else sys.intern(text))
    result = {}
    for i, column in cells.items():
        result[i] = np.empty(len(column), object)
        result[i][:] = column
    return result


def _has_decimal_comma(cell: str) -> bool:
    cell = cell.strip()
    return cell.count(",") == 1 and cell.lstrip("+-").replace(",", "").isdecimal()


def unique_names(names: Sequence[str]) -> list[str]:
    """The names of columns, with a second `x` renamed to `x.1`."""
    counts: dict[str, int] = {}
    result = []
    for name in names:
        count = counts[name] = counts.get(name, -1) + 1
        result.append(f"{name}.{count}" if count else name)
    return result
