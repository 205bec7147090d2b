"""Precision and memory: half-precision compute, loss scaling, rematerialization, int8 weights.

Parameters stay in float32 (the master weights that the optimizer updates); only the model runs in
half precision. bfloat16 has float32's range and needs no loss scaling; float16 does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax, trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree
from kdtl_jax.train._contracts import check_optimizer
from kdtl_jax.train._state import cast_like


def compute_in(model: ModelFn, dtype: Any) -> ModelFn:
    """`model` with parameters and inputs cast to `dtype`, and outputs and model state cast back.

    Gradients reach the float32 parameters through the cast. Wrap the teacher in the same way to run
    it in lower precision.

    Raises:
      TypeError: if `dtype` is not floating point.
    """
    try:
        is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise TypeError(f"dtype must be floating point such as jnp.bfloat16, got {dtype!r:.80}.")

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        outputs, new_state = model(
            _cast(params, dtype), model_state, _cast(inputs, dtype), key=key, train=train
        )
        restored = jax.tree.map(
            lambda new, old: new.astype(old.dtype) if trees.is_inexact(old) else new,
            new_state,
            model_state,
        )
        return _cast(outputs, jnp.float32), restored

    return apply


def rematerialized(model: ModelFn, *, policy: Callable[..., Any] | None = None) -> ModelFn:
    """`model` that recomputes its activations in the backward pass instead of storing them.

    Args:
      policy: which values to keep, one of `jax.checkpoint_policies`; None keeps nothing.
    """

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        def run(params: Params, inputs: Any) -> tuple[Outputs, PyTree]:
            return model(params, model_state, inputs, key=key, train=train)

        return jax.checkpoint(run, policy=policy)(params, inputs)

    return apply


class LossScaleState(NamedTuple):
    """Dynamic loss scale and the wrapped optimizer's state."""

    scale: Array  # float32 []
    good_steps: Array  # int32 [], since the last change
    skipped: Array  # int32 [], steps whose gradient was not finite
    inner: PyTree


