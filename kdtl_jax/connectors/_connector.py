"""`Connector`, its running statistics, and folding them into linear maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Params, PyTree, Scalar


class Statistics(NamedTuple):
    """Statistics of a normalization: `mean` and `var` `[C]`, their number of values, and its `eps`.

    The variance has the divisor n - 1, like running variances in torch.
    """

    mean: Array
    var: Array
    size: Array
    eps: Array


class ApplyWithStatistics(Protocol):
    """`apply` with the given statistics, or with the batch's own if they are None.

    Returns the output and the statistics that were used: a pytree of `Statistics`.
    """

    def __call__(
        self, params: Params, x: Any, statistics: PyTree | None, where: Array | None, /
    ) -> tuple[Any, PyTree]: ...


class Connector(NamedTuple):
    """`init(key, x) -> params` from shapes alone; `apply(params, x, *, where=None) -> y`.

    `run` is for connectors with batch statistics; a connector of your own that has none needs only
    `apply(params, x)`.
    """

    init: Callable[[Array, Any], Params]
    apply: Callable[..., Any]
    run: ApplyWithStatistics | None = None

    def measure(self, params: Params, x: Any, *, where: Array | None = None) -> tuple[Any, PyTree]:
        """The output of `apply` and the batch's statistics (no gradient flows into them)."""
        return run_step(self, params, x, None, where)

    def evaluate(self, params: Params, statistics: PyTree, x: Any) -> Any:
        """The output with given statistics: each example's output is independent of its batch."""
        return run_step(self, params, x, statistics, None)[0]


def zero_masked(x: Any, where: Array | None) -> Any:
    """Zeros masked rows, where a NaN would reach the gradients of the parameters."""
    if where is None:
        return x

    def mask_leaf(leaf: Any) -> Any:
        _checks.arrays(x=leaf)
        _checks.mask(where, np.shape(leaf)[: max(1, np.ndim(where))])
        return _numerics.kept(leaf, jnp.asarray(where))

    return jax.tree.map(mask_leaf, x)


