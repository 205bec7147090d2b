"""What a merging method is given: one tensor of every model, in memory or where it is stored."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import transforms
from kdtl_jax.interop import safetensors
from kdtl_jax.interop.safetensors import Tensor

Tree = dict[str, Any]  # one tensor by its path
PIECE = "x"  # the path of every piece: one program serves all tensors


class Options(NamedTuple):
    """What `--weights`, `--scale` … say, defaults filled in."""

    weights: Sequence[float] | None = None
    scale: float = 1.0
    density: float = 0.2
    epsilon: float = 0.15
    outliers: float = 0.01
    t: float = 0.5
    axis: int | None = None
    seed: int = 0


class Members(NamedTuple):
    """One tensor of every model; `statistics` are Fisher informations or Gram matrices."""

    base: Tree
    models: list[Tree]
    statistics: list[Tree]


class Stored(NamedTuple):
    """One tensor of every model, on disk: read as often as a method needs."""

    path: str
    tensors: Sequence[Tensor]  # the base's, unless the first model is the base, and the models'
    number: int  # of models
    statistics: Sequence[Tensor | None] = ()


Merge = Callable[[Members, Options], Tree]
Stream = Callable[[Stored], Iterator[np.ndarray]]  # to the merged tensor's pieces


def whole(x: Stored) -> Members:
    """All of it in memory, as device arrays at once, so that no tensor is held twice."""
    arrays = [jnp.asarray(safetensors.read(tensor)) for tensor in x.tensors]
    read = [None if one is None else jnp.asarray(safetensors.read(one)) for one in x.statistics]
    return _members(x.path, arrays, x.number, read)


def pieces(x: Stored, size: int) -> Iterator[Members]:
    """Vectors of at most `size` entries under the path `PIECE`, from the first entry on."""
    given = [*x.tensors, *(one for one in x.statistics if one is not None)]
    cut = len(x.tensors)
    for piece in zip(*(safetensors.blocks(tensor, size) for tensor in given), strict=True):
        yield _members(PIECE, piece[:cut], x.number, piece[cut:])


def part(x: Stored, start: int, stop: int) -> Stored:
    """The entries `start:stop` in storage order."""

    def within(tensor: Tensor) -> Tensor:
        width = (tensor.stop - tensor.start) // math.prod(tensor.shape)
        begin, end = (tensor.start + width * place for place in (start, stop))
        return tensor._replace(shape=(stop - start,), start=begin, stop=end)

    return Stored(x.path, [within(tensor) for tensor in x.tensors], x.number)


def shape(x: Stored) -> tuple[int, ...]:
    """That of the tensor in every model."""
    return x.tensors[0].shape


def taus(x: Members) -> list[Tree]:
    """The models' task vectors."""
    return [transforms.task_vector(model, x.base) for model in x.models]


def added(x: Members, o: Options, vectors: Sequence[Tree]) -> Tree:
    """The base and the weighted sum of task vectors."""
    return transforms.apply_task_vectors(x.base, vectors, o.weights, scale=o.scale)


def agreed(x: Members, o: Options, vectors: Sequence[Tree]) -> Tree:
    """The base and the mean of the task vectors that have the elected sign."""
    merged = transforms.disjoint_merge(vectors, transforms.elect_sign(vectors), o.weights)
    return transforms.apply_task_vectors(x.base, [merged], scale=o.scale)


def _members(path: str, arrays: Sequence[Any], count: int, statistics: Sequence[Any]) -> Members:
    """The last `count` arrays are the models', the first is the base's or first model's."""
    models = [{path: array} for array in arrays[-count:]]
    return Members({path: arrays[0]}, models, [{} if x is None else {path: x} for x in statistics])
