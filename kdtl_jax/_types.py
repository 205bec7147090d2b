"""Shared types: aliases for trees, and protocols for user functions.

A protocol states what a callable receives and returns, so all contracts of the library are here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
Params = Any  # a pytree of arrays; only inexact leaves are ever differentiated
Outputs = Mapping[str, Array]  # "logits" and every tapped feature, by path
Scalar = float | Array  # a number, possibly traced
Schedule = Callable[[Array], Scalar]  # step -> value, as in optax


class Variables(NamedTuple):
    """The variables of a frozen model: its parameters and its other collections."""

    params: Params
    model_state: PyTree = None


class Mean(NamedTuple):
    """A mean, `total / weight`, that can still be accumulated.

    `weight` is the number of averaged values, or the sum of their weights.
    """

    total: Array
    weight: Array

    def value(self) -> Array:
        """`total / weight`, 0 where the weight is 0."""
        is_defined = self.weight != 0
        return jnp.where(is_defined, self.total, 0) / jnp.where(is_defined, self.weight, 1)


class ModelFn(Protocol):
    """A model as a pure function.

    `inputs` is the batch's `"inputs"` entry. `model_state` holds values that gradients do not train
    (batch statistics); it is returned unchanged unless `train` is true.
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
