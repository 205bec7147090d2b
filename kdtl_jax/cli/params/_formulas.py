"""The formulas of `kdtl params merge`: `transforms` on one tensor of each model.

Random draws fold in the tensor's path and ranks are the tensor's own, so merging tensor by tensor
gives the same bits as merging whole models. TIES over whole models ranks all tensors
together (`_merging.ties_of_models`).

A tensor comes in blocks of rows. What an entry needs from the whole tensor (a cut, a norm, a
threshold, the angles between models) is measured first, in passes over the blocks.

Methods follow their papers. `mergekit` is the same method as computed by that program: it weights
task vectors before electing signs, divides by weights instead of counts, and rescales what remains
after dropping to the original L1 norm.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kdtl_jax import transforms
from kdtl_jax._types import Array

Tree = dict[str, Any]  # one tensor by its path


class Options(NamedTuple):
    """The values of `--weights`, `--scale` …, with defaults; shares may differ by model."""

    weights: Sequence[float] | None = None
    normalize: bool | None = None  # None means the method's default
    scale: float = 1.0
    density: float | Sequence[float] = 0.2
    epsilon: float | Sequence[float] = 0.15
    outliers: float | Sequence[float] = 0.01
    rescale: bool | None = None
    t: float = 0.5
    axis: int | None = None
    gain: float = 0.0
    seed: int = 0


class Members(NamedTuple):
    """A tensor of every model, or a block of rows; `statistics` are Fishers or Gram matrices."""

    base: Tree
    models: list[Tree]
    statistics: list[Tree]
    block: int = 0  # its number
    measured: Any = None  # of the whole tensor


class Read(Protocol):
    """The tensor's blocks, from the first: of all models, or only of model `i`."""

    def __call__(self, i: int | None = None, /) -> Iterable[Members]: ...


class Merge(NamedTuple):
    """The merge of a block and, before it, the measurements of the whole tensor."""

    combine: Callable[[Members, Options], Tree]
    measure: Callable[[Read, Options], Any] | None = None

    def whole(self, x: Members, o: Options) -> Tree:
        """The merge of a tensor that is entirely in memory."""

        def read(i: int | None = None) -> list[Members]:
            return [x if i is None else x._replace(models=x.models[i : i + 1])]

        measured = None if self.measure is None else self.measure(read, o)
        return self.combine(x._replace(measured=measured), o)


# --- task vectors --------------------------------------------------------------------------------


def taus(x: Members) -> list[Tree]:
    """The models' task vectors."""
    return [transforms.task_vector(model, x.base) for model in x.models]


def _keys(x: Members, o: Options) -> list[jax.Array]:
    return list(jax.random.split(jax.random.key(o.seed), len(x.models)))


def _each(value: float | Sequence[float], x: Members) -> list[float]:
    return [value] * len(x.models) if isinstance(value, (int, float)) else list(value)


class Sparsify(NamedTuple):
    """The sparsified task vector of every model, and the measurements it needs."""

    drop: Callable[[Members, Options], list[Tree]]
    measure: Callable[[Read, Options], Any] | None = None


def _blocks(read: Read, i: int) -> Iterator[Array]:
    """The task vector of model `i`, block by block."""
    for x in read(i):
        (tau,) = taus(x)
        yield from tau.values()


class _Kept(NamedTuple):
    """The cut that keeps the largest entries, and the number of ties with it before each block."""

    cut: transforms.Cut
    before: list[Any]


def _largest(read: Read, i: int, count: Callable[[int], int]) -> _Kept:
    """The largest `count(size)` entries of model `i`'s task vector."""
    sizes = [(tau.size, tau.real.dtype) for tau in _blocks(read, i)]
    count_kept = count(sum(size for size, _ in sizes))
    cut = transforms.magnitude_cut(lambda: _blocks(read, i), count_kept, sizes[0][1])
    before = [jnp.zeros((), cut.equal.dtype)]
    for tau in _blocks(read, i):
        before.append(transforms.trim_to_cut(tau, cut, before[-1])[1])
    return _Kept(cut, before)


def _cut(tau: Tree, kept: _Kept, block: int) -> Tree:
    return {p: transforms.trim_to_cut(x, kept.cut, kept.before[block])[0] for p, x in tau.items()}


def _trimmed(x: Members, o: Options) -> list[Tree]:
    return [_cut(tau, kept, x.block) for tau, kept in zip(taus(x), x.measured, strict=True)]


