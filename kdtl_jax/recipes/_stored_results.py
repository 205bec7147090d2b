"""Results of the finished parts of a run, which a resumed run does not train again.

A method whose whole training is one compiled program has no step to resume from; its results are
stored when it is done, and a resumed run reads them. A file is written whole or not at all, and
belongs to one run, so a resumed run gives the same numbers as an uninterrupted one.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _files, _text, trees
from kdtl_jax._types import PyTree
from kdtl_jax.train import sweep

FOLDER, KIND = "finished", "finished methods"
_PLAIN = (str, int, float, bool)
_ARRAYS = (np.ndarray, np.generic, jax.Array)


class Finished(NamedTuple):
    """Where results are kept."""

    folder: Path | None  # None: nowhere
    run: str
    resume: bool
    kinds: Mapping[str, type]  # the NamedTuples that results consist of, by name


NOWHERE = Finished(None, "", False, {})


def opened(folder: Path, run: str, *, resume: bool, kinds: Sequence[type]) -> Finished:
    """The results of a run; those of an earlier run are deleted unless it is resumed.

    Args:
      folder: of the run.
      run: its identity.
      resume: whether to use what is there.
      kinds: the NamedTuple classes that results consist of.
    """
    home = folder / FOLDER
    if not resume:
        _files.remove(home, KIND)
    _files.claim(home, KIND)
    return Finished(home, run, resume, {kind.__name__: kind for kind in kinds})


def once(finished: Finished, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
    """`make()` and the seconds that it took; its stored result if a resumed run has one.

    Arrays are NumPy's, from a file or not, so picking rows needs no program per shape. Trees of
    types other than `kinds`, dicts, lists and tuples, such as an NNX state, are read from a file as
    dicts by canonical path.
    """
    return begun(finished, name, make)()


def begun(
    finished: Finished, name: str, make: Callable[[], Any]
) -> Callable[[], tuple[Any, float]]:
    """`once` in two parts: its programs start now, alongside others, and calling it waits."""
    path = None if finished.folder is None else finished.folder / f"{name}.npz"
    if path is not None and finished.resume and path.exists():
        try:
            stored = _read(path, finished)
        except Exception as error:  # zipfile, zlib, NumPy and json each have their own
            said = _text.shown(str(error) or type(error).__name__, 200)
            print(f"note: {path} cannot be used ({said}): {name} runs again", file=sys.stderr)
        else:
            _remove_rungs(path)  # left where the run was killed right after writing the result
            return lambda: stored
    start, running = time.perf_counter(), make()

    def ended() -> tuple[Any, float]:
        result = jax.device_get(running)
        seconds = time.perf_counter() - start
        if path is not None:
            _write(path, finished, result, seconds)
            _remove_rungs(path)
        return result, seconds

    return ended


def _remove_rungs(path: Path) -> None:
    """Deletes the rungs of the method whose whole result is at this path."""
    for rung in path.parent.glob(f"{path.stem}_rung_*.npz"):
        rung.unlink(missing_ok=True)


def rungs(finished: Finished, name: str, state: PyTree, last: int) -> sweep.Kept:
    """`kept` of `sweep.successive_halving`, storing the survivors after every rung but `last`.

    Args:
      finished: where to store them.
      name: of the method.
      state: shapes of one point's state: which leaves a stored one has, and which are keys.
      last: the rung after which the method is finished and stored as a whole.
    """
    leaves, structure = jax.tree.flatten(state)
    if finished.folder is None:
        return lambda rung, make: make()
    home = finished.folder

    def raw(make: Callable[[], sweep.Halving]) -> dict[str, Any]:
        found = make()
        leaves = jax.tree.leaves(found.state)
        arrays = [jax.random.key_data(x) if _checks.is_key(x) else x for x in leaves]
        return {"survivors": found.survivors, "state": arrays, "scores": found.scores}

    def kept(rung: int, make: Callable[[], sweep.Halving]) -> sweep.Halving:
        if rung == last:
            return make()
        stored, _ = once(finished, f"{name}_rung_{rung}", lambda: raw(make))
        (home / f"{name}_rung_{rung - 1}.npz").unlink(missing_ok=True)
        arrays = [
            jax.random.wrap_key_data(jnp.asarray(x)) if _checks.is_key(of) else jnp.asarray(x)
            for x, of in zip(stored["state"], leaves, strict=True)
        ]
        state = jax.tree.unflatten(structure, arrays)
        return sweep.Halving(stored["survivors"], state, stored["scores"])

    return kept


def _write(path: Path, finished: Finished, result: Any, seconds: float) -> None:
    arrays: list[np.ndarray] = []
    structure = _outline(result, finished.kinds, arrays)
    about = json.dumps({"run": finished.run, "seconds": seconds, "structure": structure})
    written = io.BytesIO()
    named = {f"array_{i}": array for i, array in enumerate(arrays)}
    np.savez(written, about=np.frombuffer(about.encode(), np.uint8), **named)  # pyright: ignore[reportArgumentType]  # a name could be allow_pickle, a bool
    _files.write_atomic(path, written.getbuffer())


def _read(path: Path, finished: Finished) -> tuple[Any, float]:
    with np.load(_files.regular(path), allow_pickle=False) as stored:
        about = json.loads(stored["about"].tobytes())
        if about["run"] != finished.run:
            raise ValueError("it is of another run")
        result = _filled(about["structure"], finished.kinds, stored)
        return result, float(about["seconds"])


def _outline(value: Any, kinds: Mapping[str, type], arrays: list[np.ndarray]) -> Any:
    """The value as JSON, with numbers in place of its arrays, which go into a list."""
    if value is None or isinstance(value, _PLAIN):
        return {"plain": value}
    if type(value) is dict:
        return {"dict": [[name, _outline(x, kinds, arrays)] for name, x in value.items()]}
    if isinstance(value, tuple) and type(value) in kinds.values():
        fields = [_outline(x, kinds, arrays) for x in value]
        return {"named": type(value).__name__, "fields": fields}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_outline(x, kinds, arrays) for x in value]}
    if jax.tree_util.all_leaves([value]) and not isinstance(value, _ARRAYS):
        raise TypeError(f"a result holds {type(value).__name__}, which is not stored")
    if not isinstance(value, _ARRAYS):  # a framework's own tree: readers go by the paths
        return _outline(trees.flatten(value), kinds, arrays)
    arrays.append(np.asarray(value))
    return {"array": len(arrays) - 1, "dtype": str(arrays[-1].dtype)}


def _filled(outline: Any, kinds: Mapping[str, type], stored: Any) -> Any:
    """The value of an outline, with its arrays read."""
    if "plain" in outline:
        return outline["plain"]
    if "dict" in outline:
        return {name: _filled(x, kinds, stored) for name, x in outline["dict"]}
    if "named" in outline:
        fields = [_filled(x, kinds, stored) for x in outline["fields"]]
        return kinds[outline["named"]](*fields)
    for kind, make in (("list", list), ("tuple", tuple)):
        if kind in outline:
            return make(_filled(x, kinds, stored) for x in outline[kind])
    found = stored[f"array_{outline['array']}"]
    dtype = jax.numpy.dtype(outline["dtype"])  # bfloat16 and its like are stored as bytes
    return found if found.dtype == dtype else found.view(dtype)
