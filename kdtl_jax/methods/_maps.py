"""Methods that compare positions: they need feature maps (or tokens), and say so of vectors."""

from jax import Array

from kdtl_jax import connectors, losses
from kdtl_jax.methods import _builders, _views
from kdtl_jax.methods._features import regressor
from kdtl_jax.methods._method import TASK, Method, Setup


def _wkd_f(student: Array, teacher: Array) -> Array:
    return losses.wkd_feature(student, teacher, mean_weight=4.0)


def _wkd_f_weights(setup: Setup) -> dict[str, _builders.Weight]:
    return {TASK: 1.0, "wkd_f": _builders.let_go(0.08, setup.steps)}


METHODS = (
    Method(
        "at",
        "Attention transfer",
        "Zagoruyko, Komodakis, 1612.03928, 2017",
        "maps",
        False,
        _builders.over_pairs(
            "at",
            losses.attention_transfer,
            _builders.constant({"at": 1000.0}),
            view=_views.matched_maps,
        ),
        _views.needs_positions("a normalized attention map of one position is always 1"),
    ),
    Method(
        "nst",
        "Neuron selectivity transfer",
        "Huang, Wang, 1707.01219, 2017",
        "maps",
        False,
        _builders.over_pairs(
            "nst",
            losses.nst,
            _builders.constant({"nst": 50.0}),
            view=_views.matched_maps,
        ),
        _views.needs_positions("a channel normalized over one position is only a sign"),
    ),
    Method(
        "cwd",
        "Channel-wise distillation",
        "Shu et al., 2011.13256, 2021",
        "maps",
        True,
        _builders.over_pairs(
            "cwd",
            losses.cwd,
            _builders.constant({"cwd": 50.0}),
            pairs=_views.deepest_pair,
            view=_views.matched_maps,
            connector=connectors.conv1x1,
        ),
        _views.needs_positions("a softmax over one position is always 1", _views.deepest_pair),
    ),
    Method(
        "wkd_f",
        "Wasserstein KD of features",
        "Lv, Yang, Li, 2412.08139, 2024",
        "maps",
        True,
        _builders.over_pairs(
            "wkd_f",
            _wkd_f,
            _wkd_f_weights,
            pairs=_views.deepest_pair,
            view=_views.matched_maps,
            connector=regressor,
        ),
        _views.needs_positions("one position has no variance", _views.deepest_pair),
    ),
)
