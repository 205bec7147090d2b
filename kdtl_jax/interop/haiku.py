"""Haiku functions as model functions.

    run = haiku.model(lambda x, train: MLP(...)(x))
    variables = run.init(jax.random.key(0), images)
    outputs, state = run.apply(variables.params, variables.model_state, images)

Parameters are Haiku's two-level dicts. A module's name may itself contain `/`: selectors match the
joined path, `"net/~/linear_1/w"`, and never split it again. For features, let the function return
them (a dict with `"logits"`), or tap modules by name.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.interop import _modes, _taps

try:
    import haiku as hk
except ImportError:
    raise ImportError("interop.haiku needs dm-haiku: pip install 'kdtl_jax[haiku]'.") from None

_CALL = "haiku.model(lambda x, train: Net()(x, is_training=train))"


class Haiku(NamedTuple):
    """A Haiku function as two pure functions."""

    init: Callable[[Array, Any], Variables]  # (key, example inputs) -> Variables
    apply: ModelFn


def model(net: Callable[..., Any], *, taps: Sequence[str] = ()) -> Haiku:
    """`(init, apply)` of an untransformed Haiku function `net(inputs, train)`.

    `model_state` is Haiku's state (batch statistics), or None if there is none; it changes only
    with `train=True`.

    Args:
      net: builds and calls its modules, as given to `hk.transform_with_state`. Its second argument
        is `train`, or has another common name (`is_training`, `training`, `deterministic`,
        `inference`, …) and is set accordingly; a net without modes may take only the inputs.
      taps: modules whose output is added to the outputs under their name, `"net/~/linear_0"`; each
        is a regular expression that must match whole names. A module called more than once, or one
        that returns a tuple, gives `name/0`, `name/1`, and so on.

    Raises:
      TypeError: if `net` is no function, or has arguments besides its inputs but none for its mode.
      ValueError: when `apply` is traced, if a tap matches no module (the existing ones are listed),
        batch statistics are not in the requested mode, or numbers are drawn in evaluation mode.
    """
    if isinstance(net, type) or not callable(net):
        kind = net.__name__ if isinstance(net, type) else type(net).__name__
        raise TypeError(
            f"net must be an untransformed function of its inputs, got {kind}. Write "
            "haiku.model(lambda x, train: Net()(x, is_training=train)), without hk.transform."
        )
    transformed = hk.transform_with_state(_with_mode(net))

    def init(key: Array, inputs: Any) -> Variables:
        # Batch norm creates its averages only in training mode.
        params, state = transformed.init(key, inputs, True)
        return Variables(params, state or None)

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        calls: dict[str, list[Any]] = {}
        modes: dict[str, bool] = {}

        def record(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            out = next_call(*args, **kwargs)
            if context.method_name != "__call__":
                return out
            name = context.module.module_name
            calls.setdefault(name, []).append(out)
            if isinstance(context.module, hk.BatchNorm):
                call = inspect.signature(hk.BatchNorm.__call__).bind(None, *args, **kwargs)
                tests_by_batch = call.arguments.get("test_local_stats", False)
                uses_batch = call.arguments["is_training"] or tests_by_batch
                if isinstance(uses_batch, (bool, np.bool_)):
                    modes[name] = bool(uses_batch)
            return out

        state = {} if model_state is None else model_state
        with hk.intercept_methods(record):
            outputs, new_state = transformed.apply(params, state, key, inputs, train)
            if key is not None and not train:
                modes["dropout"] = _modes.draws(
                    lambda: transformed.apply(params, state, key, inputs, train)
                )
        _modes.check(modes, train, "the net", _CALL)
        if not train and _modes.changed(trees.flatten(state), trees.flatten(new_state)):
            raise ValueError(
                "the net changed its state in evaluation mode: its batch statistics do not follow "
                "the mode. Pass it on: lambda x, train: Net()(x, is_training=train)."
            )
        all_outputs = _taps.with_taps(outputs, taps, _taps.outputs_by_path(calls.items()))
        return all_outputs, new_state if train and model_state is not None else model_state

    return Haiku(init, apply)


def _with_mode(net: Callable[..., Any]) -> Callable[[Any, bool], Any]:
    """Adapts `net` to a function of inputs and `train`."""
    names = list(inspect.signature(net).parameters)
    accepted = _modes.accepted(net)
    if _modes.flags(accepted, True):

        def call_with_mode(inputs: Any, train: bool) -> Any:
            args, kwargs = _modes.arguments(net, 1, _modes.flags(accepted, train), _CALL)
            return net(inputs, *args, **kwargs)

        return call_with_mode
    if len(names) == 1 and not _modes.is_open(net):
        return lambda inputs, train: net(inputs)
    raise TypeError(
        "net must take its inputs and train (or is_training, deterministic, ...), got the "
        f"arguments {names}, none of which is known to be the mode. Write for example "
        "lambda x, train: Net()(x, is_training=train)."
    )
