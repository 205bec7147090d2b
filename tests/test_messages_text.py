"""Plausible slips with text, caches, files and measures: the message names the argument."""

# pyright: reportArgumentType=false
# The slips are of the wrong types on purpose.

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import language
from kdtl_jax.interop import decoders, model_files, naming, pruning, safetensors
from kdtl_jax.run import measure, teacher_cache

TOKENIZER = language.byte_tokenizer()
DOCUMENTS = [language.document([1, 2, 3]), language.document([4, 5])]
GROUPS = np.zeros((2, 4), np.int32)
ARRAYS = {"inputs": np.ones((4, 2), np.float32)}
LIMITS = measure.Ceilings(1.0, 1.0, "float32", 1, 1)


def fingerprint(**given: Any) -> Any:
    return teacher_cache.fingerprint({"w": np.ones(2)}, **{"arrays": ARRAYS, **given})


def whole(rows: Any) -> Any:
    return [*rows]


SLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    "a path for a tokenizer": (
        lambda: whole(language.documents([], "tokenizer.json")),
        "tokenizer must be a Tokenizer, got 'tokenizer.json'",
    ),
    "texts for records": (
        lambda: whole(language.documents(["a text"], TOKENIZER)),
        "each of records must be a Record, got 'a text'",
    ),
    "a text for messages": (
        lambda: language.chat_text(TOKENIZER._replace(chat_template="{{ messages }}"), "hello"),
        "messages must be a list of .*got 'hello'",
    ),
    "a list for variables": (
        lambda: language.chat_text(TOKENIZER, [], ["tools"]),
        "variables must be a dict by name, got list",
    ),
    "half an id": (
        lambda: language.document([1, 2], privileged=[1.5]),
        r"privileged must be ids \[n\], got float64\[1\]",
    ),
    "a prompt as text": (
        lambda: whole(language.concatenated(DOCUMENTS, 4, prompt="2")),
        "prompt must be an integer, got '2'",
    ),
    "half a padding": (
        lambda: language.joined_row(DOCUMENTS, 8, padding=0.5),
        "padding must be an integer, got 0.5",
    ),
    "a document for a row": (
        lambda: language.batch(DOCUMENTS),
        "row must be a Row, got Document",
    ),
    "rows for a batch": (lambda: language.maxtext_batch([]), "batch must be a dict by name"),
    "text for end tokens": (
        lambda: language.completion_mask(GROUPS, padding=0, ends=("</s>",)),
        "each of ends must be an integer, got '</s>'",
    ),
    "half of a padding's id": (
        lambda: language.completion_mask(GROUPS, padding=1.5),
        "padding must be an integer, got 1.5",
    ),
    "logits for groups": (
        lambda: language.chunk_lengths(np.ones((2, 4)), num_chunks=2),
        "groups must be integers, got float32",
    ),
    "closes of another batch": (
        lambda: language.merge_chunks(GROUPS, np.ones(3, bool)),
        r"closes must be .*got closes\[3\], groups\[2, 4\]",
    ),
    "a size for a vocabulary": (
        lambda: language.shared_ids({"a": 0}, 32_000),
        "teacher_vocabulary must be a dict by name, got int",
    ),
    "a tokenizer for a vocabulary": (
        lambda: language.require_same_ids(TOKENIZER, {"a": 0}),
        "student_vocabulary must be a dict by name, got Tokenizer",
    ),
    "segments of one row": (
        lambda: language.last_text(np.ones(4, np.int32)),
        r"segments must have 2 dimension\(s\)",
    ),
    "no folder of rows": (lambda: language.open_rows(None), "folder must be the path"),
    "no tokenizer": (lambda: language.tokenizer(None), "path must be the path of a file"),
    "an array of data": (
        lambda: fingerprint(arrays=ARRAYS["inputs"]),
        "arrays must be a dict by name, got ndarray",
    ),
    "one tap as text": (lambda: fingerprint(taps="logits"), "taps must be a list of names"),
    "classes as text": (lambda: fingerprint(classes="cat"), "classes must be a list of names"),
    "a number of classes": (lambda: fingerprint(classes=10), "classes must be a list of names"),
    "two temperatures": (
        lambda: fingerprint(temperature=[1.0, 2.0]),
        "temperature must be one number",
    ),
    "a model for a fingerprint": (
        lambda: teacher_cache.begun("nowhere", expect="mlp:8"),
        "expect must be a Fingerprint, got 'mlp:8'",
    ),
    "a folder for a cache": (
        lambda: teacher_cache.load("cache"),
        "cache must be a Cache, got 'cache'",
    ),
    "no rounds": (
        lambda: measure.throughput(lambda: jnp.ones(1), 2, rounds=0),
        "rounds must be at least 1, got 0",
    ),
    "fewer than no steps": (
        lambda: measure.throughput(lambda: jnp.ones(1), -1),
        "steps must be at least 1, got -1",
    ),
    "no time": (
        lambda: measure.roofline(measure.Cost(1.0, 1.0), 0.0, LIMITS),
        "seconds must be finite and > 0, got 0.0",
    ),
    "a pattern for patterns": (
        lambda: naming.from_torch({}, (), ignore=".*num_batches_tracked"),
        "ignore must be a list of patterns",
    ),
    "pairs for tensors": (
        lambda: naming.from_torch([("weight", np.ones(2))], ()),
        "tensors must be a dict by name, got list",
    ),
    "a file for its tensors": (
        lambda: safetensors.nested("model.safetensors"),
        "flat must be a dict by name, got str",
    ),
    "no file": (lambda: safetensors.load(None), "path must be the path of a file or folder"),
    "no file to write": (lambda: safetensors.save(None, {}), "path must be the path of a file"),
    "no file of a model": (lambda: model_files.about(None), "path must be the path of a file"),
    "the file of a config": (
        lambda: decoders.initialized("config.json", 0),
        "config must be a dict by name, got str",
    ),
    "a seed for a decoder": (lambda: decoders.initialized({}, 0), "key must be a PRNG key"),
    "a folder for a decoder": (
        lambda: decoders.student("llama", layers=(0,)),
        "source must be a PretrainedDecoder, got 'llama'",
    ),
    "a path for a decoder": (
        lambda: pruning.narrow(Path("llama"), width=8),
        "source must be a PretrainedDecoder, got .*llama",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_names_its_argument(name: str) -> None:
    call, message = SLIPS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
