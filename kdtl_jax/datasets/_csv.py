"""Text tables: CSV, TSV and files with semicolons, read row by row.

A first pass reads every column as numbers; columns that are not numbers are then read again as
text. Booleans are 0 and 1; empty cells and the usual words for a missing value are missing.
Files are UTF-8, or UTF-16 with a byte-order mark; any other is read as Windows-1252, with a notice.
They may be gzipped, as in `people.csv.gz`.
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

from kdtl_jax.datasets._tables import FLAGS, Table

DELIMITERS = (",", ";", "\t", "|")
ABSENT = frozenset(("", "na", "n/a", "nan", "null", "?"))
# Among numbers; in a column of text they may be text.
NO_NUMBER = ABSENT | {"none", "nil", "-", "--", ".", "#n/a", "#na", "<na>", "-nan"}
NAN = float("nan")
PART = 4096  # rows read at once
LONGEST = 2**22  # characters of a row, including line ends within quotes
SUFFIXES = (".csv", ".tsv", ".tab")
OTHER = "cp1252"
# A gzipped table of more than `LARGE` bytes is refused if it unpacks to this many times its size.
LARGE, MOST_PACKED = 2**28, 200
DAMAGED = (UnicodeDecodeError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile)


def is_text_table(path: Path) -> bool:
    """Whether a file is a text table by its name, gzipped or not."""
    return Path(path.stem if _is_packed(path) else path).suffix.lower() in SUFFIXES


def header_of(path: Path) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is not text, or a row is longer than any in a table.
    """
    header, cells, delimiter = _beginning(path)
    names = [name.strip() for name in header]
    if names and len(cells) == len(names) + 1 and "" not in names:
        names = ["", *names]  # R writes row names in such a column
    return names, delimiter


def first_row(path: Path) -> list[str]:
    """The cells of the first row; none if the file is not a table."""
    try:
        return [cell.strip() for cell in _beginning(path)[1]]
    except ValueError:
        return []


def _beginning(path: Path) -> tuple[list[str], list[str], str]:
    """The cells of the header and of the first row, and the delimiter."""
    try:
        with _text(path) as stream:
            lines = iter(lambda: _line(path, stream), "")
            first = next((line for line in lines if line.strip()), "")
        delimiter = max(DELIMITERS, key=lambda mark: _count(first, mark))
        rows = (row for _, row in _filled(path, delimiter))
        header, cells = next(rows, []), next(rows, [])
    except DAMAGED as error:
        raise ValueError(f"{path}: not a CSV text file ({error}).") from None
    return header, cells, delimiter


def encoding_of(path: Path) -> str:
    """UTF-8 or UTF-16 if the file is valid, else Windows-1252, a superset of Latin-1's text.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is gzipped and unpacks to hundreds of times its size.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    if _is_packed(path):
        _check_unpacked(path)
    with _binary(path) as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        stream.seek(0)
        try:
            while piece := stream.read(2**20):
                if b"\0" in piece:
                    break  # not text: decoding reports it
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return OTHER
    return "utf-8-sig"


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _binary(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if _is_packed(path) else path.open("rb")


def _text(path: Path) -> TextIO:
    encoding = encoding_of(path)
    return io.TextIOWrapper(_binary(path), encoding=encoding, newline="")


def _check_unpacked(path: Path) -> None:
    used, most = 0, max(LARGE, MOST_PACKED * path.stat().st_size)
    with gzip.open(path) as stream:
        while piece := stream.read(2**20):
            used += len(piece)
            if used > most:
                raise ValueError(
                    f"{path}: more than {MOST_PACKED} times as large unpacked, which is unusual "
                    f"for a table. If it is one, unpack it first: gunzip {path.name}"
                )


def read_csv(path: Path, targets: Sequence[str] = ()) -> Table:
    """A text table; the second of two columns with one name is called `name.1`.

    Args:
      path: the file.
      targets: columns to read as text, whatever they hold.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is empty, or a row is too long or has a wrong number of cells (its line is
        named).
    """
    header, delimiter = header_of(path)
    names = distinct(header)
    as_text = {i for i, name in enumerate(names) if name in targets}
    try:
        numbers, lines, commas = _numbers(path, names, delimiter, as_text)
        texts = _texts(path, names, delimiter, as_text)
    except DAMAGED as error:
        raise ValueError(f"{path}: not a CSV text file ({error}).") from None
    if not len(lines):
        raise ValueError(
            f"{path}: needs a header line and at least one row, got {int(bool(header))} line."
        )
    columns: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        columns[name] = texts[i] if i in texts else np.frombuffer(numbers[i], np.float64)
    notices = ["numbers with a decimal comma are read as such"] if commas else []
    if len(_beginning(path)[0]) < len(names):
        notices.append(
            "rows have one cell more than the first line: their first cells are taken for "
            "row names, as written by R"
        )
    if encoding_of(path) == OTHER:
        notices.append("the file is not UTF-8: its text is read as Windows-1252 (Latin-1)")
    places = np.frombuffer(lines, np.int64)
    return Table(str(path), columns, places, tuple(notices), delimiter == ";")


def _rows(path: Path, names: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of every row after the header."""
    rows = _filled(path, delimiter)
    next(rows, None)
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}: row {number} has {len(row)} cells, but the header has {len(names)}."
            )
        yield number, row


