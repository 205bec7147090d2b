"""Multiple teachers: stacked, run as one model, and mixed into one teacher.

    >>> import jax, jax.numpy as jnp
    >>> from kdtl_jax import losses
    >>> from kdtl_jax.train import ensembles
    >>> def teacher(params, model_state, inputs, *, key=None, train=False):
    ...     return {"logits": inputs @ params["w"]}, model_state
    >>> teachers = ensembles.stack_teachers([{"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}])
    >>> outputs, _ = ensembles.vmap_teacher(teacher)(teachers, None, jnp.eye(2))
    >>> outputs["logits"].shape
    (2, 2, 2)
    >>> mixture = ensembles.mean_probabilities(outputs["logits"], temperature=4.0)
    >>> losses.kd_kl(jnp.zeros((2, 2)), mixture, temperature=4.0).shape
    (2,)

A mixture takes teachers' logits `[K, ..., num_classes]` and returns logits `[..., num_classes]`,
which any loss accepts as a teacher's. The mixtures differ in meaning:

- `mean_logits`: the geometric mixture; one teacher's confident "no" is a veto;
- `mean_probabilities`: the arithmetic mixture; one teacher's confident "yes" suffices;
- `log_sum_exp`: the arithmetic mixture weighted by each teacher's normalizer, so teachers with
  large logits dominate;
- `gated_logits`: a geometric mixture whose weights are learned per example (ONE);
- `over_teachers(loss)`: no mixture, a sum of losses. A sum of K forward KLs has K times the
  gradient of `mean_probabilities` and the same minimum.

`weights` are per teacher, `[K]`, or per teacher and example, `[K, B]`; they must not be negative
and are normalized over teachers. By default they are equal.

Raises ValueError if there is no teacher axis, weights or scores do not fit it, weights are negative
or sum to 0, or a temperature is not positive, and TypeError if logits or scores are not floating
point.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax, trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Scalar

# One per member, `[K]` or `[K, B]`.
Weights = Array | Sequence[float]


class PairLoss(Protocol):
    """A loss of a student and one teacher: `[B, ...], [B, ...] -> [B]`."""

    def __call__(self, student: Array, teacher: Array, /) -> Array: ...


def stack_teachers(teachers: Sequence[Params]) -> Params:
    """Parameters of K teachers of one architecture: leaves `[K, ...]`, in the first's containers.

    Raises:
      ValueError: if there are none, or their leaves differ in path or shape.
    """
    if not isinstance(teachers, Sequence) or isinstance(teachers, str):
        is_dict = isinstance(teachers, Mapping)
        kind = "one tree (a dict)" if is_dict else type(teachers).__name__
        raise TypeError(f"teachers must be a list of parameter trees, got {kind}.")
    if not teachers:
        raise ValueError("expected at least one teacher, got none.")
    first, *others = [trees.flatten(teacher) for teacher in teachers]
    for other in others:
        _checks.same_leaves(first=first, other=other)
    stacked = [
        jnp.stack([leaf, *(other[path] for other in others)]) for path, leaf in first.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(teachers[0]), stacked)


def vmap_teacher(teacher: ModelFn) -> ModelFn:
    """Runs K teachers of one architecture as one model function.

    Takes stacked parameters and model state (`stack_teachers`; a state of None stays None), the
    same inputs for all, and returns every output as `[K, B, ...]`. With a key, each teacher gets
    its own.
    """

    def stacked(
        params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, PyTree]:
        count = jax.tree.leaves(params)[0].shape[0]
        keys = None if key is None else jax.random.split(key, count)

        def run_one(params: Params, state: PyTree, key: Array | None) -> tuple[Outputs, PyTree]:
            return teacher(params, state, inputs, key=key, train=train)

        return jax.vmap(run_one)(params, model_state, keys)

    return stacked


def mean_logits(logits: Array, *, weights: Weights | None = None) -> Array:
    """`sum_k w_k z_k`: the geometric mixture; its `softmax` is the normalized `prod_k p_k^w_k`.

    Returns:
      `[..., num_classes]` logits, float32 or wider; -inf where any teacher with a weight above 0
      excludes a class.

    References:
      TextBrewer averages logits. Hinton et al., 2015 (1503.02531), section 1.
    """
    logits = _check_logits(logits)
    return _mean(logits, _shares(weights, logits))


def mean_probabilities(
    logits: Array, *, temperature: Scalar = 1.0, weights: Weights | None = None
) -> Array:
    """`T log sum_k w_k softmax(z_k / T)`: the arithmetic mixture, as logits.

    `softmax(result / T)` is the mean of the teachers' softened probabilities, so give the loss
    the same temperature.

    Returns:
      `[..., num_classes]`, at most 0; -inf where all teachers exclude a class.
    """
    logits = _check_logits(logits)
    _checks.several_classes(logits=logits)
    _checks.positive(temperature=temperature)
    share = _shares(weights, logits)
    temperature = _numerics.scalar(temperature, logits, "temperature")
    return temperature * _log_mixture(_softmax.log_softmax(logits / temperature), share)


def log_sum_exp(
    logits: Array, *, temperature: Scalar = 1.0, weights: Weights | None = None
) -> Array:
    """`T log sum_k w_k exp(z_k / T)`: each teacher is weighted by its normalizer.

    Adding a constant to one teacher's logits changes the result, which `mean_probabilities` does
    not; on log-probabilities the two are equal. Takes `[K, ..., num_classes]` logits; returns
    `[..., num_classes]`.
    """
    logits = _check_logits(logits)
    _checks.positive(temperature=temperature)
    share = _shares(weights, logits)
    temperature = _numerics.scalar(temperature, logits, "temperature")
    return temperature * _log_mixture(logits / temperature, share)


def gated_logits(logits: Array, scores: Array) -> Array:
    """`sum_k g_k z_k` with `g = softmax(scores)` per example: the on-the-fly teacher of ONE.

    The gate is a connector on shared features. The paper's loss over K branches, with T = 3, is

        ensemble = ensembles.gated_logits(branches, gate_scores)
        {"branches": cross_entropy of every branch, summed, "ensemble": that of the ensemble,
         "distill": over_teachers with the roles exchanged: kd_kl(branch, stop_gradient(ensemble))}

    which `online.one_terms` implements.

    Args:
      logits: `[K, B, num_classes]`, one per branch.
      scores: `[B, K]`, the gate's output before its softmax.

    Returns:
      `[B, num_classes]`.

    References:
      Lan, Zhu and Gong, Knowledge Distillation by On-the-Fly Native Ensemble, 2018 (1806.04606).
    """
    logits = _check_logits(logits)
    _checks.floating(scores=scores)
    _checks.rank(3, 3, logits=logits)
    if np.shape(scores) != (logits.shape[1], logits.shape[0]):
        raise ValueError(
            f"scores must be [{logits.shape[1]}, {logits.shape[0]}], one per "
            f"example and branch, got {_checks.described(logits=logits, scores=scores)}."
        )
    gates = jax.nn.softmax(_numerics.upcast(scores), axis=-1).astype(logits.dtype)
    return _mean(logits, jnp.swapaxes(gates, 0, 1)[:, :, None])


def over_teachers(
    loss: PairLoss, *, weights: Weights | None = None
) -> Callable[[Array, Array], Array]:
    """`sum_k w_k loss(student, teacher_k)` as a loss of a student and stacked teachers.

    For one teacher per example (multi-teacher on-policy distillation, 2601.02780), use one-hot
    `weights` `[K, B]` or, in chunks, the sum of each teacher's `Mean` over its own examples.

    Args:
      loss: of one student and one teacher; bind its hyper-parameters with `functools.partial`.
      weights: `[K]`, or `[K, B]` for weights per example; ones by default, a plain sum.

    Returns:
      `summed(student, teachers)`: `teachers` is `[K, *student.shape]`.

    Raises:
      ValueError: when called, if the shapes or the weights do not fit.

    References:
      big_vision sums the KLs of its teachers; so does RepDistiller's multi-teacher recipe.
    """

    def summed(student: Array, teachers: Array) -> Array:
        _checks.rank(1, teachers=teachers)
        values = jax.vmap(loss, in_axes=(None, 0))(student, teachers)
        if weights is None:
            return jnp.sum(values, axis=0)
        share = _fit_weights(weights, values)
        # A teacher that does not teach an example may be infinitely far from the student there.
        return jnp.sum(share * jnp.where(share != 0, values, 0), axis=0)

    return summed


def _check_logits(logits: Array) -> Array:
    _checks.floating(logits=logits)
    _checks.rank(2, logits=logits)
    _checks.nonempty(logits=logits)
    return _numerics.upcast(logits)


def _fit_weights(weights: Weights, values: Array) -> Array:
    """Weights `[K]` or `[K, B]`, shaped to multiply `values [K, B, ...]`."""
    if np.shape(weights) not in (values.shape[:1], values.shape[:2]):
        raise ValueError(
            f"weights must be [K] or [K, B] = {list(values.shape[:2])}, "
            f"got {_checks.described(weights=weights)}."
        )
    _checks.finite(weights=weights)
    return _numerics.per_example(jnp.asarray(weights), values, "weights")


def _shares(weights: Weights | None, logits: Array) -> Array:
    """Weights that sum to 1 over teachers, shaped to multiply the logits."""
    if weights is None:
        return jnp.full((1,) * logits.ndim, 1 / logits.shape[0], logits.dtype)
    share = _fit_weights(weights, logits)
    _checks.non_negative(weights=weights)
    concrete = _checks.concrete(weights)
    if concrete is not None:
        _checks.positive(**{"the teachers' weights together": concrete.sum(axis=0)})
    return share / jnp.sum(share, axis=0, keepdims=True)


def _mean(logits: Array, share: Array) -> Array:
    """`sum_k share_k z_k`; `0 * -inf = 0`: a teacher without a share excludes no class."""
    is_absent = logits == -jnp.inf
    total = jnp.sum(share * jnp.where(is_absent, 0, logits), axis=0)
    return jnp.where(jnp.any(is_absent & (share > 0), axis=0), -jnp.inf, total)


def _log_mixture(log_values: Array, share: Array) -> Array:
    """`log sum_k share_k exp(log_values_k)`; gradients are finite even where terms are absent."""
    is_present = (share > 0) & (log_values != -jnp.inf)
    safe = jnp.where(is_present, log_values, jnp.finfo(log_values.dtype).min)
    largest = jax.lax.stop_gradient(jnp.max(safe, axis=0))
    shifted = jnp.where(is_present, log_values - largest[None], 0)
    total = jnp.sum(jnp.where(is_present, share * jnp.exp(shifted), 0), axis=0)
    has_any = jnp.any(is_present, axis=0)
    return jnp.where(
        has_any, jnp.log(jnp.where(has_any, total, 1)) + jnp.where(has_any, largest, 0), -jnp.inf
    )
