"""A merge, tensor by tensor: which tensors are merged into each result, and how they are read.

Tensors are merged one after another by `transforms`, in pieces of 4 MB, so memory never holds the
models. Only `regmean`, which solves equations, holds three matrices, and a vector is one piece.

NaN and infinity in an input are reported while it is read: methods that drop entries may drop
these, too, and give a finite result.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import transforms
from kdtl_jax._types import Array
from kdtl_jax.cli.params import _checkpoints, _folders, _formulas
from kdtl_jax.cli.params._formulas import Members, Merge, Options, Tree
from kdtl_jax.cli.params._methods import MergeMethod
from kdtl_jax.interop import safetensors
from kdtl_jax.interop.safetensors import Tensor


class Part(NamedTuple):
    """One tensor of the result: what is merged into it, and how."""

    models: tuple[Tensor, ...]
    options: Options
    base: Tensor | None = None
    statistics: tuple[Tensor | None, ...] = ()
    reported: set[Tensor] | None = None  # the inputs reported to hold NaN or infinity


def by_tensor(
    method: MergeMethod, merge: Merge, parts: Mapping[str, Part], copies: Mapping[str, Tensor]
) -> Callable[[str], Any]:
    """`Rewrite.produce` of a merge of independent tensors; copies stay unchanged.

    `merge` is the method's or, if that differs, mergekit's.
    """
    parts = _reporting_once(parts)
    # Tied tensors share the draws of the first one's path, so they stay equal.
    first = _ties(parts) if "seed" in method.options else {}

    def produce(path: str) -> Any:
        if (unmerged := _unmerged(parts, copies, path)) is not None:
            return unmerged
        part, name = parts[path], first.get(path, path)
        options = part.options._replace(axis=_row_axis(part))
        if method.is_elementwise:
            pieces = _pieces(part, name, _checkpoints.BLOCK)
            return (np.asarray(merge.combine(x, options)[name]) for x in pieces)
        if method.has_grams:
            return _least_squares(part, name, merge)
        if options.axis == -1:  # every row has its own angles
            return (np.asarray(merge.whole(x, options)[name]).ravel() for x in _rows(part, name))
        return (
            np.asarray(block[name]).ravel()
            for slab, axis in _slabs(part, options.axis)
            for block in _merged_blocks(slab, name, merge, options._replace(axis=axis))
        )

    return produce


def _merged_blocks(part: Part, name: str, merge: Merge, options: Options) -> Iterator[Tree]:
    """The merged blocks, after measuring what they need from the whole tensor."""

    def read(i: int | None = None, /) -> Iterator[Members]:
        return _rows(part if i is None else _one_model(part, i), name)

    measured = None if merge.measure is None else merge.measure(read, options)
    return (merge.combine(x._replace(measured=measured), options) for x in read())


def _least_squares(part: Part, name: str, merge: Merge) -> Iterator[np.ndarray]:
    """RegMean: a kernel with Gram matrices is solved for; any other tensor is averaged."""
    if None in part.statistics:
        without_grams = part._replace(statistics=())
        for x in _pieces(without_grams, name, _checkpoints.BLOCK):
            members = x._replace(statistics=[{} for _ in x.models])
            yield np.asarray(merge.combine(members, part.options)[name])
        return
    samples = [next(safetensors.blocks(tensor, 1)) for tensor in part.models]
    dtype = transforms.one_dtype(samples)[0].dtype

    def rows(tensor: Tensor) -> Iterator[Array]:
        size = transforms.block_rows(tensor.shape) * tensor.shape[-1]
        for x in _entries(part, tensor, size):
            yield jnp.asarray(x.reshape(-1, tensor.shape[-1]), dtype)

    for slab, _ in _slabs(part, -2):
        kernels, grams = (
            [functools.partial(rows, tensor) for tensor in tensors if tensor]
            for tensors in (slab.models, slab.statistics)
        )
        solution = transforms.regmean_kernel(kernels, grams)
        flat = np.asarray(solution).ravel()
        del solution
        for start in range(0, flat.size, _checkpoints.BLOCK):
            yield flat[start : start + _checkpoints.BLOCK]


def _slabs(part: Part, axis: int | None) -> Iterator[tuple[Part, int | None]]:
    """The matrices `[length of the axis, the rest]` for each index before it, and their axis."""
    if axis is None:
        yield part, None
        return
    count = math.prod(part.models[0].shape[:axis])

    def slab_of(tensor: Tensor, number: int) -> Tensor:
        size = (tensor.stop - tensor.start) // count
        shape = (tensor.shape[axis], math.prod(tensor.shape[axis:][1:]))
        start = tensor.start + number * size
        return tensor._replace(shape=shape, start=start, stop=start + size)

    for i in range(count):
        models = tuple(slab_of(tensor, i) for tensor in part.models)
        statistics = tuple(tensor and slab_of(tensor, i) for tensor in part.statistics)
        base = part.base and slab_of(part.base, i)
        yield part._replace(models=models, base=base, statistics=statistics), -2


def _one_model(part: Part, i: int) -> Part:
    """What is read for a single model."""
    return part._replace(models=part.models[i : i + 1])


def _row_axis(part: Part) -> int | None:
    """The axis of rows that spherical methods rotate separately; None if a tensor is one vector."""
    axis, rank = part.options.axis, len(part.models[0].shape)
    if axis is None or rank < 2 or not -rank <= axis < rank:
        return None
    return axis % rank - rank


def ties_of_models(parts: Mapping[str, Part], copies: Mapping[str, Tensor]) -> Callable[[str], Any]:
    """`Rewrite.produce` of TIES over whole models; its passes start with the first tensor.

    Two passes find every model's threshold; a third counts signs and the entries equal to the
    threshold before each tensor. Writing is the fourth.
    """
    parts = _reporting_once(parts)
    first = _ties(parts)
    paths = sorted(path for path in parts if path not in first)
    example = next(iter(parts.values()), Part((), Options()))
    options, count = example.options, len(example.models)
    total = sum(math.prod(parts[path].models[0].shape) for path in paths)
    doubles = [t for p in parts.values() for t in (p.base, *p.models) if t and t.dtype == "F64"]
    dtype = jnp.float64 if doubles else jnp.float32
    density = options.density
    densities = [density] * count if isinstance(density, (int, float)) else density
    measured: dict[str, Any] = {}

    def measure() -> None:
        advance = _checkpoints.progress(4 * total * (2 * count + 1), "ranking: ")

        def read(i: int) -> Iterator[Any]:
            for path in paths:
                for x in _pieces(_one_model(parts[path], i), path, _checkpoints.BLOCK):
                    (tau,) = _formulas.taus(x)
                    yield tau[path]
                    advance(4 * tau[path].size)

        counts = [math.floor(density * total) for density in densities]
        measured["cuts"] = [
            transforms.magnitude_cut(lambda i=i: read(i), counts[i], dtype) for i in range(count)
        ]
        seen_before, balance = [0] * count, 0
        for path in paths:
            measured[f"before {path}"] = seen_before
            for _, trimmed, seen_after in trim(path, seen_before):
                balance, seen_before = balance + int(transforms.sign_balance(trimmed)), seen_after
                advance(4 * trimmed[0][path].size)
        measured["majority"] = 1 if balance >= 0 else -1

    def trim(path: str, seen_before: list[Any]) -> Iterator[tuple[Members, list[Any], list[Any]]]:
        for x in _pieces(parts[path], path, _checkpoints.BLOCK):
            pairs = [
                transforms.trim_to_cut(tau[path], cut, seen_after)
                for tau, cut, seen_after in zip(
                    _formulas.taus(x), measured["cuts"], seen_before, strict=True
                )
            ]
            seen_before = [seen_after for _, seen_after in pairs]
            yield x, [{path: leaf} for leaf, _ in pairs], seen_before

    def merged(path: str) -> Iterator[np.ndarray]:
        if not measured:
            measure()
        for x, trimmed, _ in trim(path, measured[f"before {path}"]):
            signs = transforms.elect_sign_global(trimmed, majority=measured["majority"])
            tau = transforms.disjoint_merge(trimmed, signs, options.weights)
            out = transforms.apply_task_vectors(x.base, [tau], scale=options.scale)
            yield np.asarray(out[path])

    def produce(path: str) -> Iterator[np.ndarray]:
        unmerged = _unmerged(parts, copies, path)
        return merged(first.get(path, path)) if unmerged is None else unmerged

    return produce


def _unmerged(
    parts: Mapping[str, Part], copies: Mapping[str, Tensor], path: str
) -> Iterator[np.ndarray] | None:
    """A copied or empty tensor, which has nothing to merge and no norm; None to merge it."""
    tensor = copies.get(path) or parts[path].base or parts[path].models[0]
    if path in copies or not math.prod(tensor.shape):
        return safetensors.blocks(tensor, _checkpoints.BLOCK)
    return None


def _pieces(part: Part, name: str, size: int, shape: tuple[int, ...] = (-1,)) -> Iterator[Members]:
    """All tensors side by side, `size` entries at a time, under the path `name`."""
    models = [part.base, *part.models] if part.base else [*part.models]
    tensors = [t for t in (*models, *part.statistics) if t is not None]
    streams = (_entries(part, tensor, size) for tensor in tensors)
    for number, pieces in enumerate(zip(*streams, strict=True)):
        trees = [{name: jnp.asarray(_checkpoints.widened(x)).reshape(shape)} for x in pieces]
        base = trees.pop(0) if part.base else {}
        yield Members(base, trees[: len(part.models)], trees[len(part.models) :], number)


def _reporting_once(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts of one merge, which report an input once, however often it is read."""
    reported: set[Tensor] = set()
    return {path: part._replace(reported=reported) for path, part in parts.items()}


