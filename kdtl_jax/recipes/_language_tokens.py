"""Tokenizers of `kdtl language`: bytes, or a folder's tokenizer.json."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import _files

END = 256  # the end token of bytes
END_TEXT = "<|endoftext|>"


class Tokenizer(NamedTuple):
    """Text to ids and back; `vocabulary` maps a token's text to its id."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    vocabulary: Mapping[str, int]
    size: int
    bos: int | None
    eos: int | None


def of_bytes() -> Tokenizer:
    """One id per byte of UTF-8, and an end token."""

    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < END).decode(errors="replace")

    vocabulary = {text: i for i, text in enumerate(_letters())} | {END_TEXT: END}
    return Tokenizer(lambda text: list(text.encode()), decode, vocabulary, END + 1, None, END)


def of_folder(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, its start and end tokens as config.json says.

    Raises:
      FileNotFoundError: if there is no such file.
      RuntimeError: without the `tokenizers` package.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    try:
        package = importlib.import_module("tokenizers")
    except ImportError:
        raise RuntimeError(
            "reading tokenizer.json needs the package tokenizers: pip install 'kdtl_jax[hub]'."
        ) from None
    made = package.Tokenizer.from_file(str(file))
    config = json.loads((folder / "config.json").read_bytes())
    bos, eos = (_first(config.get(f"{name}_token_id")) for name in ("bos", "eos"))

    def encode(text: str) -> list[int]:
        return made.encode(text, add_special_tokens=False).ids

    def decode(ids: Sequence[int]) -> str:
        return made.decode(list(ids))

    return Tokenizer(encode, decode, made.get_vocab(), made.get_vocab_size(), bos, eos)


def write_bytes(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of bytes, as Hugging Face reads them."""
    vocabulary = {letter: i for i, letter in enumerate(_letters())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": END, "content": END_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    made = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": {**level, "use_regex": False},
        "decoder": {**level, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    _files.write_json(folder / "tokenizer.json", made)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TEXT}
    _files.write_json(folder / "tokenizer_config.json", about)


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(others)) for b in range(256)]


def _first(value: Any) -> int | None:
    return next(iter(value), None) if isinstance(value, list) else value