def _trim_counts(least: int) -> Callable[[Read, Options], Any]:
    """The cuts that keep each model's density, with at least `least` entries if it is not 0."""

    def count(density: float, size: int) -> int:
        return max(math.floor(density * size), least if density > 0 else 0)

    def measure(read: Read, o: Options) -> Any:
        shares = _each(o.density, next(iter(read())))
        return [_largest(read, i, lambda n, d=d: count(d, n)) for i, d in enumerate(shares)]

    return measure


def _crumbs(read: Read, o: Options) -> Any:
    """The largest entries per model, and which of them are too large."""
    first = next(iter(read()))
    rows = zip(_each(o.density, first), _each(o.outliers, first), strict=True)

    def counts(size: int, density: float, outliers: float) -> tuple[int, int]:
        kept = math.floor(density * size)
        top = min(math.floor(outliers * size), size - kept)
        return top + kept, top

    return [
        tuple(_largest(read, i, lambda n, j=j, s=shares: counts(n, *s)[j]) for j in (0, 1))
        for i, shares in enumerate(rows)
    ]


def _crumbled(x: Members, o: Options) -> list[Tree]:
    out = []
    for tau, (kept, dropped) in zip(taus(x), x.measured, strict=True):
        large = _cut(tau, dropped, x.block)
        out.append({p: jnp.where(large[p] != 0, 0, y) for p, y in _cut(tau, kept, x.block).items()})
    return out


def _dare(x: Members, o: Options) -> list[Tree]:
    rows = zip(_keys(x, o), taus(x), _each(o.density, x), strict=True)
    return [transforms.dare(key, tau, density=d, block=x.block) for key, tau, d in rows]


def _della(x: Members, o: Options) -> list[Tree]:
    rows = zip(_keys(x, o), taus(x), _each(o.density, x), _each(o.epsilon, x), strict=True)
    return [
        transforms.della(key, tau, density=density, epsilon=epsilon, block=x.block)
        for key, tau, density, epsilon in rows
    ]


WHOLE = Sparsify(lambda x, o: taus(x))
TRIM = Sparsify(_trimmed, _trim_counts(0))
TRIM_SOME = Sparsify(_trimmed, _trim_counts(1))  # mergekit keeps an entry of every tensor
DARE, DELLA = Sparsify(_dare), Sparsify(_della)
BREADCRUMBS = Sparsify(_crumbled, _crumbs)


def added(sparsify: Sparsify) -> Merge:
    """The base and the weighted sum of task vectors, or with `normalize` their weighted mean."""

    def combine(x: Members, o: Options) -> Tree:
        weights = _weights(x, o)
        total = sum(weights)
        if o.normalize and abs(total) > 1e-8 * sum(map(abs, weights)):
            weights = [w / total for w in weights]
        return transforms.apply_task_vectors(x.base, sparsify.drop(x, o), weights, scale=o.scale)

    return Merge(combine, sparsify.measure)


def agreed(sparsify: Sparsify) -> Merge:
    """The base plus the mean (the sum without `normalize`) of entries with the elected sign."""

    def combine(x: Members, o: Options) -> Tree:
        vectors = sparsify.drop(x, o)
        divisor = transforms.undivided if o.normalize is False else transforms.agreeing_count
        signs = transforms.elect_sign(vectors)
        merged = transforms.disjoint_merge(vectors, signs, o.weights, divisor=divisor)
        return transforms.apply_task_vectors(x.base, [merged], scale=o.scale)

    return Merge(combine, sparsify.measure)


def _weights(x: Members, o: Options) -> list[float]:
    return [1.0] * len(x.models) if o.weights is None else list(o.weights)


# --- choosing entries ----------------------------------------------------------------------------


def _leaves(x: Members) -> list[Array]:
    """The base's block and the models', in one dtype."""
    return transforms.one_dtype([leaf for tree in (x.base, *x.models) for leaf in tree.values()])


def _chosen(piece: Callable[[Members, Options], Array]) -> Callable[[Members, Options], Tree]:
    """A block of the result in the base's dtype."""
    return lambda x, o: {p: piece(x, o).astype(leaf.dtype) for p, leaf in x.base.items()}


def sce(*, floor: float = 0.0) -> Merge:
    """SCE, whose `top` is the density; `floor` as in `transforms.sce`."""

    def measure(read: Read, o: Options) -> Any:
        top = o.density
        assert isinstance(top, (int, float))  # `merge` refuses more than one
        return transforms.sce_selection(lambda: map(_leaves, read()), top=top, floor=floor)

    return Merge(
        _chosen(lambda x, o: transforms.sce_piece(_leaves(x), x.measured, x.block)), measure
    )


