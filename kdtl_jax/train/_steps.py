"""The training step and the evaluation step."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import _checks, _donation, _host_arrays, _model_functions, objective, trees
from kdtl_jax._types import ModelFn, PyTree, Variables
from kdtl_jax.objective import Inputs, Mean, Metrics, TermsFn, Weights
from kdtl_jax.train import _contracts, _gradients, dot, precision
from kdtl_jax.train._gradients import Carried, GradientResult, Means, Objective
from kdtl_jax.train._state import Batch, Step, TrainState, cast_like, check_state, split


def make_step(
    model: ModelFn,
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    *,
    teacher: ModelFn | None = None,
    trainable: trees.Selector = trees.everything,
    microbatches: int = 1,
) -> Step:
    """A training step `step(state, batch, teacher_params=None) -> (state, metrics)`, not jitted.

    The batch is a dict with `"inputs"`, which both models read, usually `"labels"`, and optionally
    `"weights"` `[B]` (0 marks padding). The optimizer receives the extra arguments `value`, `grad`
    and `value_fn` of the loss if it takes any, so line searches, Polyak steps, MoMo and
    `reduce_on_plateau` work without changes; SAM receives `grad_fn`, unless it is in a chain.

    Args:
      model: the model function to train.
      terms: `terms(inputs) -> {name: values}` or `({name: values}, memory)`.
      weights: `{name: number, traced array or schedule of the step}`, with the terms' keys.
      tx: an optax optimizer.
      teacher: run on `teacher_params` (parameters or `Variables`) without gradient, in evaluation
        mode; its outputs are `inputs.teacher`. Without a teacher, `inputs.teacher` is
        `batch["teacher"]` (a cache) or empty. `teacher_params` are passed unchanged to the terms as
        `inputs.teacher_params`: frozen parameters for penalties such as L2-SP.
      trainable: selector over `state.params`; no gradient is computed for the rest.
        `state.connectors` are always trained.
      microbatches: process the batch in this many parts, one after another, to save memory. Sums
        and counts are accumulated separately, so for terms on single examples the gradient is that
        of the whole batch, for any masks; a relational term sees one part at a time.

    Returns:
      The step. Its metrics are a mapping with every unweighted term and `"loss"`.

    Raises:
      TypeError: if `model` or `teacher` is not a model function; when the step is traced, if their
        results or the batch do not have the form above.
      ValueError: when the step is traced, if terms and weights have different keys, or the
        selector matches nothing, or the batch does not divide into the microbatches, or rows of
        weight 0 might enter batch statistics.
    """
    _model_functions.model_function(
        model=model, **({} if teacher is None else {"teacher": teacher})
    )
    _contracts.check_optimizer(tx)
    _checks.count(1, microbatches=microbatches)
    optimizer = optax.with_extra_args_support(tx)

    def run_teacher(teacher_params: Any, batch: Batch) -> Any:
        if teacher is None:
            return batch.get("teacher", {})
        variables = _variables(teacher_params)
        outputs, _ = _model_functions.call_model(
            "teacher", teacher, variables.params, variables.model_state, batch["inputs"]
        )
        return jax.lax.stop_gradient(outputs)

    def step(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        check_state(state)
        batch = _blank_padding(_contracts.check_batch(batch))
        parts = split(state.params, state.connectors, trainable)

        def forward(
            trained: PyTree, carried: Carried, batch: Batch, part: Array
        ) -> tuple[Means, Carried]:
            params, connectors = parts.join(trained)
            model_state, memory = carried
            key = jax.random.fold_in(state.key, state.step)
            if microbatches > 1:
                key = jax.random.fold_in(key, part)
            model_key, terms_key = jax.random.split(key)
            outputs, new_model_state = _model_functions.call_model(
                "model", model, params, model_state, batch["inputs"], key=model_key, train=True
            )
            _contracts.check_statistics(batch, model_state, new_model_state)
            teacher_outputs = run_teacher(teacher_params, batch)
            inputs = Inputs(
                outputs,
                jax.lax.stop_gradient(teacher_outputs),
                batch,
                params,
                connectors,
                teacher_params,
                memory,
                state.step,
                terms_key,
            )
            returned = _contracts.call_terms(terms, inputs)
            terms_by_name, memory = returned if isinstance(returned, tuple) else (returned, memory)
            means = objective.reduce_all(
                terms_by_name, batch.get("weights"), batch_size=_size(batch)
            )
            return means, (new_model_state, memory)

        scale, separate = precision.loss_scale(state.opt_state), dot.distilled(state.opt_state)
        spec = Objective(forward, objective.resolve(weights, state.step), scale, separate)
        carried = state.model_state, state.memory
        if microbatches == 1:
            gradient, loss, examples = _gradients.full_batch, _gradients.full_batch_loss, batch
        else:
            gradient, loss = _gradients.microbatched, _gradients.microbatched_loss
            examples = _deal(batch, microbatches)
        result = gradient(spec, parts.trained, carried, examples)
        value_fn = functools.partial(loss, spec, carried, examples)
        updates, opt_state = _updates(
            optimizer, result, state.opt_state, parts.trained, value_fn, scale
        )
        params, connectors = parts.join(optax.apply_updates(parts.trained, updates))
        model_state, memory = precision.unless_skipped(
            result.carried, carried, opt_state, state.opt_state
        )
        new_state = TrainState(
            state.step + 1, params, connectors, opt_state, model_state, memory, state.key
        )
        metrics = result.means | {"loss": Mean(result.loss, jnp.ones_like(result.loss))}
        _contracts.check_carried(
            model_state=(model_state, state.model_state), memory=(memory, state.memory)
        )
        return cast_like(new_state, state), objective.stack(metrics)

    return step


def make_eval_step(
    model: ModelFn, measures: Callable[[Inputs], objective.Terms]
) -> Callable[[Any, Batch], Metrics]:
    """`evaluate(variables, batch) -> {name: Mean}` with the model in evaluation mode.

    Combine the `Mean`s of the batches with `add_metrics` for exact totals.
    """
    _model_functions.model_function(model=model)

    def evaluate(variables: Any, batch: Batch) -> Metrics:
        variables, batch = _variables(variables), _contracts.check_batch(batch)
        outputs, _ = _model_functions.call_model(
            "model", model, variables.params, variables.model_state, batch["inputs"]
        )
        inputs = Inputs(outputs, batch.get("teacher", {}), batch, variables.params)
        return objective.stack(objective.reduce_all(measures(inputs), batch.get("weights")))

    return evaluate


def add_metrics(*metrics: Metrics) -> Metrics:
    """Combines the metrics of multiple batches into those of their union."""
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *metrics)


def values(metrics: Metrics) -> dict[str, Array]:
    """`{name: total / weight}`; batched metrics (from scan or vmap) give batched values.

    Raises:
      TypeError: if `metrics` are not those that a step returns.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(x, Mean) for x in metrics.values()):
        raise TypeError(
            f"metrics must be those that a step returns, {{name: Mean}}, got {metrics!r:.80}."
        )
    return {name: mean.value() for name, mean in metrics.items()}


