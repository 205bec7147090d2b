"""The text of `kdtl language` as rows of tokens.

Texts (`--data text.txt`, or lines of `{"text": ...}`) are concatenated and cut into rows; each
document in a row is a segment. A prompt with its completion, or a conversation, gets its own row:
the prompt is padded on the left to the prompt's columns, and the last answer is learned up to the
end token. Before the prompt, a self-taught teacher reads the record's `"privileged"` text, or else
its answer; for texts, what precedes the prompt.

Large text is written as rows to the run folder and memory-mapped.
"""

import itertools
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import language
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import processes

EMBEDDED = "shakespeare.txt"
# Bytes of text whose rows stay in memory; a byte may be a token, which takes 9 bytes.
IN_MEMORY = 64 * 2**20


class Rows(NamedTuple):
    """Token batches `[N, L]`, and how many rows were cut short."""

    inputs: dict[str, Any]
    cut: int = 0


class Text(NamedTuple):
    """The training rows, the held-out rows, and the bytes of the learned held-out text.

    `teacher_context` describes what a self-taught teacher reads before the prompt.
    """

    name: str
    train: Rows
    held_out: Rows
    held_out_bytes: int
    teacher_context: str


class Shape(NamedTuple):
    """Columns of a row, columns of its prompt, and the held-out share of the text."""

    length: int
    prompt: int
    held_out: float


def paths(value: Any) -> tuple[str, ...]:
    """One path, or a list of them."""
    values = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(path, str) and path for path in values):
        raise ValueError(f"expected paths of files or folders, got {value!r}")
    return values


def read(
    paths: Sequence[str],
    tokenizer: language.Tokenizer,
    shape: Shape,
    folder: Path,
    identity: str = "",
) -> Text:
    """Reads the rows of files and folders; without a path, of the built-in text.

    The last part of every file is held out.

    Args:
      paths: what `language.text_files` reads.
      folder: where rows of large text are stored.
      identity: of this text; rows of another text in the folder are replaced.
    """
    if not paths:
        embedded = resources.files("kdtl_jax.datasets").joinpath(EMBEDDED)
        with resources.as_file(embedded) as file:
            return read([str(file)], tokenizer, shape, folder, identity)
    name = ", ".join(Path(path).name for path in paths)
    is_large = sum(file.stat().st_size for file in language.text_files(paths)) > IN_MEMORY
    boundary = 1 - shape.held_out
    first = next(language.records(paths), None)
    parts = []
    for part, share in (("train", (0.0, boundary)), ("held_out", (boundary, 1.0))):
        rows = _rows(language.records(paths, share), first, tokenizer, shape)
        row = next(rows, None)
        if row is None:
            purpose = "to learn from" if part == "train" else "held out"
            raise UsageError(
                f"--data {name}: too little text: no row of --length {shape.length} tokens "
                f"{purpose}. Give more text, shorter rows or another --held-out."
            )
        parts.append(
            _store_rows(itertools.chain([row], rows), folder / part if is_large else None, identity)
        )
    held_out = parts[1].inputs
    teacher_context = "each record's 'privileged' text, or its answer if there is none"
    if first is not None and "privileged" not in first.value:
        is_text = "text" in first.value
        teacher_context = "what precedes it in its text" if is_text else "its answer"
    return Text(name, parts[0], parts[1], learned_bytes(held_out, tokenizer), teacher_context)


def pieces(rows: Rows, count: int = 64) -> np.ndarray:
    """The text of the first `count` rows without padding, as rows `[B, L]`."""
    tokens, segments = (rows.inputs[name][:count] for name in ("tokens", "segments"))
    text = tokens[segments > 0]
    length = min(tokens.shape[1], len(text))
    return text[: len(text) // length * length].reshape(-1, length)


def learned_bytes(inputs: dict[str, Any], tokenizer: language.Tokenizer) -> int:
    """Bytes of the text of the rows' learned tokens."""
    size = 0
    for start in range(0, len(inputs["tokens"]), 1024):
        chunk = {n: inputs[n][start : start + 1024] for n in ("tokens", "segments", "learned")}
        _, learned = (np.asarray(x) for x in language.next_tokens(chunk))
        for row, counts in zip(chunk["tokens"], learned, strict=True):
            text = tokenizer.decode(row[1:][counts[:-1]].tolist())
            size += len(text.encode(errors="replace"))
    return size


def _rows(
    records: Iterator[language.Record],
    first: language.Record | None,
    tokenizer: language.Tokenizer,
    shape: Shape,
) -> Iterator[language.Row]:
    """The rows of records, which must all have the form of the first."""
    is_text = first is not None and "text" in first.value

    def checked() -> Iterator[language.Record]:
        for record in records:
            if first is not None and ("text" in record.value) != is_text:
                raise ValueError(
                    f"{record.place} has a different form from {first.place}: only one is a "
                    "'text'. Use one form in a run."
                )
            yield record

    documents = language.documents(checked(), tokenizer)
    if is_text:
        return language.concatenated(documents, shape.length, prompt=shape.prompt)
    return language.after_prompts(documents, shape.length, shape.prompt)


def _store_rows(rows: Iterator[language.Row], folder: Path | None, identity: str) -> Rows:
    """Collects rows in memory, or in a folder."""
    cut = 0

    def count_cut() -> Iterator[language.Row]:
        nonlocal cut
        for row in rows:
            cut += row.is_cut
            yield row

    if folder is None:
        inputs = language.batch(count_cut())
    else:
        source = {"text": identity}
        processes.decide(lambda: language.write_rows(folder, count_cut(), made_from=source))
        inputs = language.open_rows(folder)
    return Rows(inputs, cut)