ARCEE_FUSION = Merge(
    _chosen(lambda x, o: transforms.arcee_piece(_leaves(x), x.measured)),
    lambda read, o: transforms.arcee_threshold(lambda: map(_leaves, read())),
)
RAM = Merge(
    _chosen(lambda x, o: transforms.ram_piece(_leaves(x), x.measured)),
    lambda read, o: transforms.ram_boosts(lambda: map(_leaves, read()), gain=o.gain),
)


# --- mergekit's conventions ----------------------------------------------------------------------


def consensus(sparsify: Sparsify, *, normalize: bool) -> Merge:
    """Signs of weighted task vectors; a sum, divided with `normalize` by the agreeing weight."""

    def combine(x: Members, o: Options) -> Tree:
        weights = _weights(x, o)
        pairs = zip(sparsify.drop(x, o), weights, strict=True)
        vectors = [transforms.scale(tau, w) for tau, w in pairs]
        divides = normalize if o.normalize is None else o.normalize
        divisor = transforms.agreeing_weight(weights) if divides else transforms.undivided
        signs = transforms.elect_sign(vectors)
        merged = transforms.disjoint_merge(vectors, signs, divisor=divisor)
        return transforms.apply_task_vectors(x.base, [merged], scale=o.scale)

    return Merge(combine, sparsify.measure)


def rescaled(sparsify: Sparsify, *, default: bool) -> Sparsify:
    """Kept entries keep their values, times the ratio of L1 norms if `rescale`."""

    def kept(x: Members, o: Options) -> list[Tree]:
        pairs = zip(taus(x), sparsify.drop(x, o), strict=True)
        return [
            transforms.keep(tau, {path: leaf != 0 for path, leaf in dropped.items()})
            for tau, dropped in pairs
        ]

    def measure(read: Read, o: Options) -> Any:
        measured = None if sparsify.measure is None else sparsify.measure(read, o)
        count = len(next(iter(read())).models)
        if not (default if o.rescale is None else o.rescale):
            return measured, [1.0] * count
        norms: list[list[Any]] = [[] for _ in range(count)]
        for x in read():
            x = x._replace(measured=measured)
            for model_norms, tau, remaining in zip(norms, taus(x), kept(x, o), strict=True):
                model_norms.append(transforms.l1_norms(*tau.values(), *remaining.values()))
        return measured, [transforms.l1_ratio(model_norms, floor=1e-7) for model_norms in norms]

    def drop(x: Members, o: Options) -> list[Tree]:
        measured, ratios = x.measured
        vectors = kept(x._replace(measured=measured), o)
        return [transforms.scale(tau, ratio) for tau, ratio in zip(vectors, ratios, strict=True)]

    return Sparsify(drop, measure)


# --- on spheres ----------------------------------------------------------------------------------


def pieces(read: Read) -> Iterator[list[Array]]:
    """Block by block, the task vectors (the models without a base), in one floating dtype."""
    for x in read():
        vectors = taus(x) if x.base else x.models
        yield transforms.one_dtype([leaf for tree in vectors for leaf in tree.values()])


def mixed(x: Members, o: Options) -> Tree:
    """The vectors' weighted sum, with measured weights."""
    if x.base:
        return transforms.apply_task_vectors(x.base, taus(x), x.measured)
    return transforms.weighted_sum(x.models, x.measured)


def spherical(shares: Callable[[transforms.Angles, Options], Any]) -> Merge:
    """The sum of the vectors, each times its share: `shares` of the angles between them."""

    def measure(read: Read, o: Options) -> Any:
        return shares(transforms.angles(lambda: pieces(read), o.axis), o)

    return Merge(mixed, measure)


def nuslerp(angles: transforms.Angles, o: Options) -> Any:
    """The shares of SLERP at `t = w_2 / (w_1 + w_2)`, 1/2 if the weights cancel.

    mergekit's `nuslerp`: with a base, it rotates task vectors; only parallel ones mix linearly.
    """
    first, second = (1.0, 1.0) if o.weights is None else o.weights
    total = first + second
    t = second / total if abs(total) > 1e-6 * (abs(first) + abs(second)) else 0.5
    return transforms.slerp_shares(angles, t, threshold=1.0)


def linear(x: Members, o: Options) -> Tree:
    """`sum_i w_i theta_i / sum_i w_i`, weights 1 by default; only the sum without `normalize`."""
    if o.normalize is False:
        return transforms.weighted_sum(x.models, _weights(x, o))
    return transforms.average(x.models, o.weights)
