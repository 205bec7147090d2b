"""safetensors: nothing that is read is trusted; it is loaded, or refused soon and in words."""

import json
import os
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_files import bits, entry, raw_file

from kdtl_jax.interop import safetensors as weights

GOOD = {"a": entry(), "b": entry("I8", (3,), (8, 11))}
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "empty or truncated"),
    "short": (lambda p: p.write_bytes(b"\3\0\0"), "empty or truncated"),
    "truncated header": (lambda p: p.write_bytes(struct.pack("<Q", 99) + b"{"), "truncated"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 64), "not a safetensors file"),
    "truncated payload": (lambda p: raw_file(p, GOOD, b"x" * 10), "truncated"),
    "trailing bytes": (lambda p: raw_file(p, GOOD, b"x" * 12), "appended"),
    "not JSON": (lambda p: raw_file(p, b"{garbage"), "not JSON"),
    "not UTF-8": (lambda p: raw_file(p, b'{"\xff":1}'), "not JSON"),
    "not an object": (lambda p: raw_file(p, b"[1, 2]"), "JSON object"),
    "deep JSON": (lambda p: raw_file(p, b'{"a":' + b"[" * 100_000), "not JSON"),
    "NaN": (lambda p: raw_file(p, b'{"a": NaN}'), "not a number"),
    "endless number": (lambda p: raw_file(p, b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "same name twice": (lambda p: raw_file(p, b'{"a": 1, "a": 1}'), "'a' appears twice"),
    "bad metadata": (lambda p: raw_file(p, {"__metadata__": {"a": 1}}), "__metadata__"),
    "no dtype": (lambda p: raw_file(p, {"a": {"shape": [], "data_offsets": [0, 0]}}), "must have"),
    "unknown dtype": (lambda p: raw_file(p, {"a": entry("F31")}, b"x" * 8), "'F31'"),
    "dtype is a list": (lambda p: raw_file(p, {"a": entry([1])}, b"x" * 8), "has the dtype"),  # type: ignore[arg-type]  # wrong on purpose
    "negative offset": (lambda p: raw_file(p, {"a": entry(offsets=(-8, 0))}, b"x" * 8), "whole"),
    "negative shape": (lambda p: raw_file(p, {"a": entry(shape=(-2,))}, b"x" * 8), "whole"),
    "float shape": (lambda p: raw_file(p, {"a": entry(shape=(2.0,))}, b"x" * 8), "whole"),
    "bool shape": (lambda p: raw_file(p, {"a": entry(shape=(True, 2))}, b"x" * 8), "whole"),
    "65 axes": (lambda p: raw_file(p, {"a": entry(shape=(1,) * 65)}, b"x" * 4), "whole"),
    "three offsets": (lambda p: raw_file(p, {"a": entry(offsets=(0, 4, 8))}, b"x" * 8), "offsets"),
    "lying shape": (lambda p: raw_file(p, {"a": entry(shape=(3,))}, b"x" * 8), "needs 12 bytes"),
    "overflowing shape": (
        lambda p: raw_file(p, {"a": entry(shape=(2**40, 2**40))}, b"x" * 8),
        "offsets span 8",
    ),
    "overlap": (
        lambda p: raw_file(p, {"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12),
        "overlaps 'a'",
    ),
    "hole": (
        lambda p: raw_file(p, {"a": entry(offsets=(4, 12))}, b"x" * 12),
        "hole after the header",
    ),
    "beyond the end": (lambda p: raw_file(p, {"a": entry(offsets=(0, 8))}, b"x"), "truncated"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": np.ones(64)})), "a pickle.*unpickled"),
    "torch zip": (lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 64), "pickle inside"),
    "npy": (lambda p: p.write_bytes(b"\x93NUMPY" + b"\0" * 64), r"\.npy"),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + b"\0" * 64), "GGUF"),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 64), "HDF5"),
    "lfs pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_words(tmp_path: Path, case: str):
    make, says = BAD[case]
    make(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=says) as error:
        weights.index(tmp_path / "w.safetensors")
    assert "w.safetensors cannot be read" in str(error.value)


