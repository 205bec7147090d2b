"""The table of distillation methods behind `kdtl distill --methods` and `--list`.

The one place where a string chooses a method. A method is a value (`recipes._method.Method`); its
weights are those of its paper or of the authors' code, on the terms as the library defines them.
"""

from kdtl_jax.methods import (
    _contrastive,
    _divergences,
    _features,
    _labels,
    _logits,
    _maps,
    _networks,
    _relations,
    _reviews,
    _tokens,
)
from kdtl_jax.methods._method import Method

METHODS: tuple[Method, ...] = (
    *_logits.METHODS,
    *_divergences.METHODS,
    *_labels.METHODS,
    *_features.METHODS,
    *_reviews.METHODS,
    *_networks.METHODS,
    *_maps.METHODS,
    *_relations.METHODS,
    *_contrastive.METHODS,
    *_tokens.METHODS,
)
BY_NAME = {method.name: method for method in METHODS}
COLUMNS = ("method", "title", "paper", "needs", "connector")


def rows() -> list[tuple[str, str, str, str, str]]:
    """One row per method under `COLUMNS`, for printing."""
    return [(m.name, m.title, m.paper, m.needs, "yes" if m.connector else "no") for m in METHODS]
