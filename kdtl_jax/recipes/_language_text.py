"""The text of `kdtl language` as rows of tokens: plain text, or JSON lines.

A row has `length` columns. Plain text and documents (`{"text": ...}`) are cut into rows one after
another; documents in one row are segments of their own. A line `{"prompt": ..., "completion": ...}`
is a row of its own, its prompt padded on the left to the prompt's columns, its completion learned
up to the end token. What a self-taught teacher is told beside the prompt is the line's
`"privileged"` text, or else its completion; for plain text, what stands before the prompt. A line
`{"messages": [...]}` is written by the tokenizer's chat template: its last reply is the completion,
what is before it the prompt.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import language
from kdtl_jax.recipes.settings import UsageError

EMBEDDED = "shakespeare.txt"


class Rows(NamedTuple):
    """Token batches `[N, L]`, the bytes of their learned text, and how many rows were cut short."""

    inputs: dict[str, Any]
    bytes: int
    cut: int = 0


class Text(NamedTuple):
    """What is learned from, and what is measured on."""

    name: str
    train: Rows
    held_out: Rows


class Shape(NamedTuple):
    """Columns of a row, columns of its prompt, and the share of the text that is held out."""

    length: int
    prompt: int
    held_out: float


def read(path: str | None, tokenizer: language.Tokenizer, shape: Shape) -> Text:
    """The rows of a file; None is the text that the package carries.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not UTF-8, a line is no JSON object of a known form, or too short.
    """
    name = EMBEDDED if path is None else Path(path).name
    if path is None:
        text = resources.files("kdtl_jax.datasets").joinpath(EMBEDDED).read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}).") from None
    if not name.endswith((".jsonl", ".json")):
        at = int(len(text) * (1 - shape.held_out))
        at = text.rfind("\n", 0, at) + 1 or at  # between lines
        parts = [_packed([part], tokenizer, shape, None) for part in (text[:at], text[at:])]
    else:
        # JSON texts may hold the other ends of lines that `splitlines` knows.
        lines = [
            (i, _object(line, name, i))
            for i, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        at = max(1, int(len(lines) * (1 - shape.held_out)))
        has_text = ["text" in line for _, line in lines]
        if any(has_text) and not all(has_text):
            raise ValueError(
                f"{name}: some lines have 'text' and some have not. Use one form in a file."
            )
        if all(has_text):
            texts, end = [str(line["text"]) for _, line in lines], tokenizer.eos
            parts = [_packed(part, tokenizer, shape, end) for part in (texts[:at], texts[at:])]
        else:
            said = [_said(line, f"{name}: line {i}", tokenizer) for i, line in lines]
            parts = [_answers(part, tokenizer, shape) for part in (said[:at], said[at:])]
    for part, words in zip(parts, ("to learn from", "held out"), strict=True):
        if not len(part.inputs["tokens"]):
            raise UsageError(
                f"--data {name}: too little text: no row of --length {shape.length} tokens "
                f"{words}. Give more text, shorter rows or another --held-out."
            )
    return Text(name, *parts)


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: line {number} is not JSON ({error}).") from None
    if not isinstance(found, dict) or not (
        "text" in found or "messages" in found or {"prompt", "completion"} <= set(found)
    ):
        raise ValueError(
            f"{name}: line {number} has neither 'text' nor 'messages' nor 'prompt' and "
            "'completion'."
        )
    return found


class Said(NamedTuple):
    """A line's texts: of the prompt, of the completion, and of what else its teacher is told."""

    where: str
    prompt: str
    completion: str
    privileged: str
    is_chat: bool