def _entries(part: Part, tensor: Tensor, size: int) -> Iterator[np.ndarray]:
    """The tensor's entries, `size` at a time."""
    key = tensor._replace(shape=(), start=0, stop=0)  # it may be a slab of it
    for x in safetensors.blocks(tensor, size):
        if part.reported is not None and key not in part.reported and not np.isfinite(x).all():
            part.reported.add(key)
            print(f"warning: {tensor.name} of {tensor.file} holds NaN or infinity", file=sys.stderr)
        yield x


def _rows(part: Part, name: str) -> Iterator[Members]:
    """The blocks of rows in which `transforms` draws; vectors are one block."""
    shape = part.models[0].shape
    if len(shape) < 2:
        return _pieces(part, name, math.prod(shape), shape)
    return _pieces(part, name, transforms.block_rows(shape) * shape[-1], (-1, shape[-1]))


def _ties(parts: Mapping[str, Part]) -> dict[str, str]:
    """Maps tensors that are equal in every model to the first of them."""
    rows = {path: [t for t in (p.base, *p.models) if t] for path, p in parts.items()}
    count = max(map(len, rows.values()), default=0)
    columns = [{path: row[i] for path, row in rows.items()} for i in range(count)]
    return _folders.tied(columns) if columns else {}


def common_tensor(path: str, tensors: Sequence[Tensor]) -> Tensor:
    """The first of several models' tensors that are not numbers to combine.

    Counters differ between runs; a matrix of integers is a table of indices, equal everywhere, or
    holds packed codes.
    """
    first, *others = tensors
    kinds = {tensor.dtype[:1] in "IU" for tensor in tensors}
    is_matrix = len(first.shape) > 1 and kinds == {True}
    if len(kinds) > 1 or (is_matrix and not all(_folders.equal(first, x) for x in others)):
        raise ValueError(
            f"{path!r} holds integers that differ between the models: packed codes cannot be "
            "combined. Dequantize them to floating point first."
        )
    return first
