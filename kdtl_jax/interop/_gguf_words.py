"""The tokenizer of a GGUF file as the tokenizer.json that it was converted from.

llama.cpp stores the tokens and merges of a byte-level BPE, but only a name for how it splits text
into words. The splittings are listed here by name.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kdtl_jax import _text


class TokenizerData(NamedTuple):
    """The tokenizer of a GGUF file, as stored.

    `model` is "gpt2" (byte-level BPE, with `merges`) or "llama" (SentencePiece, with `scores`);
    `pre` names the splitting into words. `types` are llama.cpp's: 1 normal, 2 unknown, 3 control, 4
    user-defined, 5 unused, 6 byte. Ids are None if the file has none.
    """

    model: str
    pre: str | None
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    adds_bos: bool | None
    adds_eos: bool | None
    adds_space: bool | None
    chat_template: str | None


def _bytes(*, splits: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": splits,
    }


def _split_by(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, _bytes(splits=False)]


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": [_bytes(splits=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(splits=True)],
    "llama-bpe": _split_by(_WORDS % "{1,3}"),
    "qwen2": _split_by(_WORDS % ""),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def tokenizer_json(words: TokenizerData) -> dict[str, Any]:
    """The content of tokenizer.json, for a byte-level BPE whose splitting is known."""
    if words.model != "gpt2" or words.pre not in _SPLITS:
        raise ValueError(
            f"no tokenizer.json can be written for model {_text.quoted(words.model)} with the "
            f"splitting {_text.quoted(words.pre)}, only for byte-level BPE ('gpt2') with one of "
            f"{', '.join(_SPLITS)}. Take the folder that the file was converted from."
        )
    if len(words.types) not in (0, len(words.tokens)):
        raise ValueError(f"{len(words.types)} types for {len(words.tokens)} tokens.")
    types = words.types or (_NORMAL,) * len(words.tokens)
    added = [
        {
            "id": i,
            "content": text,
            "special": kind == _CONTROL,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, (text, kind) in enumerate(zip(words.tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    adds_bos = words.pre == "llama-bpe" if words.adds_bos is None else words.adds_bos
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if words.pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITS[words.pre]},
        "post_processor": _start(words) if adds_bos and words.bos is not None else None,
        "decoder": _bytes(splits=True),
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(words.tokens)},
            "merges": [merge.split(" ", 1) for merge in words.merges],
            "ignore_merges": words.pre == "llama-bpe",
        },
    }


def tokenizer_config(words: TokenizerData) -> dict[str, Any]:
    """The content of tokenizer_config.json: special tokens and the chat template."""
    ids = {"bos": words.bos, "eos": words.eos, "unk": words.unknown, "pad": words.pad}
    config = {f"{name}_token": _token(words.tokens, i) for name, i in ids.items() if i is not None}
    if words.chat_template is not None:
        config["chat_template"] = words.chat_template
    return {"tokenizer_class": "PreTrainedTokenizerFast", **config}


def _start(words: TokenizerData) -> dict[str, Any]:
    """The rule that begins every text with `bos`."""
    assert words.bos is not None
    bos = _token(words.tokens, words.bos)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [words.bos], "tokens": [bos]}},
    }


def _token(tokens: Sequence[str], i: int) -> str:
    if not 0 <= i < len(tokens):
        raise ValueError(f"there is no token {_text.shown(i)}; there are {len(tokens)}.")
    return tokens[i]
