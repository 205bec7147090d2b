"""The teacher cache: what comes back, what is refused, and training on it."""

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from teacher_caches import (
    ARRAYS,
    CLASSES,
    FEATURES,
    INPUTS,
    KEY,
    LIVE,
    PARAMS,
    RNG,
    ROWS,
    N,
    apply,
    contents,
    expected,
    model,
    other_weights,
    write,
)

from kdtl_jax import augment, losses, train
from kdtl_jax.run import data
from kdtl_jax.run import teacher_cache as tc
from kdtl_jax.run.teacher_cache import _shards
from kdtl_jax.run.teacher_cache import _write as _write_module


@pytest.mark.parametrize(
    ("dtype", "digits"), [(jnp.float32, None), (jnp.bfloat16, 8), (jnp.float16, 11)]
)
def test_outputs_come_back_in_the_stored_precision(
    tmp_path: Path, dtype: Any, digits: int | None
) -> None:
    """Three shards, the last one ragged; rows in any order, repeated, across shards."""
    taps = ("logits", "block/hidden")
    write(tmp_path, taps=taps, dtype=dtype)
    cache = tc.open_cache(tmp_path, expect=expected(taps=taps, dtype=dtype))
    actual, stored = tc.rows(cache, ROWS), tc.rows(cache, ROWS, stored_precision=True)
    everything = tc.load(cache)
    assert set(actual) == set(taps)
    assert [
        path.stat().st_size // _shards.row_bytes(cache.plan.columns)
        for path in sorted(tmp_path.glob("*.bin"))
    ] == [20, 20, 10]
    for tap in taps:
        want = LIVE[tap][ROWS]
        assert actual[tap].dtype == np.float32 and stored[tap].dtype == dtype
        np.testing.assert_array_equal(actual[tap], np.asarray(stored[tap], np.float32))
        np.testing.assert_array_equal(actual[tap], everything[tap][ROWS])
        bound = 1e-6 if digits is None else np.abs(want) * 2.0**-digits + 1e-6
        assert np.all(np.abs(actual[tap] - want) <= bound)
        if digits is not None:  # and half precision was really stored
            assert np.any(np.abs(actual[tap] - want) > 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_is_that_of_the_losses(tmp_path: Path, dtype: Any, temperature: float) -> None:
    write(tmp_path, top_k=7, temperature=temperature, dtype=dtype)
    cache = tc.open_cache(tmp_path, expect=expected(top_k=7, temperature=temperature, dtype=dtype))
    cut = tc.rows(cache, ROWS)["logits"]
    want = losses.top_k_targets(LIVE["logits"][ROWS], k=7, temperature=temperature)
    assert isinstance(cut, losses.TopK) and cut.indices.dtype == np.int32
    np.testing.assert_array_equal(cut.indices, want.indices)
    np.testing.assert_allclose(cut.log_tail, want.log_tail, rtol=1e-5)
    error = np.abs(cut.log_probs - np.asarray(want.log_probs))
    assert np.all(error <= np.abs(want.log_probs) * (2e-6 if dtype == jnp.float32 else 2.0**-11))
    student = jnp.asarray(RNG.normal(size=(len(ROWS), CLASSES)), jnp.float32)
    loss = partial(losses.top_k_kl_tail, student, temperature=temperature)
    np.testing.assert_allclose(loss(cut), loss(want), rtol=2e-3)
    assert np.all(loss(want) > 1e-3)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_indices_take_the_smallest_integers(classes: int, dtype: str) -> None:
    outputs = {"logits": jax.ShapeDtypeStruct((4, classes), jnp.float32)}
    indices = _write_module.columns(outputs, 4, ("logits",), 3, "float16")[0]
    assert (indices.field, indices.dtype) == ("indices", dtype)


def test_32_of_32_000_classes_are_under_a_500th_of_dense_float32(tmp_path: Path) -> None:
    rows, classes = 64, 32_000

    def model(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> Any:
        return {"logits": inputs @ params}, model_state

    arrays = {"inputs": RNG.normal(size=(rows, 2)).astype(np.float32)}
    head = RNG.normal(size=(2, classes)).astype(np.float32)
    tc.write(tmp_path, model, head, arrays, batch_size=64, top_k=32, dtype=jnp.float16)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert stored == rows * (32 * 2 + 32 * 2 + 4)
    assert stored <= rows * classes * 4 / 500


def test_sequences_and_integer_outputs(tmp_path: Path) -> None:
    """Logits `[B, L, V]` from a dict of inputs; an output of integers keeps its dtype."""
    tokens = RNG.integers(0, 9, size=(10, 4))
    arrays = {"inputs": {"ids": tokens, "mask": np.ones_like(tokens)}}
    table = RNG.normal(size=(9, 12)).astype(np.float32)

    def model(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> Any:
        logits = params[inputs["ids"]]
        return {"logits": logits, "best": jnp.argmax(logits, axis=-1)}, model_state

    options: dict[str, Any] = {"taps": ("logits", "best"), "top_k": 3, "dtype": jnp.float16}
    tc.write(tmp_path, model, table, arrays, batch_size=4, **options)
    cache = tc.open_cache(tmp_path, expect=tc.fingerprint(table, arrays, **options))
    actual = tc.rows(cache, np.array([9, 2]))
    want = losses.top_k_targets(jnp.asarray(table[tokens[[9, 2]]]), k=3)
    np.testing.assert_array_equal(actual["logits"].indices, want.indices)
    assert actual["logits"].log_tail.shape == (2, 4) and actual["best"].dtype == np.int32
    np.testing.assert_array_equal(actual["best"], want.indices[..., 0])


MISMATCHES: dict[str, tuple[Any, str]] = {
    "one weight": (
        lambda: tc.fingerprint(other_weights(), ARRAYS, preprocessing={"mean": 1}),
        "teacher weights differ",
    ),
    "a weight's name": (
        lambda: tc.fingerprint(
            {"hidden": PARAMS["hidden"], "head": PARAMS["out"]}, ARRAYS, preprocessing={"mean": 1}
        ),
        "teacher weights differ",
    ),
    "order of rows": (
        lambda: tc.fingerprint(PARAMS, {"inputs": INPUTS[::-1]}, preprocessing={"mean": 1}),
        "data differ",
    ),
    "number of rows": (
        lambda: tc.fingerprint(PARAMS, {"inputs": INPUTS[1:]}, preprocessing={"mean": 1}),
        "number of examples differs: 50 in the cache, 49 here",
    ),
    "preprocessing": (
        lambda: expected(preprocessing={"mean": 2}),
        "preprocessing differs: 'mean' was 1, is 2",
    ),
    "preprocessing added": (
        lambda: expected(preprocessing={"mean": 1, "crop": None}),
        "preprocessing differs: 'crop' was not set, is None",
    ),
    "preprocessing gone": (
        lambda: expected(),
        "preprocessing differs: 'mean' was 1, is not set",
    ),
    "model": (
        lambda: expected(preprocessing={"mean": 1}, model="vit:heads=1"),
        "models differ: the cache does not say which model made it, this is 'vit:heads=1'",
    ),
    "classes": (
        lambda: expected(preprocessing={"mean": 1}, classes=("b", "a")),
        r"classes differ: \[\] in the cache, \['b', 'a'\] here",
    ),
    "taps": (
        lambda: expected(preprocessing={"mean": 1}, taps=("logits", "block/hidden")),
        r"taps are missing: \['block/hidden'\] requested, but the cache holds \['logits'\]",
    ),
    "k": (
        lambda: expected(preprocessing={"mean": 1}, top_k=4),
        "logits differ: dense in the cache, the 4 most likely classes",
    ),
    "dtype": (
        lambda: expected(preprocessing={"mean": 1}, dtype=jnp.float16),
        "dtype differ: float32 in the cache, float16 requested",
    ),
    "views": (
        lambda: expected(preprocessing={"mean": 1}, views=2, view_key=KEY),
        "views differ: none in the cache, 2 of key 0 7 requested",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write(folder, preprocessing={"mean": 1})
    return folder


@pytest.mark.parametrize("name", MISMATCHES)
def test_every_mismatch_is_refused_by_name(plain: Path, name: str) -> None:
    expect, message = MISMATCHES[name]
    with pytest.raises(ValueError, match=f"made from something else: {message}"):
        tc.open_cache(plain, expect=expect())


def test_all_differences_are_told_at_once_and_none_is_none(plain: Path) -> None:
    both = tc.fingerprint(other_weights(), {"inputs": INPUTS[::-1]}, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="weights differ.*; data differ.*; prepro.*; dtype differ"):
        tc.open_cache(plain, expect=both)
    loose = both._replace(teacher=None, data=None, preprocessing=None, dtype=None)
    assert tc.open_cache(plain, expect=loose).plan.size == N
    assert tc.open_cache(plain, expect=None).plan.top_k is None


def test_networks_and_classes_of_the_same_shapes_are_told_apart(tmp_path: Path) -> None:
    made = {"model": "vit:heads=8", "classes": ("a", "b")}
    write(tmp_path, **made)
    assert tc.open_cache(tmp_path, expect=expected(**made)).plan.size == N
    assert tc.open_cache(tmp_path, expect=expected()).plan.size == N, "None is not compared"
    for wrong, says in (
        ({"model": "vit:heads=1"}, "models differ: the cache is of 'vit:heads=8', this is 'vit:h"),
        ({"classes": ("b", "a")}, r"classes differ: \['a', 'b'\] in the cache, \['b', 'a'\] here"),
    ):
        with pytest.raises(ValueError, match=f"made from something else: {says}"):
            tc.open_cache(tmp_path, expect=expected(**made | wrong))
        with pytest.raises(ValueError, match=f"holds another cache: {says}"):
            write(tmp_path, **made | wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": other_weights()}, "teacher weights differ"),
        ({"dtype": jnp.bfloat16}, "dtype differ"),
        ({"shard_rows": 10}, "shard_rows differ: 20 there, 10 here"),
        ({"preprocessing": {"mean": 2}}, "'mean' was 1, is 2"),
    ],
)
def test_another_cache_is_never_overwritten(
    plain: Path, options: dict[str, Any], message: str
) -> None:
    before = contents(plain)
    with pytest.raises(ValueError, match=f"holds another cache: .*{message}.*another folder"):
        write(plain, **{"preprocessing": {"mean": 1}} | options)
    assert contents(plain) == before


@pytest.mark.parametrize("index", [np.array([0, 50]), np.array([-1])])
def test_rows_that_do_not_exist(plain: Path, index: np.ndarray) -> None:
    cache = tc.open_cache(plain, expect=None)
    with pytest.raises(ValueError, match=r"rows must lie in 0\.\.49"):
        tc.rows(cache, index)
    with pytest.raises(TypeError, match="must be integers, got float"):
        tc.rows(cache, index.astype(np.float32))


def test_no_rows(plain: Path) -> None:
    cache = tc.open_cache(plain, expect=None)
    assert tc.rows(cache, np.zeros(0, np.int32))["logits"].shape == (0, CLASSES)


def test_bad_outputs_and_settings(tmp_path: Path) -> None:
    spoiled = INPUTS.copy()
    spoiled[27, 0] = np.nan
    with pytest.raises(ValueError, match="output 'logits' of row 27 is NaN"):
        write(tmp_path / "a", arrays={"inputs": spoiled})
    large = PARAMS | {"out": PARAMS["out"] * np.float32(1e6)}
    with pytest.raises(ValueError, match=r"row 0 is finite but too large for float16"):
        write(tmp_path / "b", params=large, dtype=jnp.float16)
    with pytest.raises(ValueError, match="no output 'block/hiden'. Nearest: 'block/hidden'"):
        write(tmp_path / "c", taps=("block/hiden",))
    with pytest.raises(ValueError, match="top_k=301 needs logits"):
        write(tmp_path / "d", top_k=301)
    with pytest.raises(ValueError, match=r"'mean' must have one row per example, got \[5\]"):
        write(tmp_path / "j", taps=("mean",))
    with pytest.raises(ValueError, match='top_k=3 needs "logits" among the taps'):
        write(tmp_path / "e", top_k=3, taps=("block/hidden",))
    with pytest.raises(TypeError, match="dtype must be one of"):
        write(tmp_path / "f", dtype=jnp.int8)
    with pytest.raises(ValueError, match="belong together"):
        write(tmp_path / "g", views=2, view_key=KEY)
    with pytest.raises(ValueError, match="need both views="):
        tc.fingerprint(PARAMS, ARRAYS, views=2)
    with pytest.raises(ValueError, match="one batch size"):
        write(tmp_path / "h", arrays={"inputs": INPUTS, "labels": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match='need an entry "inputs"'):
        write(tmp_path / "i", arrays={"x": INPUTS})


def test_the_digest_knows_paths_shapes_dtypes_and_order() -> None:
    x = np.arange(6, dtype=np.float32)
    same = tc.digest({"a": x})
    assert same == tc.digest({"a": jnp.asarray(x)}) == tc.digest({"a": x.astype(np.float64)})
    others = [
        {"b": x},
        {"a": x.reshape(2, 3)},
        {"a": x.astype(np.int32)},
        {"a": x[::-1]},
        {"a": x.astype(jnp.bfloat16)},
        {"a": x, "b": x},
    ]
    assert len({same, *map(tc.digest, others)}) == 1 + len(others)
    by_hand = json.dumps(["a", [6], "float32"]).encode() + x.tobytes()
    assert same == hashlib.sha256(by_hand).hexdigest()
    assert tc.digest(KEY) != tc.digest(jax.random.key(8))


def test_the_digest_reads_mapped_files_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", INPUTS)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("kdtl_jax.run.teacher_cache._fingerprint.HASHED_BYTES", 7 * FEATURES * 4)
    assert tc.digest(mapped) == tc.digest(INPUTS)
    monkeypatch.undo()
    assert tc.digest(mapped) == tc.digest(INPUTS)


# --- augmented views -------------------------------------------------------------------------

IMAGES = {"inputs": RNG.normal(size=(20, 4, 4, 1)).astype(np.float32)}


def _augment(keys: jax.Array, batch: Any) -> Any:
    crop_keys, flip_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    images = augment.flip(flip_keys, augment.crop(crop_keys, batch["inputs"], padding=1))
    return dict(batch) | {"inputs": images}


def test_cached_views_are_what_a_live_teacher_sees(tmp_path: Path) -> None:
    """Same augmented batch, shuffled, over more epochs than views: cache equals live teacher."""
    views: dict[str, Any] = {"views": 2, "view_key": data.view_key(KEY)}
    write(tmp_path, arrays=IMAGES, augment=_augment, shard_rows=8, batch_size=4, **views)
    cache = tc.open_cache(tmp_path, expect=tc.fingerprint(PARAMS, IMAGES, **views))
    assert len(list(tmp_path.glob("*.bin"))) == 6, "shards do not cross views"
    options: dict[str, Any] = {"key": KEY, "augment": _augment, "views": 2}
    resident = data.resident(IMAGES, 10, teacher=tc.load(cache), **options)
    gather = jax.jit(partial(data.gather, resident))
    seen = []
    for epoch in range(3):
        at = jnp.int32(epoch)
        rows = data.epoch_rows(resident, at)[0]
        batch = gather(rows, at, jnp.int32(0))
        live = apply(PARAMS, batch["inputs"])["logits"]
        np.testing.assert_allclose(batch["teacher"]["logits"], live, atol=1e-5)
        read = tc.rows(cache, np.asarray(rows), epoch)["logits"]
        np.testing.assert_array_equal(read, batch["teacher"]["logits"])
        seen.append(tc.rows(cache, np.arange(20), epoch)["logits"])
    np.testing.assert_array_equal(seen[0], seen[2])
    assert np.abs(seen[0] - seen[1]).max() > 0.1


def test_views_of_another_key_are_refused(tmp_path: Path) -> None:
    views: dict[str, Any] = {"views": 2, "view_key": data.view_key(KEY)}
    write(tmp_path, arrays=IMAGES, augment=_augment, **views)
    wrongs: list[dict[str, Any]] = [{"view_key": data.view_key(jax.random.key(8))}, {"views": 3}]
    for wrong in wrongs:
        expect = tc.fingerprint(PARAMS, IMAGES, **views | wrong)
        with pytest.raises(ValueError, match="views differ: 2 of key"):
            tc.open_cache(tmp_path, expect=expect)


# --- training --------------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("top_k", [None, CLASSES])
def test_training_on_a_cache_equals_training_on_the_teacher(
    tmp_path: Path, top_k: int | None
) -> None:
    """Through the stream reader and the step; k of all classes loses nothing either."""
    write(tmp_path, top_k=top_k, temperature=2.0 if top_k else 1.0)
    cache = tc.open_cache(tmp_path, expect=None)
    tx = optax.sgd(0.1)

    def kd(x: Any) -> Any:
        student, teacher = x.student["logits"], x.teacher["logits"]
        if isinstance(teacher, losses.TopK):
            return {"kd": 4 * losses.top_k_kl_tail(student, teacher, temperature=2.0)}
        return {"kd": losses.kd_kl(student, teacher, temperature=2.0)}

    def trained(teacher: Any, read: Any) -> Any:
        step = jax.jit(train.make_step(model, kd, {"kd": 1.0}, tx, teacher=teacher))
        student = jax.tree.map(lambda x: 0.5 * x[..., ::-1], PARAMS)
        state = train.init_state(student, tx, key=KEY)
        batches = data.stream(read, N, 16, key=KEY)(0)
        for _ in range(5):
            state, _ = step(state, next(batches), PARAMS)
        return state.params

    live = trained(model, lambda epoch, rows: data.take_rows(ARRAYS, rows))
    cached = trained(
        None,
        lambda epoch, rows: data.take_rows(ARRAYS, rows) | {"teacher": tc.rows(cache, rows, epoch)},
    )
    for a, b in zip(jax.tree.leaves(cached), jax.tree.leaves(live), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert math.isfinite(float(jnp.sum(live["out"])))
