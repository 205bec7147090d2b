"""Weights as safetensors: flat canonical paths in a file, trees in the program.

Only one file is open at a time, however many tensors there are; `views` holds one mapping per file.
`read`, `blocks` and `take` map nothing, so a file may be larger than the address space. They raise
ValueError if the file has become shorter since its header was read; no 8-bit float is read
(TypeError).

Writing is atomic: a temporary file beside the target is written, synced and renamed, so the target
is the old file or the new one, never half of it, even if the disk is full (OSError).
Deliberately absent: anything that unpickles (`.bin`, `.pt`, `.ckpt` are refused by content), and
checksums, which the format lacks (training checkpoints have them: `kdtl_jax.run.checkpoint`).
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _text, trees
from kdtl_jax._types import PyTree
from kdtl_jax.interop import _safetensors_header as _header
from kdtl_jax.interop._safetensors_header import Checkpoint as Checkpoint
from kdtl_jax.interop._safetensors_header import Tensor as Tensor
from kdtl_jax.interop._safetensors_header import index as index
from kdtl_jax.interop._safetensors_header import index_name as index_name
from kdtl_jax.interop._safetensors_header import json_file as json_file
from kdtl_jax.interop._safetensors_write import save as save
from kdtl_jax.interop._safetensors_write import save_sharded as save_sharded
from kdtl_jax.interop._safetensors_write import stream as stream
from kdtl_jax.interop._safetensors_write import stream_sharded as stream_sharded


def views(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Read-only memory maps, one per file: pages are read when touched."""
    dtypes = {key: _header.numpy_dtype(t.name, t.dtype) for key, t in tensors.items()}
    # An empty file cannot be mapped; its tensors are empty as well.
    files = {tensor.file for tensor in tensors.values() if tensor.stop > tensor.start}
    maps = {file: np.memmap(file, np.uint8, "r") for file in files}
    none = np.zeros(0, np.uint8)
    return {
        key: maps.get(t.file, none)[t.start : t.stop].view(dtypes[key]).reshape(t.shape)
        for key, t in tensors.items()
    }


def view(tensor: Tensor) -> np.ndarray:
    """A read-only memory map of one tensor, as in `views`."""
    return views({tensor.name: tensor})[tensor.name]


def read(tensor: Tensor) -> np.ndarray:
    """Copies the tensor into its own memory; nothing stays mapped."""
    return _piece(tensor, tensor.start, tensor.stop).reshape(tensor.shape)


def blocks(tensor: Tensor, size: int) -> Iterator[np.ndarray]:
    """The tensor's entries in storage order, as vectors of at most `size`, read one at a time.

    Use it to apply a function of the entries to a tensor larger than memory.

    Raises:
      ValueError: if `size` is below 1.
    """
    _checks.count(1, size=size)
    step = size * _header.numpy_dtype(tensor.name, tensor.dtype).itemsize
    for start in range(tensor.start, tensor.stop, step):
        yield _piece(tensor, start, min(start + step, tensor.stop))


