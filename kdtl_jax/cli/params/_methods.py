"""The merging methods of `kdtl params merge`, each a composition of `transforms` on one tensor.

Random draws fold in the tensor's path and ranks are the tensor's own, so merging tensor by tensor
gives what merging whole models gives, bit for bit. TIES over whole models ranks all tensors
together (`merge`).

Methods follow their papers. `mergekit` is the same method as that program computes it: it weighs
task vectors before it elects signs, divides by weights instead of counts, and rescales what is left
after dropping to the L1 norm of the whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from kdtl_jax import transforms

Tree = dict[str, Any]  # one tensor by its path


class Options(NamedTuple):
    """What `--weights`, `--scale` … say, defaults filled in; shares may differ by model."""

    weights: Sequence[float] | None = None
    normalize: bool | None = None  # None is the method's own habit
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
    """One tensor of every model; `statistics` are Fisher informations or Gram matrices."""

    base: Tree
    models: list[Tree]
    statistics: list[Tree]
    block: int = 0  # number of the first block, where a tensor comes in blocks of rows


Merge = Callable[[Members, Options], Tree]


class Method(NamedTuple):
    """A method, what it needs, and which options it reads."""

    summary: str
    merge: Merge
    base: Literal["needs", "takes", "has no"] = "needs"
    fewest: int = 1
    most: int | None = None
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    is_elementwise: bool = False  # an entry depends on the same entry of each input alone
    is_rowwise: bool = False  # `merge`: an entry depends on its row, and on its block's draws
    has_statistics: bool = False
    mergekit: Merge | None = None  # where that program's number differs


# --- task vectors --------------------------------------------------------------------------------


def taus(x: Members) -> list[Tree]:
    """The models' task vectors."""
    return [transforms.task_vector(model, x.base) for model in x.models]


def _keys(x: Members, o: Options) -> list[jax.Array]:
    return list(jax.random.split(jax.random.key(o.seed), len(x.models)))


def _each(value: float | Sequence[float], x: Members) -> list[float]:
    return [value] * len(x.models) if isinstance(value, (int, float)) else list(value)


Sparsify = Callable[[Members, Options], list[Tree]]


def _whole(x: Members, o: Options) -> list[Tree]:
    return taus(x)


def _trim(x: Members, o: Options) -> list[Tree]:
    pairs = zip(taus(x), _each(o.density, x), strict=True)
    return [transforms.trim(tau, density=density) for tau, density in pairs]


def _dare(x: Members, o: Options) -> list[Tree]:
    rows = zip(_keys(x, o), taus(x), _each(o.density, x), strict=True)
    return [transforms.dare(key, tau, density=d, block=x.block) for key, tau, d in rows]


def _della(x: Members, o: Options) -> list[Tree]:
    rows = zip(_keys(x, o), taus(x), _each(o.density, x), _each(o.epsilon, x), strict=True)
    return [
        transforms.della(key, tau, density=density, epsilon=epsilon, block=x.block)
        for key, tau, density, epsilon in rows
    ]


def _breadcrumbs(x: Members, o: Options) -> list[Tree]:
    rows = zip(taus(x), _each(o.density, x), _each(o.outliers, x), strict=True)
    return [
        transforms.breadcrumbs(tau, density=density, outliers=outliers)
        for tau, density, outliers in rows
    ]


def _added(sparsify: Sparsify) -> Merge:
    """The base and the weighted sum of task vectors, or with `normalize` their weighted mean."""

    def merge(x: Members, o: Options) -> Tree:
        weights = _weights(x, o)
        total = sum(weights)
        if o.normalize and abs(total) >= 1e-8:
            weights = [w / total for w in weights]
        return transforms.apply_task_vectors(x.base, sparsify(x, o), weights, scale=o.scale)

    return merge


def _agreed(sparsify: Sparsify) -> Merge:
    """The base and the mean (the sum, if not to `normalize`) of what has the elected sign."""

    def merge(x: Members, o: Options) -> Tree:
        vectors = sparsify(x, o)
        divisor = transforms.undivided if o.normalize is False else transforms.agreeing_count
        signs = transforms.elect_sign(vectors)
        merged = transforms.disjoint_merge(vectors, signs, o.weights, divisor=divisor)
        return transforms.apply_task_vectors(x.base, [merged], scale=o.scale)

    return merge


