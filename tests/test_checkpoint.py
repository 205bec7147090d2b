"""Checkpoints: exact round trips, verified reads, clear refusals, nothing lost."""

import asyncio
import logging
import os
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdtl_jax import train
from kdtl_jax.run import checkpoint
from kdtl_jax.run.checkpoint import _save


def state() -> train.TrainState:
    """A state with everything that is hard to store."""
    params = {
        "student": {0: jnp.arange(6.0).reshape(2, 3), 1: jnp.asarray(0.1, jnp.bfloat16)},
        "connectors": [jnp.zeros((0, 3)), jnp.asarray(-0.0), {"a/b": jnp.ones((1,), jnp.float16)}],
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return train.init_state(
        params,
        tx,
        key=jax.random.key(7, impl="rbg"),
        model_state=(jnp.asarray([True, False]), None),
        memory={"keys": jax.random.split(jax.random.key(1), 3), "nan": jnp.asarray(jnp.nan)},
    )


def raw(tree: Any) -> list[tuple[Any, bytes]]:
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [((x.shape, x.dtype), np.asarray(x).tobytes()) for x in leaves]


@pytest.fixture
def kept(tmp_path: Path, standard_promotion: None) -> Path:
    """A folder with whole steps 1 and 2."""
    with checkpoint.open_folder(tmp_path) as checkpoints:
        for step in (1, 2):
            saved = state()._replace(step=jnp.asarray(step, jnp.int32))
            checkpoint.save(checkpoints, step, saved, {"epoch": step / 3})
    return tmp_path


def test_round_trip_is_exact(kept: Path, standard_promotion: None) -> None:
    expected = state()._replace(step=jnp.asarray(2, jnp.int32))
    actual = checkpoint.restore(kept, state())
    assert (actual.step, actual.meta, actual.skipped) == (2, {"epoch": 2 / 3}, [])
    assert jax.tree.structure(actual.state) == jax.tree.structure(expected)
    assert raw(actual.state) == raw(expected)
    assert jax.random.key_impl(actual.state.key) == jax.random.key_impl(expected.key)
    assert jax.random.bits(actual.state.memory["keys"][2]) == jax.random.bits(
        expected.memory["keys"][2]
    )
    abstract = checkpoint.restore(kept, jax.eval_shape(lambda: expected), step=1)
    assert abstract.step == 1 and raw(abstract.state)[1:] == raw(expected)[1:]


def test_host_leaves_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {"numpy": np.arange(3, dtype=np.int64) * 2**40, "float": 0.1, "int": 2**40, "flag": True}
    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, 0, tree)
    actual = checkpoint.restore(tmp_path, tree).state
    assert isinstance(actual["numpy"], np.ndarray) and actual["numpy"].dtype == np.int64
    assert (actual["numpy"] == tree["numpy"]).all()
    assert {k: (type(v), v) for k, v in actual.items() if k != "numpy"} == {
        "float": (float, 0.1),
        "int": (int, 2**40),
        "flag": (bool, True),
    }


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
    def mesh(n: int) -> NamedSharding:
        made = jax.make_mesh((n,), ("d",), (AxisType.Auto,), devices=jax.devices()[:n])
        return NamedSharding(made, PartitionSpec("d"))

    values = jnp.arange(16.0)
    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, 5, {"w": jax.device_put(values, mesh(4))})
    for placed in (mesh(2), mesh(8)):
        template = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=placed)}
        actual = checkpoint.restore(tmp_path, template).state["w"]
        assert actual.sharding == placed and (actual == values).all()


def test_saved_state_may_be_donated_at_once(tmp_path: Path) -> None:
    shift = jax.jit(lambda x: jax.tree.map(lambda y: y * 2 + 1, x), donate_argnums=0)
    tree = {"a": jnp.ones((256, 256)), "b": jnp.zeros((7,))}
    with checkpoint.open_folder(tmp_path, keep=checkpoint.newest(8)) as checkpoints:
        for step in range(6):
            checkpoint.save(checkpoints, step, tree)
            tree = shift(shift(tree))
    tree = {"a": jnp.ones((256, 256)), "b": jnp.zeros((7,))}
    for step in range(6):
        assert raw(checkpoint.restore(tmp_path, tree, step=step).state) == raw(tree)
        tree = jax.tree.map(lambda y: (y * 2 + 1) * 2 + 1, tree)


