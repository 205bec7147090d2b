"""Step factories: distillation, fine-tuning, evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import objective, trees
from kdtl_jax._types import ModelFn, Params, PyTree, Variables
from kdtl_jax.objective import Inputs, Mean, Metrics, TermsFn, Weights
from kdtl_jax.train import precision
from kdtl_jax.train._state import Batch, Step, TrainState, like


def make_distill_step(
    student: ModelFn,
    teacher: ModelFn | None,
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    *,
    trainable: trees.Selector = trees.everything,
    microbatches: int = 1,
) -> Step:
    """A distillation step `step(state, teacher_params, batch) -> (state, metrics)`.

    The batch is a dict with `"inputs"`, which both models read, usually `"labels"`, and
    optionally `"weights"` `[B]` (0 marks padding). The student's parameters are
    `state.params["student"]`; connectors and other trainable glue sit beside it.

    Args:
      student: the student's model function.
      teacher: the teacher's, run without gradient in evaluation mode; None takes the outputs
        from `batch["teacher"]` (a cache), or no teacher at all.
      terms: `terms(inputs) -> {name: values}` or `({name: values}, memory)`.
      weights: `{name: number, traced array or schedule of the step}`, the terms' keys.
      tx: an optax optimizer.
      trainable: selector over `state.params`; everything else costs no gradient.
      microbatches: the batch is taken in that many parts, one after another, to save memory. Sums
        and counts are accumulated apart, so the gradient is that of the whole batch, whatever
        the masks, for terms of single examples; a relational term sees one part at a time.

    Returns:
      The un-jitted step. Metrics are a mapping with every unweighted term and `"loss"`.

    Raises:
      ValueError: when the step is traced, if terms and weights have different keys, or the
        selector matches nothing, or the batch does not divide into the microbatches.
    """

    def run_teacher(teacher_params: Any, batch: Batch) -> Any:
        if teacher is None:
            return batch.get("teacher", {})
        variables = _variables(teacher_params)
        outputs, _ = teacher(variables.params, variables.model_state, batch["inputs"])
        return outputs

    def apply_student(params: Params, model_state: PyTree, batch: Batch, key: Array):
        if not isinstance(params, Mapping) or "student" not in params:
            raise ValueError(
                "the state's parameters must be {'student': ..., and what "
                "else is trained}. Make it with init_state({'student': params}, tx, key=key)."
            )
        return student(params["student"], model_state, batch["inputs"], key=key, train=True)

    return _make_step(apply_student, run_teacher, terms, weights, tx, trainable, microbatches)


def make_train_step(
    model: ModelFn,
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    *,
    trainable: trees.Selector = trees.everything,
    microbatches: int = 1,
) -> Step:
    """A fine-tuning step: `theta_target = argmin L_target` over the trainable partition.

    As `make_distill_step`, without a teacher and with `state.params` the model's own parameters.
    The step's second argument reaches the terms as `inputs.teacher`: pass the source parameters
    there for penalties such as L2-SP, or None.
    """

    def no_teacher(teacher_params: Any, batch: Batch) -> Any:
        return batch.get("teacher", {}) if teacher_params is None else teacher_params

    def apply_model(params: Params, model_state: PyTree, batch: Batch, key: Array):
        return model(params, model_state, batch["inputs"], key=key, train=True)

    return _make_step(apply_model, no_teacher, terms, weights, tx, trainable, microbatches)


def make_eval_step(
    model: ModelFn, measures: Callable[[Inputs], objective.Terms]
) -> Callable[[Any, Batch], Metrics]:
    """`evaluate(variables, batch) -> {name: Mean}` with the model in evaluation mode.

    Add the `Mean`s of several batches with `add_metrics` for exact totals.
    """

    def evaluate(variables: Any, batch: Batch) -> Metrics:
        variables = _variables(variables)
        outputs, _ = model(variables.params, variables.model_state, batch["inputs"])
        inputs = Inputs(outputs, batch.get("teacher", {}), batch, variables.params)
        return objective.stack(objective.reduce_all(measures(inputs), batch.get("weights")))

    return evaluate


def add_metrics(*metrics: Metrics) -> Metrics:
    """Metrics of several batches as those of their union."""
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *metrics)


def values(metrics: Metrics) -> dict[str, Array]:
    """`{name: total / weight}`; batched metrics (from scan or vmap) give batched values."""
    return {name: mean.value() for name, mean in metrics.items()}


def jit_step(step: Step) -> Step:
    """`jax.jit` with the state donated: its buffers are reused, so do not touch the old state.

    An EMA teacher must be a copy, not a leaf of the donated state.
    """
    return jax.jit(step, donate_argnums=0)


def _make_step(
    apply_model: Callable[..., Any],
    run_teacher: Callable[[Any, Batch], Any],
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    trainable: trees.Selector,
    microbatches: int,
) -> Step:
    def forward(
        params: Params, state: TrainState, teacher_params: Any, batch: Batch, part: Array
    ) -> tuple[dict[str, Mean], PyTree, PyTree]:
        key = jax.random.fold_in(state.key, state.step)
        if microbatches > 1:
            key = jax.random.fold_in(key, part)
        model_key, terms_key = jax.random.split(key)
        teacher_outputs = jax.lax.stop_gradient(run_teacher(teacher_params, batch))
        outputs, model_state = apply_model(params, state.model_state, batch, model_key)
        inputs = Inputs(
            outputs, teacher_outputs, batch, params, state.memory, state.step, terms_key
        )
        returned = terms(inputs)
        named, memory = returned if isinstance(returned, tuple) else (returned, state.memory)
        means = objective.reduce_all(named, batch.get("weights"), batch_size=_size(batch))
        return means, model_state, memory

    def gradient(
        trained: Params,
        frozen: Params,
        state: TrainState,
        teacher_params: Any,
        batch: Batch,
        part: Array,
        whole: dict[str, Array] | None,
    ) -> tuple[Params, Array, dict[str, Mean], PyTree, PyTree]:
        """Gradient of this part's share of the loss; `whole` holds the whole batch's counts."""
        scale = precision.loss_scale(state.opt_state)

        def loss_fn(trained: Params) -> tuple[Array, Any]:
            params = trees.combine(trained, frozen)
            means, model_state, memory = forward(params, state, teacher_params, batch, part)
            shares = {k: Mean(m.total, whole[k] if whole else m.weight) for k, m in means.items()}
            loss = objective.weighted_sum(shares, objective.resolve(weights, state.step))
            scaled = loss if scale is None else loss * scale.astype(loss.dtype)
            return scaled, (loss, means, model_state, memory)

        grads, (loss, means, model_state, memory) = jax.grad(loss_fn, has_aux=True)(trained)
        stop = jax.lax.stop_gradient
        return grads, loss, means, stop(model_state), stop(memory)

    def accumulate(
        trained: Params, frozen: Params, state: TrainState, teacher_params: Any, batch: Batch
    ) -> tuple[Params, Array, dict[str, Mean], PyTree, PyTree]:
        parts = _split(batch, microbatches), jnp.arange(microbatches, dtype=jnp.int32)

        # Only the counts are used, and they rarely depend on the model: XLA drops its forward.
        def counts(_: None, part: tuple[Batch, Array]) -> tuple[None, dict[str, Array]]:
            means, _, _ = forward(state.params, state, teacher_params, *part)
            return None, {name: mean.weight for name, mean in means.items()}

        _, per_part = jax.lax.scan(counts, None, parts)
        whole = jax.tree.map(lambda w: jnp.sum(w, axis=0), per_part)

        def body(carry: Any, part: tuple[Batch, Array]) -> tuple[Any, Any]:
            grads, model_state, memory = carry
            here = state._replace(model_state=model_state, memory=memory)
            more, loss, means, *carried = gradient(
                trained, frozen, here, teacher_params, *part, whole
            )
            grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, more)
            model_state, memory = like(tuple(carried), (model_state, memory))
            return (grads, model_state, memory), (loss, means)

        # Accumulated in float32 or wider, also for parameters in half precision.
        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), trained
        )
        carry, (losses, means) = jax.lax.scan(body, (zeros, state.model_state, state.memory), parts)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), carry[0], trained)
        means = jax.tree.map(lambda x: jnp.sum(x, axis=0), means)
        return grads, jnp.sum(losses), means, *carry[1:]

    def step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = _blank_padding(_checked(batch))
        trained, frozen = trees.partition(state.params, trainable)
        if microbatches == 1:
            first = jnp.zeros((), jnp.int32)
            found = gradient(trained, frozen, state, teacher_params, batch, first, None)
        else:
            found = accumulate(trained, frozen, state, teacher_params, batch)
        grads, loss, means, model_state, memory = found
        updates, opt_state = _updates(tx, grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        new = TrainState(
            step=state.step + 1,
            params=trees.combine(trained, frozen),
            opt_state=opt_state,
            model_state=model_state,
            memory=memory,
            key=state.key,
        )
        return like(new, state), objective.stack(means | {"loss": Mean(loss, jnp.ones_like(loss))})

    return step


def _split(batch: Batch, parts: int) -> dict[str, Any]:
    """Every leaf `[B, ...]` as `[parts, B / parts, ...]`.

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


