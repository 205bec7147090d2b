"""Flax Linen modules as model functions.

    model = linen.model(MLP((64, 32), classes=10))
    variables = model.init(jax.random.key(0), images[:1])
    outputs, state = model.apply(variables.params, variables.model_state, images)

A module returns either a dict of outputs, or an array, which becomes the `"logits"`. (An encoder
without a head has no logits; its dict is passed on unchanged.) `taps` adds the outputs of
submodules by path, without changing the module.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import errors
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.interop import _modes, _taps

STATISTICS = ("use_running_average", "update_stats", "update_batch_stats")  # modes of these alone
_CALL = "linen.model(module, call=lambda module, x, train: module(x, flag=train))"
Call = Callable[[nn.Module, Any, bool], Any]  # (bound module, inputs, train) -> outputs


class Linen(NamedTuple):
    """A module as two functions."""

    init: Callable[[Array, Any], Variables]  # (key, example inputs) -> Variables
    apply: ModelFn


def model(
    module: nn.Module,
    *,
    taps: Sequence[str] = (),
    call: Call | None = None,
    rngs: Sequence[str] = ("dropout",),
) -> Linen:
    """`(init, apply)` of a Linen module, following the library's model contract.

    `model_state` holds every collection except `"params"` (batch statistics), or None if there is
    none; it changes only with `train=True`.

    The mode is set through whichever common argument or field the module has: `train`, `training`,
    `is_training`, `deterministic`, `use_running_average`, `inference`, …, also within `**kwargs`.

    Args:
      module: an unbound module.
      taps: submodules whose output is added to the outputs under their path, `"block3/conv1"`;
        each is a regular expression that must match whole paths. A module called more than once,
        or one that returns a tuple, gives `path/0`, `path/1`, and so on. Outputs that the module
        itself returns keep their names.
      call: `call(module, inputs, train)`, for modules that are not called in the usual way.
      rngs: names of the random streams that the module reads when `key` is given; `"dropout"` only
        in training, so that dropout that does not follow the mode is an error.

    Returns:
      `Linen(init, apply)`. `init(key, inputs)` only reads shapes and is safe under `eval_shape`.

    Raises:
      ValueError: when `apply` is traced, if a tap matches no submodule (the existing ones are
        listed), dropout or batch statistics are not in the requested mode, or the module reads a
        random stream that `rngs` and `key` do not provide.
    """

    _modes.check_module(module, isinstance(module, nn.Module), "Linen")

    def streams(key: Array | None, train: bool) -> dict[str, Array] | None:
        if key is None:
            return None
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}
        return keys if train else {k: v for k, v in keys.items() if k != "dropout"}

    def is_submodule_call(module: nn.Module, method: str) -> bool:
        return method == "__call__" and bool(module.path)

    def init(key: Array, inputs: Any) -> Variables:
        key_params, key_streams = jax.random.split(key)
        keys = {"params": key_params, **(streams(key_streams, True) or {})}

        def run(way: _Way) -> Any:
            return way.module.init(keys, inputs, False, method=way.call)

        with _rephrased_errors(module):
            variables = run(_choose_way(_ways(module, call, train=False), False, run))
        state = {k: v for k, v in variables.items() if k not in ("params", "intermediates")}
        return Variables(variables.get("params", {}), state or None)

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        changing = list(model_state) if train and model_state else []

        def run(way: _Way, mutable: Any = True) -> Any:
            return way.module.apply(
                {"params": params, **(model_state or {})},
                inputs,
                train,
                method=way.call,
                rngs=streams(key, train),
                mutable=mutable,
                capture_intermediates=is_submodule_call if taps else False,
            )

        def check() -> None:
            if call is None:
                _modes.check(modes, train, type(module).__name__, _CALL)

        with _rephrased_errors(module):
            way = _choose_way(_ways(module, call, train), train, run)
        with _rephrased_errors(module), _record_modes() as modes:
            try:
                outputs, updated = run(way, [*changing, "intermediates"] if taps else changing)
            except errors.ModifyScopeVariableError as error:
                check()
                raise ValueError(
                    f"{type(module).__name__} changes its variables in evaluation mode: "
                    f"{_message(error)}. Say how to call it: {_CALL}."
                ) from error
        if "batch_stats" in changing and not any(modes.values()):
            before, after = (trees.flatten(x["batch_stats"]) for x in (model_state, updated))
            if not _modes.changed(before, after):
                modes["batch_stats"] = False  # in a custom layer
        check()
        calls = _calls(updated.get("intermediates") or {}, "") if taps else []
        all_outputs = _taps.with_taps(outputs, taps, _taps.outputs_by_path(calls))
        if not changing:
            return all_outputs, model_state
        return all_outputs, {name: updated[name] for name in model_state}

    return Linen(init, apply)


def _message(error: Exception) -> str:
    """Flax's message without the link."""
    return str(error).partition(" (http")[0].rstrip(".")


