"""Donation: a jitted step reuses the buffers of its state, which deletes the old arrays."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer


def is_deleted(tree: Any) -> bool:
    """Whether any array of a tree was donated to an earlier call."""
    return any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
        for leaf in jax.tree.leaves(tree)
    )


def check_alive(state: Any, **others: Any) -> None:
    """Raises RuntimeError if the state or one of the other arguments, by name, was donated."""
    if is_deleted(state):
        raise RuntimeError(
            "this state was already given to a jitted step, which reuses its arrays. Continue "
            "with the state that the step returned: state, metrics = step(state, batch)."
        )
    for name, tree in others.items():
        if is_deleted(tree):
            raise RuntimeError(
                f"{name} holds arrays of a state that was given to a jitted step, which reuses "
                f"them. Copy them before that step: {name} = jax.tree.map(jnp.copy, {name})."
            )


@contextlib.contextmanager
def explained(state: Any, **others: Any) -> Iterator[None]:
    """Runs a call that donates `state`; XLA's errors about donation then name the argument.

    Raises:
      RuntimeError: if an array was donated earlier, or is in the state twice, or is in the state
        and in another argument.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # A step that fails while it runs (out of memory) has deleted its state too.
        if "deleted" in str(error):
            try:
                check_alive(state, **others)
            except RuntimeError as explanation:
                raise explanation from error
        if "donate" in str(error) and "in the same call" in str(error):
            names = " or ".join(others)
            raise RuntimeError(
                f"an array of the state is also in {names}, but a jitted step reuses the state's "
                "arrays. Copy them: teacher_params = jax.tree.map(jnp.copy, state.params)."
            ) from error
        if "donate the same buffer twice" in str(error):
            raise RuntimeError(
                "an array is in the state twice, but a jitted step reuses each of the state's "
                "arrays once. Copy them: state = jax.tree.map(jnp.copy, state)."
            ) from error
        raise
