"""Optimizers and balances that look at the terms one by one, not at their sum.

`term_gradients` gives the gradient of every term from one forward pass, `scale_by_dot` is the
optimizer that treats the distillation gradient apart, `make_dot_step` puts them into a step;
`balanced` brings terms to one size.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _numerics, objective, trees
from kdtl_jax._types import ModelFn, PyTree, Variables
from kdtl_jax.objective import Inputs, Masked, Mean, Metrics, Terms, TermsFn, Weights
from kdtl_jax.train._state import Batch, Step, TrainState, like


class DotState(NamedTuple):
    """One momentum per gradient."""

    task: PyTree
    distill: PyTree


def term_gradients(
    loss: Callable[[PyTree], tuple[Mapping[str, Array], Any]], params: PyTree
) -> tuple[dict[str, Array], dict[str, PyTree], Any]:
    """Values and gradients of every scalar term: one forward pass, one pullback per term.

    Args:
      loss: `params -> ({name: []}, auxiliary)`.
      params: what is differentiated.

    Returns:
      `({name: []}, {name: gradient}, auxiliary)`. The gradient of a weighted sum is the weighted
      sum of these; their cosines show where terms conflict.
    """
    values, pull, auxiliary = jax.vjp(loss, params, has_aux=True)
    values = dict(values)
    zeros = {name: jnp.zeros_like(value) for name, value in values.items()}
    gradients = {
        name: pull({**zeros, name: jnp.ones_like(value)})[0] for name, value in values.items()
    }
    return values, gradients, auxiliary


def scale_by_dot(
    *, momentum: float = 0.9, delta: float = 0.075
) -> optax.GradientTransformationExtraArgs:
    """DOT: `v <- g + (mu - delta) v` for the task, `mu + delta` for distillation; their sum.

    The larger momentum lets the distillation loss dominate the direction, which its weight alone
    does not do. As in the published code, weight decay belongs to the task gradient only:

        tx = optax.chain(optax.add_decayed_weights(5e-4), scale_by_dot(), optax.scale(-0.05))
        updates, state = tx.update(task_gradient, state, params, distill_gradient=other)

    Args:
      momentum: mu.
      delta: 0.075 on CIFAR, 0.09 for some pairs; `0 <= delta`, and `mu + delta < 1`. At 0 this is
        SGD with momentum on the sum.

    Returns:
      A transformation of the task's gradient that takes `distill_gradient` beside it.

    Raises:
      ValueError: if the momenta leave `[0, 1)`, or `distill_gradient` is missing.

    References:
      Zhao et al., DOT: A Distillation-Oriented Trainer, 2023 (2307.08436); mdistiller's
      `engine/dot.py`.
    """
    if not (delta >= 0 and momentum - delta >= 0 and momentum + delta < 1):
        raise ValueError(
            "needs 0 <= delta <= momentum and momentum + delta < 1, got "
            f"momentum={momentum}, delta={delta}."
        )

    def init(params: PyTree) -> DotState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return DotState(zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, distill_gradient: PyTree = None
    ) -> tuple[PyTree, DotState]:
        if distill_gradient is None:
            raise ValueError(
                "update needs distill_gradient= beside the task's gradient; "
                "make_dot_step passes it."
            )

        task = jax.tree.map(lambda g, v: g + (momentum - delta) * v, updates, state.task)
        distill = jax.tree.map(
            lambda g, v: g + (momentum + delta) * v, distill_gradient, state.distill
        )
        return jax.tree.map(jnp.add, task, distill), DotState(task, distill)

    return optax.GradientTransformationExtraArgs(init, update)


def make_dot_step(
    student: ModelFn,
    teacher: ModelFn | None,
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    *,
    distill: Collection[str],
    trainable: trees.Selector = trees.everything,
) -> Step:
    """A distillation step whose optimizer sees two gradients: the task's and distillation's.

    Arguments are those of `train.make_distill_step`; make the state with `train.init_state`. Costs
    one forward pass and two backward passes.

    Args:
      student: the student's model function.
      teacher: the teacher's, or None to read `batch["teacher"]`.
      terms: `terms(inputs) -> {name: values}`, with or without memory.
      weights: `{name: number, array or schedule}`, the terms' keys.
      tx: an optimizer with `scale_by_dot` in it.
      distill: names of the terms whose gradient takes the larger momentum.
      trainable: selector over `state.params`.

    Raises:
      ValueError: when traced, if terms and weights have different keys, or `distill` names no term
        or all of them.
    """
    chained = optax.with_extra_args_support(tx)

    def step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = trees.partition(state.params, trainable)
        taught = batch.get("teacher", {})
        if teacher is not None:
            given = teacher_params
            frozen_teacher = given if isinstance(given, Variables) else Variables(given)
            taught, _ = teacher(frozen_teacher.params, frozen_teacher.model_state, batch["inputs"])
        taught = jax.lax.stop_gradient(taught)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))

        def loss(trained: PyTree) -> tuple[dict[str, Array], Any]:
            params = trees.combine(trained, frozen)
            outputs, model_state = student(
                params["student"], state.model_state, batch["inputs"], key=keys[0], train=True
            )
            inputs = Inputs(outputs, taught, batch, params, state.memory, state.step, keys[1])
            returned = terms(inputs)
            named, memory = returned if isinstance(returned, tuple) else (returned, state.memory)
            means = objective.reduce_all(named, batch.get("weights"))
            resolved = objective.resolve(weights, state.step)
            total = objective.weighted_sum(means, resolved)
            chosen = {name: means[name] for name in means if name in distill}
            if not set(distill) < means.keys():
                raise ValueError(
                    f"distill must name some of the terms {sorted(means)} and leave "
                    f"the task's, got {sorted(distill)}."
                )
            part = objective.weighted_sum(chosen, {name: resolved[name] for name in chosen})
            return {"task": total - part, "distill": part}, (means, total, model_state, memory)

        _, gradients, (means, total, model_state, memory) = term_gradients(loss, trained)
        updates, opt_state = chained.update(
            gradients["task"], state.opt_state, trained, distill_gradient=gradients["distill"]
        )
        trained = optax.apply_updates(trained, updates)
        params = trees.combine(trained, frozen)
        new = TrainState(state.step + 1, params, opt_state, model_state, memory, state.key)
        logged = means | {"loss": Mean(total, jnp.ones_like(total))}
        return like(new, state), objective.stack(logged)

    return step


def balanced(
    terms: Terms, *, reference: str, example_weights: Array | None = None, eps: float = 1e-8
) -> Terms:
    """Scales every term to the size of one of them: `x * stop_gradient(mean ref / mean x)`.

    The weights then say how much each term matters, whatever its units. Gradients keep their
    directions; only their sizes change, from step to step.

    Args:
      terms: `{name: values}`, as the objective takes them, none negative.
      reference: the name that stays as it is.
      example_weights: `[B]`, the batch's, so that padding does not count.
      eps: added to the mean that divides, so that a term at 0 stays 0.

    Raises:
      ValueError: if there is no such term.

    References:
      Model-Optimizer's Megatron loss balancer brings intermediate losses to the logit loss.
    """
    if reference not in terms:
        raise ValueError(f"no term {reference!r}, there are {sorted(terms)}.")
    means = objective.reduce_all(terms, example_weights)
    target = jax.lax.stop_gradient(means[reference].value())

    def scaled(name: str, term: objective.Term) -> objective.Term:
        if name == reference:
            return term
        mean = jax.lax.stop_gradient(means[name].value())
        ratio = target.astype(mean.dtype) / (mean + eps)
        if isinstance(term, Mean):
            return Mean(ratio * _numerics.upcast(term.total), term.weight)
        if isinstance(term, Masked):
            return Masked(ratio * _numerics.upcast(term.values), term.where)
        return ratio * _numerics.upcast(term)

    return {name: scaled(name, term) for name, term in terms.items()}


def remainder(weights: Mapping[str, float], *, to: str) -> dict[str, float]:
    """Weights that sum to 1: what the given ones leave goes to the term `to`.

    Raises:
      ValueError: if a weight is negative, they exceed 1, or `to` has one already.

    References:
      Model-Optimizer's `StaticLossBalancer`.
    """
    left = 1 - sum(weights.values())
    if to in weights or left < -1e-6 or any(weight < 0 for weight in weights.values()):
        raise ValueError(
            f"expected non-negative weights of other terms than {to!r} that sum to at "
            f"most 1, got {dict(weights)}."
        )
    return {**weights, to: max(left, 0.0)}