def _weights(x: Members, o: Options) -> list[float]:
    return [1.0] * len(x.models) if o.weights is None else list(o.weights)


# --- mergekit's conventions ----------------------------------------------------------------------


def _consensus(sparsify: Sparsify, *, normalize: bool) -> Merge:
    """Signs of weighted task vectors; a sum, or with `normalize` over the agreeing weight."""

    def merge(x: Members, o: Options) -> Tree:
        weights = _weights(x, o)
        pairs = zip(sparsify(x, o), weights, strict=True)
        vectors = [transforms.scale(tau, w) for tau, w in pairs]
        divides = normalize if o.normalize is None else o.normalize
        divisor = transforms.agreeing_weight(weights) if divides else transforms.undivided
        signs = transforms.elect_sign(vectors)
        merged = transforms.disjoint_merge(vectors, signs, divisor=divisor)
        return transforms.apply_task_vectors(x.base, [merged], scale=o.scale)

    return merge


def _trim_some(x: Members, o: Options) -> list[Tree]:
    """At least one entry of every tensor is kept, unless the density is 0."""

    def by_leaf(tau: Tree, density: float) -> Callable[[str], float]:
        least = {path: 1.5 / max(leaf.size, 2) for path, leaf in tau.items()}
        return lambda path: min(1.0, max(density, least[path])) if density > 0 else 0.0

    pairs = zip(taus(x), _each(o.density, x), strict=True)
    return [transforms.trim(tau, density=by_leaf(tau, density)) for tau, density in pairs]


def _rescaled(drop: Sparsify) -> Sparsify:
    """What is kept keeps its value, times the ratio of L1 norms if `rescale` (the default)."""

    def sparsify(x: Members, o: Options) -> list[Tree]:
        out = []
        for tau, dropped in zip(taus(x), drop(x, o), strict=True):
            kept = transforms.keep(tau, {path: leaf != 0 for path, leaf in dropped.items()})
            out.append(kept if o.rescale is False else transforms.rescale_l1(kept, tau, floor=1e-7))
        return out

    return sparsify


def _nuslerp(x: Members, o: Options) -> Tree:
    first, second = _weights(x, o)
    total = first + second
    t = second / total if abs(total) >= 1e-6 else 0.5
    if not x.base:
        return transforms.slerp(x.models[0], x.models[1], t, axis=o.axis, threshold=1.0)
    one, other = taus(x)
    tau = transforms.slerp(one, other, t, axis=o.axis, threshold=1.0)
    return transforms.apply_task_vectors(x.base, [tau])


def _linear(x: Members, o: Options) -> Tree:
    if o.normalize is False:
        return transforms.weighted_sum(x.models, _weights(x, o))
    return transforms.average(x.models, o.weights)


_ADDS = ("weights", "normalize", "scale")
_KEEPS = (*_ADDS, "density")
_DRAWS = (*_KEEPS, "rescale", "seed")
_SPREAD = (*_DRAWS, "epsilon")
_TAILS = (*_KEEPS, "outliers")