def loss_scaling(
    tx: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    period: int = 2000,
    factor: float = 2.0,
    smallest: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Dynamic loss scaling for float16, as the outermost wrapper of an optimizer.

    Steps of this library read the scale from the optimizer's state and multiply the loss by it; the
    other arguments that they pass (`value`, `grad`, `distill_gradient`) are not scaled. If a
    gradient or loss is not finite, the scale is divided by `factor`, and parameters, batch
    statistics and memory do not change. After `period` good steps the scale is multiplied by
    `factor`, as long as the result is finite.

    Raises:
      ValueError: if a number is out of its range: initial, smallest > 0, factor > 1, period >= 1.

    References:
      Micikevicius et al., Mixed Precision Training, 2018 (1710.03740).
    """
    _checks.scalar(initial=initial, factor=factor, smallest=smallest)
    _checks.positive(initial=initial, factor=factor, smallest=smallest)
    _checks.count(1, period=period)
    check_optimizer(tx)
    if factor <= 1:
        raise ValueError(f"factor must be above 1, got {factor}.")

    inner_tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> LossScaleState:
        zero = jnp.zeros((), jnp.int32)
        return LossScaleState(jnp.asarray(initial, jnp.float32), zero, zero, tx.init(params))

    # `**extra` is optax's protocol: value, grad, value_fn and anything else that a step passes.
    def update(
        updates: PyTree, state: Any, params: Params = None, **extra: Any
    ) -> tuple[PyTree, LossScaleState]:
        grads = unscaled(updates, state.scale)
        extra_trees = {name: tree for name, tree in extra.items() if not callable(tree)}
        finite = all_finite((grads, extra_trees))
        safe, extra_trees = jax.tree.map(lambda x: jnp.where(finite, x, 0), (grads, extra_trees))
        updates, inner = inner_tx.update(safe, state.inner, params, **(extra | extra_trees))
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner, state.inner)
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        scale = jnp.where(finite, state.scale, jnp.maximum(state.scale / factor, smallest))
        # An infinite scale would never decrease again.
        grow = (good_steps >= period) & jnp.isfinite(scale * factor)
        return updates, LossScaleState(
            jnp.where(grow, scale * factor, scale),
            jnp.where(grow, 0, good_steps).astype(jnp.int32),
            state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
            inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: PyTree) -> Array | None:
    """The scale in the state of `loss_scaling`; None for any other optimizer's state.

    Raises:
      ValueError: if `loss_scaling` is inside another transformation, which would see scaled
        gradients.
    """
    inner = opt_state.inner if isinstance(opt_state, LossScaleState) else opt_state
    leaves = jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, LossScaleState))
    if any(isinstance(leaf, LossScaleState) for leaf in leaves):
        raise ValueError(
            "loss_scaling must be the outermost transformation, used once: any wrapper around it "
            "would see scaled gradients. Write loss_scaling(optax.chain(...))."
        )
    return opt_state.scale if isinstance(opt_state, LossScaleState) else None


def unscaled(gradient: PyTree, scale: Array | None) -> PyTree:
    """Divides the gradient of a scaled loss by its scale, in float32, which can hold the scale."""
    if scale is None:
        return gradient
    return jax.tree.map(lambda g: (_numerics.upcast(g) / scale).astype(g.dtype), gradient)


def unless_skipped(
    new: PyTree, old: PyTree, new_opt_state: PyTree, old_opt_state: PyTree
) -> PyTree:
    """`new`, or `old` if the optimizer skipped the step between two of its states.

    `loss_scaling` skips steps, and so do `optax.apply_if_finite` and `optax.MultiSteps` with
    `optax.skip_not_finite`. Otherwise batch statistics would keep a NaN that never reaches the
    parameters.
    """
    if isinstance(new_opt_state, LossScaleState):
        flags = [new_opt_state.skipped == old_opt_state.skipped]
    else:
        flags = _guard_flags(new_opt_state)
    if not flags:
        return new
    is_taken = jnp.all(jnp.stack(flags))
    return jax.tree.map(partial(jax.lax.select_n, is_taken), old, cast_like(new, old))


def _guard_flags(opt_state: PyTree) -> list[Array]:
    """Whether optax's own guards took the last step, bool `[]` each; empty without guards."""

    def is_guard(state: Any) -> bool:
        return isinstance(state, (optax.ApplyIfFiniteState, optax.MultiStepsState))

    flags = []
    for state in jax.tree.leaves(opt_state, is_leaf=is_guard):
        if isinstance(state, optax.ApplyIfFiniteState):
            flags.append(state.last_finite)
        elif is_guard(state) and "should_skip" in state.skip_state:
            flags.append(~state.skip_state["should_skip"])
    return flags


def all_finite(tree: PyTree) -> Array:
    """Whether every inexact leaf is finite: one bool []."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if trees.is_inexact(x)]
    return jnp.all(jnp.array(leaves, jnp.bool_))


class Int8(NamedTuple):
    """A weight as int8 with one float32 scale per output channel (last axis)."""

    values: Array
    scale: Array


def quantize(params: Params, where: trees.Selector = r"(.*/)?kernel") -> Params:
    """Weight-only int8: selected leaves become `Int8(round(w / s), s)`, `s = max |w| / 127`.

    Symmetric, one scale per output channel, which is the last axis of matrix and convolution
    kernels here. No weight changes by more than `s / 2`; a leaf is four times smaller than in
    float32. This is meant for frozen teachers: integers have no gradient. `fidelity` measures the
    error.

    Args:
      params: a pytree.
      where: the leaves to quantize; by default every `kernel`. Leaves with fewer than two axes
        (biases, normalization scales) are unchanged, even if selected.

    Raises:
      ValueError: if a selected leaf holds NaN or infinity, which int8 cannot represent, or the
        selector matches nothing.
    """

    def quantize_leaf(path: str, is_selected: bool, leaf: Any) -> Any:
        if not is_selected or not trees.is_inexact(leaf) or leaf.ndim < 2:
            return leaf
        w = leaf.astype(jnp.float32)
        largest = jnp.max(jnp.abs(w), axis=tuple(range(leaf.ndim - 1)), keepdims=True)
        concrete = _checks.concrete(largest)
        if concrete is not None and not np.isfinite(concrete).all():
            raise ValueError(f"{path!r} holds NaN or infinity. Check these weights.")
        scale = jnp.where(largest > 0, largest / 127, 1)
        return Int8(jnp.round(w / scale).astype(jnp.int8), scale)

    return trees.map_with_path(quantize_leaf, trees.mask(params, where), params)


def dequantize(params: Params) -> Params:
    """Inverse of `quantize` up to rounding: `Int8` leaves become float32 arrays."""
    return jax.tree.map(
        lambda x: x.values.astype(jnp.float32) * x.scale if isinstance(x, Int8) else x,
        params,
        is_leaf=lambda x: isinstance(x, Int8),
    )


def with_int8(model: ModelFn) -> ModelFn:
    """`model` on quantized parameters, which are dequantized where they are used."""

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        return model(dequantize(params), model_state, inputs, key=key, train=train)

    return apply


class Fidelity(NamedTuple):
    """Measures of how well changed weights reproduce a model's logits."""

    agreement: Array  # share of examples with the same most likely class
    kl: Array  # mean KL(reference || changed), nats
    largest_error: Array  # of a logit, absolute
    relative_error: Array  # ||z' - z|| / ||z||


def fidelity(logits: Array, reference: Array) -> Fidelity:
    """Compares `[..., num_classes]` logits of changed weights with the reference's.

    NaN logits make all four fields NaN; an all-zero reference makes the relative error infinite.

    Raises:
      ValueError: if the shapes differ, the logits are empty or there is only one class.
    """
    _checks.same_shape(logits=logits, reference=reference)
    _checks.nonempty(logits=logits)
    _checks.several_classes(logits=logits)
    z, ref = jnp.asarray(logits, jnp.float32), jnp.asarray(reference, jnp.float32)
    same = (jnp.argmax(z, axis=-1) == jnp.argmax(ref, axis=-1)).astype(jnp.float32)
    error = z - ref
    lengths = [_numerics.safe_norm(x.ravel()) for x in (error, ref)]
    return Fidelity(
        jnp.mean(_numerics.nan_of(same, jnp.max(error, axis=-1))),
        jnp.mean(_softmax.kl_from_logits(ref, z)),
        jnp.max(jnp.abs(error)),
        jnp.where(lengths[0] == 0, 0, lengths[0] / lengths[1]),
    )


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: x.astype(dtype) if trees.is_inexact(x) else x, tree)
