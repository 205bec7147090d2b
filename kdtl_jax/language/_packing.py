"""Documents as rows of tokens: one after another, packed by best fit, or one per row.

Documents in one row are segments: attention and next tokens never cross from one to another. The
attention mask (`segments`) and the loss mask (`learned`) are separate, and both go by position: the
padding token may equal the end token, and the end token that closes a document is learned.

Raises TypeError if a size is not an integer, and ValueError if it is too small.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks
from kdtl_jax.language._documents import Document, stretches
from kdtl_jax.language._terms import next_tokens
from kdtl_jax.models import segment_positions

WINDOW = 4096  # documents that are packed together
ROWS_PER_STACK = 1024  # rows that are stacked at a time


class Row(NamedTuple):
    """One row of a token batch.

    Attributes:
      tokens: int32 `[L]`.
      segments: int32 `[L]`, 0 for padding, else the document's number in its row.
      learned: bool `[L]`, whether the token at this position is a target.
      privileged: tokens and segments `[L']` of the prompt of a self-distilling teacher, padded on
        the left; or None.
      is_cut: whether the document was longer than its columns.
    """

    tokens: np.ndarray
    segments: np.ndarray
    learned: np.ndarray
    privileged: tuple[np.ndarray, np.ndarray] | None = None
    is_cut: bool = False


def concatenated(documents: Iterable[Document], length: int, *, prompt: int = 0) -> Iterator[Row]:
    """One document after another, cut every `length` tokens; drops an incomplete last row.

    The first token of a row is not predicted. Nothing is padded. This is the form for long texts.

    Args:
      documents: read as they are needed.
      length: tokens per row.
      prompt: if positive, `privileged` holds a row's first `prompt` tokens, preceded by at most as
        many tokens that come before them in the same document.
    """
    _checks.count(2, length=length)
    _checks.count(0, prompt=prompt)
    tokens, learned, owner = np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.int64)
    previous: tuple[np.ndarray, np.ndarray] | None = None
    for i, document in enumerate(documents):
        tokens = np.concatenate([tokens, document.tokens])
        learned = np.concatenate([learned, document.learned])
        owner = np.concatenate([owner, np.full(len(document.tokens), i)])
        complete = len(tokens) // length * length
        for start in range(0, complete, length):
            columns = slice(start, start + length)
            ids, owners = tokens[columns], owner[columns]
            segments = (owners - owners[0] + 1).astype(np.int32)
            row = Row(ids, segments, learned[columns].copy())
            if prompt:
                row = row._replace(privileged=_context(previous, ids, owners, prompt))
                previous = ids[-prompt:], owners[-prompt:]
            yield row
        tokens, learned, owner = tokens[complete:], learned[complete:], owner[complete:]


def packed(documents: Iterable[Document], length: int, *, window: int = WINDOW) -> Iterator[Row]:
    """Rows of `length` tokens, filled by best fit, longest first, among `window` documents.

    Longer documents are split first, so every learned token is learned exactly once. Rows are the
    same for the same documents in the same order, and nothing with something to learn is dropped.
    This is the form for conversations of many lengths.

    Args:
      documents: read as they are needed.
      length: tokens per row.
      window: number of documents that may share rows; more needs less padding and more memory.
    """
    _checks.count(2, length=length)
    _checks.count(1, window=window)
    pieces = (piece for document in documents for piece in split(document, length))
    while pending := list(itertools.islice(pieces, window)):
        yield from _best_fit(pending, length)


def after_prompts(documents: Iterable[Document], length: int, prompt: int) -> Iterator[Row]:
    """One document per row: its prompt ends with column `prompt`, padded on the left.

    The answer is the last run of learned tokens; everything before it is the prompt and is not
    learned. A prompt that is too long loses its beginning, and an answer its end. This is the form
    for methods that sample from the prompt.

    Raises:
      ValueError: if a document has no prompt or nothing to learn.
    """
    _checks.count(1, prompt=prompt)
    _checks.count(prompt + 1, length=length)
    for document in documents:
        runs = stretches(document.learned)
        if not runs or runs[-1][0] == 0:
            raise ValueError(
                f"{document.place}: a row needs a prompt that is not learned, and an answer that "
                "is."
            )
        begin, stop = runs[-1]
        start, end = max(0, begin - prompt), min(stop, begin + length - prompt)
        visible = Document(document.tokens[start:end], np.arange(start, end) >= begin)
        privileged = np.concatenate([document.privileged, document.tokens[start:begin]])
        padding = max(0, length - len(privileged))
        tokens = np.pad(privileged[-length:].astype(np.int32), (padding, 0))
        segments = (np.arange(length) >= padding).astype(np.int32)
        row = joined_row([visible], length, start=prompt - (begin - start))
        is_cut = start > 0 or end < stop or len(privileged) > length
        yield row._replace(privileged=(tokens, segments), is_cut=is_cut)


def joined_row(
    documents: Sequence[Document], length: int, *, start: int = 0, padding: int = 0
) -> Row:
    """One row of documents side by side, from column `start` on.

    Raises:
      ValueError: if the documents do not fit into the row.
    """
    _checks.count(0, length=length, start=start)
    _checks.integer(padding=padding)
    needed = start + sum(len(document.tokens) for document in documents)
    if needed > length:
        raise ValueError(f"length must be at least {needed}, the tokens of the row, got {length}.")
    row = Row(
        np.full(length, padding, np.int32), np.zeros(length, np.int32), np.zeros(length, np.bool_)
    )
    for i, document in enumerate(documents, 1):
        columns = slice(start, start + len(document.tokens))
        row.tokens[columns], row.segments[columns] = document.tokens, i
        row.learned[columns] = document.learned
        start = columns.stop
    return row


def split(document: Document, length: int) -> Iterator[Document]:
    """Splits a document into pieces of at most `length` tokens, dropping those with none to learn.

    A piece begins with the last token of the previous one, so every learned token except the
    document's first is learned exactly once, for any length.
    """
    for start in range(0, max(len(document.tokens) - 1, 1), length - 1):
        learned = document.learned[start : start + length].copy()
        learned[0] = False
        if learned.any():
            yield document._replace(tokens=document.tokens[start : start + length], learned=learned)


def batch(rows: Iterable[Row]) -> dict[str, Any]:
    """Rows as one token batch, `[N, L]` each: `tokens`, `segments`, `learned`, and `privileged`.

    Raises:
      ValueError: if there are no rows.
    """
    # A single row takes several times the memory of its numbers, so few are held at once.
    arrays, parts = map(as_batch, rows), []
    while pending := list(itertools.islice(arrays, ROWS_PER_STACK)):
        parts.append(_join_batches(np.stack, pending))
    if not parts:
        raise ValueError("there are no rows: no document has a token to learn.")
    return parts[0] if len(parts) == 1 else _join_batches(np.concatenate, parts)


def _join_batches(
    join: Callable[[list[np.ndarray]], np.ndarray], batches: list[dict[str, Any]]
) -> Any:
    """Joins batches entry by entry; each entry is freed as soon as it is joined."""
    result: dict[str, Any] = {}
    for name in [*batches[0]]:
        entries = [batch.pop(name) for batch in batches]
        is_nested = isinstance(entries[0], dict)
        result[name] = _join_batches(join, entries) if is_nested else join(entries)
    return result


def as_batch(row: Row) -> dict[str, Any]:
    """A row's arrays by the names of a token batch.

    Raises:
      TypeError: if `row` is not a `Row`.
    """
    _checks.instance(Row, row=row)
    arrays: dict[str, Any] = {n: getattr(row, n) for n in ("tokens", "segments", "learned")}
    if row.privileged is not None:
        arrays["privileged"] = dict(zip(("tokens", "segments"), row.privileged, strict=True))
    return arrays


def maxtext_batch(batch: Mapping[str, Any]) -> dict[str, Array]:
    """A token batch under MaxText's keys: `inputs` and `targets`, each with position and segment.

    All are int `[B, L]`. Targets are shifted by one; `targets_segmentation` is 0 where nothing is
    learned, so `targets_segmentation != 0` is the loss mask.

    Raises:
      TypeError: if the batch is not a dict.
    """
    _checks.mappings(batch=batch)
    segments = jnp.asarray(batch.get("segments", jnp.ones_like(batch["tokens"])))
    positions = segment_positions(segments)
    targets, where = next_tokens(batch)
    return {
        "inputs": jnp.asarray(batch["tokens"]),
        "inputs_position": positions,
        "inputs_segmentation": segments,
        "targets": targets,
        "targets_position": positions,
        "targets_segmentation": jnp.where(where, segments, 0),
    }


def completion_mask(tokens: Array, *, padding: int | None, ends: Sequence[int] = ()) -> Array:
    """Which tokens of sampled completions count, determined from the ids: bool `[B, C]`.

    For completions from other samplers, padded on the right. If the padding is an end token, the
    first end token counts and nothing after it; otherwise trailing padding does not count.

    Args:
      tokens: int `[B, C]`, without the prompt.
      padding: the padding's id, or None.
      ends: ids of end tokens.

    Raises:
      TypeError: if tokens or an id are not integers.

    References:
      TRL's `DistillationTrainer._get_completion_lengths`.
    """
    _checks.integers(tokens=tokens)
    for end in ends:
        _checks.integer(**{"each of ends": end})
    tokens = jnp.asarray(tokens)
    position = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    if padding is None:
        return jnp.ones(tokens.shape, jnp.bool_)
    _checks.integer(padding=padding)
    if padding in ends:
        is_end = jnp.isin(tokens, jnp.asarray(tuple(ends), tokens.dtype)).astype(jnp.int32)
        return jnp.cumsum(is_end, axis=-1) - is_end == 0
    last = jnp.max(jnp.where(tokens != padding, position, -1), axis=-1, keepdims=True)
    return position <= last


def _context(
    previous: tuple[np.ndarray, np.ndarray] | None, ids: np.ndarray, owners: np.ndarray, prompt: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `prompt` tokens before a row in its first document, and the row's prompt."""
    tokens, owner = (np.zeros(prompt, np.int32), owners[:0]) if previous is None else previous
    is_before = np.zeros(prompt, np.int32)
    is_before[prompt - len(owner) :] = owner == owners[0]
    tokens = np.pad(tokens, (prompt - len(tokens), 0))
    segments = (owners[:prompt] - owners[0] + 1).astype(np.int32)
    return np.concatenate([tokens, ids[:prompt]]), np.concatenate([is_before, segments])


def _best_fit(documents: Sequence[Document], length: int) -> Iterator[Row]:
    """Best fit decreasing: each document goes into the fullest row that still has room for it."""
    rows: list[list[Document]] = []
    free: list[tuple[int, int]] = []  # (columns left, row), ascending
    for document in sorted(documents, key=lambda x: -len(x.tokens)):
        size = len(document.tokens)
        index = bisect.bisect_left(free, (size, -1))
        if index == len(free):
            rows.append([])
            free.append((length, len(rows) - 1))
        remaining, row = free.pop(index)
        rows[row].append(document)
        bisect.insort(free, (remaining - size, row))
    yield from (joined_row(row, length) for row in rows)
