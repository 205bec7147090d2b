"""Batches: orders that are functions of key and epoch, honest filling, files, prefetch."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import augment
from kdtl_jax.run import data

KEY = jax.random.key(5)
SIZE, BATCH = 10, 4


def arrays(size: int = SIZE) -> dict[str, np.ndarray]:
    """Every input tells its row."""
    rows = np.arange(size)
    return {"inputs": np.stack([rows, rows * 10.0], 1), "labels": rows.astype(np.int64) % 3}


def read(epoch: int, rows: np.ndarray) -> data.Batch:
    return data.take_rows(arrays(), rows)


def streamed(
    step: int = 0, *, key: jax.Array | None = KEY, drop_remainder: bool = True
) -> Iterator[Any]:
    return data.stream(read, SIZE, BATCH, key=key, drop_remainder=drop_remainder)(step)


def first(batches: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(batches, count))


def rows_of(batch: Any) -> list[int]:
    return np.asarray(batch["inputs"])[:, 0].astype(int).tolist()


def gathered(source: data.Resident, epoch: int, step: int) -> dict[str, Any]:
    rows = data.epoch_rows(source, jnp.int32(epoch))[step]
    return data.gather(source, rows, jnp.int32(epoch), jnp.int32(step))


@pytest.mark.parametrize("drop", [True, False])
def test_streams_and_resident_data_have_one_order(drop: bool) -> None:
    source = data.resident(arrays(), BATCH, key=KEY, drop_remainder=drop)
    steps = data.steps_per_epoch(source)
    assert steps == (2 if drop else 3)
    stream = first(streamed(drop_remainder=drop), 2 * steps)
    for i, batch in enumerate(stream):
        here = gathered(source, i // steps, i % steps)
        assert here.keys() == batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(here[name], value, err_msg=name)


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    source = data.resident(arrays(), BATCH, key=KEY, drop_remainder=False)
    epochs = []
    for epoch in range(3):
        batches = [gathered(source, epoch, step) for step in range(3)]
        assert [np.asarray(b["weights"]).tolist() for b in batches] == [
            [1] * 4,
            [1] * 4,
            [1, 1, 0, 0],
        ]
        real = [r for b in batches for r, w in zip(rows_of(b), b["weights"], strict=True) if w]
        assert sorted(real) == list(range(SIZE))
        epochs.append(real)
    assert epochs[0] != epochs[1] != epochs[2]
    again = data.resident(arrays(), BATCH, key=KEY, drop_remainder=False)
    assert rows_of(gathered(again, 2, 0)) == epochs[2][:4]
    other = data.resident(arrays(), BATCH, key=jax.random.key(6))
    assert rows_of(gathered(other, 0, 0)) != epochs[0][:4]


def test_without_a_key_the_order_is_the_given_one() -> None:
    source = data.resident(arrays(), BATCH, key=None, drop_remainder=False)
    assert rows_of(gathered(source, 7, 1)) == [4, 5, 6, 7]
    assert rows_of(gathered(source, 7, 2)) == [8, 9, 0, 1]
    assert rows_of(first(streamed(key=None), 3)[2]) == [0, 1, 2, 3]


def test_a_resumed_stream_goes_on_where_it_was() -> None:
    straight = first(streamed(drop_remainder=False), 9)
    for step in (1, 3, 5):
        for a, b in zip(
            first(streamed(step, drop_remainder=False), 3), straight[step:], strict=False
        ):
            assert rows_of(a) == rows_of(b)


def test_given_weights_survive_and_the_filling_has_none() -> None:
    given = arrays() | {"weights": np.linspace(1, 2, SIZE).astype(np.float32)}
    source = data.resident(given, BATCH, key=None, drop_remainder=False)
    expected = [*given["weights"][8:], 0, 0]
    np.testing.assert_array_equal(gathered(source, 0, 2)["weights"], expected)
    stream = data.stream(
        lambda epoch, rows: data.take_rows(given, rows), SIZE, BATCH, key=None, drop_remainder=False
    )
    np.testing.assert_array_equal(first(stream(2), 1)[0]["weights"], expected)
    *_, last = data.in_order(given, BATCH)
    np.testing.assert_array_equal(last["weights"], expected)


def test_cached_teachers_follow_rows_and_views() -> None:
    seen: list[np.ndarray] = []

    def augmented(keys: jax.Array, batch: data.Batch) -> data.Batch:
        seen.append(np.asarray(jax.random.key_data(keys)))
        return batch

    teacher = {"logits": np.arange(2 * SIZE, dtype=np.float32).reshape(2, SIZE, 1)}
    source = data.resident(arrays(), BATCH, key=KEY, augment=augmented, teacher=teacher, views=2)
    for epoch in range(3):
        batch = gathered(source, epoch, 1)
        rows = np.array(rows_of(batch), np.int32)
        np.testing.assert_array_equal(batch["teacher"]["logits"][:, 0], SIZE * (epoch % 2) + rows)
        # The keys from which a cache is built, without a loop or a batch.
        keys = augment.example_keys(data.view_key(KEY), epoch % 2, jnp.asarray(rows))
        np.testing.assert_array_equal(seen[-1], jax.random.key_data(keys))
    flat = data.resident(arrays(), BATCH, key=KEY, teacher={"logits": teacher["logits"][0]})
    batch = gathered(flat, 5, 0)
    np.testing.assert_array_equal(batch["teacher"]["logits"][:, 0], rows_of(batch))


def test_host_dtypes_become_those_of_jax() -> None:
    batch = gathered(data.resident(arrays(), BATCH, key=None), 0, 0)
    assert (batch["inputs"].dtype, batch["labels"].dtype) == (jnp.float32, jnp.int32)
    placed = next(data.prefetch(iter([arrays()])))
    assert (placed["inputs"].dtype, placed["labels"].dtype) == (jnp.float32, jnp.int32)


class Tensor:
    """What other libraries' tensors are here: something that NumPy can read."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.values, dtype)