def test_every_altered_file_is_noticed(kept: Path, standard_promotion: None) -> None:
    home = kept / "2"
    files = sorted(path for path in home.rglob("*") if path.is_file())
    assert len(files) > 5 and home / "manifest.json" in files
    for path in files:
        whole = path.read_bytes()
        spoilt = [whole[:-1], whole + b"x"]
        for place in {0, len(whole) // 2, len(whole) - 1}:
            flipped = bytearray(whole)
            flipped[place] ^= 0x01
            spoilt.append(bytes(flipped))
        for content in spoilt:
            path.write_bytes(content)
            reason = checkpoint.problem(kept, 2)
            assert reason is not None and path.name in reason
        actual = checkpoint.restore(kept, state())
        assert (actual.step, actual.skipped) == (1, [(2, checkpoint.problem(kept, 2))])
        path.write_bytes(whole)
        path.rename(kept / "elsewhere")
        reason = checkpoint.problem(kept, 2)
        assert reason is not None and path.name in reason
        (kept / "elsewhere").rename(path)
    assert checkpoint.problem(kept, 2) is None


@pytest.mark.parametrize("damage", ["flip", "empty folder", "no manifest", "other format"])
def test_falls_back_and_says_why(kept: Path, damage: str, standard_promotion: None) -> None:
    home = kept / "2"
    if damage == "flip":
        path = max((p for p in home.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x10
        path.write_bytes(content)
        says = "SHA-256"
    elif damage == "empty folder":
        shutil.rmtree(home)
        home.mkdir()
        says = "cut short"
    elif damage == "no manifest":
        (home / "manifest.json").unlink()
        says = "cut short"
    else:
        text = (home / "manifest.json").read_text()
        (home / "manifest.json").write_text(text.replace('"format": 3', '"format": 4'))
        says = "altered"
    actual = checkpoint.restore(kept, state())
    assert (
        actual.step == 1 and [s for s, _ in actual.skipped] == [2] and says in actual.skipped[0][1]
    )
    with checkpoint.open_folder(kept) as checkpoints:  # the run goes on from there
        checkpoint.save(checkpoints, 2, actual.state)
    assert checkpoint.restore(kept, state()).step == 2
    assert (kept / ".aside" / "2").is_dir(), "what was spoilt is set aside, not deleted"


def test_no_whole_step_is_an_error_with_reasons(kept: Path, standard_promotion: None) -> None:
    for step in (1, 2):
        (kept / str(step) / "manifest.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"step 2: manifest.json .*; step 1: manifest"):
        checkpoint.restore(kept, state())
    with pytest.raises(FileNotFoundError, match="no steps"):
        checkpoint.restore(kept / "nowhere", state())
    with pytest.raises(FileNotFoundError, match=r"has no step 9\. Its steps: \[1, 2\]"):
        checkpoint.restore(kept, state(), step=9)
    with pytest.raises(TypeError, match="step must be an integer, got 1.5"):
        checkpoint.restore(kept, state(), step=1.5)  # type: ignore[arg-type]  # wrong on purpose


def test_differences_are_named_leaf_by_leaf(kept: Path, standard_promotion: None) -> None:
    other = state()
    other.params["student"][0] = jnp.zeros((3, 2))
    other.params["student"][1] = jnp.zeros((), jnp.float32)
    other.params["head"] = jnp.zeros(1)
    del other.params["connectors"]
    other = other._replace(key=jax.random.key(0))
    with pytest.raises(ValueError) as caught:
        checkpoint.restore(kept, other)
    for words in (
        "the checkpoint lacks 'params/head'",
        "the template lacks 'params/connectors/1'",
        "'params/student/0' was saved as float32[2, 3], the template has float32[3, 2]",
        "'params/student/1' was saved as bfloat16[], the template has float32[]",
        "'key' was saved as key<rbg>[], the template has key<fry>[]",
    ):
        assert words in str(caught.value)


def test_retention(tmp_path: Path) -> None:
    keep = checkpoint.newest_and_every(2, 4)
    with checkpoint.open_folder(tmp_path, keep=keep) as checkpoints:
        for step in range(1, 8):
            checkpoint.save(checkpoints, step, {"w": jnp.ones(2)})
    assert checkpoint.steps(tmp_path) == [4, 6, 7]
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.newest(0)


def test_a_rewound_run_sets_newer_steps_aside(kept: Path, standard_promotion: None) -> None:
    old = checkpoint.restore(kept, state(), step=1)
    with checkpoint.open_folder(kept) as checkpoints:
        checkpoint.save(checkpoints, 1, old.state)
    assert checkpoint.steps(kept) == [1] and (kept / ".aside" / "2").is_dir()


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with checkpoint.open_folder(tmp_path):
        with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on"):
            with checkpoint.open_folder(tmp_path):
                pass
    with checkpoint.open_folder(tmp_path):
        pass


def test_leftovers_of_a_kill_are_cleared(kept: Path) -> None:
    (kept / ".saving-3").mkdir()
    (kept / ".dropped-0").mkdir()
    with checkpoint.open_folder(kept):
        pass
    assert not list(kept.glob(".saving*")) and not list(kept.glob(".dropped*"))


BAD_SAVES: dict[str, tuple[Any, Any, Any]] = {
    "step must be at least 0, got -1": (-1, {}, {}),
    "step must be an integer, got 2.5": (2.5, {}, {}),
    r"'a/b' must be an array or a number, got str \(<U4\)": (1, {"a": {"b": "text"}}, {}),
    r"'f' must be an array or a number, got function \(object\)": (1, {"f": state}, {}),
    "meta must be JSON: Object of type object": (1, {}, {"bad": object()}),
    "meta must be JSON: Object of type float32": (1, {}, {"x": np.float32(1)}),
}


def test_what_cannot_be_saved_is_refused_at_the_door(tmp_path: Path) -> None:
    with checkpoint.open_folder(tmp_path) as checkpoints:
        for says, (step, tree, meta) in BAD_SAVES.items():
            with pytest.raises((TypeError, ValueError), match=f"^{says}"):
                checkpoint.save(checkpoints, step, {"w": np.ones(2)} | tree, meta)
        assert checkpoint.steps(tmp_path) == []
        checkpoint.save(checkpoints, jnp.int32(7), {"w": np.ones(2)})  # a counter is a step too
    assert checkpoint.restore(tmp_path, {"w": np.ones(2)}).step == 7


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file may grow beyond a kilobyte: what a full disk looks like to the writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_an_error_and_old_steps_stay(
    kept: Path, standard_promotion: None, request: pytest.FixtureRequest
) -> None:
    template = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    _save._to_storage(list(template.values()))  # compiles: JAX's own cache must not be cut short
    with checkpoint.open_folder(kept) as checkpoints:
        request.getfixturevalue("short_files")
        with pytest.raises(OSError, match=r"step 3 could not be saved .*intact: \[1, 2\]"):
            checkpoint.save(checkpoints, 3, template)
            checkpoint.wait(checkpoints)
    assert checkpoint.steps(kept) == [1, 2] and not list(kept.glob(".saving*"))
    assert checkpoint.restore(kept, state()).step == 2


def test_what_outlives_a_failed_save_prints_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other writes, whose event loop is closed by then; errors of anyone else are printed."""
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for _ in range(2):
        with checkpoint.open_folder(tmp_path):
            pass
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as late:
        loop.call_soon_threadsafe(print)
    assert late.value.__traceback__ is not None
    inside = late.value.__traceback__.tb_next  # as the thread that calls it sees it
    for kind, error, trace in (
        (RuntimeError, late.value, inside),
        (RuntimeError, RuntimeError("Event loop is closed"), late.value.__traceback__),
        (ValueError, ValueError("mine"), None),
    ):
        args = {"exc_type": kind, "exc_value": error, "exc_traceback": trace}
        hook: Any = sys.unraisablehook
        hook(SimpleNamespace(**args))
    assert [str(one.exc_value) for one in printed] == ["Event loop is closed", "mine"]
    logging.getLogger("asyncio").error("Task exception was never retrieved: mine")
    assert "mine" in caplog.text


def test_what_cannot_fit_is_refused_before_writing(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with checkpoint.open_folder(kept) as checkpoints:
        with pytest.raises(
            OSError, match="no space left: 4,000 bytes are needed in .*, 100 are free"
        ):
            checkpoint.save(checkpoints, 3, {"w": jnp.ones(1000)})
    assert checkpoint.steps(kept) == [1, 2]


def test_a_read_only_folder_is_refused_at_the_door() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    root = os.geteuid() == 0
    try:
        if root:  # whom permissions do not bind
            os.seteuid(65534)
        with pytest.raises(PermissionError, match="cannot be written .*another folder"):
            with checkpoint.open_folder(folder):
                pass
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)
