"""Writes safetensors tensor by tensor, completely or not at all.

All raise TypeError if a dtype cannot be stored or metadata are not strings, and OSError if the disk
is full; the old file then stays as it was.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kdtl_jax import _checks, trees
from kdtl_jax._files import atomic_file, new_folder, write_atomic
from kdtl_jax._types import PyTree
from kdtl_jax.interop import _safetensors_header as _header

Produce = Callable[[str], Any]  # name -> the array, or an iterator of vectors that form it
Beside = Callable[[Path], Mapping[str, bytes]]


def save(path: str | Path, tree: PyTree, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree's arrays under their canonical paths, atomically.

    Non-contiguous arrays (transposed kernels) and scalars are stored correctly.

    Raises:
      TypeError: if a leaf is not an array, is a PRNG key, or has a dtype that the format lacks.
      FileNotFoundError: if the file's folder does not exist.
    """
    path, leaves = _checks.path(path=path), _arrays(tree)
    stream(path, leaves, leaves.__getitem__, metadata=metadata)


def stream(
    path: str | Path,
    specs: Mapping[str, Any],
    produce: Produce,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file tensor by tensor; memory holds one tensor, or one piece of it, at a time.

    Args:
      path: the target; replaced atomically once everything is written and synced.
      specs: `{name: anything with shape and dtype}`, everything the file will hold.
      produce: `(name) -> array`, called once per name in the file's order; or an iterator of
        vectors, the array's entries in row-major order.
      metadata: strings to strings, such as `{"format": "pt"}` or a recipe.

    Raises:
      ValueError: if `produce` returns another shape or dtype than in `specs`; no file is then left.
      FileNotFoundError: if the file's folder does not exist.
    """
    dtypes_and_shapes = {
        name: (_header.stored_dtype(name, spec.dtype), tuple(spec.shape))
        for name, spec in specs.items()
    }
    header, order = _header.encode(dtypes_and_shapes, metadata or {})
    with atomic_file(Path(path)) as file:
        file.write(header)
        for name in order:
            _write(file, name, *dtypes_and_shapes[name], produce(name))


def save_sharded(
    folder: str | Path,
    tree: PyTree,
    *,
    max_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a tree as `model-00001-of-0000N.safetensors` … and an index, as one new folder.

    The folder appears by one rename when everything in it is complete.

    Raises:
      FileExistsError: if the folder exists and is not empty.
    """
    leaves = _arrays(tree)
    stream_sharded(folder, leaves, leaves.__getitem__, max_bytes=max_bytes, metadata=metadata)


def stream_sharded(
    folder: str | Path,
    specs: Mapping[str, Any],
    produce: Produce,
    *,
    max_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    beside: Beside | None = None,
) -> None:
    """`save_sharded` tensor by tensor.

    Args:
      folder: the new folder.
      specs, produce, metadata: as in `stream`, for every file.
      max_bytes: the largest size of a file; a larger tensor gets its own file.
      beside: `(folder) -> {name: content}`, called when all weights are in the folder (which does
        not have its name yet); gives other files to write, such as a configuration.

    Raises:
      FileExistsError: if the folder exists and is not empty.
    """
    sizes = {name: _size(spec) for name, spec in specs.items()}
    shards: list[dict[str, Any]] = [{}]
    shard_bytes = 0
    for name in sorted(specs, key=trees.natural_key):
        if shards[-1] and shard_bytes + sizes[name] > max_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = specs[name]
        shard_bytes += sizes[name]
    with new_folder(Path(folder)) as new_path:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            stream(new_path / name, shard, produce, metadata=metadata)
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_atomic(new_path / _header.index_name, json.dumps(index, indent=1).encode())
        for name, content in (beside(new_path) if beside else {}).items():
            (new_path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(new_path / name, content)


def _size(spec: Any) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _arrays(tree: PyTree) -> dict[str, Any]:
    """A tree's leaves by path; all are arrays that the format can store."""
    leaves = trees.flatten(tree)
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"{name!r} is a {type(leaf).__name__}, not an array. Save only the arrays, for "
                "example trees.partition(tree, '.*')[0]."
            )
        _header.stored_dtype(name, leaf.dtype)
    return leaves


def _write(file: BinaryIO, name: str, dtype: str, shape: tuple[int, ...], content: Any) -> None:
    """Writes one tensor, checked against its spec."""

    def other(received: Any) -> ValueError:
        return ValueError(f"{name!r} was announced as {(dtype, shape)}, got {received}.")

    if not isinstance(content, Iterator):
        array = np.asarray(content)
        received = (_header.stored_dtype(name, array.dtype), array.shape)
        if received != (dtype, shape):
            raise other(received)
        file.write(_bytes(array))
        return
    entries, expected = 0, math.prod(shape)
    for piece in content:
        array = np.asarray(piece)
        received = _header.stored_dtype(name, array.dtype)
        entries += array.size
        if received != dtype or entries > expected:
            raise other(f"pieces of {received} with {entries} entries so far")
        file.write(_bytes(array))
    if entries != expected:
        raise other(f"pieces with {entries} entries together")


def _bytes(array: np.ndarray) -> memoryview:
    """Row-major little-endian bytes, viewed as uint8 because bfloat16 does not support buffers."""
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8).data
