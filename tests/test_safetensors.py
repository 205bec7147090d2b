"""safetensors: exact round trips, lazy reading, and no trust in what is read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors_files import bits, entry, raw_file

from kdtl_jax.interop import safetensors as weights

TREE = {
    "block": [
        {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scale": np.float32(3.5)},
        {"kernel": np.arange(24, dtype=np.float16).reshape(2, 3, 4)[:, ::-1, ::2]},
    ],
    "head": (jnp.ones((3,), jnp.bfloat16) * 1.5, np.zeros((0, 4), np.int32)),
    "count": np.arange(3, dtype=">i4"),
    "mask": np.array([True, False]),
    "spectrum": np.array([1 + 2j], np.complex64),
}


def native(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.asarray(x).dtype.newbyteorder("=")), tree)


def test_round_trip_keeps_structure_shapes_dtypes_and_bits(tmp_path: Path):
    weights.save(tmp_path / "w.safetensors", TREE, metadata={"format": "pt"})
    loaded = weights.load_tree(tmp_path / "w.safetensors", native(TREE))
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for ours, theirs in zip(jax.tree.leaves(native(TREE)), jax.tree.leaves(loaded), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert bits(ours) == bits(theirs)
    assert weights.index(tmp_path).metadata == {"format": "pt"}


def test_the_reference_reader_agrees(tmp_path: Path):
    weights.save(tmp_path / "w.safetensors", TREE)
    theirs = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    ours = weights.load(tmp_path / "w.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert bits(ours[name]) == bits(theirs[name]), name


def test_we_read_what_the_reference_writes(tmp_path: Path):
    arrays = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64)}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors", metadata={"k": "v"})
    loaded = weights.load(tmp_path / "w.safetensors")
    assert list(loaded) == ["a", "b.weight"]
    assert all(bits(loaded[k]) == bits(v) for k, v in arrays.items())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int8, np.uint64, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    data=st.data(),
)
def test_any_view_of_any_array_survives(tmp_path: Path, array: np.ndarray, data: st.DataObject):
    order = data.draw(st.permutations(range(array.ndim)))
    flipped = array.transpose(order)[tuple(slice(None, None, -1) for _ in order)]
    weights.save(tmp_path / "x.safetensors", {"x": flipped})
    loaded = weights.load(tmp_path / "x.safetensors")["x"]
    assert loaded.shape == flipped.shape and bits(loaded) == bits(flipped)


def test_reading_is_lazy_and_selective(tmp_path: Path):
    weights.save(
        tmp_path / "w.safetensors", {"a": np.ones(4, np.float32), "b": np.zeros(4, np.int8)}
    )
    loaded = weights.load(tmp_path / "w.safetensors", where="a")
    assert list(loaded) == ["a"] and isinstance(loaded["a"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded["a"][0] = 2
    copied = weights.read(weights.index(tmp_path / "w.safetensors").tensors["a"])
    copied[0] = 2  # memory of its own
    assert loaded["a"][0] == 1
    shapes = weights.abstract(weights.index(tmp_path / "w.safetensors"))
    assert shapes["b"] == jax.ShapeDtypeStruct((4,), np.dtype(np.int8))
    with pytest.raises(ValueError, match="matches no leaf"):
        weights.load(tmp_path / "w.safetensors", where="c")


def test_sharded_round_trip(tmp_path: Path):
    tree = {f"layer_{i}": {"kernel": np.full((4, 4), i, np.float32)} for i in range(12)}
    weights.save_sharded(tmp_path / "out", tree, max_bytes=200)
    checkpoint = weights.index(tmp_path / "out")
    assert len(checkpoint.files) == 4
    loaded = weights.load_tree(tmp_path / "out", tree)
    assert all(
        bits(a) == bits(b) for a, b in zip(*map(jax.tree.leaves, (tree, loaded)), strict=True)
    )
    assert list(weights.load(tmp_path / "out"))[9:11] == ["layer_9/kernel", "layer_10/kernel"]
    with pytest.raises(FileExistsError, match="not empty"):
        weights.save_sharded(tmp_path / "out", tree)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_template_is_authoritative(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)})
    like = {"a": jax.ShapeDtypeStruct((3, 2), jnp.float32), "c": jnp.zeros(2)}
    with pytest.raises(ValueError) as error:
        weights.load_tree(path, like)
    for part in ("missing 'c'", "extra 'b'", "'a' is [2, 3], expected [3, 2]"):
        assert part in str(error.value)
    with pytest.raises(TypeError, match="'a' is float32, expected bfloat16"):
        weights.load_tree(path, {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(2)})


def test_int_and_string_keys_that_collide_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="two leaves have the path"):
        weights.save(tmp_path / "w", {"layers": {"0": np.ones(1)}, "layers/0": np.ones(1)})
    with pytest.raises(ValueError, match="itself a tensor"):
        weights.nested({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="beginning of another path"):
        weights.nested({"a/b": 2, "a": 1})


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (jax.random.key(0), "PRNG key"),
        (jnp.zeros(2, jnp.float8_e4m3fn), "float8_e4m3fn"),
        (np.zeros(2, np.complex128), "complex128"),
        (np.array(["x"], object), "object"),
        (3.0, "not an array"),
        (len, "not an array"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, leaf: Any, says: str):
    with pytest.raises(TypeError, match=says) as error:
        weights.save(tmp_path / "w.safetensors", {"block": {"odd": leaf}})
    assert "block/odd" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_metadata_and_folders_are_checked_before_writing(tmp_path: Path):
    with pytest.raises(TypeError, match="metadata must map strings to strings, got 'a': 1"):
        weights.save(tmp_path / "w.safetensors", TREE, metadata={"a": 1})  # type: ignore[dict-item]  # wrong on purpose
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors cannot .*/nodir'$"):
        weights.save(tmp_path / "nodir" / "w.safetensors", TREE)
    assert not list(tmp_path.iterdir())


def test_fp8_is_indexed_but_not_loaded(tmp_path: Path):
    raw_file(tmp_path / "w.safetensors", {"w": entry("F8_E4M3", (2,), (0, 2))}, b"ab")
    checkpoint = weights.index(tmp_path)
    assert checkpoint.tensors["w"].dtype == "F8_E4M3"
    for read in (weights.view, weights.read):
        with pytest.raises(TypeError, match="F8_E4M3.*scales.*BF16"):
            read(checkpoint.tensors["w"])
