"""Checks of model functions and named arrays, with one message for each common mistake."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kdtl_jax._types import ModelFn, Outputs, PyTree

PROTOCOL = "model(params, model_state, inputs, *, key=None, train=False) -> (outputs, model_state)"


def model_function(**models: Any) -> None:
    """Refuses objects that are not model functions: a module, a transformed pair, Variables.

    Raises:
      TypeError: naming the object, and the adapters that turn it into a model function.
    """
    for name, model in models.items():
        if callable(model) and not (hasattr(model, "init") and hasattr(model, "apply")):
            try:
                inspect.signature(model).bind(None, None, None, key=None, train=False)
                continue
            except TypeError:
                pass
            except ValueError:  # a signature that cannot be read
                continue
        raise TypeError(
            f"{name} must be a model function {PROTOCOL}, got {describe(model)}. Take the .apply "
            "of interop.linen.model(module) (likewise nnx, equinox and haiku), or "
            "interop.function(f) for a plain f(params, inputs)."
        )


def call_model(
    name: str, model: ModelFn, params: Any, model_state: PyTree, inputs: Any, **mode: Any
) -> tuple[Outputs, PyTree]:
    """Calls `model(params, model_state, inputs, **mode)` and checks the result.

    Raises:
      TypeError: if it returns anything other than `(outputs, model_state)`.
      ValueError: if the model needs a state, such as batch statistics, and none was given.
    """
    try:
        result = model(params, model_state, inputs, **mode)
    except Exception as error:
        if params is None and name == "teacher":
            raise ValueError(
                "there is a teacher, and teacher_params got none. Write step(state, batch, "
                "teacher_params)."
            ) from error
        if isinstance(params, Mapping) and "params" in params and not isinstance(error, ValueError):
            raise TypeError(
                f"the parameters of the {name} must be those alone, got the collections "
                f"{sorted(params)}. Write v['params'], and model_state={{'batch_stats': "
                "v['batch_stats']} where there are statistics."
            ) from error
        if jax.tree.leaves(model_state) or not _lacks_state(error):
            raise
        if mode.get("train"):
            argument = "init_state"
            call = "init_state(v.params, tx, key=key, model_state=v.model_state)"
        else:
            argument = "teacher_params" if name == "teacher" else "the step"
            call = "Variables(params, model_state)"
        raise ValueError(
            f"the {name} has a state besides its parameters (batch statistics), and {argument} got "
            f"none. Write {call}."
        ) from error
    return outputs_of(result, name)


def _lacks_state(error: BaseException) -> bool:
    """Whether a framework reports a missing collection."""
    message = f"{type(error).__name__} {error}"
    return any(word in message for word in ("ScopeCollectionNotFound", "batch_stats", "BatchStat"))


def outputs_of(result: Any, name: str) -> tuple[Outputs, PyTree]:
    """Checks that a model function returned `(outputs, model_state)`.

    Raises:
      TypeError: if it returned anything else.
    """
    if isinstance(result, (tuple, list)) and len(result) == 2:
        outputs, model_state = result
        if isinstance(outputs, Mapping):
            return outputs, model_state
    raise TypeError(
        f"the {name} must return (outputs, model_state) with outputs a dict such as "
        f"{{'logits': array}}, got {describe(result)}. interop.function(f) makes a model "
        "function of f(params, inputs) -> logits."
    )


def check_named_arrays(name: str, arrays: Any) -> Mapping[str, Any]:
    """Checks that named arrays, such as a batch, are a mapping.

    Raises:
      TypeError: if it is not a mapping.
    """
    if isinstance(arrays, Mapping):
        return arrays
    example = "{'inputs': x, 'labels': y}"
    if hasattr(arrays, "inputs") and hasattr(arrays, "labels"):  # a Dataset
        example = "{'inputs': data.inputs, 'labels': data.labels}"
    raise TypeError(
        f"{name} must be a dict with 'inputs', got {describe(arrays)}. Write for example {example}."
    )


def describe(value: Any) -> str:
    """Describes a value for a message."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"an array of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(type(part).__name__ for part in value)
        return f"{type(value).__name__} of {len(value)}: {inner}"
    if inspect.isfunction(value):
        return f"{value.__name__}{inspect.signature(value)}"
    return f"{type(value).__name__}"
