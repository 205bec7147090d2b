"""Stored results of finished methods, which a resumed run reads instead of training again.

A method that trains in one compiled program has no step to resume from, so its results are stored
when it finishes. Files are written atomically and belong to one run, so a resumed run gives the
same numbers as an uninterrupted one.
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


class Store(NamedTuple):
    """Where a run stores its results."""

    folder: Path
    run: str
    resume: bool
    kinds: Mapping[str, type]  # the NamedTuples that results consist of, by name


def open_store(folder: Path, run: str, *, resume: bool, kinds: Sequence[type]) -> Store:
    """Opens the results of a run, which consist of NamedTuples of these `kinds`.

    Deletes those of an earlier run, unless it is resumed.
    """
    home = folder / FOLDER
    if not resume:
        _files.remove(home, KIND)
    _files.claim(home, KIND)
    return Store(home, run, resume, {kind.__name__: kind for kind in kinds})


def load_or_run(store: Store, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
    """Returns `make()` and its seconds, or the stored result if a resumed run has one.

    Arrays are always NumPy arrays, so picking rows compiles no program. Trees of types other than
    `kinds`, dicts, lists and tuples, such as an NNX state, are read back as dicts by canonical
    path.
    """
    return start_or_load(store, name, make)()


def start_or_load(
    store: Store, name: str, make: Callable[[], Any]
) -> Callable[[], tuple[Any, float]]:
    """As `load_or_run`, but starts the programs now; calling the result waits for them."""
    path = store.folder / f"{name}.npz"
    if store.resume and path.exists():
        try:
            stored = _read(path, store)
        except Exception as error:  # zipfile, zlib, NumPy and json each have their own
            message = _text.shown(str(error) or type(error).__name__, 200)
            print(f"note: {path} cannot be used ({message}): {name} runs again", file=sys.stderr)
        else:
            _remove_rungs(path)  # left if the run was killed right after writing the result
            return lambda: stored
    start, pending = time.perf_counter(), make()

    def wait() -> tuple[Any, float]:
        result = jax.device_get(pending)
        seconds = time.perf_counter() - start
        _write(path, store, result, seconds)
        _remove_rungs(path)
        return result, seconds

    return wait


def _remove_rungs(path: Path) -> None:
    """Deletes the rungs of the method whose whole result is at this path."""
    for rung in path.parent.glob(f"{path.stem}_rung_*.npz"):
        rung.unlink(missing_ok=True)


def keep_rungs(store: Store, name: str, state: PyTree, last: int) -> sweep.Kept:
    """A `sweep.Kept` that stores the survivors after every rung but `last`.

    After that one the method is stored as a whole. `state` has the shapes of one point's state,
    which say which leaves are keys.
    """
    leaves, structure = jax.tree.flatten(state)

    def raw(make: Callable[[], sweep.Halving]) -> dict[str, Any]:
        halving = make()
        leaves = jax.tree.leaves(halving.state)
        arrays = [jax.random.key_data(x) if _checks.is_key(x) else x for x in leaves]
        return {"survivors": halving.survivors, "state": arrays, "scores": halving.scores}

    def keep(rung: int, make: Callable[[], sweep.Halving]) -> sweep.Halving:
        if rung == last:
            return make()
        stored, _ = load_or_run(store, f"{name}_rung_{rung}", lambda: raw(make))
        (store.folder / f"{name}_rung_{rung - 1}.npz").unlink(missing_ok=True)
        arrays = [
            jax.random.wrap_key_data(jnp.asarray(x)) if _checks.is_key(leaf) else jnp.asarray(x)
            for x, leaf in zip(stored["state"], leaves, strict=True)
        ]
        state = jax.tree.unflatten(structure, arrays)
        return sweep.Halving(stored["survivors"], state, stored["scores"])

    return keep


def _write(path: Path, store: Store, result: Any, seconds: float) -> None:
    arrays: list[np.ndarray] = []
    structure = _describe(result, store.kinds, arrays)
    header = json.dumps({"run": store.run, "seconds": seconds, "structure": structure})
    buffer = io.BytesIO()
    named_arrays = {f"array_{i}": array for i, array in enumerate(arrays)}
    np.savez(buffer, about=np.frombuffer(header.encode(), np.uint8), **named_arrays)  # pyright: ignore[reportArgumentType]  # a name could be allow_pickle, a bool
    _files.write_atomic(path, buffer.getbuffer())


def _read(path: Path, store: Store) -> tuple[Any, float]:
    with np.load(_files.regular(path), allow_pickle=False) as stored:
        header = json.loads(stored["about"].tobytes())
        if header["run"] != store.run:
            raise ValueError("it is of another run")
        result = _restore(header["structure"], store.kinds, stored)
        return result, float(header["seconds"])


def _describe(value: Any, kinds: Mapping[str, type], arrays: list[np.ndarray]) -> Any:
    """The value as JSON; appends its arrays to a list and refers to them by index."""
    if value is None or isinstance(value, _PLAIN):
        return {"plain": value}
    if type(value) is dict:
        return {"dict": [[name, _describe(x, kinds, arrays)] for name, x in value.items()]}
    if isinstance(value, tuple) and type(value) in kinds.values():
        fields = [_describe(x, kinds, arrays) for x in value]
        return {"named": type(value).__name__, "fields": fields}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(x, kinds, arrays) for x in value]}
    if jax.tree_util.all_leaves([value]) and not isinstance(value, _ARRAYS):
        raise TypeError(f"a result holds {type(value).__name__}, which is not stored")
    if not isinstance(value, _ARRAYS):  # a framework's own tree, read back by path
        return _describe(trees.flatten(value), kinds, arrays)
    arrays.append(np.asarray(value))
    return {"array": len(arrays) - 1, "dtype": str(arrays[-1].dtype)}


def _restore(description: Any, kinds: Mapping[str, type], stored: Any) -> Any:
    """The value of a description, with its arrays read."""
    if "plain" in description:
        return description["plain"]
    if "dict" in description:
        return {name: _restore(x, kinds, stored) for name, x in description["dict"]}
    if "named" in description:
        fields = [_restore(x, kinds, stored) for x in description["fields"]]
        return kinds[description["named"]](*fields)
    if "list" in description:
        return [_restore(x, kinds, stored) for x in description["list"]]
    if "tuple" in description:
        return tuple(_restore(x, kinds, stored) for x in description["tuple"])
    array = stored[f"array_{description['array']}"]
    dtype = jax.numpy.dtype(description["dtype"])  # bfloat16 and its like are stored as bytes
    return array if array.dtype == dtype else array.view(dtype)