def test_a_pickle_is_never_executed(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickle"):
        weights.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_folders_without_safetensors_say_what_they_hold(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        weights.index(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, a pickle"):
        weights.index(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.index(tmp_path / "nowhere")
    for name in ("a.safetensors", "b.safetensors"):
        weights.save(tmp_path / name, {"x": np.ones(1)})
    with pytest.raises(FileNotFoundError, match="holds 2 safetensors files"):
        weights.index(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../w.safetensors", "/w.safetensors", "a/w.safetensors", "..", "", "a\\w", "C:w", "a\0"],
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: str):
    weights.save(tmp_path / "w.safetensors", {"a": np.ones(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / weights.index_name).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="only name files beside it"):
        weights.index(folder)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({}, "no weight_map"),
        ({"weight_map": ["w.safetensors"]}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": {"z": "w.safetensors"}}, "which lacks it"),
        ({"weight_map": {"a": "w.safetensors"}}, "does not list 1 .* such as 'b'"),
        ({"weight_map": {"a": "v.safetensors"}}, "does not exist"),
    ],
)
def test_a_lying_index_is_refused(tmp_path: Path, contents: Any, says: str):
    weights.save(tmp_path / "w.safetensors", {"a": np.ones(1), "b": np.ones(1)})
    (tmp_path / weights.index_name).write_text(json.dumps(contents))
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        weights.index(tmp_path / weights.index_name)


def sound(path: Path) -> bool:
    """Loads everything a file claims; False when it was refused in our words."""
    try:
        loaded = weights.load(path)
        return all(isinstance(bits(array), bytes) for array in loaded.values())
    except (ValueError, TypeError) as error:
        assert "safetensors" in str(error)
        return False


def test_every_flipped_byte_of_a_header_is_survived(tmp_path: Path):
    good = tmp_path / "good.safetensors"
    weights.save(good, {"a": np.arange(4, dtype=np.float32), "b": jnp.ones((2, 2), jnp.bfloat16)})
    data = good.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    outcomes = []
    for position in range(8 + length):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(data)
            broken[position] ^= flip
            path = tmp_path / "broken.safetensors"
            path.write_bytes(broken)
            outcomes.append(sound(path))
    assert 0 < sum(outcomes) < 0.5 * len(outcomes)  # a renamed tensor is sound, most flips are not


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats()
        | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "F32"]),
                inner | st.sampled_from(["F32", "I8", [0, 8], [2], [0, 0]]),
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
    payload=st.binary(max_size=16),
)
def test_any_header_is_loaded_or_refused(tmp_path: Path, header: Any, payload: bytes):
    sound(raw_file(tmp_path / "w.safetensors", header, payload))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=64))
def test_any_bytes_are_loaded_or_refused(tmp_path: Path, content: bytes):
    (tmp_path / "w.safetensors").write_bytes(content)
    sound(tmp_path / "w.safetensors")


# --- limits --------------------------------------------------------------------------------------


@contextmanager
def cheap(seconds: float = 4.0, bytes_: float = 100e6) -> Iterator[None]:
    """Fails if the block takes more of the processor, or allocates more at any moment.

    Quadratic work on these files takes minutes; tracemalloc makes linear work several times slower.
    """
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bytes_
        assert time.process_time() - start < seconds
    finally:
        tracemalloc.stop()


def keys(count: int) -> str:
    """A JSON object whose last key appears twice."""
    return "{" + ",".join(f'"k{i}":0' for i in range(count)) + f',"k{count - 1}":0' + "}"


@pytest.mark.parametrize("is_index", [False, True])
def test_duplicate_keys_are_found_in_linear_time(tmp_path: Path, is_index: bool):
    path = tmp_path / ("w.safetensors.index.json" if is_index else "w.safetensors")
    if is_index:
        path.write_text('{"weight_map": ' + keys(40_000) + "}")
    else:
        raw_file(path, keys(40_000).encode())
    with cheap(), pytest.raises(ValueError, match="the key 'k39999' appears twice"):
        weights.index(path)


DENSE = {
    "lists": b'{"a": [' + b"[]," * 1_000_000 + b"[]]}",
    "texts": b'{"a": [' + b'"ab",' * 1_000_000 + b'""]}',
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}",
    "objects": b'{"a": [' + b"{}," * 1_000_000 + b"0]}",
}


@pytest.mark.parametrize("name", DENSE)
def test_a_header_that_lists_no_tensors_costs_little(tmp_path: Path, name: str):
    path = raw_file(tmp_path / "w.safetensors", DENSE[name])
    with cheap(), pytest.raises(ValueError, match="not list tensors|must have dtype") as error:
        weights.index(path)
    assert len(str(error.value).splitlines()) == 1


def test_an_index_of_any_length_costs_little(tmp_path: Path):
    path = tmp_path / weights.index_name
    with path.open("wb") as file:
        file.truncate(10**10)  # a hole: no bytes on the disk
    with cheap(), pytest.raises(ValueError, match="more than 100000000"):
        weights.index(path)


def test_a_long_header_of_many_tensors_is_read(tmp_path: Path):
    header = {f"{i}": entry("I8", (1,), (i, i + 1)) for i in range(20_000)}
    text = json.dumps(header, separators=(",", ":")).encode()
    path = raw_file(tmp_path / "w.safetensors", text, bytes(20_000))
    with cheap():
        assert len(weights.index(path).tensors) == 20_000


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 400, "-1", "null", "true"])
def test_odd_numbers_are_refused(tmp_path: Path, text: str):
    header = '{"a": {"dtype": "F32", "shape": [' + text + '], "data_offsets": [0, 8]}}'
    with pytest.raises(ValueError, match="cannot be read") as error:
        weights.index(raw_file(tmp_path / "w.safetensors", header.encode(), b"x" * 8))
    assert len(str(error.value)) < 300


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a", "b", ""]) | st.text(max_size=3),
        st.sampled_from(["w.safetensors", "../w.safetensors", "x", "", "\0"]) | st.integers(),
        max_size=3,
    )
    | st.none()
    | st.lists(st.text(max_size=2), max_size=2),
    cut=st.integers(0, 80),
)
def test_any_index_is_loaded_or_refused(tmp_path: Path, weight_map: Any, cut: int):
    weights.save(tmp_path / "w.safetensors", {"a": np.ones(1), "b": np.ones(1)})
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    path = tmp_path / weights.index_name
    path.write_text(text[: cut or None])
    try:
        assert set(weights.load(path)) in ({"a", "b"}, set())
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error).splitlines()) == 1
