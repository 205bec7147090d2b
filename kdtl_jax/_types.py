"""Shared types: named aliases for trees, and the protocols user functions follow.

Nothing here computes. A protocol states what a callable receives and returns, so that a
reader finds every contract of the library on one page.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any
Params = Any  # a pytree of arrays; only inexact leaves are ever differentiated
Outputs = Mapping[str, Array]  # "logits" and every tapped feature, by path
Scalar = float | Array  # a number, possibly traced
Schedule = Callable[[Array], Scalar]  # step -> value, as in optax


class Variables(NamedTuple):
    """What a frozen model needs to run: parameters and its other collections."""

    params: Params
    model_state: PyTree = None


class ModelFn(Protocol):
    """A model as a pure function.

    `inputs` is the batch's `"inputs"` entry. `model_state` holds what is not trained by
    gradient (batch statistics); it comes back unchanged unless `train` is true.
    """

    def __call__(
        self,
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]: ...
