"""The objective: a dict of per-example terms, weighted and reduced once.

The user writes one function `terms(inputs) -> {name: values}` and one dict `{name: weight}`, where
a weight is a number, a traced array or a schedule of the step. Values are one of

- `[B]`, or `[B, L]` for tokens: averaged over examples (and positions);
- `Masked(values, where)`: averaged where the mask holds;
- `Mean(total, weight)`: already summed, as in `losses.chunked_divergence`;
- `[]`: a penalty, a function of parameters, counted once for any batch.

Sums and counts are kept separate (`Mean`), so accumulating over microbatches or devices gives
exactly the value of the large batch. Logged values are unweighted.

A term whose weight is the constant 0 is logged, but left out of the loss and its gradient, even if
it is NaN. A traced 0, such as a schedule's, multiplies: 0 * NaN is NaN.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Mean as Mean
from kdtl_jax._types import Outputs, Params, PyTree, Scalar, Schedule


class Inputs(NamedTuple):
    """The inputs of terms, which read them by name, so that new fields do not break terms.

    `teacher` holds a teacher's outputs and is empty without a teacher; `teacher_params` is the
    step's third argument, unchanged, for penalties that read frozen parameters.
    """

    student: Outputs
    teacher: Outputs
    batch: Mapping[str, Any]
    params: Params = None
    connectors: Params = None
    teacher_params: Any = None
    memory: PyTree = None
    step: Array | None = None
    key: Array | None = None

    @property
    def real(self) -> Array | None:
        """Which examples are not padding, bool `[B]`; None if the batch has no weights.

        Pass it as `where` to any loss that mixes rows of a batch:
        `losses.sp(s, t, where=inputs.real)`.
        """
        weights = self.batch.get("weights")
        return None if weights is None else weights != 0


class Masked(NamedTuple):
    """Values that are averaged only where `where` (bool, the same shape) is true."""

    values: Array
    where: Array


@partial(jax.tree_util.register_dataclass, data_fields=["sums"], meta_fields=["names"])
@dataclass(frozen=True)
class Metrics(Mapping[str, Mean]):
    """`{name: Mean}` held in one array `[..., K, 2]` of totals and weights.

    A step returns one buffer instead of two per term: on small models, the cost of logging is in
    buffers, not arithmetic. Scan and vmap add leading axes; adding the `sums` of multiple batches
    gives the metrics of their union.
    """

    names: tuple[str, ...]
    sums: Array

    def __getitem__(self, name: str) -> Mean:
        if name not in self.names:
            raise KeyError(f"no metric {name!r}, there are {sorted(self.names)}")
        row = self.sums[..., self.names.index(name), :]
        return Mean(row[..., 0], row[..., 1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def stack(means: Mapping[str, Mean]) -> Metrics:
    """Metrics of the given means; float32 or wider."""
    parts = [_numerics.upcast(part) for mean in means.values() for part in mean]
    widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    sums = jnp.stack([part.astype(widest) for part in parts])
    return Metrics(tuple(means), sums.reshape(len(means), 2))


# Values per example, values with a mask, or a mean that is already computed.
Term = Array | Masked | Mean
# Loss terms by name.
Terms = Mapping[str, Term]
# A number, or a schedule of the step, for every term.
Weights = Mapping[str, Scalar | Schedule]


class TermsFn(Protocol):
    """Returns `{name: values}`, or `({name: values}, memory)` when memory is carried."""

    def __call__(self, inputs: Inputs, /) -> Terms | tuple[Terms, PyTree]: ...


def classification(inputs: Inputs) -> dict[str, Array]:
    """Plain classification as a `TermsFn`: `{"task": cross-entropy of "logits" with "labels"}`.

    `[..., classes]` logits and int `[...]` labels give `[...]`, nats, float32 or wider; NaN where a
    traced label is out of range, 0 in rows of weight 0.

    Raises:
      TypeError, ValueError: if labels are not class indices, or the head has a single logit.
    """
    logits, labels = inputs.student["logits"], inputs.batch["labels"]
    is_real = inputs.real
    if is_real is not None:
        is_real = jnp.reshape(is_real, (-1,) + (1,) * (jnp.ndim(labels) - 1))
        is_real = jnp.broadcast_to(is_real, jnp.shape(labels))
    _checks.several_classes(logits=logits)
    _checks.labels(labels, logits, is_real)
    return {"task": _softmax.cross_entropy(logits, labels, is_real)}


def reduce(
    name: str,
    term: Term,
    example_weights: Array | None = None,
    *,
    batch_size: int | None = None,
) -> Mean:
    """The (weighted) sum and count of one term.

    Args:
      name: for messages.
      term: `[]`, `[B]`, `[B, L]`, `Masked`, or a `Mean`, which is passed on.
      example_weights: `[B]`, 0 for padding; multiplies both sum and count. A `Mean` must already
        exclude padding.
      batch_size: the batch's size, if it is known without weights.

    Raises:
      ValueError: if the leading dimension is not the batch's, or a mask has a different shape.
      TypeError: if the values are not floating point.
    """
    if isinstance(term, Mean):
        _checks.floating(**{f"{name}'s {k}": v for k, v in term._asdict().items()})
        return Mean(*(_numerics.upcast(part) for part in term))
    values, where = (term.values, term.where) if isinstance(term, Masked) else (term, None)
    _checks.floating(**{name: values})
    values = _numerics.upcast(values)
    if values.ndim and batch_size not in (None, values.shape[0]):
        raise ValueError(
            f"the term {name!r} must be [B] or [B, L] with B = {batch_size}, the "
            f"batch's, or [] for a penalty, got {list(values.shape)}. Return one value per "
            "example, or a Mean of values summed already."
        )
    weights = jnp.ones((), values.dtype)
    if values.ndim and example_weights is not None:
        _checks.same_batch(**{name: values, "weights": example_weights})
        weights = _numerics.per_example(example_weights, values, "weights")
    if where is not None:
        _checks.mask(where, values.shape)
        weights = weights * where.astype(values.dtype)
    elif values.ndim == 0 and example_weights is not None:
        weights = jnp.sum(_numerics.cast(example_weights, values))
    weights = jnp.broadcast_to(weights, values.shape)
    # A padded example may hold anything, including NaN: select before multiplying.
    total = jnp.sum(jnp.where(weights != 0, values, 0) * weights)
    return Mean(total, jnp.sum(weights))


def reduce_all(
    terms: Terms, example_weights: Array | None = None, *, batch_size: int | None = None
) -> dict[str, Mean]:
    """`reduce` of every term.

    Raises:
      TypeError: if the terms are not a mapping.
    """
    if not isinstance(terms, Mapping):
        raise TypeError(
            "terms must be a dict {name: values} (or a tuple of it and the memory), "
            f"got {type(terms).__name__}. Return for example {{'kd': values}}."
        )
    return {
        name: reduce(name, term, example_weights, batch_size=batch_size)
        for name, term in terms.items()
    }


def resolve(weights: Weights, step: Array) -> dict[str, Array]:
    """Weights at a step, an integer `[]`, with schedules evaluated: each `[]`, float32 or wider.

    Raises:
      TypeError: if the weights are not a mapping, or one is neither a number nor a schedule.
      ValueError: if one is not a scalar.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights must be a dict {name of a term: number or schedule}, got "
            f"{type(weights).__name__}."
        )
    return {
        name: _as_float(name, weight(step) if callable(weight) else weight)
        for name, weight in weights.items()
    }