METHODS = {
    "linear": Method(
        "sum w theta / sum w, or without --normalize no the plain sum",
        _linear, base="has no", options=("weights", "normalize"), is_elementwise=True,
    ),
    "interpolate": Method(
        "(1 - t) first + t second (WiSE-FT)",
        lambda x, o: transforms.interpolate(x.models[0], x.models[1], o.t),
        base="has no", fewest=2, most=2, options=("t",), required=("t",), is_elementwise=True,
    ),
    "passthrough": Method(
        "one model, times --scale; for recipes that stack layers of several",
        lambda x, o: transforms.scale(x.models[0], o.scale),
        base="has no", most=1, options=("scale",), is_elementwise=True,
    ),
    "task_arithmetic": Method(
        "base + scale sum w (theta - base)", _added(_whole), options=_ADDS, is_elementwise=True
    ),
    "ties": Method(
        "trim over whole models, elect signs, average what agrees (TIES as its paper)",
        _agreed(_trim),  # with `--scope model`, the default, by passes over all tensors
        options=(*_KEEPS, "scope"), mergekit=_consensus(_trim_some, normalize=True),
    ),
    "dare": Method(
        "drop entries of task vectors at random, rescale, add",
        _added(_dare), options=_DRAWS, required=("density",), is_rowwise=True,
        mergekit=_added(_rescaled(_dare)),
    ),
    "dare_ties": Method(
        "as dare, then elect signs and average what agrees",
        _agreed(_dare), options=_DRAWS, required=("density",), is_rowwise=True,
        mergekit=_consensus(_rescaled(_dare), normalize=False),
    ),
    "della": Method(
        "drop small entries more often, elect signs, average what agrees",
        _agreed(_della), options=_SPREAD, required=("density",), is_rowwise=True,
        mergekit=_consensus(_rescaled(_della), normalize=True),
    ),
    "della_linear": Method(
        "drop small entries more often, add",
        _added(_della), options=_SPREAD, required=("density",), is_rowwise=True,
        mergekit=_added(_rescaled(_della)),
    ),
    "breadcrumbs": Method(
        "drop each tensor's largest and smallest entries, add",
        _added(_breadcrumbs), options=_TAILS, required=("density",),
    ),
    "breadcrumbs_ties": Method(
        "as breadcrumbs, then elect signs and average what agrees",
        _agreed(_breadcrumbs), options=_TAILS, required=("density",),
        mergekit=_consensus(_breadcrumbs, normalize=False),
    ),
    "sce": Method(
        "select by variance, weigh by energy, erase minority signs; density is the share selected",
        lambda x, o: transforms.sce(x.base, x.models, top=o.density),
        options=("density",), required=("density",),
        mergekit=lambda x, o: transforms.sce(x.base, x.models, top=o.density, floor=1e-6),
    ),
    "slerp": Method(
        "along the arc from the first to the second",
        lambda x, o: transforms.slerp(x.models[0], x.models[1], o.t, axis=o.axis),
        base="has no", fewest=2, most=2, options=("t", "axis"), required=("t",),
    ),
    "nuslerp": Method(
        "slerp by weights, of the task vectors where there is a base",
        _nuslerp, base="takes", fewest=2, most=2, options=("weights", "axis"),
    ),
    "multi_slerp": Method(
        "several models' directions averaged in a tangent space, from the base if there is one",
        lambda x, o: transforms.multi_slerp(x.base or None, x.models, o.weights),
        base="takes", options=("weights",),
    ),
    "karcher": Method(
        "mean on the sphere, times the mean length",
        lambda x, o: transforms.karcher_mean(x.models, o.weights),
        base="has no", options=("weights",),
    ),
    "near_swap": Method(
        "the model's entries where within t of the base's",
        lambda x, o: transforms.near_swap(x.base, x.models[0], t=o.t),
        most=1, options=("t",), required=("t",), is_elementwise=True,
    ),
    "arcee_fusion": Method(
        "the model's entries whose importance stands out",
        lambda x, o: transforms.arcee_fusion(x.base, x.models[0]), most=1,
    ),
    "ram": Method(
        "changes that one model made alone are kept (times 1 + gain rho), shared ones averaged",
        lambda x, o: transforms.ram(x.base, x.models, gain=o.gain), options=("gain",),
    ),
    "model_stock": Method(
        "between base and mean, by the angle between task vectors",
        lambda x, o: transforms.model_stock(x.base, x.models, axis=o.axis),
        fewest=2, options=("axis",),
        mergekit=lambda x, o: transforms.model_stock(x.base, x.models, axis=o.axis, floor=1e-6),
    ),
    "fisher": Method(
        "weighted by Fisher information, entry by entry",
        lambda x, o: transforms.fisher_merge(x.models, x.statistics, o.weights),
        base="has no", options=("weights",), is_elementwise=True, has_statistics=True,
    ),
    "regmean": Method(
        "least squares to the outputs of all models' kernels [in, out]",
        lambda x, o: transforms.regmean(x.models, x.statistics),
        base="has no", has_statistics=True,
    ),
}  # fmt: skip