def check_params(params: Any, *names: str) -> None:
    """Refuses parameters or statistics that are not those of this connector.

    Raises:
      ValueError: naming the entries that a connector's parameters have.
    """
    if not isinstance(params, Mapping) or any(name not in params for name in names):
        received = (
            sorted(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        )
        raise ValueError(
            f"params must be what this connector's init made, a dict with {list(names)}, got "
            f"{received}."
        )


def check_connector(**connectors: Any) -> None:
    """Raises TypeError unless every value has the two functions of a connector."""
    for name, value in connectors.items():
        if not (callable(getattr(value, "init", None)) and callable(getattr(value, "apply", None))):
            raise TypeError(
                f"{name} must be a connector such as connectors.linear(64), got "
                f"{type(value).__name__}."
            )


def run_step(
    connector: Connector, params: Params, x: Any, statistics: PyTree | None, where: Array | None
) -> tuple[Any, PyTree]:
    """`run` of any connector; if it has no statistics, they are an empty tree."""
    x = zero_masked(x, where)
    if connector.run is None:
        return connector.apply(params, x), {}
    return connector.run(params, x, statistics, where)


def with_statistics(init: Callable[[Array, Any], Params], run: ApplyWithStatistics) -> Connector:
    """A connector made from its `run`."""

    def apply(params: Params, x: Any, *, where: Array | None = None) -> Any:
        return run(params, zero_masked(x, where), None, where)[0]

    return Connector(init, apply, run)


def running_init(connector: Connector, params: Params, x: Any) -> PyTree:
    """A connector's running statistics before the first batch, for `TrainState.memory`.

    Args:
      connector: any connector; without statistics, the result is an empty tree.
      params: its parameters; arrays or shapes.
      x: an input of `apply`; shapes are enough.

    Returns:
      A pytree of `Statistics`: mean 0, variance 1, nothing counted.
    """
    check_connector(connector=connector)
    shapes = jax.eval_shape(lambda *arguments: arguments, params, x)

    def initial(statistics: Statistics) -> Statistics:
        mean, var, size, eps = statistics
        return Statistics(jnp.zeros_like(mean), jnp.ones_like(var), jnp.zeros_like(size), eps)

    def init_all() -> PyTree:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.tree.map(initial, connector.measure(*zeros)[1], is_leaf=_is_statistics)

    return jax.jit(init_all)()  # compiled, so only constants are left


def running_update(running: PyTree, measured: PyTree, *, momentum: Scalar = 0.1) -> PyTree:
    """`(1 - momentum) running + momentum measured`; the first batch is taken unchanged.

    A batch with fewer than two values per channel (e.g. all padding) changes nothing.

    Args:
      running: from `running_init` or an earlier step.
      measured: from `Connector.measure`.
      momentum: share of the batch.

    Raises:
      ValueError: if the two are not statistics of one connector.
    """
    _checks.within(0, 1, momentum=momentum)
    flattened = [
        jax.tree.flatten(statistics, is_leaf=_is_statistics) for statistics in (running, measured)
    ]
    if flattened[0][1] != flattened[1][1] or not all(
        map(_is_statistics, (*flattened[0][0], *flattened[1][0]))
    ):
        raise ValueError(
            "running and measured must be statistics of one connector, from running_init and "
            f"Connector.measure, got trees of {flattened[0][1]} and {flattened[1][1]}."
        )

    def average(old: Statistics, new: Statistics) -> Statistics:
        share = jnp.where(old.size == 0, 1, _numerics.scalar(momentum, old.mean, "momentum"))
        share = jnp.where(new.size >= 2, share, 0)
        mean, var = (a + share * (b - a) for a, b in zip(old[:2], new[:2], strict=True))
        return Statistics(mean, var, old.size + new.size, new.eps)

    return jax.tree.map(average, running, measured, is_leaf=_is_statistics)


def fold_batch_norm(params: Params, statistics: PyTree) -> Params:
    """The parameters with every normalization merged into the linear map before it.

    The folded parameters belong to the same connector: `apply(folded, x)` equals
    `evaluate(params, statistics, x)`, since a `batch_norm` without parameters is the identity.

    Args:
      params: of a `chain` in which every `batch_norm` follows a `linear` or `conv`, or of
        connectors made of such chains.
      statistics: running statistics of the same connector; they hold each normalization's eps.

    Raises:
      ValueError: if a normalization does not follow a linear map.
    """
    if isinstance(params, Mapping) and isinstance(statistics, Mapping):
        return {
            name: fold_batch_norm(child, statistics[name]) if name in statistics else child
            for name, child in params.items()
        }
    if isinstance(params, Sequence) and isinstance(statistics, Sequence) and params:
        if not isinstance(statistics, Statistics):
            return _fold_chain(params, statistics)
    if isinstance(statistics, Statistics):
        raise ValueError(
            "a batch_norm can be folded only into a linear or conv just before it in the same "
            f"chain, but one of {statistics.mean.shape[0]} channels has none."
        )
    return params


def _fold_chain(params: Sequence[Params], statistics: Sequence[PyTree]) -> Params:
    folded: list[Params] = []
    for step_params, step_statistics in zip(params, statistics, strict=True):
        follows_linear = bool(folded) and isinstance(folded[-1], Mapping) and "kernel" in folded[-1]
        if isinstance(step_statistics, Statistics) and follows_linear:
            folded[-1] = _fold_into_linear(folded[-1], step_params, step_statistics)
            folded.append({})
        else:
            folded.append(fold_batch_norm(step_params, step_statistics))
    return folded


def _fold_into_linear(linear: Params, norm: Params, statistics: Statistics) -> Params:
    """`(x W + b - mean) factor + offset` as one linear map."""
    kernel = linear["kernel"]
    factor = norm["scale"] * _numerics.safe_rsqrt(statistics.var + statistics.eps).astype(
        kernel.dtype
    )
    bias = linear.get("bias", jnp.zeros_like(factor)) - statistics.mean.astype(kernel.dtype)
    rows = factor.reshape((1,) * (kernel.ndim - 1) + factor.shape)
    return {"kernel": kernel * rows, "bias": bias * factor + norm["offset"]}


def _is_statistics(x: Any) -> bool:
    return isinstance(x, Statistics)
