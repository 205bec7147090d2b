"""A merge as work on tensors: which of each model's tensors meet, and what is written of them.

Tensors are merged one after another by `transforms`, entry by entry methods in pieces of 4 MB. So
memory holds a few times the largest tensor, not the models.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _checkpoints, _folders, _methods
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite
from kdtl_jax.cli.params._methods import Members, Merge, Method, Options
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import Report

PIECE = "x"  # the path of every piece


class Part(NamedTuple):
    """One tensor to merge: where every model has it, and how."""

    models: tuple[tuple[int, str], ...]  # (which input, the tensor's path there)
    base: tuple[int, str] | None
    options: Options


class Job(NamedTuple):
    """A merge that was found possible: by name and shape alone."""

    method: Method
    merge: Merge
    inputs: Sequence[Opened]  # the first names what is written
    parts: Mapping[str, Part]
    copies: Mapping[str, tuple[int, str]]  # what is not merged
    report: Report
    statistics: Sequence[Opened] = ()
    is_global: bool = False
    layers: Sequence[int] | None = None


def rewrite(job: Job) -> Rewrite:
    """What the job writes, tensor by tensor."""
    specs = {
        path: job.inputs[i].specs[source]
        for path, (i, source) in {
            **{path: part.base or part.models[0] for path, part in job.parts.items()},
            **job.copies,
        }.items()
    }
    make = _whole_models(job) if job.is_global else _by_tensor(job)

    def produce(path: str) -> Any:
        # What is empty has nothing to merge, and no norm.
        if path in job.parts and math.prod(specs[path].shape):
            return make(path)
        part = job.parts.get(path)
        i, source = (part.base or part.models[0]) if part else job.copies[path]
        return safetensors.blocks(job.inputs[i].tensors[source], _checkpoints.BLOCK)

    order = {path: specs[path] for path in sorted(specs, key=trees.natural_key)}
    names = {path: job.inputs[0].names.get(path, path) for path in order}
    inputs = [*job.inputs, *job.statistics]
    return Rewrite(order, produce, job.report, inputs, names, job.layers)


# --- the merge, tensor by tensor -----------------------------------------------------------------


def _by_tensor(job: Job) -> Callable[[str], Any]:
    first = _ties(job) if "seed" in job.method.options else {}

    def produce(path: str) -> Any:
        part = job.parts[path]
        if job.method.is_elementwise:
            return (
                np.asarray(job.merge(piece, part.options)[PIECE])
                for piece in _pieces(job, path, [part.base, *part.models])
            )
        # Tied tensors share the draws of the first one's path, and so stay equal.
        name = first.get(path, path)
        if job.method.is_rowwise and job.merge is job.method.merge:
            return (
                np.asarray(job.merge(rows, part.options)[name]).ravel()
                for rows in _rows(job, name, [part.base, *part.models])
            )
        trees_ = [
            {} if at is None else {name: jnp.asarray(safetensors.read(_tensor(job, at)))}
            for at in (part.base, *part.models)
        ]
        given = [one.tensors.get(path) for one in job.statistics]
        statistics = [
            {} if one is None else {name: jnp.asarray(safetensors.read(one))} for one in given
        ]
        members = Members(trees_[0], trees_[1:], statistics)
        return np.asarray(job.merge(members, part.options)[name])

    return produce


def _pieces(job: Job, path: str, places: Sequence[tuple[int, str] | None]) -> Iterator[Members]:
    """Vectors of at most `BLOCK` entries under the path `PIECE`, from the first entry on."""
    statistics = [one.tensors[path] for one in job.statistics]
    tensors = [_tensor(job, at) for at in places if at is not None] + statistics
    count = len(tensors) - len(statistics)
    for piece in zip(
        *(safetensors.blocks(tensor, _checkpoints.BLOCK) for tensor in tensors), strict=True
    ):
        trees_ = [{PIECE: jnp.asarray(x)} for x in piece]
        base = {} if places[0] is None else trees_[0]
        models = trees_[:count] if places[0] is None else trees_[1:count]
        yield Members(base, models, trees_[count:])


def _rows(job: Job, name: str, places: Sequence[tuple[int, str] | None]) -> Iterator[Members]:
    """The blocks of rows in which `transforms` draws, under the path `name`; vectors whole."""
    tensors = [_tensor(job, at) for at in places if at is not None]
    shape = tensors[0].shape
    size = math.prod(shape)
    if len(shape) > 1:
        shape, size = (-1, shape[-1]), transforms.block_rows(shape) * shape[-1]
    pieces = zip(*(safetensors.blocks(tensor, size) for tensor in tensors), strict=True)
    for block, piece in enumerate(pieces):
        base, *models = [{name: jnp.asarray(x).reshape(shape)} for x in piece]
        yield Members(base, models, [], block)


def _whole_models(job: Job) -> Callable[[str], Any]:
    """TIES over whole models, whose passes begin when the first tensor is asked for.

    Two passes find every model's cut, a third counts signs and how many of the cut's equals come
    before each tensor. Writing is the fourth.
    """
    options = next(iter(job.parts.values())).options if job.parts else Options()
    first = _ties(job)
    paths = sorted(path for path in job.parts if path not in first)
    sizes = [math.prod(_tensor(job, job.parts[path].models[0]).shape) for path in paths]
    count = len(next(iter(job.parts.values())).models) if job.parts else 0
    is_double = any(spec.dtype == np.float64 for one in job.inputs for spec in one.specs.values())
    dtype = jnp.float64 if is_double else jnp.float32
    given = options.density
    densities = [given] * count if isinstance(given, (int, float)) else given
    found: dict[str, Any] = {}

    def measure() -> None:
        done = _checkpoints.progress(4 * sum(sizes) * (2 * count + 1), "ranking: ")

        def read(i: int) -> Iterator[Any]:
            for path in paths:
                part = job.parts[path]
                for x in _pieces(job, path, [part.base, part.models[i]]):
                    (tau,) = _methods.taus(x)
                    yield tau[PIECE]
                    done(4 * tau[PIECE].size)

        kept = [math.floor(density * sum(sizes)) for density in densities]
        found["cuts"] = [
            transforms.magnitude_cut(lambda i=i: read(i), kept[i], dtype) for i in range(count)
        ]
        before, balance = [0] * count, 0
        for path in paths:
            found[f"before {path}"] = before
            for _, trimmed, seen in trim(path, before):
                balance, before = balance + int(transforms.sign_balance(trimmed)), seen
                done(4 * trimmed[0][PIECE].size)
        found["majority"] = 1 if balance >= 0 else -1

    def trim(path: str, before: list[Any]) -> Iterator[tuple[Members, list[Any], list[Any]]]:
        part = job.parts[path]
        for x in _pieces(job, path, [part.base, *part.models]):
            pairs = [
                transforms.trim_to_cut(tau[PIECE], cut, seen)
                for tau, cut, seen in zip(_methods.taus(x), found["cuts"], before, strict=True)
            ]
            before = [seen for _, seen in pairs]
            yield x, [{PIECE: leaf} for leaf, _ in pairs], before

    def produce(path: str) -> Iterator[np.ndarray]:
        if not found:
            measure()
        path = first.get(path, path)
        for x, trimmed, _ in trim(path, found[f"before {path}"]):
            signs = transforms.elect_sign_global(trimmed, majority=found["majority"])
            merged = transforms.disjoint_merge(trimmed, signs, options.weights)
            out = transforms.apply_task_vectors(x.base, [merged], scale=options.scale)
            yield np.asarray(out[PIECE])

    return produce


def _ties(job: Job) -> dict[str, str]:
    """Tensors that are equal in every model, to the first of them."""
    places = {path: [at for at in (p.base, *p.models) if at] for path, p in job.parts.items()}
    count = max(map(len, places.values()), default=0)
    columns = [{path: _tensor(job, at[i]) for path, at in places.items()} for i in range(count)]
    return _folders.tied(columns) if columns else {}


def _tensor(job: Job, at: tuple[int, str]) -> safetensors.Tensor:
    return job.inputs[at[0]].tensors[at[1]]


# --- from settings to a job ----------------------------------------------------------------------
