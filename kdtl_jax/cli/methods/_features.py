"""Methods of features: regressions behind a trained connector."""

import jax

from kdtl_jax import connectors, losses
from kdtl_jax.cli.methods import _builders, _views
from kdtl_jax.connectors import Connector
from kdtl_jax.recipes._method import Method


def regressor(channels: int) -> Connector:
    """RepDistiller's: a 1x1 convolution, batch normalization, ReLU."""
    return connectors.chain(
        connectors.conv1x1(channels),
        connectors.batch_norm(),
        connectors.activation(jax.nn.relu),
    )


METHODS = (
    Method(
        "hint",
        "FitNets hint of the middle layer",
        "Romero et al., 1412.6550, 2015",
        "features",
        True,
        _builders.over_pairs(
            "hint",
            losses.hint,
            _builders.constant({"hint": 100.0}),
            pairs=_views.middle_pair,
            connector=regressor,
        ),
        _views.needs_pairs(1, _views.middle_pair),
    ),
)
