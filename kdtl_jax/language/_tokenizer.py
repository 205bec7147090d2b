"""Tokenizers: bytes, or a Hugging Face folder's tokenizer.json.

    tokenizer = language.tokenizer("SmolLM2-135M")
    ids = tokenizer.encode("The capital of France is")
    tokenizer.decode(ids)

Text is encoded as it is. Start and end tokens are added by position when rows are made, so a
padding id that equals the end token hides no end. Encoders read `framed` text.
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import _checks, _files
from kdtl_jax._text import quoted

_END = 256  # the end token of bytes
_END_TEXT = "<|endoftext|>"


class Tokenizer(NamedTuple):
    """Text to ids and back.

    `vocabulary` maps a token's text to its id, and `size` is the number of ids (a model's table may
    have more rows). `bos`, `eos` and `pad` are ids or None; `adds_bos` says whether the tokenizer's
    own rules begin a text with `bos`. `framed(text, length)` gives at most `length` ids with the
    start and end tokens of those rules (`[CLS] … [SEP]`). `chat_template` is the folder's jinja2
    text or None, for `chat`; `special` holds the texts of special tokens that templates may name
    (`"bos_token"`, …). Tokenizers with the same `fingerprint` give the same ids.
    """

    encode: Callable[[str], list[int]]
    framed: Callable[[str, int], list[int]]
    decode: Callable[[Sequence[int] | np.ndarray], str]
    vocabulary: Mapping[str, int]
    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    adds_bos: bool
    chat_template: str | None
    special: Mapping[str, str]
    fingerprint: str


def byte_tokenizer() -> Tokenizer:
    """One id per byte of UTF-8, and an end token; `<|endoftext|>` in a text is ordinary bytes.

    `byte_tokenizer().encode("é")` is `[195, 169]`. Bytes that are not UTF-8 are decoded as `"�"`.
    """

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i for i in ids if i < _END).decode(errors="replace")

    return Tokenizer(
        encode=lambda text: list(text.encode(errors="replace")),
        framed=lambda text, length: list(text.encode(errors="replace"))[:length],
        decode=decode,
        vocabulary={text: i for i, text in enumerate(_letters())} | {_END_TEXT: _END},
        size=_END + 1,
        bos=None,
        eos=_END,
        pad=None,
        adds_bos=False,
        chat_template=None,
        special={"eos_token": _END_TEXT},
        fingerprint=hashlib.sha256(b"bytes").hexdigest(),
    )


def tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, given the file or its folder.

    Start, end and padding tokens come from config.json, or else from tokenizer_config.json beside
    it. The chat template comes from chat_template.jinja, or else from tokenizer_config.json (of
    several named ones, `default`).

    Raises:
      FileNotFoundError: if there is no tokenizer.json.
      ImportError: if the package `tokenizers` is not installed.
      ValueError: if a file cannot be read as what its name says.
    """
    file = _checks.path(path=path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    try:
        package = importlib.import_module("tokenizers")
    except ImportError:
        raise ImportError(
            "reading tokenizer.json needs the package tokenizers: pip install 'kdtl_jax[hub]'."
        ) from None
    content = file.read_bytes()
    try:
        backend = package.Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{file} is not a tokenizer: {quoted(str(error))}.") from None
    backend.no_padding()
    backend.no_truncation()
    tokenizer_config = _object(file.parent / "tokenizer_config.json")
    config = _object(file.parent / "config.json")
    special = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := _text(tokenizer_config.get(name))) is not None
    }

    def id_of(name: str) -> int | None:
        token_id = config.get(f"{name}_token_id")
        token_id = next(iter(token_id), None) if isinstance(token_id, list) else token_id
        # Some write a number below 0 for none.
        if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0:
            if token_id >= 2**31:
                raise ValueError(f"{file.parent / 'config.json'}: {name}_token_id is not a token.")
            return token_id
        text = special.get(f"{name}_token")
        return None if text is None else backend.token_to_id(text)

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    def framed(text: str, length: int) -> list[int]:
        encoding = backend.encode(text, add_special_tokens=False)
        encoding.truncate(max(length - backend.num_special_tokens_to_add(False), 0))
        return backend.post_process(encoding).ids

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return backend.decode(list(ids))

    bos = id_of("bos")
    return Tokenizer(
        encode=encode,
        framed=framed,
        decode=decode,
        vocabulary=backend.get_vocab(),
        size=backend.get_vocab_size(),
        bos=bos,
        eos=id_of("eos"),
        pad=id_of("pad"),
        adds_bos=bos is not None and backend.encode("").ids[:1] == [bos],
        chat_template=_template(file.parent, tokenizer_config),
        special=special,
        fingerprint=hashlib.sha256(content).hexdigest(),
    )


def write_byte_tokenizer(folder: str | Path) -> None:
    """Writes `byte_tokenizer` as the tokenizer.json and tokenizer_config.json of a folder.

    Raises:
      TypeError: if `folder` is not a path.
    """
    folder = _checks.path(folder=folder)
    vocabulary = {letter: i for i, letter in enumerate(_letters())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": _END, "content": _END_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    content = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": {**level, "use_regex": False},
        "decoder": {**level, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    _files.write_json(Path(folder) / "tokenizer.json", content)
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_TEXT}
    _files.write_json(Path(folder) / "tokenizer_config.json", tokenizer_config)


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    substitutes = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(substitutes)) for b in range(256)]


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    return _files.read_json(file) if file.is_file() else {}


def _text(token: Any) -> str | None:
    """A special token's text: tokenizer_config.json holds the text or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}).") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {x.get("name"): x.get("template") for x in entries}.get("default")
    return template if isinstance(template, str) else None
