"""Equinox modules as model functions.

    model, params, state = equinox.model(MyModule(key=key))
    outputs, state = model(params, state, inputs, key=key, train=True)

`params` is the module's inexact arrays, a module with None elsewhere; selectors see paths
such as `layers/0/weight`. Equinox modules work on one example; the batch is mapped here. Features
are returned by the module itself (there is nothing to intercept): return a dict with `"logits"`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax import Array

from kdtl_jax._types import ModelFn, Outputs, Params, PyTree

# (module for one example, state or None, input, key or None, train) -> (outputs, state)
Call = Callable[[Any, Any, Any, Any, bool], tuple[Any, Any]]


class Equinox(NamedTuple):
    """A module as a model function, its parameters, and its state (or None)."""

    apply: ModelFn
    params: Params
    model_state: PyTree


def standard_call(module: Any, state: Any, inputs: Any, key: Any, train: bool) -> tuple[Any, Any]:
    """Calls a module with `state` if it has one and `key=` if its signature does."""
    del train  # dropout and batch norm read their `inference` field
    accepted = inspect.signature(type(module).__call__).parameters
    keys = {"key": key} if "key" in accepted else {}
    if state is None:
        return module(inputs, **keys), None
    return module(inputs, state, **keys)


def model(
    module: eqx.Module,
    state: eqx.nn.State | None = None,
    *,
    call: Call = standard_call,
    axis_name: str = "batch",
) -> Equinox:
    """`(apply, params, model_state)` of an Equinox module, following the library's contract.

    The module is mapped over the batch; each example gets its own key. `train=False` runs it in
    inference mode (`eqx.nn.inference_mode`), so that dropout is off and statistics are frozen.
    To put trained parameters back: `equinox.with_params(module, params)`.

    Args:
      module: from its constructor, or the first half of `eqx.nn.make_with_state(...)`.
      state: the second half, if there is one.
      call: how the module is called on one example.
      axis_name: the name that the module's batch norms reduce over.
    """
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        # Equinox refuses a state that was used before; a copy may be used as often as one likes.
        model_state = jax.tree.map(lambda leaf: leaf, model_state)
        combined = eqx.combine(params, static)
        ready = eqx.nn.inference_mode(combined, value=not train)
        size = jax.tree.leaves(inputs)[0].shape[0]
        keys = None if key is None else jax.random.split(key, size)
        outputs, new_state = jax.vmap(
            lambda x, k: call(ready, model_state, x, k, train),
            in_axes=(0, None if keys is None else 0),
            out_axes=(0, None),
            axis_name=axis_name,
        )(inputs, keys)
        named = dict(outputs) if isinstance(outputs, dict) else {"logits": outputs}
        return named, new_state if train else model_state

    return Equinox(apply, params, state)


def with_params(module: Any, params: Params) -> Any:
    """The module with its inexact arrays replaced by `params` (same structure)."""
    _, static = eqx.partition(module, eqx.is_inexact_array)
    if jax.tree.structure(eqx.filter(module, eqx.is_inexact_array)) != jax.tree.structure(params):
        raise ValueError(
            "params must have the structure of the module's own arrays; fill "
            "them with transforms.transfer(source, equinox.model(module).params)."
        )
    return eqx.combine(params, static)