def _checked(batch: Batch) -> Batch:
    if "inputs" not in batch:
        raise ValueError(
            f"the batch must be a dict with 'inputs', got the keys {sorted(batch)}. Name "
            "what the models read 'inputs'."
        )
    shape = np.shape(batch.get("weights", np.ones(1)))
    if len(shape) != 1:
        raise ValueError(f"the batch's 'weights' must be [B], one per example, got {list(shape)}.")
    return batch


def _size(batch: Batch) -> int | None:
    """The number of examples; None where the batch's entries do not agree on one."""
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(dict(batch)) if np.ndim(leaf)}
    return sizes.pop() if len(sizes) == 1 else None


def _updates(
    tx: optax.GradientTransformation, grads: Params, opt_state: PyTree, trained: Params
) -> tuple[Params, PyTree]:
    try:
        return tx.update(grads, opt_state, trained)
    except (ValueError, TypeError) as error:
        made = jax.eval_shape(tx.init, trained)
        if jax.tree.structure(made) == jax.tree.structure(opt_state):
            raise
        raise ValueError(
            "the optimizer's state was made for other parameters than the step trains. "
            "Give init_state and the step the same optimizer and the same trainable=."
        ) from error


def _blank_padding(batch: Batch) -> Batch:
    """Zeros in rows of weight 0: whatever they hold would reach the gradient, as 0 * NaN is NaN."""
    weights = batch.get("weights")
    if weights is None:
        return batch

    def blank(x: Any) -> Any:
        if not trees.is_inexact(x) or jnp.shape(x)[:1] != jnp.shape(weights):
            return x
        real = jnp.reshape(weights != 0, (-1,) + (1,) * (x.ndim - 1))
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    return jax.tree.map(blank, dict(batch))


def _variables(given: Any) -> Variables:
    return given if isinstance(given, Variables) else Variables(given)
