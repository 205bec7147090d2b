"""What a step expects of models, batches and states, told where it is not so."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from kdtl_jax import _checks, trees
from kdtl_jax._types import ModelFn, Outputs, PyTree
from kdtl_jax.objective import Inputs, TermsFn

PROTOCOL = "model(params, model_state, inputs, *, key=None, train=False) -> (outputs, model_state)"


def model_function(**models: Any) -> None:
    """Refuses what cannot be called as a model function: a module, a transformed pair, Variables.

    Raises:
      TypeError: naming what came, and the adapters that make a model function of it.
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
            f"{name} must be a model function {PROTOCOL}, got {_described(model)}. Take the .apply "
            "of interop.linen.model(module), nnx, equinox or haiku likewise, or "
            "interop.function(f) of a plain f(params, inputs)."
        )


def called(
    name: str, model: ModelFn, params: Any, model_state: PyTree, inputs: Any, **mode: Any
) -> tuple[Outputs, PyTree]:
    """`model(params, model_state, inputs, **mode)`, checked.

    Raises:
      TypeError: if it returns something else than `(outputs, model_state)`.
      ValueError: if the model needs a state, such as batch statistics, and was given none.
    """
    try:
        returned = model(params, model_state, inputs, **mode)
    except Exception as error:
        if jax.tree.leaves(model_state) or not _misses_state(error):
            raise
        if mode.get("train"):
            where = "init_state"
            how = "init_state(v.params, tx, key=key, model_state=v.model_state)"
        else:
            where = "teacher_params" if name == "teacher" else "the step"
            how = "Variables(params, model_state)"
        raise ValueError(
            f"the {name} has a state besides its parameters (batch statistics), and {where} got "
            f"none. Write {how}."
        ) from error
    return outputs_of(returned, name)


def told(terms: TermsFn, inputs: Inputs) -> Any:
    """`terms(inputs)`; a KeyError says what the state lacks where a method's terms need it."""
    try:
        return terms(inputs)
    except KeyError as error:
        lacking = [n for n in ("connectors", "memory") if not jax.tree.leaves(getattr(inputs, n))]
        if lacking:
            how = ", ".join(f"{name}=method.{name}(key)" for name in lacking)
            error.add_note(
                f"The state has no {' and no '.join(lacking)}. If the terms are a method's, write "
                f"init_state(..., {how})."
            )
        raise


def donated(state: Any) -> bool:
    """Whether a state's arrays were given away to an earlier call."""
    return any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
        for leaf in jax.tree.leaves(state)
    )


def _misses_state(error: BaseException) -> bool:
    """Whether a framework complains of a collection that is not there."""
    said = f"{type(error).__name__} {error}"
    return any(word in said for word in ("ScopeCollectionNotFound", "batch_stats", "BatchStat"))


def outputs_of(returned: Any, name: str) -> tuple[Outputs, PyTree]:
    """What a model function returned, if it is `(outputs, model_state)`.

    Raises:
      TypeError: if it is something else.
    """
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        outputs, model_state = returned
        if isinstance(outputs, Mapping):
            return outputs, model_state
    raise TypeError(
        f"the {name} must return (outputs, model_state) with outputs a dict such as "
        f"{{'logits': array}}, got {_described(returned)}. interop.function(f) makes a model "
        "function of f(params, inputs) -> logits."
    )


def batch(given: Any) -> Mapping[str, Any]:
    """The batch, if it is a dict with `"inputs"` and weights `[B]`.

    Raises:
      TypeError: if it is not a mapping.
      ValueError: if an entry is missing or misshapen.
    """
    if not isinstance(given, Mapping):
        example = "{'inputs': x, 'labels': y}"
        if hasattr(given, "inputs") and hasattr(given, "labels"):  # a Dataset
            example = "{'inputs': data.inputs, 'labels': data.labels}"
        raise TypeError(
            f"the batch must be a dict with 'inputs', got {_described(given)}. Write for example "
            f"{example}."
        )
    if "inputs" not in given:
        raise ValueError(
            f"the batch must be a dict with 'inputs', got the keys {sorted(given)}. Name "
            "what the models read 'inputs'."
        )
    shape = np.shape(given.get("weights", np.ones(1)))
    if len(shape) != 1:
        raise ValueError(f"the batch's 'weights' must be [B], one per example, got {list(shape)}.")
    return given


def no_padding_in_statistics(batch: Mapping[str, Any], before: PyTree, after: PyTree) -> None:
    """Refuses weights that may be 0 where the model's own state changes with its inputs.

    Rows of weight 0 change no number of the others, except in a model's batch statistics, which no
    mask reaches. Traced weights may be 0.

    Raises:
      ValueError: naming what changes.
    """
    weights = batch.get("weights")
    if weights is None or jax.tree.structure(before) != jax.tree.structure(after):
        return
    known = _checks.concrete(weights)
    if known is not None and np.all(known != 0):
        return
    old, new = jax.tree.leaves(before), jax.tree_util.tree_leaves_with_path(after)
    changing = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, leaf), past in zip(new, old, strict=True)
        if trees.is_inexact(leaf) and leaf is not past
    ]
    if changing:
        raise ValueError(
            f"the model's state changes in training ({changing[0]!r}), and rows of weight 0 would "
            "enter its statistics. Give it batches without 'weights': a short last batch in its "
            "own shape, or none. To weight examples, let the term return "
            "objective.Mean(sum(w * values), sum(w))."
        )


def _described(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"an array of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(type(part).__name__ for part in value)
        return f"{type(value).__name__} of {len(value)}: {inner}"
    if inspect.isfunction(value):
        return f"{value.__name__}{inspect.signature(value)}"
    return f"{type(value).__name__}"