@contextlib.contextmanager
def _rephrased_errors(module: nn.Module) -> Iterator[None]:
    """Rephrases Flax's errors about a missing random stream or mode in terms of this adapter."""
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"{type(module).__name__} reads its mode as a traced value. Mark it static where the "
            "module is wrapped, nn.remat(Block, static_argnums=(2,)) for __call__(self, x, train), "
            "or make it a field."
        ) from error
    except ValueError as error:
        if "must be passed to the constructor or at call time" not in str(error):
            raise
        raise ValueError(
            f"{type(module).__name__} holds a layer without a mode: {_message(error)}. Say how to "
            f"call the module: {_CALL}."
        ) from error
    except errors.InvalidRngError as error:
        raise ValueError(
            f"{type(module).__name__} reads a random stream that it was not given: "
            f"{_message(error)}. Pass key=, and name the streams besides dropout: "
            "linen.model(module, rngs=('dropout', 'noise')). If it should draw nothing in this "
            f"mode, say how to call it: {_CALL}."
        ) from error


class _Way(NamedTuple):
    """A way to call a module: a copy with its fields set, and a method."""

    module: nn.Module
    call: Call


def _ways(module: nn.Module, call: Call | None, train: bool) -> list[_Way]:
    if call is not None:
        return [_Way(module, call)]
    function = type(module).__call__
    options = _modes.candidates(function, train)
    fields = [
        field.name
        for field in dataclasses.fields(module)
        if isinstance(getattr(module, field.name), (bool, np.bool_, type(None)))
    ]
    if options != [{}]:  # a mode must not be given twice; statistics may be frozen
        fields = [name for name in fields if getattr(module, name) is not None]
        fields = [name for name in fields if name not in STATISTICS and name not in options[0]]
    changes: dict[str, Any] = _modes.flags(fields, train)
    module = module.clone(**changes)
    return [_Way(module, call) for call in _modes.calls(function, train, _CALL)]


def _choose_way(ways: list[_Way], train: bool, run: Callable[[_Way], Any]) -> _Way:
    def modes(way: _Way) -> dict[str, bool]:
        with _record_modes() as modes_found:
            jax.eval_shape(lambda: run(way))
        return modes_found

    return _modes.first_that_follows(ways, train, modes)


@contextlib.contextmanager
def _record_modes() -> Iterator[dict[str, bool]]:
    """Records the mode in which dropout and batch normalization run: `{path: training}`."""
    modes: dict[str, bool] = {}

    def record(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__":
            frozen = None
            if isinstance(layer, nn.BatchNorm):
                frozen = _first(kwargs.get("use_running_average"), *args[1:2])
                frozen = _first(frozen, layer.use_running_average)
            elif isinstance(layer, nn.Dropout) and not _is_zero(layer.rate):
                frozen = _first(kwargs.get("deterministic"), *args[1:2])
                frozen = _first(frozen, layer.deterministic)
            elif isinstance(layer, nn.MultiHeadDotProductAttention) and layer.dropout_rate:
                frozen = _first(kwargs.get("deterministic"), layer.deterministic)
            if isinstance(frozen, (bool, np.bool_)):
                modes["/".join(layer.path)] = not frozen
        return run(*args, **kwargs)

    with nn.intercept_methods(record):
        yield modes


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_zero(rate: Any) -> bool:
    return isinstance(rate, (int, float)) and rate == 0


def _calls(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, tuple[Any, ...]]]:
    out: list[tuple[str, tuple[Any, ...]]] = []
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if name == "__call__":
            out.append((prefix, value))
        elif isinstance(value, Mapping):
            out += _calls(value, path)
        else:  # sown by the module itself: a tuple of values, or whatever its reduce_fn makes
            out.append((path, value if isinstance(value, tuple) else (value,)))
    return out