def _filled(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of every row that is not blank, each at most `LONGEST` long."""
    used = 0

    def lines() -> Iterator[str]:
        nonlocal used
        while line := _line(path, stream):
            used += len(line)
            if used > LONGEST:
                raise _too_long(path)
            yield line

    with _text(path) as stream:
        reader = csv.reader(lines(), delimiter=delimiter)
        for row in reader:
            used = 0
            if len(row) > 1 or (row and row[0].strip()):
                yield reader.line_num, row


def _count(line: str, delimiter: str) -> int:
    """The cells of a line; none if it is too long to be one."""
    try:
        return len(next(csv.reader([line], delimiter=delimiter), ()))
    except csv.Error:
        return 0


def _line(path: Path, stream: TextIO) -> str:
    line = stream.readline(LONGEST + 1)
    if len(line) > LONGEST:
        raise _too_long(path)
    return line


def _too_long(path: Path) -> ValueError:
    return ValueError(
        f"{path}: a row has more than {LONGEST:,} characters, which no table has. If a quotation "
        "mark is missing, close it; store wide data in an npz or parquet file."
    )


def _numbers(
    path: Path, names: Sequence[str], delimiter: str, as_text: set[int]
) -> tuple[dict[int, Any], Any, bool]:
    """Columns of numbers, the line of every row, and whether commas were decimal.

    Columns that are not numbers are added to `as_text`.
    """
    columns = {i: array.array("d") for i in range(len(names)) if i not in as_text}
    lines, commas, rows = array.array("q"), False, _rows(path, names, delimiter)
    while part := list(itertools.islice(rows, PART)):
        lines.extend(line for line, _ in part)
        for i in tuple(columns):
            cells = [row[i] for _, row in part]
            try:
                columns[i].extend(array.array("d", map(float, cells)))
            except ValueError:
                found = [_number(cell.strip(), delimiter) for cell in cells]
                if None in found:
                    as_text.add(i)
                    del columns[i]
                else:
                    columns[i].extend(x for x in found if x is not None)
                    commas |= delimiter == ";" and any(map(_has_decimal_comma, cells))
    return columns, lines, commas


def _number(cell: str, delimiter: str) -> float | None:
    """A cell as a number, NaN if it is missing, None if it is something else."""
    try:
        return float(cell)
    except ValueError:
        pass
    word = cell.lower()
    if word in NO_NUMBER:
        return NAN
    if delimiter == ";" and _has_decimal_comma(cell):
        return float(cell.replace(",", "."))
    return FLAGS.get(word)


def _texts(
    path: Path, names: Sequence[str], delimiter: str, as_text: set[int]
) -> dict[int, np.ndarray]:
    """Columns of text; equal cells share one object, and missing ones are None."""
    if not as_text:
        return {}
    cells: dict[int, list[str | None]] = {i: [] for i in as_text}
    for _, row in _rows(path, names, delimiter):
        for i in as_text:
            text = row[i].strip()
            cells[i].append(None if text.lower() in ABSENT else sys.intern(text))
    found = {}
    for i, column in cells.items():
        found[i] = np.empty(len(column), object)
        found[i][:] = column
    return found


def _has_decimal_comma(cell: str) -> bool:
    cell = cell.strip()
    return cell.count(",") == 1 and cell.lstrip("+-").replace(",", "").isdecimal()


def distinct(names: Sequence[str]) -> list[str]:
    """The names of columns, with a second `x` renamed to `x.1`."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        found.append(f"{name}.{count}" if count else name)
    return found
