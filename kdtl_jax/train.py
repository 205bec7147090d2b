"""Training steps as pure functions of pytrees.

Static things (model functions, terms, weights, the optimizer) go to the factory, arrays go to the
step. The returned step is not jitted, so `jax.jit`, `jax.vmap`, `jax.lax.scan` and sharding all
compose with it; `jit_step` adds jit and donation.

The trainable partition is taken *before* the gradient: frozen weights cost no FLOPs, have no
optimizer state, do not enter clipping and stay bit-identical.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import objective, trees
from kdtl_jax._types import ModelFn, Params, PyTree, Variables
from kdtl_jax.objective import Inputs, Mean, Metrics, TermsFn, Weights

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
    params = jax.tree.map(_own, params)
    trained, _ = trees.partition(params, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.tree.map(_own, tx.init(trained)),
        model_state=jax.tree.map(_own, model_state),
        memory=jax.tree.map(_own, memory),
        key=_own(key),
    )


def make_distill_step(
    student: ModelFn,
    teacher: ModelFn | None,
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    *,
    trainable: trees.Selector = trees.everything,
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

    Returns:
      The un-jitted step. Metrics are a mapping with every unweighted term and `"loss"`.

    Raises:
      ValueError: when the step is traced, if terms and weights have different keys, or the
        selector matches nothing.
    """

    def run_teacher(teacher_params: Any, batch: Batch) -> Any:
        if teacher is None:
            return batch.get("teacher", {})
        variables = _variables(teacher_params)
        outputs, _ = teacher(variables.params, variables.model_state, batch["inputs"])
        return outputs

    def apply_student(params: Params, model_state: PyTree, batch: Batch, key: Array):
        return student(params["student"], model_state, batch["inputs"], key=key, train=True)

    return _make_step(apply_student, run_teacher, terms, weights, tx, trainable)


def make_train_step(
    model: ModelFn,
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    *,
    trainable: trees.Selector = trees.everything,
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

    return _make_step(apply_model, no_teacher, terms, weights, tx, trainable)


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


def take(data: Batch, index: Array) -> dict[str, Any]:
    """Rows `index` of every array in `data`; `index` of any shape."""
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), dict(data))


def scan_epoch(step: Step) -> Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]:
    """An epoch over device-resident data as one program.

    Returns:
      `epoch(state, teacher_params, data, index) -> (state, metrics)`: `data` holds whole arrays
      `[N, ...]`, `index` int32 `[steps, B]` names the rows of each batch; metrics get a leading
      step axis. Rows are gathered once, outside the loop. Not jitted: use `jit_step(epoch)`.
    """

    def epoch(
        state: TrainState, teacher_params: Any, data: Batch, index: Array
    ) -> tuple[TrainState, Metrics]:
        def body(carry: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return step(carry, teacher_params, batch)

        return jax.lax.scan(body, state, take(data, index))

    return epoch


def epoch_path(step: Step, state: TrainState, teacher_params: Any, data: Batch) -> str:
    """`"scan"` or `"steps"`: how `jit_epoch` runs this step on this back end.

    Inside a while-loop XLA's CPU back end compiles convolutions without their threaded kernels,
    and an epoch runs more than twice as slow as its single steps. There, and only there, a step
    with convolutions is called batch by batch. Decided by tracing, without running anything.
    """
    if jax.default_backend() != "cpu":
        return "scan"
    batch = jax.eval_shape(lambda d: take(d, jnp.zeros((1,), jnp.int32)), dict(data))
    traced = jax.make_jaxpr(step)(state, teacher_params, batch)
    return "steps" if "conv_general_dilated" in str(traced) else "scan"


def jit_epoch(step: Step) -> Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]:
    """`scan_epoch` jitted with the state donated, or single steps where those are faster.

    Returns:
      `epoch(state, teacher_params, data, index)` as in `scan_epoch`, with equal results on either
      path; `epoch_path` tells which one it takes.
    """
    scanned = jax.jit(scan_epoch(step), donate_argnums=0)
    one = jax.jit(lambda s, t, data, rows: step(s, t, take(data, rows)), donate_argnums=0)
    chosen: list[str] = []  # decided at the first call: a step has one path on one back end

    def epoch(
        state: TrainState, teacher_params: Any, data: Batch, index: Array
    ) -> tuple[TrainState, Metrics]:
        if not chosen:
            chosen.append(epoch_path(step, state, teacher_params, data))
        if chosen[0] == "scan":
            return scanned(state, teacher_params, data, index)
        collected = []
        for rows in np.asarray(index):
            state, metrics = one(state, teacher_params, data, rows)
            collected.append(metrics)
        return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)

    return epoch


def epoch_index(key: Array, epoch: int | Array, size: int, batch_size: int) -> Array:
    """int32 `[size // batch_size, batch_size]`: the shuffled rows of one epoch.

    A function of `(key, epoch)` alone, so a resumed run sees the same order. The remainder of
    the division is left out of this epoch (another one next time).
    """
    if not 0 < batch_size <= size:
        raise ValueError(
            f"epoch_index: batch_size must lie in 1..{size} (the number of examples), "
            f"got {batch_size}."
        )
    order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    steps = size // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size).astype(jnp.int32)


def _make_step(
    apply_model: Callable[..., Any],
    run_teacher: Callable[[Any, Batch], Any],
    terms: TermsFn,
    weights: Weights,
    tx: optax.GradientTransformation,
    trainable: trees.Selector,
) -> Step:
    def loss_fn(
        trained: Params, frozen: Params, state: TrainState, teacher_outputs: Any, batch: Batch
    ) -> tuple[Array, tuple[dict[str, Mean], PyTree, PyTree]]:
        params = trees.combine(trained, frozen)
        model_key, terms_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        outputs, model_state = apply_model(params, state.model_state, batch, model_key)
        inputs = Inputs(
            outputs, teacher_outputs, batch, params, state.memory, state.step, terms_key
        )
        returned = terms(inputs)
        named, memory = returned if isinstance(returned, tuple) else (returned, state.memory)
        means = objective.reduce_all(named, batch.get("weights"))
        loss = objective.weighted_sum(means, objective.resolve(weights, state.step))
        return loss, (means, model_state, memory)

    def step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = _blank_padding(batch)
        teacher_outputs = jax.lax.stop_gradient(run_teacher(teacher_params, batch))
        trained, frozen = trees.partition(state.params, trainable)
        (loss, (means, model_state, memory)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            trained, frozen, state, teacher_outputs, batch
        )
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        new = TrainState(
            step=state.step + 1,
            params=trees.combine(trained, frozen),
            opt_state=opt_state,
            model_state=jax.lax.stop_gradient(model_state),
            memory=jax.lax.stop_gradient(memory),
            key=state.key,
        )
        return _like(new, state), objective.stack(means | {"loss": Mean(loss, jnp.ones_like(loss))})

    return step


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


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _own(leaf: Any) -> Any:
    """A copy without weak type, so that donating the state never deletes the caller's arrays."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(
            jnp.array(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
        )
    if not (hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))):
        return leaf
    array = jnp.array(leaf)
    return jax.lax.convert_element_type(array, array.dtype)


def _like(new: PyTree, old: PyTree) -> PyTree:
    """Casts every leaf to the old state's dtype, so that the step maps its state to itself."""

    def cast(after: Any, before: Any) -> Any:
        return after if _is_key(before) else jax.lax.convert_element_type(after, before.dtype)

    return jax.tree.map(cast, new, old)
