"""Results of finished methods: kept whole, of one run, with the same bits."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax.recipes import _finished


class Found(NamedTuple):
    kept: Any
    score: Any


VALUE = Found(
    {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": (np.float32(1 / 3), [np.nan, None, "x", True])},
    np.array([[1e-45, -0.0], [np.inf, 2.0]], np.float32),
)


def opened(folder: Path, run: str = "r", *, resume: bool = True) -> _finished.Finished:
    return _finished.opened(folder, run, resume=resume, kinds=(Found,))


def counted() -> tuple[list[int], Any]:
    calls: list[int] = []

    def make() -> Found:
        calls.append(1)
        return VALUE

    return calls, make


def test_a_finished_method_is_not_run_again(tmp_path: Path) -> None:
    calls, make = counted()
    first, seconds = _finished.once(opened(tmp_path, resume=False), "kd", make)
    again, later = _finished.once(opened(tmp_path), "kd", make)
    assert len(calls) == 1 and later == seconds
    assert jax.tree.structure(again) == jax.tree.structure(first)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_only_a_resumed_run_takes_its_own_whole_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, make = counted()
    _finished.once(opened(tmp_path, resume=False), "kd", make)
    _finished.once(opened(tmp_path, "another"), "kd", make)
    assert len(calls) == 2 and "it is of another run" in capsys.readouterr().err
    path = tmp_path / "finished" / "kd.npz"
    path.write_bytes(path.read_bytes()[:-30])
    _finished.once(opened(tmp_path, "another"), "kd", make)
    assert len(calls) == 3 and "kd runs again" in capsys.readouterr().err
    _finished.once(opened(tmp_path, "another", resume=False), "kd", make)
    assert len(calls) == 4, "a new run begins with nothing"
    _finished.once(_finished.NOWHERE, "kd", make)
    assert len(calls) == 5


def test_what_is_not_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds object, which is not stored"):
        _finished.once(opened(tmp_path), "kd", lambda: {"x": object()})
