"""Checks of what a step expects from terms, batches and states."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from kdtl_jax import _checks, trees
from kdtl_jax._model_functions import check_named_arrays, describe
from kdtl_jax._types import PyTree
from kdtl_jax.objective import Inputs, TermsFn


def optimizer(tx: Any) -> None:
    """Refuses anything but an optax optimizer, e.g. a learning rate, or `optax.adam` uncalled.

    Raises:
      TypeError: naming the argument received.
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(
            f"tx must be an optimizer, got {tx!r:.80}. Call it, as in optax.adam(1e-3)."
        )


def carried(**states: tuple[PyTree, PyTree]) -> None:
    """Refuses a step that changes the form of its model state or memory.

    Raises:
      ValueError: naming both, and the first leaf that differs.
    """
    for name, (new, old) in states.items():
        after, before = trees.flatten({name: new}), trees.flatten({name: old})
        if jax.tree.structure(new) == jax.tree.structure(old):
            wrong = [path for path in after if np.shape(after[path]) != np.shape(before[path])]
        else:
            wrong = [name]
        if wrong:
            path = wrong[0]
            came, held = (
                describe(each[path]) if path in each and len(each) else f"{len(each)} leaves"
                for each in (after, before)
            )
            source = "the terms return" if name == "memory" else "the model returns"
            raise ValueError(
                f"{source} a different {name} from the state's: {path!r} is {came}, was {held}. "
                f"Give init_state({name}=) what a step carries: the same structure and shapes."
            )


def told(terms: TermsFn, inputs: Inputs) -> Any:
    """`terms(inputs)`; a KeyError states what is available and what the state lacks."""
    try:
        return terms(inputs)
    except KeyError as error:
        if error.args and error.args[0] not in inputs.batch:
            error.add_note(
                f"The batch has {sorted(inputs.batch)}, the model returns {sorted(inputs.student)}."
            )
        if len(error.args) == 1:
            error.args = (_missing(error.args[0], inputs),)
        lacking = [n for n in ("connectors", "memory") if not jax.tree.leaves(getattr(inputs, n))]
        if lacking:
            how = ", ".join(f"{name}=method.{name}(key)" for name in lacking)
            error.add_note(
                f"The state has no {' and no '.join(lacking)}. If the terms are a method's, write "
                f"init_state(..., {how})."
            )
        raise


def _missing(entry: Any, inputs: Inputs) -> str:
    """What the terms looked for, and what is available."""
    fields = {name: getattr(inputs, name) for name in ("student", "teacher", "batch")}
    there = {name: sorted(map(str, x)) for name, x in fields.items() if isinstance(x, Mapping)}
    there |= {n: [] for n in ("connectors", "memory") if not jax.tree.leaves(getattr(inputs, n))}
    listed = ", ".join(f"inputs.{name} has {found or 'nothing'}" for name, found in there.items())
    advice = ""
    if entry in there.get("student", ()) and not there.get("teacher"):
        advice = (
            " There is no teacher: pass teacher= to make_step and teacher_params to the step, or "
            'its outputs as batch["teacher"].'
        )
    return f"the terms read {entry}, which is not there: {listed}.{advice}"


def donated(state: Any) -> bool:
    """Whether a state's arrays were donated to an earlier call."""
    return any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
        for leaf in jax.tree.leaves(state)
    )


def batch(given: Any) -> Mapping[str, Any]:
    """The batch, if it is a dict with `"inputs"` and weights `[B]`.

    Raises:
      TypeError: if it is not a mapping.
      ValueError: if an entry is missing or misshapen.
    """
    given = check_named_arrays("the batch", given)
    if "inputs" not in given:
        raise ValueError(
            f"the batch must be a dict with 'inputs', got the keys {sorted(given)}. Name "
            "what the models read 'inputs'."
        )
    shape = np.shape(given.get("weights", np.ones(1)))
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(given["inputs"]) if np.ndim(leaf)}
    if len(shape) != 1 or ("weights" in given and sizes and shape[0] not in sizes):
        size = f"[B] = {sorted(sizes)}" if sizes else "[B]"
        raise ValueError(
            f"the batch's 'weights' must be {size}, one per example, got {list(shape)}."
        )
    if "weights" in given:
        _checks.non_negative(**{"the batch's 'weights'": given["weights"]})
    return given


def no_padding_in_statistics(batch: Mapping[str, Any], before: PyTree, after: PyTree) -> None:
    """Refuses weights that may be 0 if the model's own state changes with its inputs.

    Rows of weight 0 do not affect the results for other rows, except through a model's batch
    statistics, which no mask reaches. Traced weights may be 0.

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
