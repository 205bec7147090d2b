"""safetensors in pieces: atomic and streamed writing, reading of slices, files that change."""

import json
import os
import resource
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdtl_jax.interop import safetensors as weights


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"a": np.ones(3, np.float32)})
    before = path.read_bytes()

    def produce(name: str) -> Any:
        if name == "b":
            raise RuntimeError("source vanished")
        return np.zeros(3, np.float32)

    specs = {name: jax.ShapeDtypeStruct((3,), jnp.float32) for name in "ab"}
    with pytest.raises(RuntimeError, match="vanished"):
        weights.stream(path, specs, produce)
    with pytest.raises(ValueError, match=r"announced as .*\(3,\).*got .*\(4,\)"):
        weights.stream(path, specs, lambda name: np.zeros(4, np.float32))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_tensor_is_written_and_read_in_pieces(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    array = np.arange(7 * 3, dtype=np.float16).reshape(7, 3)
    empty = np.zeros((0, 3), np.float16)
    specs = {"w": array, "none": empty}
    pieces = {"w": [array.ravel()[i : i + 4] for i in range(0, 21, 4)], "none": []}
    weights.stream(path, specs, lambda name: iter(pieces[name]))
    loaded = weights.index(path).tensors
    assert bits(weights.read(loaded["w"])) == bits(array)
    for size in (1, 4, 21, 100):
        read = list(weights.blocks(loaded["w"], size))
        assert bits(np.concatenate(read)) == bits(array) and max(map(len, read)) == min(size, 21)
    assert list(weights.blocks(loaded["none"], 4)) == []


@pytest.mark.parametrize(
    "pieces",
    [
        [np.zeros(3, np.float32)],  # too few
        [np.zeros(3, np.float32)] * 3,  # too many
        [np.zeros(4, np.float32), np.zeros(0, np.float64)],  # another dtype
    ],
)
def test_pieces_that_are_not_the_tensor_are_refused(tmp_path: Path, pieces: list[np.ndarray]):
    spec = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    with pytest.raises(ValueError, match=r"'w' was announced as .*\(2, 2\)\), got pieces"):
        weights.stream(tmp_path / "w.safetensors", spec, lambda name: iter(pieces))
    assert not list(tmp_path.iterdir())


def test_shards_are_streamed_one_tensor_at_a_time(tmp_path: Path):
    alive: list[str] = []
    specs = {f"w{i}": jax.ShapeDtypeStruct((4,), jnp.float32) for i in range(12)}

    def produce(name: str) -> Any:
        alive.append(name)
        return iter([np.full(4, int(name[1:]), np.float32)])

    weights.stream_sharded(tmp_path / "out", specs, produce, max_bytes=40)
    assert sorted(alive) == sorted(specs)
    assert len(weights.index(tmp_path / "out").files) == 6
    assert weights.load(tmp_path / "out")["w11"].tolist() == [11.0] * 4

    def fails(name: str) -> Any:
        raise RuntimeError("source vanished")

    with pytest.raises(RuntimeError, match="vanished"):
        weights.stream_sharded(tmp_path / "new", specs, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_that_shrinks_is_noticed(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"a": np.ones(300, np.float32)})
    tensor = weights.index(path).tensors["a"]
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        next(weights.blocks(tensor, 0))
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="became shorter"):
        weights.read(tensor)