def take(
    tensor: Tensor, indices: Mapping[int, np.ndarray], size: int = 1 << 20
) -> Iterator[np.ndarray]:
    """The entries at `indices[axis]` along each axis, as vectors in storage order.

    Reads only these entries, about `size` at a time, for example `x[indices[0]][:, indices[1]]` of
    a tensor larger than memory.

    Args:
      tensor: any tensor with axes.
      indices: `{axis: whole numbers in 0..length-1}`, in any order; other axes are kept whole.
      size: number of entries to read at once; a row (the axes after the first) may have more.
    """
    _header.numpy_dtype(tensor.name, tensor.dtype)
    positions = [np.asarray(indices.get(i, np.arange(n))) for i, n in enumerate(tensor.shape)]
    if not all(selection.size for selection in positions):
        return
    inner_shape = tensor.shape[1:]
    row = math.prod(inner_shape)
    width = (tensor.stop - tensor.start) // tensor.shape[0]
    for run in _runs(positions[0], max(1, size // row)):
        low, high = int(run.min()), int(run.max()) + 1
        piece = _piece(tensor, tensor.start + low * width, tensor.start + high * width)
        piece = np.take(piece.reshape(-1, *inner_shape), run - low, 0)
        for axis, selection in enumerate(positions[1:], 1):
            piece = np.take(piece, selection, axis)
        yield piece.ravel()


def _runs(indices: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Splits `indices` into consecutive parts, each within `rows` neighboring rows."""
    start, least, most = 0, int(indices[0]), int(indices[0])
    for i, position in enumerate(indices.tolist()):
        least, most = min(least, position), max(most, position)
        if most - least >= rows:
            yield indices[start:i]
            start, least, most = i, position, position
    yield indices[start:]


def _piece(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    dtype = _header.numpy_dtype(tensor.name, tensor.dtype)
    with tensor.file.open("rb") as file:
        file.seek(start)
        raw = np.fromfile(file, np.uint8, stop - start)
    if raw.size != stop - start:
        raise ValueError(f"{tensor.file} became shorter while it was read.")
    return raw.view(dtype)


def abstract(checkpoint: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
    """`{name: ShapeDtypeStruct}`: enough to plan any transform before reading a byte."""
    return {
        name: jax.ShapeDtypeStruct(tensor.shape, _header.numpy_dtype(name, tensor.dtype))
        for name, tensor in checkpoint.tensors.items()
    }


def load(path: str | Path, *, where: trees.Selector = trees.everything) -> dict[str, np.ndarray]:
    """`{name: memory-mapped array}` of the selected tensors, in natural order; see `views`.

    Raises:
      ValueError: as in `index`; also if the selector matches nothing.
    """
    tensors = index(path).tensors
    # ShapeDtypeStruct leaves: a Tensor is itself a tuple, which jax would flatten.
    leaves = {name: jax.ShapeDtypeStruct(t.shape, jnp.float32) for name, t in tensors.items()}
    selected = trees.mask(leaves, where) if leaves else {}
    names = sorted((name for name in tensors if selected[name]), key=trees.natural_key)
    return views({name: tensors[name] for name in names})


def load_tree(path: str | Path, like: PyTree = None) -> PyTree:
    """A tree from a file of canonical paths.

    Args:
      path: as in `index`.
      like: a template, concrete or abstract: its structure is kept (lists, tuples, int keys, NNX
        states), and names, shapes and dtypes must match exactly. None gives nested dicts, split
        at "/"; a path segment of digits stays a string.

    Raises:
      ValueError: if names or shapes differ from the template's, listed leaf by leaf.
      TypeError: if dtypes differ; use `transforms.transfer` to convert.
    """
    flat = load(path)
    return nested(flat) if like is None else fill(like, flat)


def nested(flat: Mapping[str, Any], *, separator: str = "/") -> dict[str, Any]:
    """Builds nested dicts from flat paths.

    Raises:
      ValueError: if one path is both a leaf and the beginning of another.
    """
    _checks.mappings(flat=flat)
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(separator)
        node = tree
        for segment in parents:
            node = node.setdefault(segment, {})
            if not isinstance(node, dict):
                raise ValueError(f"{_text.quoted(path)} continues a path that is itself a tensor.")
        if last in node:
            raise ValueError(
                f"{_text.quoted(path)} is both a tensor and the beginning of another path."
            )
        node[last] = leaf
    return tree


def fill(like: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """Fills the template's structure with the leaves of `flat`; everything must match exactly.

    Raises:
      TypeError: if a dtype differs; the message names the leaf.
      ValueError: if a leaf is missing, extra or of another shape; the message lists them.
    """
    _checks.mappings(flat=flat)
    expected = trees.flatten(like)
    mismatches = [f"missing {_text.quoted(path)}" for path in expected if path not in flat]
    mismatches += [f"extra {_text.quoted(path)}" for path in flat if path not in expected]
    shared = [path for path in expected if path in flat]
    mismatches += [
        f"{_text.quoted(path)} is {list(np.shape(flat[path]))}, expected "
        f"{list(np.shape(expected[path]))}"
        for path in shared
        if np.shape(flat[path]) != np.shape(expected[path])
    ]
    if mismatches:
        remainder = f" and {len(mismatches) - 8} more" if len(mismatches) > 8 else ""
        raise ValueError(
            f"the file does not fit the template: {'; '.join(mismatches[:8])}{remainder}. "
            "To adapt it, load without a template and use transforms.transfer."
        )
    for path in shared:
        if jnp.result_type(flat[path]) != jnp.result_type(expected[path]):
            raise TypeError(
                f"{_text.quoted(path)} is {jnp.result_type(flat[path])}, expected "
                f"{jnp.result_type(expected[path])}. transforms.transfer converts and reports it."
            )
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in expected])
