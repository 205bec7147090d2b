"""DOT: an optimizer with a separate momentum for the distillation gradient.

    >>> import optax
    >>> from kdtl_jax import train
    >>> tx = optax.chain(
    ...     optax.add_decayed_weights(5e-4),
    ...     train.dot.scale_by_dot(distill=["kd"]),
    ...     optax.scale(-0.05),
    ... )

`train.make_step` with this optimizer is DOT; nothing else changes. The step finds the names of the
distillation terms in the optimizer's state and passes their gradient separately.
"""

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdtl_jax import _checks
from kdtl_jax._types import PyTree


@jax.tree_util.register_static
class Names(frozenset[str]):
    """Names of terms, a node without leaves: part of a state's structure."""


class DotState(NamedTuple):
    """A momentum for each gradient, and the names of the distillation terms."""

    task: PyTree
    distill: PyTree
    names: Names


def scale_by_dot(
    *, distill: Collection[str], momentum: float = 0.9, delta: float = 0.075
) -> optax.GradientTransformationExtraArgs:
    """`v <- g + (mu - delta) v` for the task, `mu + delta` for distillation, and their sum.

    The larger momentum lets the distillation loss dominate the direction, which its weight alone
    does not do. The updates passed to it are the gradient of all other terms; transformations
    before it in a chain (weight decay, as in the published code) act on that gradient alone.

    Args:
      distill: names of the terms whose gradient gets the larger momentum; some, not all.
      momentum: mu.
      delta: 0.075 on CIFAR, 0.09 for some pairs; `0 <= delta`, and `mu + delta < 1`. At 0 this is
        SGD with momentum on the sum.

    Raises:
      ValueError: if the momenta are outside `[0, 1)`, `distill` is empty, the step does not pass
        `distill_gradient`, or some parameters are masked out.

    References:
      Zhao et al., DOT: A Distillation-Oriented Trainer, 2023 (2307.08436); mdistiller's
      `engine/dot.py`.
    """
    _checks.scalar(momentum=momentum, delta=delta)
    if not (delta >= 0 and momentum - delta >= 0 and momentum + delta < 1):
        raise ValueError(
            "needs 0 <= delta <= momentum and momentum + delta < 1, got "
            f"momentum={momentum}, delta={delta}."
        )
    if isinstance(distill, str) or not distill:
        raise ValueError(f"distill must be names of terms, such as ['kd'], got {distill!r}.")
    names = Names(distill)

    def init(params: PyTree) -> Any:
        zeros = partial(jax.tree.map, jnp.zeros_like)
        return DotState(zeros(params), zeros(params), names)

    # `**extra` is optax's protocol: a chain passes every extra argument to all transformations.
    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        distill_gradient: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        if distill_gradient is None:
            raise ValueError(
                "scale_by_dot needs distill_gradient= besides the other terms' gradient. "
                "train.make_step passes it, but some wrappers of scale_by_dot do not pass it on: "
                "use make_step(microbatches=) instead of optax.MultiSteps."
            )

        def is_masked(node: Any) -> bool:
            return isinstance(node, optax.MaskedNode)

        if any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
            raise ValueError(
                "scale_by_dot must see every parameter: those that optax.masked or "
                "optax.partition keeps from it would lose their distillation gradient. Select "
                "parameters by the step's trainable=."
            )

        if jax.tree.structure(updates) != jax.tree.structure(distill_gradient):
            raise ValueError(
                "scale_by_dot got a different parameter structure from the step's: a wrapper "
                "around it, such as optax.flatten, changes it. Remove that wrapper."
            )

        def decayed(gradient: PyTree, velocity: PyTree, decay: float) -> PyTree:
            return jax.tree.map(lambda g, v: g + decay * v, gradient, velocity)

        task = decayed(updates, state.task, momentum - delta)
        distill = decayed(distill_gradient, state.distill, momentum + delta)
        return jax.tree.map(jnp.add, task, distill), DotState(task, distill, names)

    return optax.GradientTransformationExtraArgs(init, update)


def distilled(opt_state: PyTree) -> frozenset[str]:
    """The terms whose gradient a `scale_by_dot` in the optimizer takes separately; none without
    one.

    Raises:
      ValueError: if there are two of them: each would add the gradient of the other's terms.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, DotState))
    names = [leaf.names for leaf in leaves if isinstance(leaf, DotState)]
    if len(names) > 1:
        raise ValueError("scale_by_dot is used once: name all distillation terms in one.")
    return names[0] if names else frozenset()
