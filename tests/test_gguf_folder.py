"""A GGUF file as a Hugging Face folder: weights, config, and a tokenizer that splits as it did."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_gguf import LLAMA, _source, _write

from kdtl_jax import language
from kdtl_jax.interop import _gguf_words, decoders, gguf
from kdtl_jax.recipes import _language_models as of_models

LETTERS = list(language.byte_tokenizer().vocabulary)[:256]
TOKENS = ("<s>", "</s>", *LETTERS, "11", "111", "1111", "ab")
WORDS = gguf.TokenizerData(
    model="gpt2", pre="gpt-2", tokens=TOKENS, scores=(), types=(3, 3) + (1,) * 259 + (4,),
    merges=("1 1", "11 11", "11 1"), bos=0, eos=1, unknown=None, pad=None, adds_bos=None,
    adds_eos=None, adds_space=None, chat_template="{{ messages }}",
)  # fmt: skip


def _read(folder: Path, **changes: Any) -> language.Tokenizer:
    words = WORDS._replace(**changes)
    (folder / "tokenizer.json").write_text(json.dumps(_gguf_words.tokenizer_json(words)))
    (folder / "tokenizer_config.json").write_text(json.dumps(_gguf_words.tokenizer_config(words)))
    return language.tokenizer(folder)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["1111", "é"]),
        ("smollm", ["1", "1", "1", "1", "é"]),
        ("llama-bpe", ["111", "1", "é"]),
        ("qwen2", ["1", "1", "1", "1", "é"]),
    ],
)
def test_words_are_split_as_their_name_says(tmp_path: Path, pre: str, words: list[str]) -> None:
    tokenizer = _read(tmp_path, pre=pre, adds_bos=pre == "gpt-2")
    ids = tokenizer.encode("1111é")
    assert tokenizer.decode(ids) == "1111é"
    assert len(ids) == len(words) + 1  # é has two bytes
    assert [tokenizer.decode(i) for i in np.split(ids, range(1, len(words)))] == words
    assert tokenizer.encode("</s>") == [1] and tokenizer.encode("xaby")[1] == len(TOKENS) - 1
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos) == (0, 1, pre == "gpt-2")
    assert tokenizer.chat_template == "{{ messages }}"


def test_qwen_composes_letters_and_llama_begins_texts(tmp_path: Path) -> None:
    assert len(_read(tmp_path, pre="qwen2").encode("e\u0301")) == 2
    assert len(_read(tmp_path, pre="llama-bpe").encode("e\u0301")) == 3
    assert _read(tmp_path, pre="llama-bpe").adds_bos


@pytest.mark.parametrize("changes", [{"model": "llama"}, {"pre": "unheard"}, {"types": (1,)}])
def test_other_tokenizers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tokenizer.json|1 types for"):
        _gguf_words.tokenizer_json(WORDS._replace(**changes))
    with pytest.raises(ValueError, match="no token 999"):
        _gguf_words.tokenizer_config(WORDS._replace(eos=999))


def test_the_folder_is_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf", "LLAMA", LLAMA, _source(LLAMA)[1])
    assert of_models.to_folder(None, tmp_path) is None
    assert of_models.to_folder("some/folder", tmp_path) == "some/folder"
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"of another, which a resumed run would read")
    assert of_models.to_folder(str(path), folder) == str(folder)
    read, again = gguf.load(path), decoders.load(folder)
    assert read.model.config == again.model.config and again.config["eos_token_id"] == 2
    for ours, theirs in zip(*map(jax.tree.leaves, (again.params, read.params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="GGUF"):
        of_models.to_folder(str(path), folder)
