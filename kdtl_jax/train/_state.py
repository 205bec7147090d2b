"""The training state: everything that changes from step to step."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _checks, _donation, trees
from kdtl_jax._types import Params, PyTree, Variables
from kdtl_jax.objective import Metrics
from kdtl_jax.train import _contracts

# Arrays by name, `[B, ...]` each; models read "inputs".
Batch = Mapping[str, Any]


class TrainState(NamedTuple):
    """Everything that changes from step to step; arrays only.

    A step returns a state of the same structure, shapes, dtypes and weak types, so it compiles
    once. `key` never advances: step `i` uses `fold_in(key, i)`, so resuming needs nothing else.
    """

    step: Array
    params: Params  # the model's own tree
    connectors: Params  # trained with the model; {} if there are none
    opt_state: PyTree
    model_state: PyTree
    memory: PyTree
    key: Array

    def __repr__(self) -> str:
        """Counts instead of arrays: states are printed by accident more often than on purpose."""
        steps = getattr(self.step, "shape", ())
        step = "deleted" if _donation.is_deleted(self.step) else self.step
        parts = [f"step: {list(steps)}" if steps else f"step={step}"]
        for name in self._fields[1:-1]:
            leaves = jax.tree.leaves(getattr(self, name))
            if leaves:
                numbers = sum(math.prod(getattr(leaf, "shape", ())) for leaf in leaves)
                parts.append(f"{name}: {numbers:,} numbers in {len(leaves)} leaves")
        return f"{type(self).__name__}({', '.join(parts)})"


class Step(Protocol):
    """`(state, batch, teacher variables or frozen parameters) -> (state, metrics)`."""

    def __call__(
        self, state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]: ...


class Split(NamedTuple):
    """Parameters and connectors split into trained and frozen, with `None` at the other's leaves.

    The optimizer sees the bare parameters if there are no connectors, and
    `{"params": ..., "connectors": ...}` if there are.
    """

    trained: PyTree
    frozen: PyTree
    has_connectors: bool

    def join(self, trained: PyTree) -> tuple[Params, Params]:
        """Parameters and connectors with the trained leaves replaced by `trained`."""
        merged = trees.combine(trained, self.frozen)
        return (merged["params"], merged["connectors"]) if self.has_connectors else (merged, {})


def split(params: Params, connectors: Params, trainable: trees.Selector) -> Split:
    """Splits off the trained leaves: parameters that match `trainable`, and all connectors."""
    trained, frozen = trees.partition(params, trainable)
    if not jax.tree.leaves(connectors):
        return Split(trained, frozen, has_connectors=False)
    trained_connectors, frozen_connectors = trees.partition(connectors, trees.everything)
    return Split(
        {"params": trained, "connectors": trained_connectors},
        {"params": frozen, "connectors": frozen_connectors},
        has_connectors=True,
    )


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    key: Array,
    connectors: Params = None,
    model_state: PyTree = None,
    memory: PyTree = None,
    trainable: trees.Selector = trees.everything,
) -> TrainState:
    """The state before the first step. Arrays are copied: a donated state never aliases them.

    Args:
      params: the model's parameters.
      tx: the optimizer. Its state covers the trained leaves: the bare parameters if there are no
        connectors, `{"params": ..., "connectors": ...}` otherwise.
      key: typed PRNG key (`jax.random.key(seed)`).
      connectors: parameters trained along with the model; terms read them as `inputs.connectors`.
      model_state: the model's state besides its parameters (batch statistics).
      memory: banks and queues that the terms carry.
      trainable: selector over `params` for what the optimizer may change; the same as the step's.

    Raises:
      TypeError: if `params` are `Variables`, `tx` is not an optimizer or `key` is not a key.
      ValueError: if the selector matches nothing.
    """
    if isinstance(params, Variables):
        raise TypeError(
            "params must be the parameters alone, got Variables. Write init_state(v.params, tx, "
            "key=key, model_state=v.model_state)."
        )
    _contracts.check_optimizer(tx)
    _checks.key(key=key)
    params = jax.tree.map(copy_leaf, params)
    connectors = jax.tree.map(copy_leaf, {} if connectors is None else connectors)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        connectors=connectors,
        opt_state=jax.tree.map(copy_leaf, tx.init(split(params, connectors, trainable).trained)),
        model_state=jax.tree.map(copy_leaf, model_state),
        memory=jax.tree.map(copy_leaf, memory),
        key=copy_leaf(key),
    )


def check_state(state: Any) -> None:
    """Raises TypeError unless `state` is a `TrainState`."""
    if not isinstance(state, TrainState):
        raise TypeError(
            "state must be what train.init_state(params, tx, key=key) makes, got "
            f"{type(state).__name__}."
        )


def copy_leaf(leaf: Any) -> Any:
    """A copy without weak type, so donating the state never deletes the caller's arrays."""
    if _checks.is_key(leaf):
        return jax.random.wrap_key_data(
            jnp.array(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
        )
    if not (hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))):
        return leaf
    array = jnp.array(leaf)
    return jax.lax.convert_element_type(array, array.dtype)


def cast_like(new: PyTree, old: PyTree) -> PyTree:
    """Casts every leaf to the old state's dtype, so that the step maps its state to itself."""

    def cast(new_leaf: Any, old_leaf: Any) -> Any:
        if _checks.is_key(old_leaf):
            return new_leaf
        return jax.lax.convert_element_type(new_leaf, old_leaf.dtype)

    return jax.tree.map(cast, new, old)
