"""Files of others, whatever is in them, are read or refused in one clear line, at a small cost."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bounds import bounded, is_plain, lines_of, values
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from kdtl_jax import _files, language
from kdtl_jax.interop import decoders, huggingface
from kdtl_jax.recipes import _language_text
from kdtl_jax.run import checkpoint

FOLDERS = Path(__file__).parent / "data"
ENCODERS = ("bert", "vit", "t5", "resnet_basic", "deberta_tokens", "siglip_text")
DECODERS = ("gemma2", "gemma3", "gpt2", "llama", "mistral", "phi3", "qwen2", "smollm3")
REFUSALS = (ValueError, OSError)
edits = st.tuples(st.integers(0, 2**20), st.binary(max_size=6), st.integers(0, 40))


def edited(content: bytes, edit: tuple[int, bytes, int]) -> bytes:
    """Bytes put in at a place, and so many cut out behind it."""
    place, put, cut = edit
    place %= len(content)
    return content[:place] + put + content[place + cut :]


@contextlib.contextmanager
def read_or_refused() -> Iterator[None]:
    """Within bounds; an error is of a kind that the command line prints, in one line."""
    with bounded():
        try:
            yield
        except REFUSALS as error:
            assert is_plain(str(error), lines_of(str(error))), str(error)[:2000]


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Some values of a configuration, the inner ones of objects in it too, are others."""
    out = {key: value for key, value in config.items()}
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = (
            {**inner, next(iter(inner)): value} if isinstance(inner, dict) and inner else value
        )
    return out


# --- checkpoints ---------------------------------------------------------------------------------

TREE = {"a": np.arange(3.0), "b": {"c": np.ones((2, 2), np.int32)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    with checkpoint.open_folder(folder) as opened:
        for step in (1, 2):
            lines = [{"step": i + 1, "eval/x": 1.0} for i in range(step)]
            checkpoint.save(opened, step, TREE, {"evaluations": lines, "more": {"x": [1]}})
    return folder


@settings(max_examples=30)
@given(number=st.integers(0, 100), edit=edits)
def test_any_bytes_of_a_step(saved: Path, number: int, edit: tuple[int, bytes, int]) -> None:
    """The newest step is the one that was saved, or the one before it is taken."""
    files = sorted(path for path in (saved / "2").rglob("*") if path.is_file())
    path = files[number % len(files)]
    whole = path.read_bytes()
    path.write_bytes(edited(whole, edit) if whole else edit[1])
    try:
        with bounded():
            actual = checkpoint.restore(saved, TREE)
        same = path.read_bytes() == whole
        if path.name == "manifest.json" and not same:  # its seal is of the values
            with contextlib.suppress(ValueError):
                same = json.loads(path.read_bytes()) == json.loads(whole)
        assert actual.step == (2 if same else 1)
        np.testing.assert_array_equal(actual.state["a"], TREE["a"])
    finally:
        path.write_bytes(whole)


@settings(max_examples=30)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            ["format", "step", "folder", "owner", "meta", "history", "leaves", "files"]
        ),
        values,
        min_size=1,
        max_size=2,
    ),
    inside=st.booleans(),
)
def test_any_manifest_with_a_seal(saved: Path, changes: dict[str, Any], inside: bool) -> None:
    """Even sealed, a manifest of another shape is not a step: what is restored is the state."""
    path = saved / "2/manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    del manifest["digest"]
    if inside:
        manifest["leaves"] = [changed(leaf, dict.fromkeys(leaf, value)) for leaf in
                              manifest["leaves"] for value in changes.values()]  # fmt: skip
    else:
        manifest = changed(manifest, changes)
    try:
        _files.write_sealed(path, manifest)
        with read_or_refused():
            actual = checkpoint.restore(saved, TREE)
            np.testing.assert_array_equal(actual.state["a"], TREE["a"])
            assert actual.step in (1, 2)
            assert checkpoint.best(saved, "x") in (1, 2)
    finally:
        path.write_bytes(whole)


# --- models --------------------------------------------------------------------------------------


def folders(
    tmp_path_factory: pytest.TempPathFactory, kind: str, names: tuple[str, ...]
) -> dict[str, tuple[Path, dict[str, Any]]]:
    results = {}
    for name in names:
        folder = tmp_path_factory.mktemp(kind) / name
        shutil.copytree(FOLDERS / kind / name, folder)
        results[name] = folder, json.loads((folder / "config.json").read_text())
    return results


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return folders(tmp_path_factory, "huggingface", ENCODERS)


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return folders(tmp_path_factory, "decoders", DECODERS)