@pytest.mark.slow
def test_kill_9_in_a_write_never_leaves_half_a_file(tmp_path: Path):
    # One interpreter forks twenty writers that replace one file again and again, slowly enough to
    # be caught in the act, and kills each of them.
    code = """
        import os, signal, sys, time
        import numpy as np
        from kdtl_jax.interop import safetensors as weights

        path = sys.argv[1]
        specs = {f"t{i}": np.zeros((64,), np.float32) for i in range(8)}

        def write_forever():
            n = 0
            while True:
                n += 1
                def produce(name, n=n):
                    time.sleep(0.001)
                    return np.full((64,), n, np.float32)
                weights.stream(path, specs, produce)

        weights.stream(path, specs, lambda name: specs[name])
        rounds = 0
        for i in range(20):
            child = os.fork()
            if child == 0:
                write_forever()
            time.sleep(0.021 + 0.0013 * i)
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            loaded = weights.load(path)
            assert len(loaded) == 8 and len({float(v) for x in loaded.values() for v in x}) == 1
            rounds += 1
        print("survived", rounds)

        def write_folders_forever():
            n = 0
            while True:
                n += 1
                def produce(name, n=n):
                    time.sleep(0.001)
                    return np.full((64,), n, np.float32)
                weights.stream_sharded(f"{path}.{i}.{n}", specs, produce, max_bytes=600)

        parent = os.path.dirname(path)
        for i in range(6):
            child = os.fork()
            if child == 0:
                write_folders_forever()
            while not os.path.exists(f"{path}.{i}.1"):
                time.sleep(0.001)
            time.sleep(0.005 * i)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        whole = [name for name in os.listdir(parent) if name.startswith("w.safetensors.")]
        for name in whole:
            loaded = weights.load(os.path.join(parent, name))
            assert len(loaded) == 8 and len({float(v) for x in loaded.values() for v in x}) == 1
        print("folders", len(whole) >= 6)
    """
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(code),
            str(tmp_path / "w.safetensors"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout == "survived 20\nfolders True\n", run.stderr
    litter = [p.name for p in tmp_path.iterdir() if not p.name.startswith("w.safetensors")]
    assert litter and all(name.endswith(".kdtl-tmp") for name in litter)  # killed in the act


def test_many_tensors_need_one_open_file(tmp_path: Path):
    code = """
        import resource, sys
        import numpy as np
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        from kdtl_jax.interop import safetensors as weights
        path = sys.argv[1]
        weights.save(path, {f"t{i}": np.full(4, i, "f4") for i in range(1200)})
        loaded = weights.load(path)
        tensors = weights.index(path).tensors
        print(sum(float(x[0]) for x in loaded.values()))
        print(sum(float(weights.read(t)[3]) for t in tensors.values()))
        third = [next(weights.take(t, {0: np.array([2])})) for t in tensors.values()]
        print(sum(float(x[0]) for x in third))
    """
    path = str(tmp_path / "w.safetensors")
    words = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), path]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert run.stdout == "719400.0\n719400.0\n719400.0\n", run.stderr


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6),
    dtype=st.sampled_from([np.float32, np.int8, jnp.bfloat16]),
    size=st.integers(1, 20),
    data=st.data(),
)
def test_entries_are_taken_as_numpy_takes_them(
    tmp_path: Path, shape: tuple[int, ...], dtype: Any, size: int, data: st.DataObject
):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    axes = data.draw(st.sets(st.sampled_from(range(len(shape)))))
    indices = {
        axis: np.array(data.draw(st.lists(st.integers(0, shape[axis] - 1), max_size=5)), int)
        for axis in axes
        if shape[axis]
    }
    want = array
    for axis, which in indices.items():
        want = np.take(want, which, axis)
    weights.save(tmp_path / "x.safetensors", {"x": array})
    tensor = weights.index(tmp_path / "x.safetensors").tensors["x"]
    got = list(weights.take(tensor, indices, size))
    assert b"".join(map(bits, got)) == bits(want)
    assert all(piece.dtype == want.dtype for piece in got)


def test_only_the_taken_rows_are_read(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    text = json.dumps(
        {"w": {"dtype": "F32", "shape": [10**9, 100], "data_offsets": [0, 4 * 10**11]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + 4 * 10**11)  # 400 GB, none of them on the disk
    tensor = weights.index(path).tensors["w"]
    rows = np.array([0, 500_000_000, 999_999_999])
    (*pieces,) = weights.take(tensor, {0: rows, 1: np.array([7, 99])})
    assert np.concatenate(pieces).tolist() == [0.0] * 6


def test_taking_maps_no_file(tmp_path: Path) -> None:
    """A file of 2 TB, nearly all of it holes, is more than the address space may hold."""
    file = tmp_path / "a.safetensors"
    weights.save(file, {"x": np.arange(12, dtype=np.float32).reshape(4, 3)})
    tensor = weights.index(file).tensors["x"]
    with open(file, "r+b") as out:
        out.truncate(2 * 10**12)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (10**12, limit[1]))
    try:
        actual = np.concatenate(list(weights.take(tensor, {0: np.array([3, 1]), 1: np.array([2])})))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    np.testing.assert_array_equal(actual, [11, 5])
