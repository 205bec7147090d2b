"""The merging methods of `kdtl params merge`, each a composition of `transforms` on one tensor.

Random draws fold in the tensor's path and ranks are the tensor's own, so merging tensor by tensor
gives what merging whole models gives. TIES ranks whole models and has passes of its own (`_ties`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from kdtl_jax import transforms
from kdtl_jax.cli.params import _drawn, _ranked, _spheres
from kdtl_jax.cli.params._members import Members as Members
from kdtl_jax.cli.params._members import Merge, Stream, Tree, added, agreed, taus
from kdtl_jax.cli.params._members import Options as Options


class Method(NamedTuple):
    """A method, what it needs, and which options it reads."""

    summary: str
    merge: Merge
    has_base: bool
    fewest: int
    most: int | None
    options: tuple[str, ...]
    required: tuple[str, ...] = ()
    is_elementwise: bool = False  # an entry depends on the same entry of each input alone
    has_statistics: bool = False
    stream: Callable[[Options], Stream] | None = None  # the same for a tensor too large to hold


def _dare(x: Members, o: Options) -> list[Tree]:
    keys = jax.random.split(jax.random.key(o.seed), len(x.models))
    return [transforms.dare(k, t, density=o.density) for k, t in zip(keys, taus(x), strict=True)]


def _della(x: Members, o: Options) -> list[Tree]:
    keys = jax.random.split(jax.random.key(o.seed), len(x.models))
    return [
        transforms.della(key, tau, density=o.density, epsilon=o.epsilon)
        for key, tau in zip(keys, taus(x), strict=True)
    ]


def _breadcrumbs(x: Members, o: Options) -> list[Tree]:
    return [transforms.breadcrumbs(tau, density=o.density, outliers=o.outliers) for tau in taus(x)]


def _ties_per_leaf(x: Members, o: Options) -> Tree:
    merged = transforms.ties_per_leaf(taus(x), o.weights, density=o.density)
    return transforms.apply_task_vectors(x.base, [merged], scale=o.scale)


def _slerp(x: Members, o: Options) -> Tree:
    return transforms.slerp(x.models[0], x.models[1], o.t, axis=o.axis)


def _karcher(x: Members, o: Options) -> Tree:
    return transforms.karcher_mean(x.models, o.weights)


def _model_stock(x: Members, o: Options) -> Tree:
    return transforms.model_stock(x.base, x.models, axis=o.axis)


def _regmean(x: Members, o: Options) -> Tree:
    return transforms.regmean(x.models, x.statistics)


_ADDS = ("weights", "scale")
_DRAWS = ("weights", "scale", "density", "seed")

METHODS = {
    "linear": Method(
        "sum w theta / sum w",
        lambda x, o: transforms.average(x.models, o.weights),
        has_base=False,
        fewest=1,
        most=None,
        options=("weights",),
        is_elementwise=True,
    ),
    "interpolate": Method(
        "(1 - t) first + t second (WiSE-FT)",
        lambda x, o: transforms.interpolate(x.models[0], x.models[1], o.t),
        has_base=False,
        fewest=2,
        most=2,
        options=("t",),
        required=("t",),
        is_elementwise=True,
    ),
    "task_arithmetic": Method(
        "base + scale sum w (theta - base)",
        lambda x, o: added(x, o, taus(x)),
        has_base=True,
        fewest=1,
        most=None,
        options=_ADDS,
        is_elementwise=True,
    ),
    "ties": Method(
        "trim over whole models, elect signs, average what agrees (TIES as its paper)",
        _ties_per_leaf,  # with `--scope model`, the default, by passes of its own
        has_base=True,
        fewest=1,
        most=None,
        options=("weights", "scale", "density", "scope"),
        stream=_ranked.ties,
    ),
    "dare": Method(
        "drop entries of task vectors at random, rescale, add",
        lambda x, o: added(x, o, _dare(x, o)),
        has_base=True,
        fewest=1,
        most=None,
        options=_DRAWS,
        required=("density",),
        stream=_drawn.dare,
    ),
    "dare_ties": Method(
        "as dare, then elect signs and average what agrees",
        lambda x, o: agreed(x, o, _dare(x, o)),
        has_base=True,
        fewest=1,
        most=None,
        options=_DRAWS,
        required=("density",),
        stream=_drawn.dare_ties,
    ),
    "della": Method(
        "drop small entries more often, elect signs, average what agrees",
        lambda x, o: agreed(x, o, _della(x, o)),
        has_base=True,
        fewest=1,
        most=None,
        options=(*_DRAWS, "epsilon"),
        required=("density",),
        stream=_drawn.della,
    ),
    "breadcrumbs": Method(
        "drop each tensor's largest and smallest entries, add",
        lambda x, o: added(x, o, _breadcrumbs(x, o)),
        has_base=True,
        fewest=1,
        most=None,
        options=(*_ADDS, "density", "outliers"),
        required=("density",),
        stream=_ranked.breadcrumbs,
    ),
    "sce": Method(
        "select by variance, weigh by energy, erase minority signs; density is the share selected",
        lambda x, o: transforms.sce(x.base, x.models, top=o.density),
        has_base=True,
        fewest=2,
        most=None,
        options=("density",),
        required=("density",),
        stream=_ranked.sce,
    ),
    "slerp": Method(
        "along the arc from the first to the second",
        _slerp,
        has_base=False,
        fewest=2,
        most=2,
        options=("t", "axis"),
        required=("t",),
        stream=lambda o: _spheres.stream(_slerp, o),
    ),
    "karcher": Method(
        "mean on the sphere, times the mean length",
        _karcher,
        has_base=False,
        fewest=2,
        most=None,
        options=("weights",),
        stream=lambda o: _spheres.stream(_karcher, o),
    ),
    "near_swap": Method(
        "the model's entries where within t of the base's",
        lambda x, o: transforms.near_swap(x.base, x.models[0], t=o.t),
        has_base=True,
        fewest=1,
        most=1,
        options=("t",),
        required=("t",),
        is_elementwise=True,
    ),
    "model_stock": Method(
        "between base and mean, by the angle between task vectors",
        _model_stock,
        has_base=True,
        fewest=2,
        most=None,
        options=("axis",),
        stream=lambda o: _spheres.stream(_model_stock, o),
    ),
    "fisher": Method(
        "weighted by Fisher information, entry by entry",
        lambda x, o: transforms.fisher_merge(x.models, x.statistics, o.weights),
        has_base=False,
        fewest=1,
        most=None,
        options=("weights",),
        is_elementwise=True,
        has_statistics=True,
    ),
    "regmean": Method(
        "least squares to the outputs of all models' kernels [in, out]",
        _regmean,
        has_base=False,
        fewest=1,
        most=None,
        options=(),
        has_statistics=True,
    ),
}
