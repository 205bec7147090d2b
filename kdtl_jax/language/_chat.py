"""Conversations as text and as tokens, by a checkpoint's own chat template.

    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    chat = language.chat(tokenizer, messages)
    chat.tokens, chat.learned       # learned: the assistant's words, including the end of turn

Templates are untrusted programs: they run in jinja2's immutable sandbox, with bounds on time and
memory, and with the names and filters that transformers gives them.
"""

import datetime
import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from types import CodeType, MappingProxyType
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from kdtl_jax import _checks
from kdtl_jax._text import shown
from kdtl_jax.language._sandbox import Sandbox
from kdtl_jax.language._tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


class Chat(NamedTuple):
    """A conversation: `tokens` int32 `[L]`; `learned` bool `[L]`, the assistant's tokens."""

    tokens: np.ndarray
    learned: np.ndarray


def chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> Chat:
    """The tokens of a conversation, and which of them are the assistant's.

    If the template marks the assistant's words (`{% generation %}`), those are learned. Otherwise
    an assistant message is the text that its rendering adds to the prompt for it, so its end of
    turn is learned and the header before it is not. Text on the two sides of a boundary is encoded
    separately, so no token is partly learned.

    Args:
      tokenizer: a tokenizer with a `chat_template`.
      messages: `{"role": ..., "content": ...}`, in order.
      variables: further variables of the template, as its authors name them (`{"tools": [...]}`).

    Raises:
      ValueError: if there is no template, the template raises an error, or it rewrites the text
        before a reply (no part of the text then belongs to the reply alone).
    """
    pieces = _render(tokenizer, messages, variables, prompts=False)
    if not any(is_learned for _, is_learned in pieces):
        pieces = _split_by_prefixes(tokenizer, messages, variables, _join(pieces))
    ids = [(i, is_learned) for text, is_learned in pieces for i in tokenizer.encode(text)]
    return Chat(
        np.array([i for i, _ in ids], np.int32),
        np.array([is_learned for _, is_learned in ids], np.bool_),
    )


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text that prompts the assistant's next reply, as the template writes it.

    Args and errors are those of `chat`.
    """
    return _join(_render(tokenizer, messages, variables, prompts=True))


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """A conversation's text, as the template writes it. Args and errors are those of `chat`."""
    return _join(_render(tokenizer, messages, variables, prompts=False))


def _split_by_prefixes(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any], text: str
) -> list[tuple[str, bool]]:
    """The pieces of the whole text; each reply is what two renderings differ by."""
    pieces: list[tuple[str, bool]] = []
    previous = ""
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _join(_render(tokenizer, messages[:i], variables, prompts=True))
        after = text
        if i + 1 < len(messages):
            after = _join(_render(tokenizer, messages[: i + 1], variables, prompts=False))
        if not (before.startswith(previous) and after.startswith(before)):
            raise ValueError(
                f"chat_template: the text of the first {i + 1} messages does not begin with the "
                "prompt for the last of them, so the assistant's words cannot be separated from "
                "the rest. Mark them in the template with {% generation %}."
            )
        pieces += [(before[len(previous) :], False), (after[len(before) :], True)]
        previous = after
    if not text.startswith(previous):
        raise ValueError("chat_template: a later message changes the text of an earlier reply.")
    return [*pieces, (text[len(previous) :], False)]


def _join(pieces: Sequence[tuple[str, bool]]) -> str:
    return "".join(text for text, _ in pieces)


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    prompts: bool,
) -> list[tuple[str, bool]]:
    """The text in pieces, and whether a piece is marked as the assistant's."""
    _checks.instance(Tokenizer, tokenizer=tokenizer)
    _checks.mappings(variables=variables)
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(
            "messages must be a list of {'role': …, 'content': …}, got "
            f"{messages!r:.80} ({type(messages).__name__})."
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template. Give lines with 'prompt' and 'completion', or a "
            "folder with chat_template.jinja."
        )
    mark = secrets.token_hex(8)  # no message can know it
    environment = _environment()
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, _MARK: mark}
    context = {**tokenizer.special, **variables}
    context |= {"messages": messages, "add_generation_prompt": prompts}
    try:
        code = _compile(tokenizer.chat_template)
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        text = template.render(context)
    except Exception as error:  # a template is a program, which may raise anything
        message = shown(str(error), 200) or type(error).__name__
        raise ValueError(f"chat_template: {message}") from None
    pieces = text.split(mark)
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces)]


_MARK = "kdtl_jax_mark"
_LONGEST = 50_000  # characters of a template
_WIDEST = 100  # characters of a date's format, and between the parts of JSON


def _environment() -> Sandbox:
    return Sandbox(
        {"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )


@functools.lru_cache(8)
def _compile(template: str) -> CodeType:
    if len(template) > _LONGEST:
        raise ValueError(f"{len(template):,} characters, more than {_LONGEST:,}")
    return _environment().compile(template)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's words, between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = nodes.Output([nodes.Name(_MARK, "load")]).set_lineno(line)
        return [mark, *body, nodes.Output([nodes.Name(_MARK, "load")]).set_lineno(line)]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if len(form) > _WIDEST:
        raise ValueError(f"a date in {len(form):,} characters")
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: keeps letters beyond ASCII and escapes nothing for HTML."""
    widths = [len(x) if isinstance(x, str) else x for x in (indent or 0, *(separators or ()))]
    if any(width > _WIDEST for width in widths):
        raise ValueError(f"tojson with more than {_WIDEST} characters between its parts")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
