"""Files of text as records, read lazily: plain text, JSON lines, parquet.

A record is `{"text": ...}`, `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`, where
prompt and completion are texts or lists of messages. No file is held in memory, and the order is
fixed: the order of the paths, and of names within a folder.
"""

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kdtl_jax import _columnar, _files
from kdtl_jax._text import listed, shown

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
PLAIN = (".txt", ".md", ".text")
COLUMNS = ("text", "messages", "prompt", "completion", "privileged", "tools")
FORMS = "'text' nor 'messages' nor 'prompt' and 'completion'"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it at the start of a file
MAX_BYTES = 16 * 2**20  # of one line of JSON; its objects may take twenty times as many
CHUNK_BYTES = 2**20  # bytes of plain text in one record
ROWS_PER_READ = 1024  # of a parquet file at a time

Paths = str | Path | Sequence[str | Path]


class Record(NamedTuple):
    """One record, and where it was read from.

    A plain text may come in pieces: `begins` is True only for its first, `ends` only for its last.
    """

    place: str  # "data.jsonl: line 3"
    value: Mapping[str, Any]
    begins: bool = True
    ends: bool = True


def text_files(paths: Paths) -> list[Path]:
    """The files at these paths: files themselves, and all files of a known kind in folders.

    Known kinds are .txt .text .md (plain text), .jsonl .ndjson .json (one object per line) and
    .parquet. A file of another kind that is named explicitly is read as plain text. Hidden files
    are left out.

    Raises:
      FileNotFoundError: if a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist.")
            files.append(_files.regular(path))
            continue
        suffixes = (*JSON_LINES, *PARQUET, *PLAIN)
        matches = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in suffixes
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not matches:
            raise FileNotFoundError(f"{path} holds no file of text ({', '.join(suffixes)}).")
        files += matches
    return files


def records(paths: Paths, between: tuple[float, float] = (0.0, 1.0)) -> Iterator[Record]:
    """The records of files, one after another.

    A plain text is cut after a line end about every megabyte.

    Args:
      paths: files and folders, as in `text_files`.
      between: the part of every file to read, as shares of its lines (JSON), rows (parquet) or
        bytes (plain text, rounded down to a line): `(0, 0.95)` and `(0.95, 1)` are disjoint and
        together make up the whole.

    Raises:
      FileNotFoundError: as in `text_files`.
      ImportError: for parquet, if the package `pyarrow` is not installed.
      ValueError: naming file and line, if text is not UTF-8, a line is not a JSON object of a known
        form, or a parquet file cannot be read.
    """
    if not 0 <= between[0] <= between[1] <= 1:
        raise ValueError(f"between must be two ascending shares within 0 and 1, got {between}.")
    for file in text_files(paths):
        kind = file.suffix.lower()
        if kind in JSON_LINES:
            yield from _json_lines(file, between)
        elif kind in PARQUET:
            yield from _parquet(file, between)
        else:
            yield from _plain_text(file, between)


def _range(size: int, between: tuple[float, float]) -> tuple[int, int]:
    """The first index and the end of the shares of `size` items; at least one precedes a cut."""
    start, stop = (max(1, int(size * x)) if 0 < x < 1 else round(size * x) for x in between)
    return start, stop


def _lines(content: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank; lines end only at newlines."""
    number = 0
    while line := content.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
            raise ValueError(f"{file}: line {number} has more than {MAX_BYTES:,} bytes.")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def _json_lines(file: Path, between: tuple[float, float]) -> Iterator[Record]:
    with file.open("rb") as content:
        start, stop = 0, -1
        if between != (0, 1):
            start, stop = _range(sum(1 for _ in _lines(content, file)), between)
            content.seek(0)
        for i, (number, line) in enumerate(_lines(content, file)):
            if i == stop:
                return
            if i >= start:
                yield Record(f"{file}: line {number}", _object(line, f"{file}: line {number}"))


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " The file ends within it: complete or delete it."
        raise ValueError(f"{place} is not JSON ({shown(str(error))}).{hint}") from None
    if not isinstance(value, dict) or not has_known_form(value):
        raise ValueError(f"{place} has neither {FORMS}.")
    return value


