"""Checkpoints by name: leaves by path, steps by folder and owner, parts on request, the best."""

import json
import math
import shutil
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax import _files, train
from kdtl_jax.run import checkpoint, loop

PARAMS = {"w": np.ones((3, 2), np.float32), "head": {"bias": np.full(2, 5, np.float32)}}


def saved(folder: Path, tree: Any, *, meta: Any = None, **options: Any) -> Path:
    with checkpoint.open_folder(folder, **options) as checkpoints:
        checkpoint.save(checkpoints, 1, tree, meta)
    return folder


class Before(NamedTuple):
    slow: Any
    fast: Any


class After(NamedTuple):
    fast: Any
    slow: Any


Z = np.full(2, 7.0)
ORDERS: dict[str, tuple[Any, Any, Any]] = {
    "fields of a NamedTuple": (
        Before(slow=np.zeros(2), fast=np.ones(2)),
        After(fast=Z, slow=Z),
        After(fast=np.ones(2), slow=np.zeros(2)),
    ),
    "an OrderedDict": (
        OrderedDict(b=np.full(2, 2.0), a=np.full(2, 1.0)),
        {"a": Z, "b": Z},
        {"a": np.full(2, 1.0), "b": np.full(2, 2.0)},
    ),
    "a list of twelve": (
        [np.full(2, float(i)) for i in range(12)],
        {str(i): Z for i in range(12)},
        {str(i): np.full(2, float(i)) for i in range(12)},
    ),
    "fields within others": (
        {"x": [Before(slow=np.zeros(2), fast=np.ones(2)), np.zeros(3)]},
        {"x": (After(fast=Z, slow=Z), np.ones(3))},
        {"x": (After(fast=np.ones(2), slow=np.zeros(2)), np.zeros(3))},
    ),
}


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A node that gives both of its children one name."""

    def __init__(self, one: Any, other: Any) -> None:
        self.one, self.other = one, other

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        key = jax.tree_util.GetAttrKey("twin")
        return ((key, self.one), (key, self.other)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Twins":
        return cls(*children)


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (Twins(np.zeros(2), np.ones(2)), r"\.twin"),
        # The second key is what the first two leaves are told apart by.
        ({"a/b": np.zeros(2), "a": {"b": np.ones(2)}, "['a/b']": np.ones(2)}, r"\['a/b'\]"),
    ],
)
def test_leaves_that_no_path_tells_apart_are_refused_not_lost(
    tmp_path: Path, tree: Any, path: str
) -> None:
    with pytest.raises(ValueError, match=rf"two leaves of the state have the path .{path}"):
        saved(tmp_path, tree)
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("name", ORDERS)
def test_values_land_by_name_in_any_order(tmp_path: Path, name: str) -> None:
    tree, template, expected = ORDERS[name]
    actual = checkpoint.restore(saved(tmp_path, tree), template).state
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_paths_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    class Two(NamedTuple):
        x: Any

    tree = {"a": [np.zeros(1), {"b/c": np.ones(1)}], "a/1/b": {"c": np.full(1, 2.0)}, "t": Two(Z)}
    actual = checkpoint.restore(saved(tmp_path, tree), jax.tree.map(np.zeros_like, tree)).state
    assert actual["a"][1]["b/c"] == 1 and actual["a/1/b"]["c"] == 2 and actual["a"][0] == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adam's state with an average of the parameters in its memory."""
    with jax.numpy_dtype_promotion("standard"):
        ema = {"ema": jax.tree.map(lambda x: x * 3, PARAMS)}
        state = train.init_state(PARAMS, optax.adam(0.1), key=jax.random.key(3), memory=ema)
        return saved(tmp_path_factory.mktemp("trained"), state)


def test_parameters_alone_start_another_optimizer(trained: Path) -> None:
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    other = train.init_state(zeros, optax.sgd(0.1), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"lacks 'memory/ema/.*restore a part with only="):
        checkpoint.restore(trained, other)
    actual = checkpoint.restore(trained, other, only=r"params/.*")
    assert jax.tree.structure(actual.state) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(actual.state.params), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert actual.state.key == other.key
    assert {"key", "step", "memory/ema/w", "opt_state/0/mu/w"} <= set(actual.left)
    assert actual.kept == ["step", "key"] and not any(p.startswith("params/") for p in actual.left)


def test_a_part_of_the_tree_is_a_template_of_its_own(trained: Path) -> None:
    ema = checkpoint.restore(trained, {"memory": {"ema": PARAMS}}, only=r".*").state
    assert ema["memory"]["ema"]["w"][0, 0] == 3 and ema["memory"]["ema"]["head"]["bias"][0] == 15
    abstract = jax.eval_shape(lambda: {"params": {"head": PARAMS["head"]}})
    actual = checkpoint.restore(trained, abstract, only="params/.*").state
    np.testing.assert_array_equal(actual["params"]["head"]["bias"], [5, 5])
    with pytest.raises(ValueError, match="the checkpoint lacks 'params/new'"):
        checkpoint.restore(trained, {"params": {"new": Z}}, only=".*")
    with pytest.raises(ValueError, match=r"'params/w' was saved as float32\[3, 2\]"):
        checkpoint.restore(trained, {"params": {"w": Z}}, only=".*")