def jit_step(step: Step) -> Step:
    """`jax.jit` with the state donated: its buffers are reused, so do not use the old state.

    NumPy arrays of the batch are copied: a loader may fill them again as soon as the step returns.
    An EMA teacher must be a copy, not a leaf of the donated state.

    Raises:
      RuntimeError: (from the returned step) if the state was already passed to a step, or shares
        arrays with the other arguments.
    """
    jitted = jax.jit(step, donate_argnums=0)

    @functools.wraps(step)
    def run(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        with _donation.explained(state, batch=batch, teacher_params=teacher_params):
            return jitted(state, _host_arrays.unshared(batch), teacher_params)

    vars(run)["lower"] = jitted.lower  # for `measure.compiled`
    return run


def _deal(batch: Batch, parts: int) -> dict[str, Any]:
    """Reshapes every leaf `[B, ...]` to `[parts, B / parts, ...]`.

    Rows are dealt out like cards: a batch sharded over devices stays sharded in every part.
    """

    def deal(x: Any) -> Any:
        if not np.ndim(x) or np.shape(x)[0] % parts:
            raise ValueError(
                f"microbatches={parts} must divide the batch, got a batch entry of shape "
                f"{list(np.shape(x))}. Choose another number or pad with weights 0."
            )
        x = jnp.asarray(x)
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(deal, dict(batch))


def _size(batch: Batch) -> int | None:
    """The number of examples; None if the batch's entries do not agree on it."""
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(dict(batch)) if np.ndim(leaf)}
    return sizes.pop() if len(sizes) == 1 else None


def _updates(
    tx: optax.GradientTransformationExtraArgs,
    result: GradientResult,
    opt_state: PyTree,
    trained: PyTree,
    value_fn: Callable[[PyTree], Array],
    scale: Array | None,
) -> tuple[PyTree, PyTree]:
    """The optimizer's updates for the gradient; the other arguments belong to the unscaled loss."""
    gradient, *separate = [precision.unscaled(tree, scale) for tree in result.gradients]
    total = jax.tree.map(jnp.add, gradient, *separate) if separate else gradient
    extra: dict[str, Any] = {"value": result.loss, "grad": total, "value_fn": value_fn}
    if separate:
        extra["distill_gradient"] = separate[0]
    accepted = inspect.signature(tx.update).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        # optax's SAM takes grad_fn alone; line searches refuse what value_fn does not read.
        extra["grad_fn"] = lambda params, _: jax.grad(value_fn)(params)
        extra = {name: value for name, value in extra.items() if name in accepted}
    structure = jax.tree.structure(opt_state)
    failure: Exception | None = None
    try:
        updates, new_state = tx.update(result.gradients[0], opt_state, trained, **extra)
        if jax.tree.structure(new_state) == structure:
            return updates, new_state
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        failure = error
        if jax.tree.structure(jax.eval_shape(tx.init, trained)) == structure:
            raise
    raise ValueError(
        "the optimizer's state was made for other parameters than the step trains. "
        "Give init_state and the step the same optimizer and the same trainable=."
    ) from failure


def _blank_padding(batch: Batch) -> Batch:
    """Zeros in rows of weight 0: their values would reach the gradient, as 0 * NaN is NaN.

    This includes integers that models read: an invalid token is embedded as NaN.
    """
    weights = batch.get("weights")
    if weights is None:
        return batch

    def blank(name: str, x: Any) -> Any:
        is_token = name == "inputs" and jnp.issubdtype(jnp.result_type(x), jnp.integer)
        is_read = is_token or trees.is_inexact(x)
        if not is_read or jnp.shape(x)[:1] != jnp.shape(weights):
            return x
        real = jnp.reshape(weights != 0, (-1,) + (1,) * (x.ndim - 1))
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    return {
        name: jax.tree.map(functools.partial(blank, name), entry) for name, entry in batch.items()
    }


def _variables(variables: Any) -> Variables:
    return variables if isinstance(variables, Variables) else Variables(variables)
