"""Results of finished methods: kept whole, of one run, with the same bits."""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from kdtl_jax import trees
from kdtl_jax.recipes import _stored_results


class Found(NamedTuple):
    kept: Any
    score: Any


VALUE = Found(
    {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": (np.float32(1 / 3), [np.nan, None, "x", True])},
    np.array([[1e-45, -0.0], [np.inf, 2.0]], np.float32),
)


def opened(folder: Path, run: str = "r", *, resume: bool = True) -> _stored_results.Store:
    return _stored_results.open_store(folder, run, resume=resume, kinds=(Found,))


def counted() -> tuple[list[int], Any]:
    calls: list[int] = []

    def make() -> Found:
        calls.append(1)
        return VALUE

    return calls, make


def test_a_finished_method_is_not_run_again(tmp_path: Path) -> None:
    calls, make = counted()
    first, seconds = _stored_results.load_or_run(opened(tmp_path, resume=False), "kd", make)
    left = tmp_path / "finished" / "kd_rung_2.npz"  # killed between the two
    left.touch()
    again, later = _stored_results.load_or_run(opened(tmp_path), "kd", make)
    assert len(calls) == 1 and later == seconds and not left.exists()
    assert jax.tree.structure(again) == jax.tree.structure(first)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_only_a_resumed_run_takes_its_own_whole_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, make = counted()
    _stored_results.load_or_run(opened(tmp_path, resume=False), "kd", make)
    _stored_results.load_or_run(opened(tmp_path, "another"), "kd", make)
    assert len(calls) == 2 and "it is of another run" in capsys.readouterr().err
    path = tmp_path / "finished" / "kd.npz"
    path.write_bytes(path.read_bytes()[:-30])
    _stored_results.load_or_run(opened(tmp_path, "another"), "kd", make)
    assert len(calls) == 3 and "kd runs again" in capsys.readouterr().err
    _stored_results.load_or_run(opened(tmp_path, "another", resume=False), "kd", make)
    assert len(calls) == 4, "a new run begins with nothing"


def test_what_is_not_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds object, which is not stored"):
        _stored_results.load_or_run(opened(tmp_path), "kd", lambda: {"x": object()})


class Weights(NamedTuple):
    """As a model of plain functions may keep them, and no kind of results."""

    w: Any
    layers: Any


class Linear(eqx.Module):
    weight: Any
    bias: Any = None


@pytest.mark.parametrize(
    "kept",
    [
        nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, ...)[1:],
        Linear(np.ones((2, 3), np.float32)),
        Weights(np.ones(2, np.float32), (Linear(np.zeros(1, np.float32)),)),
        FrozenDict({"linear/~/b": {"w": np.ones(2, np.float32)}}),
    ],
    ids=["nnx", "equinox", "NamedTuple", "FrozenDict"],
)
def test_a_framework_s_own_tree_keeps_its_paths(kept: Any, tmp_path: Path) -> None:
    """What is read by path, as files of students are written, is the same from a stored result."""
    result = Found({"params": kept}, np.zeros(2))
    first, _ = _stored_results.load_or_run(opened(tmp_path, resume=False), "kd", lambda: result)
    again, _ = _stored_results.load_or_run(
        opened(tmp_path), "kd", lambda: pytest.fail("it ran again")
    )
    expected, actual = trees.flatten(first.kept), trees.flatten(again.kept)
    assert sorted(actual) == sorted(expected) and len(actual) > 0
    for path, leaf in expected.items():
        assert np.asarray(leaf).tobytes() == actual[path].tobytes()