def two_steps(folder: Path, **options: Any) -> Path:
    with checkpoint.open_folder(folder, **options) as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, step, {"w": np.full(2, float(step))})
    return folder


TREE = {"w": np.zeros(2)}


@pytest.mark.parametrize("act", ["rename", "copy within", "copy from another", "whole folder"])
def test_a_step_that_was_moved_is_refused(tmp_path: Path, act: str) -> None:
    owner = {"run": "a", "method": "kd"}
    home = two_steps(tmp_path / "kd", owner=owner)
    other = two_steps(tmp_path / "alone", owner=owner | {"method": "alone"})
    if act == "rename":
        (home / "2").rename(home / "5")
        says, step = "it was saved as step 2 and renamed", 5
    elif act == "copy within":
        shutil.copytree(home / "1", home / "7")
        says, step = "it was saved as step 1 and renamed", 7
    elif act == "copy from another":
        shutil.rmtree(home / "2")
        shutil.copytree(other / "2", home / "2")
        says, step = "it was saved in another folder, by another run", 2
    else:
        shutil.rmtree(home)
        shutil.copytree(other, home)
        says, step = "it belongs to .*alone.*, not to .*kd", 2
    if act == "whole folder":
        with pytest.raises(FileNotFoundError, match=f"step 2: {says}.*; step 1: {says}"):
            checkpoint.restore(home, TREE, owner=owner)
        return
    actual = checkpoint.restore(home, TREE, owner=owner)
    assert actual.step == (2 if act == "copy within" else 1), "an older step is not blocked"
    assert actual.skipped[0][0] == step and says in actual.skipped[0][1]
    with pytest.raises(FileNotFoundError, match=says):
        checkpoint.restore(home, TREE, step=step, owner=owner)


RUBBISH: list[Any] = [
    [],
    3,
    None,
    {"digest": 5},
    {"format": 3},
    {"format": 3, "step": "2", "folder": "x", "owner": {}, "meta": {}, "leaves": [], "files": {}},
    {"format": 3, "step": 2, "folder": "x", "owner": {}, "meta": [], "leaves": [], "files": {}},
    {"format": 3, "step": 2, "folder": "x", "owner": {}, "meta": {}, "leaves": [3], "files": {}},
    {"format": 3, "step": 2, "folder": "x", "owner": {}, "meta": {}, "leaves": {}, "files": {}},
    {"format": 3, "step": 2, "folder": "x", "owner": {}, "meta": {}, "leaves": [],
     "files": {"../../../etc/passwd": {"bytes": 1, "sha256": ""}}},
    {"format": 3, "step": 2, "folder": "x", "owner": {}, "meta": {}, "leaves": [],
     "files": {"a": 1}},
]  # fmt: skip


@pytest.mark.parametrize("value", RUBBISH, ids=range(len(RUBBISH)))
def test_json_of_another_shape_is_one_reason_and_blocks_nothing(tmp_path: Path, value: Any) -> None:
    path = two_steps(tmp_path) / "2" / "manifest.json"
    if isinstance(value, dict) and "format" in value:
        _files.write_sealed(path, value)  # with a digest that holds
    else:
        path.write_text(json.dumps(value))
    actual = checkpoint.restore(tmp_path, TREE)
    assert actual.step == 1 and "manifest.json" in actual.skipped[0][1]


def test_a_bad_newer_step_never_blocks_an_older_one(tmp_path: Path) -> None:
    two_steps(tmp_path)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "manifest.json").mkdir()
    (tmp_path / ("9" * 30)).mkdir()
    (tmp_path / "007").mkdir()  # not a name that a step has
    (tmp_path / "8").write_text("a file")
    (tmp_path / "5").symlink_to(tmp_path / "1")
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "manifest.json").write_text("[" * 100_000)
    actual = checkpoint.restore(tmp_path, TREE)
    assert actual.step == 2 and [s for s, _ in actual.skipped] == [int("9" * 30), 6, 5, 3]
    with checkpoint.open_folder(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, 3, TREE)
    assert checkpoint.restore(tmp_path, TREE).step == 3


@settings(max_examples=25)
@given(place=st.integers(0, 3000), put=st.binary(max_size=8), cut=st.integers(0, 2000))
def test_any_manifest_is_whole_or_one_reason(
    shared: Path, place: int, put: bytes, cut: int
) -> None:
    path = shared / "2" / "manifest.json"
    whole = path.read_bytes()
    start = time.process_time()
    path.write_bytes(whole[:place] + put + whole[place + cut :])
    try:
        actual = checkpoint.problem(shared, 2)
        same = path.read_bytes() == whole
        assert (actual is None) == same or json.loads(path.read_bytes()) == json.loads(whole)
    finally:
        path.write_bytes(whole)
    assert time.process_time() - start < 2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_steps(tmp_path_factory.mktemp("shared"))