def test_any_iterable_is_a_source() -> None:
    a, b = [[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]
    forms: list[Any] = [
        [{"inputs": a, "labels": [0, 1]}, {"inputs": b, "labels": [1]}],  # lists, as datasets yield
        [(np.array(a), np.array([0, 1])), (np.array(b), np.array([1]))],  # tuples, as loaders do
        [(Tensor(a), Tensor([0, 1])), (Tensor(b), Tensor([1]))],
        [{"inputs": jnp.array(a), "labels": jnp.array([0, 1])},
         {"inputs": jnp.array(b), "labels": jnp.array([1])}],
    ]  # fmt: skip
    for batches in forms:
        actual = first(data.iterate(batches)(0), 3)  # starts again after the second
        assert [x["inputs"].tolist() for x in actual] == [a, b + b, a]
        assert [x["labels"].tolist() for x in actual] == [[0, 1], [1, 1], [0, 1]]
        assert [x["weights"].tolist() for x in actual] == [[1, 1], [1, 0], [1, 1]]
        assert rows_of(next(data.iterate(batches)(1))) == [4, 4], "resumed at step 1"
        assert len(list(data.iterate(iter(batches))(0))) == 2, "an iterator ends"
    renamed = data.iterate([{"image": a, "label": [0, 1], "id": ["x", "y"]}],
                           rename={"image": "inputs", "label": "labels"})(0)  # fmt: skip
    assert next(renamed).keys() == {"inputs", "labels", "weights"}
    named = data.iterate([(a, [0, 1], [5, 6])], 3, names=("inputs", "labels", "row"))(0)
    assert next(named)["row"].tolist() == [5, 6, 5]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "yields no batch"),
        ([np.ones(3)], "must be a dict or a tuple of arrays, got ndarray"),
        ([(np.ones(3),)], "tuples of 1, but names= has 2"),
        ([{"inputs": [[1.0], [1.0, 2.0]]}], "inhomogeneous|not arrays of numbers"),
        ([{"inputs": np.array([None, 1], object)}], r"\['inputs'\] are not arrays of numbers"),
        ([{"inputs": np.ones(3), "labels": np.ones(2)}], "labels"),
        ([(np.ones(2), np.ones(2)), (np.ones(3), np.ones(3))], r"1\.\.2 rows, got 3"),
        ([{"inputs": np.ones((0, 2))}], "rows, got 0"),
    ],
)
def test_unusable_batches_are_refused(batches: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        first(data.iterate(batches)(0), 2)


def test_renaming_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"batches lack \['image'\]; they have \['x'\]"):
        next(data.iterate([{"x": np.ones(2)}], rename={"image": "inputs"})(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: data.resident(arrays(), 11, key=KEY), r"1\.\.10 \(the number of examples\)"),
        (lambda: data.resident(arrays(), 0, key=KEY), "batch_size"),
        (lambda: data.resident(arrays(), 2.5, key=KEY), "batch_size must be an integer, got 2.5"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: data.resident(arrays(), 2, key=0), r"key must be a PRNG key .* got 0 \(int\)"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: data.resident(arrays(), 2, key=jnp.ones(2)), r"PRNG key .* got float32\[2\]"),
        (lambda: data.stream(read, 3, 2, key=0), "key must be a PRNG key"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: data.resident({}, 1, key=KEY), "no array in the batch"),
        (lambda: data.resident(arrays() | {"x": np.ones(3)}, 1, key=KEY), "one batch size"),
        (lambda: data.resident(arrays(), 2, key=None, augment=lambda k, b: b), "needs a key"),
        (lambda: data.resident(arrays(), 2, key=KEY, teacher=np.ones((9, 1))), "10 rows, got"),
        (
            lambda: data.resident(arrays(), 2, key=KEY, teacher=np.ones((1, 10)), views=2),
            "10 rows in each of 2 views",
        ),
        (
            lambda: data.resident(
                arrays(), 2, key=KEY, teacher=np.ones((10, 1)), augment=lambda k, b: b
            ),
            "need views=",
        ),
        (lambda: data.stream(read, 3, 4, key=None), r"1\.\.3, got 4"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_a_legacy_key_is_the_same_key() -> None:
    legacy = jax.random.PRNGKey(3)
    old, new = (data.resident(arrays(), 5, key=key) for key in (legacy, jax.random.key(3)))
    assert old.order == new.order and data.view_key(legacy) == new.augment_key


def test_one_pass_in_order_is_exact() -> None:
    batches = list(data.in_order(arrays(), BATCH))
    assert [len(b["inputs"]) for b in batches] == [4, 4, 4]
    kept = [r for b in batches for r, w in zip(rows_of(b), b["weights"], strict=True) if w]
    assert kept == list(range(SIZE))


def test_ragged_batches_need_one_compilation() -> None:
    traces: list[None] = []

    @jax.jit
    def total(batch: Any) -> jax.Array:
        traces.append(None)
        return jnp.sum(batch["inputs"][:, 0] * batch["weights"])

    def ragged() -> Iterator[Any]:
        for size in (4, 3, 1, 4, 2):
            yield {"inputs": np.ones((size, 2), np.float32)}

    actual = [float(total(b)) for b in data.prefetch(data.iterate(ragged())(0))]
    assert actual == [4, 3, 1, 4, 2] and len(traces) == 1


def test_memory_mapped_rows(tmp_path: Path) -> None:
    whole = arrays(50)
    for name, array in whole.items():
        np.save(tmp_path / name, array)
    files = {name: tmp_path / f"{name}.npy" for name in whole}
    mapped = data.open_arrays(files)
    assert all(isinstance(x, np.memmap) for x in mapped.values())
    rows = np.array([7, 3, 49, 3])
    actual = data.take_rows(mapped, rows)
    for name, array in whole.items():
        np.testing.assert_array_equal(actual[name], array[rows])
        assert not isinstance(actual[name].base, np.memmap), "rows are copied out of the file"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_data_larger_than_memory_stay_on_disk(tmp_path: Path) -> None:
    """A (sparse) file of 1 GB is opened, shuffled and read in batches, in a few megabytes."""
    shape = (60_000, 64, 64)
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape).flush()
    mapped = data.open_arrays({"inputs": tmp_path / "x.npy"})

    def resident_megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    source = data.stream(lambda epoch, rows: data.take_rows(mapped, rows), len(mapped["inputs"]),
                         32, key=KEY)  # fmt: skip
    batches = source(1000)
    next(batches)
    before = resident_megabytes()
    assert all(batch["inputs"].shape == (32, 64, 64) for batch in first(batches, 20))
    assert resident_megabytes() - before < 64


@pytest.mark.parametrize("content", ["text", "empty", "objects", "cut", "npz", "broken zip"])
def test_files_that_are_no_arrays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        if content == "objects":
            np.save(file, np.array([{}, None], object))
        elif content == "npz":
            np.savez(file, np.ones(3))
        elif content == "cut":
            np.save(file, np.ones(1000))
            file.truncate(500)
        else:
            file.write({"text": b"hello", "empty": b"", "broken zip": b"PK\x03\x04 and"}[content])
    with pytest.raises(ValueError, match=r".*x\.npy is (not a plain .npy|an npz)"):
        data.open_arrays({"inputs": path})
    with pytest.raises(FileNotFoundError):
        data.open_arrays({"inputs": tmp_path / "nowhere.npy"})


def test_files_of_unequal_length_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    np.save(tmp_path / "b.npy", np.ones(4))
    with pytest.raises(ValueError, match="one batch size.*labels"):
        data.open_arrays({"inputs": tmp_path / "a.npy", "labels": tmp_path / "b.npy"})


def counted(drawn: list[int]) -> Iterator[Any]:
    for i in itertools.count():
        drawn.append(i)
        yield {"inputs": np.full((2,), i)}


def settled(drawn: list[int], count: int) -> bool:
    """Whether the thread draws `count` batches, and then no more."""
    deadline = time.monotonic() + 20
    while len(drawn) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    return len(drawn) == count


def test_prefetch_keeps_order_and_stays_a_little_ahead() -> None:
    drawn: list[int] = []
    batches = data.prefetch(counted(drawn), depth=3)
    assert int(next(batches)["inputs"][0]) == 0
    assert settled(drawn, 5)  # one used, three wait, one in the thread's hands
    assert [int(b["inputs"][0]) for b in first(batches, 4)] == [1, 2, 3, 4]
    assert settled(drawn, 9)
    batches.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}, "it ends with it"


