"""The training state: everything that changes from step to step, and nothing else."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import Params, PyTree
from kdtl_jax.objective import Metrics

Batch = Mapping[str, Any]


class TrainState(NamedTuple):
    """Everything that changes from step to step; arrays only.

    A step returns a state of the same structure, shapes, dtypes and weak types, so it compiles
    once. `key` never advances: step `i` uses `fold_in(key, i)`, so resuming needs nothing else.
    """

    step: Array
    params: Params
    opt_state: PyTree
    model_state: PyTree
    memory: PyTree
    key: Array


class Step(Protocol):
    """`(state, teacher variables or parameters, batch) -> (state, metrics)`."""

    def __call__(
        self, state: TrainState, teacher_params: Any, batch: Batch, /
    ) -> tuple[TrainState, Metrics]: ...


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    key: Array,
    model_state: PyTree = None,
    memory: PyTree = None,
    trainable: trees.Selector = trees.everything,
) -> TrainState:
    """The state before the first step. Arrays are copied: a donated state never aliases them.

    Args:
      params: a pytree; for distillation `{"student": ..., "connectors": ...}`.
      tx: the optimizer. Its state is made for the trainable partition alone.
      key: typed PRNG key (`jax.random.key(seed)`).
      model_state: what the model carries besides parameters (batch statistics).
      memory: banks and queues that the terms carry.
      trainable: selector of what the optimizer may change; the same as the step's.

    Raises:
      ValueError: if the selector matches nothing.
    """
    params = jax.tree.map(own, params)
    trained, _ = trees.partition(params, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.tree.map(own, tx.init(trained)),
        model_state=jax.tree.map(own, model_state),
        memory=jax.tree.map(own, memory),
        key=own(key),
    )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def own(leaf: Any) -> Any:
    """A copy without weak type, so that donating the state never deletes the caller's arrays."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(
            jnp.array(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
        )
    if not (hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))):
        return leaf
    array = jnp.array(leaf)
    return jax.lax.convert_element_type(array, array.dtype)


def like(new: PyTree, old: PyTree) -> PyTree:
    """Casts every leaf to the old state's dtype, so that the step maps its state to itself."""

    def cast(after: Any, before: Any) -> Any:
        return after if _is_key(before) else jax.lax.convert_element_type(after, before.dtype)

    return jax.tree.map(cast, new, old)
