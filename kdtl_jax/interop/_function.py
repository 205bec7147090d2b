"""Plain functions as model functions."""

from collections.abc import Callable
from typing import Any

from jax import Array

from kdtl_jax._types import ModelFn, Outputs, Params, PyTree
from kdtl_jax.interop import _taps


def function(f: Callable[[Params, Any], Any]) -> ModelFn:
    """Makes `f(params, inputs) -> logits` a model function, without state, key or mode.

        step = train.make_step(interop.function(lambda params, x: x @ params["w"]), ...)

    Args:
      f: returns an array, which becomes `"logits"`, or a dict of outputs.

    Raises:
      TypeError: if `f` is not a function.
    """

    if not callable(f):
        raise TypeError(f"f must be a function f(params, inputs) -> logits, got {f!r}.")

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        return _taps.outputs_of(f(params, inputs)), model_state

    return apply