def _as_float(name: str, weight: Scalar) -> Array:
    if weight is None or isinstance(weight, str):
        raise TypeError(f"the weight of {name!r} must be a number or a schedule, got {weight!r}.")
    _checks.scalar(**{f"the weight of {name!r}": weight})
    if _is_constant_zero(weight):
        with jax.ensure_compile_time_eval():  # `weighted_sum` sees the 0 under jit as well
            return jnp.zeros((), jnp.float32)
    array = jnp.asarray(weight)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.float32)
    return jax.lax.convert_element_type(_numerics.upcast(array), _numerics.upcast(array).dtype)


def weighted_sum(means: Mapping[str, Mean], weights: Mapping[str, Array]) -> Array:
    """`sum_k w_k total_k / weight_k` for weights w: the value to differentiate, `[]`.

    `total_k / weight_k` is the mean of term k. A term whose weight is the constant 0 is left out.

    Raises:
      ValueError: if the two do not have the same keys.
    """
    _checks.same_keys(terms=means, weights=weights)
    loss = jnp.zeros((), jnp.float32)
    for name, mean in means.items():
        value = mean.value()
        loss = loss.astype(value.dtype)
        # 0 * NaN is NaN, in the backward pass too: a term left out has no backward pass.
        if not _is_constant_zero(weights[name]):
            loss += weights[name].astype(value.dtype) * value
    return loss


def _is_constant_zero(weight: Scalar) -> bool:
    constant = _checks.concrete(weight)
    return constant is not None and bool(constant == 0)