def attacked(
    load: Callable[[Path], Any], of: tuple[Path, dict[str, Any]], picks: list[Any]
) -> None:
    folder, config = of
    keys = sorted(config)
    changes = {keys[number % len(keys)]: value for number, value in picks}
    (folder / "config.json").write_text(json.dumps(changed(config, changes)))
    with read_or_refused():
        load(folder)


picked = st.lists(st.tuples(st.integers(0, 200), values), min_size=1, max_size=2)


@pytest.mark.usefixtures("standard_promotion")
@settings(max_examples=30)
@given(name=st.sampled_from(ENCODERS), picks=picked)
def test_any_configuration_of_an_encoder(encoders: Any, name: str, picks: list[Any]) -> None:
    attacked(huggingface.load, encoders[name], picks)


@pytest.mark.parametrize("kind", [[], {}, None, 7])
def test_a_model_type_that_is_no_text(encoders: Any, kind: Any) -> None:
    folder, config = encoders["bert"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ValueError, match="model_type .* is not supported"):
        huggingface.load(folder)


@settings(max_examples=30)
@given(name=st.sampled_from(DECODERS), picks=picked)
def test_any_configuration_of_a_decoder(languages: Any, name: str, picks: list[Any]) -> None:
    attacked(decoders.load, languages[name], picks)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"head_dim": 10**9}, "head_dim = 1000000000; no tensor"),
        ("phi3", {"hidden_size": 10**9}, "hidden_size = 1000000000; no tensor"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 10**9}}, "at most 1"),
        ("gpt2", {"n_layer": 9999}, "9999 layers; the file has"),
    ],
)
def test_sizes_that_no_tensor_has(
    languages: Any, name: str, changes: dict[str, Any], says: str
) -> None:
    folder, config = languages[name]
    (folder / "config.json").write_text(json.dumps(config | changes))
    with bounded(), pytest.raises(ValueError, match=says):
        decoders.load(folder)


# --- text ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers", reason="the hub extra is not installed")
    folder = tmp_path_factory.mktemp("tokens")
    language.write_byte_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 256, "bos_token_id": [1]}))
    return folder


@settings(max_examples=40)
@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "config.json"]),
    edit=st.none() | edits,
    picks=picked,
)
def test_any_tokenizer(tokens: Path, name: str, edit: Any, picks: list[Any]) -> None:
    path = tokens / name
    whole = path.read_bytes()
    if edit is not None:
        path.write_bytes(edited(whole, edit))
    else:
        result = json.loads(whole)
        keys = sorted(result)
        changes = {keys[number % len(keys)]: value for number, value in picks}
        path.write_text(json.dumps(changed(result, changes)))
    try:
        with read_or_refused():
            made = language.tokenizer(tokens)
            ids = np.asarray(made.encode("ab \n é"), np.int32)
            assert isinstance(made.decode(ids.tolist()), str)
            for token in (made.bos, made.eos, made.pad):
                assert token is None or 0 <= token < 2**31
    finally:
        path.write_bytes(whole)


LINE = {"text": "some words that are long enough"}
ANSWER = {"prompt": "a question", "completion": "an answer", "privileged": "a hint"}


@settings(max_examples=40)
@given(line=st.sampled_from([LINE, ANSWER]), picks=picked, edit=st.none() | edits,
       is_table=st.booleans())  # fmt: skip
def test_any_line_of_a_text(
    tmp_path_factory: pytest.TempPathFactory, line: dict[str, Any], picks: list[Any], edit: Any,
    is_table: bool,
) -> None:  # fmt: skip
    file = tmp_path_factory.mktemp("text") / "lines.jsonl"
    keys = sorted(line)
    changes = {keys[number % len(keys)]: value for number, value in picks}
    lines = (line, changed(line, changes), line)
    content = "".join(f"{json.dumps(x)}\n" for x in lines).encode()
    if is_table:
        texts = {
            name: [str(x.get(name)).encode(errors="replace").decode() for x in lines]
            for name in dict.fromkeys([*line, *lines[1]])
        }
        out = io.BytesIO()
        parquet.write_table(pa.table(texts), out)
        file, content = file.with_suffix(".parquet"), out.getvalue()
    file.write_bytes(content if edit is None else edited(content, edit))
    with read_or_refused():
        shape = _language_text.Shape(8, 4, 0.3)
        text = _language_text.read([str(file)], language.byte_tokenizer(), shape, file.parent)
        assert text.train.inputs["tokens"].dtype == np.int32