def _said(line: Any, where: str, tokenizer: language.Tokenizer) -> Said:
    messages = line.get("messages")
    if messages is None:
        sides = line["prompt"], line["completion"]
        if not any(isinstance(side, list) for side in sides):
            prompt, completion = map(str, sides)
            told = str(line.get("privileged", completion))
            return Said(where, prompt, completion, told, is_chat=False)
        messages = [*sides[0], *sides[1]] if all(isinstance(x, list) for x in sides) else None
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages)
        and messages[-1]["role"] == "assistant"
    ):
        raise ValueError(
            f"{where}: messages must be a list of objects with a 'role', the last of them "
            "'assistant'."
        )
    prompt = language.chat_prompt(tokenizer, messages[:-1])
    whole = language.chat_text(tokenizer, messages)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template writes a conversation that does not begin with the prompt "
            "for its last reply, so the reply cannot be told from it."
        )
    completion = whole[len(prompt) :]
    return Said(where, prompt, completion, str(line.get("privileged", completion)), is_chat=True)


def _packed(
    texts: Sequence[str], tokenizer: language.Tokenizer, shape: Shape, end: int | None
) -> Rows:
    """Texts one after another, each followed by the end token if there is one, cut into rows."""
    ids, owner = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for i, text in enumerate(texts):
        own = [*tokenizer.encode(text), *([] if end is None else [end])]
        ids.append(np.asarray(own, np.int32))
        owner.append(np.full(len(own), i, np.int64))
    rows = sum(map(len, ids)) // shape.length
    tokens, own = (
        np.concatenate(x)[: rows * shape.length].reshape(rows, shape.length) for x in (ids, owner)
    )
    segments = (own - own[:, :1] + 1).astype(np.int32)
    learned = np.ones(tokens.shape, np.bool_)
    before = np.roll(tokens, 1, axis=0)[:, shape.length - shape.prompt :]
    is_before = np.roll(own, 1, axis=0)[:, shape.length - shape.prompt :] == own[:, :1]
    is_before &= np.arange(rows)[:, None] > 0
    privileged = {
        "tokens": np.concatenate([before, tokens[:, : shape.prompt]], axis=1),
        "segments": np.concatenate([is_before, segments[:, : shape.prompt]], axis=1).astype(
            np.int32
        ),
    }
    return _rows(tokens, segments, learned, privileged, tokenizer)


def _answers(lines: Sequence[Said], tokenizer: language.Tokenizer, shape: Shape) -> Rows:
    """Prompts padded on the left, completions after them with their end token."""
    size = len(lines), shape.length
    tokens, segments = np.zeros(size, np.int32), np.zeros(size, np.int32)
    learned, cut, width = np.zeros(size, np.bool_), 0, shape.prompt
    told = {name: np.zeros(size, np.int32) for name in ("tokens", "segments")}
    for i, line in enumerate(lines):
        prompt, answer = tokenizer.encode(line.prompt), tokenizer.encode(line.completion)
        # A template starts its conversations and ends its turns itself.
        if not line.is_chat:
            prompt = [*([] if tokenizer.bos is None else [tokenizer.bos]), *prompt]
            answer = [*answer, *([] if tokenizer.eos is None else [tokenizer.eos])]
        more = tokenizer.encode(line.privileged)
        cut += len(prompt) > width or len(answer) > shape.length - width
        prompt, answer = prompt[-width:], answer[: shape.length - width]
        if not prompt or not answer:
            raise ValueError(f"{line.where}: prompt and completion must not be empty.")
        tokens[i, width - len(prompt) : width] = prompt
        tokens[i, width : width + len(answer)] = answer
        segments[i, width - len(prompt) : width + len(answer)] = 1
        learned[i, width : width + len(answer)] = True
        whole = (more + prompt)[-shape.length :]
        told["tokens"][i, shape.length - len(whole) :] = whole
        told["segments"][i, shape.length - len(whole) :] = 1
    return _rows(tokens, segments, learned, told, tokenizer)._replace(cut=cut)


def _rows(tokens: Any, segments: Any, learned: Any, told: Any, tokenizer: Any) -> Rows:
    inputs = {"tokens": tokens, "segments": segments, "learned": learned}
    _, where = (np.asarray(x) for x in language.next_tokens(inputs))
    size = 0
    for row, counts in zip(tokens, where, strict=True):
        size += len(tokenizer.decode(row[1:][counts[:-1]].tolist()).encode(errors="replace"))
    return Rows({**inputs, "privileged": told}, size)
