"""Plain functions as model functions."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from kdtl_jax._types import ModelFn, Outputs, Params, PyTree


def function(f: Callable[[Params, Any], Any]) -> ModelFn:
    """`f(params, inputs) -> logits` as a model function, without state, key or mode.

        step = train.make_step(interop.function(lambda params, x: x @ params["w"]), ...)

    Args:
      f: returns an array, which becomes `"logits"`, or a dict of outputs.
    """

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        outputs = f(params, inputs)
        return outputs if isinstance(outputs, Mapping) else {"logits": outputs}, model_state

    return apply
