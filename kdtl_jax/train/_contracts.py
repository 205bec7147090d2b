"""Checks of a step's terms, batches and states."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kdtl_jax import _checks, trees
from kdtl_jax._model_functions import check_named_arrays, describe
from kdtl_jax._types import PyTree
from kdtl_jax.objective import Inputs, TermsFn


def check_optimizer(tx: Any) -> None:
    """Refuses anything but an optax optimizer, e.g. a learning rate, or `optax.adam` uncalled.

    Raises:
      TypeError: naming the argument received.
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(
            f"tx must be an optimizer, got {tx!r:.80}. Call it, as in optax.adam(1e-3)."
        )


def check_carried(**states: tuple[PyTree, PyTree]) -> None:
    """Refuses a step that changes the form of its model state or memory.

    Raises:
      ValueError: naming both, and the first leaf that differs.
    """
    for name, (new, old) in states.items():
        leaves = [trees.flatten({name: tree}) for tree in (new, old)]
        changed = [name]
        if jax.tree.structure(new) == jax.tree.structure(old):
            shapes = [{path: np.shape(leaf) for path, leaf in flat.items()} for flat in leaves]
            changed = [path for path in shapes[0] if shapes[0][path] != shapes[1][path]]
        if changed:
            path = changed[0]
            new_form, old_form = (
                describe(flat[path]) if path in flat else f"{len(flat)} leaves" for flat in leaves
            )
            source = "the terms return" if name == "memory" else "the model returns"
            raise ValueError(
                f"{source} a different {name} from the state's: {path!r} is {new_form}, was "
                f"{old_form}. Give init_state({name}=) what a step carries: the same structure and "
                "shapes."
            )


def call_terms(terms: TermsFn, inputs: Inputs) -> Any:
    """Calls `terms(inputs)`; a KeyError states what is available and what the state lacks."""
    try:
        return terms(inputs)
    except KeyError as error:
        if error.args and error.args[0] not in inputs.batch:
            error.add_note(
                f"The batch has {sorted(inputs.batch)}, the model returns {sorted(inputs.student)}."
            )
        if len(error.args) == 1:
            error.args = (_missing_message(error.args[0], inputs),)
        if missing := _empty_fields(inputs):
            arguments = ", ".join(f"{name}=method.{name}(key)" for name in missing)
            error.add_note(
                f"The state has no {' and no '.join(missing)}. If the terms are a method's, write "
                f"init_state(..., {arguments})."
            )
        raise


def _empty_fields(inputs: Inputs) -> list[str]:
    return [name for name in ("connectors", "memory") if not jax.tree.leaves(getattr(inputs, name))]


def _missing_message(entry: Any, inputs: Inputs) -> str:
    """The message for an entry that the terms read and that is not available."""
    fields = {name: getattr(inputs, name) for name in ("student", "teacher", "batch")}
    available = {name: sorted(map(str, x)) for name, x in fields.items() if isinstance(x, Mapping)}
    available |= {name: [] for name in _empty_fields(inputs)}
    contents = ", ".join(f"inputs.{n} has {names or 'nothing'}" for n, names in available.items())
    advice = ""
    if entry in available.get("student", ()) and not available.get("teacher"):
        advice = (
            " There is no teacher: pass teacher= to make_step and teacher_params to the step, or "
            'its outputs as batch["teacher"].'
        )
    return f"the terms read {entry}, which is not there: {contents}.{advice}"


def check_batch(batch: Any) -> Mapping[str, Any]:
    """Checks that a batch is a dict with `"inputs"` and weights `[B]`, and returns it.

    Raises:
      TypeError: if it is not a mapping.
      ValueError: if an entry is missing or misshapen.
    """
    batch = check_named_arrays("the batch", batch)
    if "inputs" not in batch:
        raise ValueError(
            f"the batch must be a dict with 'inputs', got the keys {sorted(batch)}. Store "
            "the models' inputs under 'inputs'."
        )
    shape = np.shape(batch.get("weights", np.ones(1)))
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch["inputs"]) if np.ndim(leaf)}
    if len(shape) != 1 or ("weights" in batch and sizes and shape[0] not in sizes):
        size = f"[B] = {sorted(sizes)}" if sizes else "[B]"
        raise ValueError(
            f"the batch's 'weights' must be {size}, one per example, got {list(shape)}."
        )
    if "weights" in batch:
        _checks.non_negative(**{"the batch's 'weights'": batch["weights"]})
    return batch


def check_statistics(batch: Mapping[str, Any], old_state: PyTree, new_state: PyTree) -> None:
    """Refuses weights that may be 0 if the model's own state changes with its inputs.

    Rows of weight 0 do not affect the results for other rows, except through a model's batch
    statistics, which no mask reaches. Traced weights may be 0.

    Raises:
      ValueError: naming the first leaf that changes.
    """
    weights = batch.get("weights")
    if weights is None or jax.tree.structure(old_state) != jax.tree.structure(new_state):
        return
    concrete = _checks.concrete(weights)
    if concrete is not None and np.all(concrete != 0):
        return
    leaves = jax.tree_util.tree_leaves_with_path(new_state)
    changing = [
        trees.path_string(path)
        for (path, leaf), previous in zip(leaves, jax.tree.leaves(old_state), strict=True)
        if trees.is_inexact(leaf) and leaf is not previous
    ]
    if changing:
        raise ValueError(
            f"the model's state changes in training ({changing[0]!r}), and rows of weight 0 would "
            "enter its statistics. Give it batches without 'weights': a short last batch in its "
            "own shape, or none. To weight examples, let the term return "
            "objective.Mean(sum(w * values), sum(w))."
        )