def has_known_form(value: Mapping[str, Any]) -> bool:
    """Whether a record has text, messages, or a prompt and its completion."""
    keys = {name for name, x in value.items() if x is not None}
    return "text" in keys or "messages" in keys or {"prompt", "completion"} <= keys


def _plain_text(file: Path, between: tuple[float, float]) -> Iterator[Record]:
    """Yields chunks that end at a line end, each held only while it is used."""
    with file.open("rb") as content:
        size = file.stat().st_size
        start, stop = (_line_start(content, position, size) for position in _range(size, between))
        begins, position = start == 0, start
        content.seek(start)
        decoder = codecs.getincrementaldecoder("utf-8")()  # a long line may be cut within a letter
        while position < stop:
            chunk = content.read(min(CHUNK_BYTES, stop - position))
            if position + len(chunk) < stop:
                chunk += content.readline(min(CHUNK_BYTES, stop - position - len(chunk)))
            if not chunk:
                return
            place = f"{file}: the text from byte {position:,} on"
            position += len(chunk)
            try:
                text = decoder.decode(chunk, final=position == stop)
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8 text ({error.reason}).") from None
            text = text.removeprefix("\ufeff") if begins else text
            yield Record(place, {"text": text}, begins, position == size)
            begins = False


def _line_start(content: BinaryIO, position: int, size: int) -> int:
    """The last line start up to a byte, or else the last character start."""
    if position in (0, size):
        return position
    length = min(position, CHUNK_BYTES)
    content.seek(position - length)
    preceding = content.read(length)
    if (line := preceding.rfind(b"\n")) >= 0:
        return position - length + line + 1
    content.seek(position)
    byte = content.read(1)
    while position and byte and byte[0] & 0xC0 == 0x80:  # within a letter
        position -= 1
        content.seek(position)
        byte = content.read(1)
    return position


def _parquet(file: Path, between: tuple[float, float]) -> Iterator[Record]:
    pa = _columnar.pyarrow(file)
    row = 0
    try:
        with pa.parquet.ParquetFile(file) as table:
            names, metadata = table.schema_arrow.names, table.metadata
        if not has_known_form(dict.fromkeys(names, "")):
            raise ValueError(f"its columns are {listed(names)}, but neither {FORMS}")
        start, stop = _range(metadata.num_rows, between)
        columns = [name for name in COLUMNS if name in names]
        size, dictionaries = _columnar.rows_per_read(file, metadata, columns, ROWS_PER_READ)
        with pa.parquet.ParquetFile(file, read_dictionary=dictionaries) as table:
            for group in range(table.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if row + rows <= start or row >= stop:
                    row += rows
                    continue
                batches = table.iter_batches(size, row_groups=[group], columns=columns)
                for value in (value for batch in batches for value in _values(pa, batch)):
                    if start <= row < stop:
                        yield _record(f"{file}: row {row + 1}", value)
                    row += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}, row {row + 1}: {shown(str(error), 200)}.") from None


def _record(place: str, value: Mapping[str, Any]) -> Record:
    if not has_known_form(value):
        raise ValueError(f"it has neither {FORMS}")
    return Record(place, {name: x for name, x in value.items() if x is not None})


def _values(pa: Any, batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch, one at a time if shared texts would take too much memory together."""
    fits = _columnar.expanded_bytes(pa, batch.to_struct_array()) <= MAX_BYTES
    for i in range(0, len(batch), len(batch) if fits else 1):
        rows = batch if fits else batch.slice(i, 1)
        if not fits and (size := _columnar.expanded_bytes(pa, rows.to_struct_array())) > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, at most {MAX_BYTES:,} are read")
        yield from rows.to_pylist()