def evaluated(folder: Path, values: list[Any], **options: Any) -> Path:
    """Steps 1, 2, … with evaluations as `loop.run` saves them."""
    lines: list[dict[str, Any]] = []
    with checkpoint.open_folder(folder, **options) as checkpoints:
        for step, value in enumerate(values, 1):
            lines.append({"step": step, "eval/error": value})
            checkpoint.save(checkpoints, step, TREE, {"evaluations": lines})
    return folder


def test_the_best_step_stays_and_is_given_back(tmp_path: Path) -> None:
    values = [math.nan, 3.0, 1.0, 1.0, 2.0, math.inf, math.nan]
    evaluated(tmp_path, values, keep=checkpoint.newest_and_best(2, "error"))
    assert checkpoint.steps(tmp_path) == [3, 6, 7], "the first of equal ones"
    assert checkpoint.best(tmp_path, "error") == 3
    assert checkpoint.restore(tmp_path, TREE, step=checkpoint.best(tmp_path, "error")).step == 3
    (tmp_path / "3" / "manifest.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"finite 'error' \(step 3: no manifest.*step 6: it"
    ):
        checkpoint.best(tmp_path, "error")
    with pytest.raises(FileNotFoundError, match="step 6: no value of 'accuracy', .*'error'"):
        checkpoint.best(tmp_path, "accuracy")


def test_the_best_of_several_seeds_and_the_largest(tmp_path: Path) -> None:
    seeds = [[0.5, 0.7], [0.9, 0.8], [0.95, math.nan]]
    keep = checkpoint.newest_and_best(1, "error", minimize=False)
    evaluated(tmp_path, seeds, keep=keep)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert checkpoint.best(tmp_path, "error", minimize=False) == 2


def test_early_stopping_never_takes_nan_for_an_improvement() -> None:
    def lines(*values: Any) -> list[dict[str, Any]]:
        return [{"step": i, "eval/error": value} for i, value in enumerate(values)]

    stop = loop.no_improvement("error", patience=2)
    assert not stop([]) and not stop(lines(math.nan)) and stop(lines(math.nan, math.nan))
    assert not stop(lines(3.0, math.nan)) and stop(lines(3.0, math.nan, math.nan))
    assert not stop(lines(math.nan, math.nan, 3.0)), "a first number is an improvement"
    assert not stop(lines(None, 3.0, None)), "as a metrics file has it"
    with pytest.raises(ValueError, match=r"returned no 'error'.*\['loss'\]"):
        stop([{"step": 1, "eval/loss": 1.0}])
    resumed = [{"step": 0, "eval/loss": 1.0}, *lines(3.0, 4.0)]  # with a new evaluation
    assert not stop(resumed) and stop([*resumed, *lines(5.0)])


def test_only_folders_of_ours_are_opened_and_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "project" / "checkpoints"
    (foreign / "other").mkdir(parents=True)
    (foreign / "other" / "weights.bin").write_text("my model")
    with pytest.raises(ValueError, match="holds other files: other"):
        with checkpoint.open_folder(foreign):
            pass
    two_steps(foreign / "kd")
    two_steps(foreign / "alone")
    with pytest.raises(ValueError, match="holds other files: other"):
        checkpoint.check_removable(foreign)
    for ours in (foreign / "kd", foreign / "new"):
        checkpoint.check_removable(ours)
    assert checkpoint.remove(foreign) == ["other"]
    assert (foreign / "other" / "weights.bin").read_text() == "my model"
    mine = two_steps(tmp_path / "mine" / "kd").parent
    (tmp_path / "link").symlink_to(mine / "kd")
    assert checkpoint.remove(tmp_path / "link") == ["link"]
    assert checkpoint.steps(mine / "kd") == [1, 2], "what a link points to stays"
    checkpoint.check_removable(mine)  # nothing but folders of ours
    assert checkpoint.remove(mine) == [] and not mine.exists()
    assert checkpoint.remove(tmp_path / "nowhere") == []


def test_nothing_is_written_twice_for_many_leaves(tmp_path: Path) -> None:
    """Files of a step do not grow with its leaves, and a thousand restore in seconds."""
    tree = {f"layer{i}": jnp.full((3,), i, jnp.float32) for i in range(300)}
    start = time.process_time()
    saved(tmp_path, tree)
    few = len([path for path in (tmp_path / "1").rglob("*") if path.is_file()])
    actual = checkpoint.restore(tmp_path, tree).state
    assert all(float(actual[f"layer{i}"][0]) == i for i in range(300))
    assert few < 40 and time.process_time() - start < 10
