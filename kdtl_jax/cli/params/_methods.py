"""The merging methods of `kdtl params merge`: their names, requirements and options."""

from typing import Literal, NamedTuple

from kdtl_jax import transforms
from kdtl_jax.cli.params._formulas import (
    ARCEE_FUSION,
    BREADCRUMBS,
    DARE,
    DELLA,
    RAM,
    TRIM,
    TRIM_SOME,
    WHOLE,
    Merge,
    added,
    agreed,
    consensus,
    linear,
    mixed,
    nuslerp,
    pieces,
    rescaled,
    sce,
    spherical,
)  # fmt: skip


class MergeMethod(NamedTuple):
    """A method, what it needs, and which options it reads."""

    summary: str
    merge: Merge
    base: Literal["needs", "takes", "has no"] = "needs"
    fewest: int = 1
    most: int | None = None
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    is_elementwise: bool = False  # an entry depends only on the same entry of each input
    has_statistics: bool = False
    has_grams: bool = False  # [in, in] for kernels [in, out], not information by entry
    mergekit: Merge | None = None  # if that program's result differs


_ADDS = ("weights", "normalize", "scale")
_KEEPS = (*_ADDS, "density")
_DRAWS = (*_KEEPS, "rescale", "seed")
_SPREAD = (*_DRAWS, "epsilon")
_TAILS = (*_KEEPS, "outliers")

METHODS = {
    "linear": MergeMethod(
        "sum w theta / sum w, or without --normalize no the plain sum",
        Merge(linear),
        base="has no", options=("weights", "normalize"), is_elementwise=True,
    ),
    "interpolate": MergeMethod(
        "(1 - t) first + t second (WiSE-FT)",
        Merge(lambda x, o: transforms.interpolate(x.models[0], x.models[1], o.t)),
        base="has no", fewest=2, most=2, options=("t",), required=("t",), is_elementwise=True,
    ),
    "passthrough": MergeMethod(
        "one model, times --scale; for recipes that stack layers of several models",
        Merge(lambda x, o: transforms.scale(x.models[0], o.scale)),
        base="has no", most=1, options=("scale",), is_elementwise=True,
    ),
    "task_arithmetic": MergeMethod(
        "base + scale sum w (theta - base)", added(WHOLE), options=_ADDS, is_elementwise=True
    ),
    "ties": MergeMethod(
        "trim over the whole model, elect signs, average what agrees (TIES as in its paper)",
        agreed(TRIM),  # with `--scope model`, the default, by passes over all tensors
        options=(*_KEEPS, "rescale", "scope"),
        mergekit=consensus(rescaled(TRIM_SOME, default=False), normalize=True),
    ),
    "dare": MergeMethod(
        "drop entries of task vectors at random, rescale, add",
        added(DARE), options=_DRAWS, required=("density",),
        mergekit=added(rescaled(DARE, default=True)),
    ),
    "dare_ties": MergeMethod(
        "like dare, then elect signs and average what agrees",
        agreed(DARE), options=_DRAWS, required=("density",),
        mergekit=consensus(rescaled(DARE, default=True), normalize=False),
    ),
    "della": MergeMethod(
        "drop small entries more often, elect signs, average what agrees",
        agreed(DELLA), options=_SPREAD, required=("density",),
        mergekit=consensus(rescaled(DELLA, default=True), normalize=True),
    ),
    "della_linear": MergeMethod(
        "drop small entries more often, add",
        added(DELLA), options=_SPREAD, required=("density",),
        mergekit=added(rescaled(DELLA, default=True)),
    ),
    "breadcrumbs": MergeMethod(
        "drop each tensor's largest and smallest entries, add",
        added(BREADCRUMBS), options=_TAILS, required=("density",),
        mergekit=added(rescaled(BREADCRUMBS, default=False)),
    ),
    "breadcrumbs_ties": MergeMethod(
        "like breadcrumbs, then elect signs and average what agrees",
        agreed(BREADCRUMBS), options=_TAILS, required=("density",),
        mergekit=consensus(rescaled(BREADCRUMBS, default=False), normalize=False),
    ),
    "sce": MergeMethod(
        "select by variance, weight by energy, erase minority signs; density is the share selected",
        sce(), options=("density",), required=("density",), mergekit=sce(floor=1e-6),
    ),
    "slerp": MergeMethod(
        "along the arc from the first to the second",
        spherical(lambda angles, o: transforms.slerp_shares(angles, o.t)),
        base="has no", fewest=2, most=2, options=("t", "axis"), required=("t",),
    ),
    "nuslerp": MergeMethod(
        "slerp by weights, of task vectors if there is a base",
        spherical(nuslerp), base="takes", fewest=2, most=2, options=("weights", "axis"),
    ),
    "multi_slerp": MergeMethod(
        "several models' directions averaged in a tangent space, from the base if there is one",
        spherical(lambda angles, o: transforms.multi_slerp_shares(angles, o.weights)),
        base="takes", options=("weights",),
    ),
    "karcher": MergeMethod(
        "mean on the sphere, times the mean length",
        Merge(mixed, lambda read, o: transforms.karcher_shares(lambda: pieces(read), o.weights)),
        base="has no", options=("weights",),
    ),
    "near_swap": MergeMethod(
        "the model's entries if they are within t of the base's",
        Merge(lambda x, o: transforms.near_swap(x.base, x.models[0], t=o.t)),
        most=1, options=("t",), required=("t",), is_elementwise=True,
    ),
    "arcee_fusion": MergeMethod(
        "the model's entries whose importance stands out",
        ARCEE_FUSION, most=1,
    ),
    "ram": MergeMethod(
        "changes made by one model alone are kept (times 1 + gain rho), shared ones averaged",
        RAM, options=("gain",),
    ),
    "model_stock": MergeMethod(
        "between base and mean, by the angle between task vectors",
        spherical(lambda angles, o: transforms.model_stock_shares(angles)),
        fewest=2, options=("axis",),
        mergekit=spherical(lambda angles, o: transforms.model_stock_shares(angles, floor=1e-6)),
    ),
    "fisher": MergeMethod(
        "weighted by Fisher information, entry by entry",
        Merge(lambda x, o: transforms.fisher_merge(x.models, x.statistics, o.weights)),
        base="has no", options=("weights",), is_elementwise=True, has_statistics=True,
    ),
    "regmean": MergeMethod(
        "least squares to the outputs of all models' kernels [in, out]",
        Merge(lambda x, o: transforms.regmean(x.models, x.statistics)),
        base="has no", has_statistics=True, has_grams=True,
    ),
}  # fmt: skip