def test_prefetched_batches_are_on_the_device_and_nothing_waits_for_them() -> None:
    step = jax.jit(lambda total, batch: total + jnp.sum(batch["inputs"]))
    total = jax.device_put(np.float32(0))
    host = [{"inputs": np.full((4,), i, np.float32)} for i in range(6)]
    total = step(total, jax.device_put(host[0]))
    with jax.transfer_guard("disallow"):  # a batch still on the host would be an implicit transfer
        for batch in data.prefetch(iter(host)):
            assert isinstance(batch["inputs"], jax.Array)
            total = step(total, batch)
    assert float(total) == 4 * sum(range(6))


def aligned(size: int) -> np.ndarray:
    """Zeros at an address whose memory JAX shares instead of copying it."""
    memory = np.zeros(4 * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * size].view(np.float32)


def test_a_loader_may_fill_its_arrays_again() -> None:
    array = aligned(4)

    def batches() -> Iterator[data.Batch]:
        for i in range(6):
            array[:] = i
            yield {"inputs": array}

    assert [int(b["inputs"][0]) for b in data.prefetch(batches())] == list(range(6))


def test_resident_data_do_not_change_with_the_arrays_they_come_from() -> None:
    inputs, teacher = aligned(8), {"logits": aligned(8)}
    labels = aligned(8)
    view = labels[:]
    view.flags.writeable = False  # its memory is not
    source = data.resident({"inputs": inputs, "labels": view}, 4, key=None, teacher=teacher)
    inputs[:], labels[:], teacher["logits"][:] = 1, 1, 1
    assert not np.any(source.arrays["inputs"]) and not np.any(source.arrays["labels"])
    assert not np.any(source.teacher["logits"])


def test_prefetch_places_batches_as_it_is_told() -> None:
    device = jax.devices()[3]
    batches = data.prefetch(iter([arrays()]), place=lambda b: jax.device_put(b, device))
    assert next(batches)["inputs"].devices() == {device}


def test_an_error_while_drawing_is_raised_at_its_place() -> None:
    def failing() -> Iterator[Any]:
        yield {"inputs": np.zeros(2)}
        yield {"inputs": np.ones(2)}
        raise OSError("the disk is gone")

    batches = data.prefetch(failing(), depth=8)
    assert [float(b["inputs"][0]) for b in first(batches, 2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
