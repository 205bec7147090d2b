"""Documents from records: token ids, and which of them are learned."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import _checks
from kdtl_jax.language._chat import chat
from kdtl_jax.language._records import FORMS, Record, has_known_form
from kdtl_jax.language._tokenizer import Tokenizer

NO_TOKENS = np.zeros(0, np.int32)


class Document(NamedTuple):
    """One text as tokens.

    Attributes:
      tokens: int32 `[n]`.
      learned: bool `[n]`, the tokens that are targets: all of a text, or the assistant's.
      privileged: int32 `[m]`, the tokens that a self-distilling teacher reads before the prompt.
      place: where the document was read from, for messages.
    """

    tokens: np.ndarray
    learned: np.ndarray
    privileged: np.ndarray = NO_TOKENS
    place: str = "document"


def document(
    tokens: Sequence[int] | np.ndarray,
    learned: Sequence[bool] | np.ndarray | None = None,
    *,
    privileged: Sequence[int] | np.ndarray = (),
    place: str = "document",
) -> Document:
    """Checks the tokens of one text; all are learned unless `learned` says otherwise.

    Raises:
      ValueError: if there is no token, an id does not fit, or the lengths differ.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"{place}: expected ids [n], at least one, got {ids.dtype}{ids.shape}.")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{place}: ids must lie in 0..2**31 - 1, got {ids.min()}..{ids.max()}.")
    mask = np.ones(len(ids), np.bool_) if learned is None else np.asarray(learned)
    if mask.shape != ids.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"{place}: learned must be bool [{len(ids)}], got {mask.dtype}{list(mask.shape)}."
        )
    context = np.asarray(privileged)
    if context.ndim != 1 or (context.size and context.dtype.kind not in "iu"):
        raise ValueError(
            f"{place}: privileged must be ids [n], got {context.dtype}{list(context.shape)}."
        )
    return Document(ids.astype(np.int32), mask, context.astype(np.int32), place)


def documents(records: Iterable[Record], tokenizer: Tokenizer) -> Iterator[Document]:
    """Turns records into documents, lazily.

    - `{"text"}` ends with the tokenizer's end token, and all of it is learned.
    - In `{"prompt", "completion"}`, the completion and its end token are learned. If they are lists
      of messages, they form one conversation, and the completion's replies are learned.
    - `{"messages"}` is rendered by the tokenizer's chat template; the assistant's text is learned.

    Texts and prompts begin with the start token if the tokenizer itself adds one. `privileged` is
    the record's `"privileged"` text, or else its last answer.

    Raises:
      ValueError: naming file and line, if a record has none of these forms, is empty, has nothing
        to learn, or the chat template raises an error.
    """
    _checks.instance(Tokenizer, tokenizer=tokenizer)
    for record in records:
        _checks.instance(Record, **{"each of records": record})
        try:
            result = _document(record, tokenizer)
        except (ValueError, TypeError) as error:
            message = str(error).removeprefix(f"{record.place}: ")
            raise ValueError(f"{record.place}: {message.rstrip('.')}.") from None
        if result is not None:
            yield result


def _document(record: Record, tokenizer: Tokenizer) -> Document | None:
    value = {name: x for name, x in record.value.items() if x is not None}
    if not has_known_form(value):
        raise ValueError(f"it has neither {FORMS}")
    starts = tokenizer.adds_bos and record.begins
    first = [tokenizer.bos] if starts and tokenizer.bos is not None else []
    last = [tokenizer.eos] if record.ends and tokenizer.eos is not None else []
    if "text" in value:
        ids = tokenizer.encode(_text("text", value["text"]))
        if not ids and record.begins and record.ends:
            raise ValueError("'text' is empty")
        if not ids:  # a piece with only a byte order mark, say
            return None
        return document([*first, *ids, *last], place=record.place)
    if "messages" in value or any(isinstance(value[n], list) for n in ("prompt", "completion")):
        return _conversation(record.place, value, tokenizer)
    prompt = tokenizer.encode(_text("prompt", value["prompt"]))
    answer = tokenizer.encode(_text("completion", value["completion"]))
    if not prompt or not answer:
        raise ValueError("prompt and completion must not be empty")
    privileged = tokenizer.encode(_text("privileged", value.get("privileged", value["completion"])))
    learned = [False] * len(first + prompt) + [True] * len(answer + last)
    ids = [*first, *prompt, *answer, *last]
    return document(ids, learned, privileged=privileged, place=record.place)


def _conversation(place: str, value: Mapping[str, Any], tokenizer: Tokenizer) -> Document:
    if "messages" in value:
        prompt_messages, messages = [], _messages(value["messages"])
    else:
        prompt_messages = _messages(value["prompt"])
        messages = [*prompt_messages, *_messages(value["completion"])]
    variables = {"tools": value["tools"]} if "tools" in value else {}
    conversation = chat(tokenizer, messages, variables)
    learned = conversation.learned.copy()
    runs = stretches(learned)
    prompt_replies = sum(message["role"] == "assistant" for message in prompt_messages)
    for start, stop in runs[:prompt_replies]:
        learned[start:stop] = False
    if not runs[prompt_replies:]:
        raise ValueError("there is no reply to learn: no message of the role 'assistant'")
    privileged = conversation.tokens[slice(*runs[-1])]
    if "privileged" in value:
        privileged = tokenizer.encode(_text("privileged", value["privileged"]))
    return document(conversation.tokens, learned, privileged=privileged, place=place)


def stretches(learned: np.ndarray) -> list[tuple[int, int]]:
    """The runs of consecutive learned tokens: `(first, after the last)`, ascending."""
    steps = np.diff(np.concatenate([[0], learned.astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name!r} must be text, got {type(value).__name__}")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    is_list = isinstance(value, list) and value
    if not is_list or not all(
        isinstance(x, dict) and isinstance(x.get("role"), str) for x in value
    ):
        raise ValueError("messages must be a list of objects with a 'role', at least one")
    # Readers of tables give each message all keys.
    return [{name: x for name, x in message.items() if x is not None} for message in value]
