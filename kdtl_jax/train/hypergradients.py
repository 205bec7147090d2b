"""Hypergradients: gradients of the loss after training with respect to hyper-parameters.

    >>> import jax, jax.numpy as jnp, optax
    >>> from kdtl_jax import losses, train
    >>> from kdtl_jax.train import hypergradients
    >>> def model(params, model_state, inputs, *, key=None, train=False):
    ...     return {"logits": inputs @ params["w"]}, model_state
    >>> def make_step(hyper):
    ...     def terms(x):
    ...         temperature = jnp.exp(hyper["log_temperature"])
    ...         student, teacher = x.student["logits"], x.teacher["logits"]
    ...         hard = optax.softmax_cross_entropy_with_integer_labels(student, x.batch["labels"])
    ...         return {"kd": losses.kd_kl(student, teacher, temperature=temperature), "task": hard}
    ...     alpha = jax.nn.sigmoid(hyper["logit_alpha"])
    ...     weights = {"kd": alpha, "task": 1 - alpha}
    ...     return train.make_step(model, terms, weights, tx, teacher=model)
    >>> tx = optax.adam(0.1, eps_root=1e-8)
    >>> start = train.init_state({"w": jnp.zeros((2, 3))}, tx, key=jax.random.key(0))
    >>> def validation(state):
    ...     logits = jnp.eye(2) @ state.params["w"]
    ...     labels = jnp.array([0, 2])
    ...     return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    >>> batches = {"inputs": jnp.stack([jnp.eye(2)] * 5), "labels": jnp.zeros((5, 2), jnp.int32)}
    >>> hyper = {"log_temperature": jnp.array(1.0), "logit_alpha": jnp.array(0.0)}
    >>> value, gradient = hypergradients.hypergradient(
    ...     make_step, lambda hyper: start, validation, hyper, batches, {"w": jnp.ones((2, 3))}
    ... )
    >>> sorted(gradient)
    ['log_temperature', 'logit_alpha']

Use it like any other gradient. The unrolled run is exact, not an approximation, and needs memory
for its activations; `remat` keeps only the states between steps.

Adam differentiates `sqrt(v)`, whose slope at a second moment of zero (a dead unit, an unused
class) is infinite: build it as `optax.adam(rate, eps_root=1e-8)`. At the kink of a ReLU, finite
differences are wrong, not the gradient.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, trees
from kdtl_jax._types import PyTree

# A state of any kind.
State = TypeVar("State")
# `(state, batch, teacher_params) -> (state, metrics)`, as from `train.make_step`.
Step = Callable[[State, Any, Any], tuple[State, Any]]


def hypergradient(
    make_step: Callable[[PyTree], Step],
    init: Callable[[PyTree], State],
    validation: Callable[[State], Array],
    hyper: PyTree,
    batches: PyTree,
    teacher_params: Any = None,
    *,
    remat: bool = True,
) -> tuple[Array, PyTree]:
    """The validation loss after K steps, and its gradient with respect to the hyper-parameters.

    Args:
      make_step: `hyper -> step(state, batch, teacher_params) -> (state, metrics)`: a step of this
        library, or any function of that form. It is called under a trace: temperatures, weights,
        learning rates and anything else that a step takes as an array may come from `hyper`.
      init: `hyper -> state`. The start may depend on `hyper`, e.g. for the scale alpha of parameter
        distillation, or be a fixed state.
      validation: `state -> []`, the loss after training.
      hyper: a pytree of floating-point arrays. Use log and logit transforms for values that must
        stay positive or within (0, 1).
      batches: a pytree of `[K, ...]` arrays, one row per step.
      teacher_params: the step's third argument.
      remat: recompute each step in the backward pass instead of keeping its activations.

    Returns:
      The validation loss `[]` and a gradient with the structure, shapes and dtypes of `hyper`.

    Raises:
      ValueError: if there are no batches, or they differ in number; or if validation is not a
        scalar.
      TypeError: if a hyper-parameter is not floating point.
      FloatingPointError: if the gradient is not finite, naming the hyper-parameter; only if values
        are known, that is, not under an outer jit.

    References:
      Maclaurin, Duvenaud and Adams, Gradient-based Hyperparameter Optimization through Reversible
      Learning, 2015 (1502.03492).
    """
    _checks.floating(**trees.flatten(hyper))
    counts = {path: jnp.shape(leaf)[:1] for path, leaf in trees.flatten(batches).items()}
    if len(set(counts.values())) != 1 or next(iter(counts.values())) in {(), (0,)}:
        raise ValueError(
            "every array of batches must be [K, ...] with one K > 0, the number of "
            f"steps, got leading dimensions {counts}."
        )

    def unrolled(hyper: PyTree) -> Array:
        step = make_step(hyper)

        def body(state: State, batch: Any) -> tuple[State, None]:
            return step(state, batch, teacher_params)[0], None

        run = jax.checkpoint(body) if remat else body
        loss = validation(jax.lax.scan(run, init(hyper), batches)[0])
        if jnp.shape(loss) != ():
            raise ValueError(
                "validation must return a scalar, got shape "
                f"{list(jnp.shape(loss))}. Take its mean."
            )
        return loss

    value, gradient = jax.value_and_grad(unrolled)(hyper)
    for path, leaf in trees.flatten(gradient).items():
        concrete = _checks.concrete(leaf)
        if concrete is not None and not jnp.isfinite(concrete).all():
            raise FloatingPointError(
                f"the gradient for {path!r} is {concrete}. If the optimizer divides by "
                "a square root (Adam, RMSProp), pass it eps_root, for example "
                "optax.adam(rate, eps_root=1e-8); otherwise train fewer steps or more slowly."
            )
    return value, gradient
