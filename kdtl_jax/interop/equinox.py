"""Equinox modules as model functions.

    model, params, state = equinox.model(MyModule(key=key))
    outputs, state = model(params, state, inputs, key=key, train=True)

`params` is the module with only its inexact arrays, and None elsewhere; selectors see paths such as
`layers/0/weight`. Equinox modules take one example; this adapter maps them over the batch. A module
that takes batches of any size, but not a single example, is given the batch. To get features, let
the module return a dict with `"logits"` (there is nothing to intercept).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax._types import ModelFn, Outputs, Params, PyTree
from kdtl_jax.interop import _modes, _taps

try:
    import equinox as eqx
except ImportError:
    raise ImportError("interop.equinox needs equinox: pip install 'kdtl_jax[equinox]'.") from None

# (module for one example, state or None, input, key or None, train) -> (outputs, state)
Call = Callable[[Any, Any, Any, Any, bool], tuple[Any, Any]]

_CALL = (
    "equinox.model(module, call=lambda module, state, x, key, train: "
    "(module(x, key=key, flag=train), state))"
)


class Equinox(NamedTuple):
    """A module as a model function, its parameters, and its state (or None)."""

    apply: ModelFn
    params: Params
    model_state: PyTree


def model(
    module: eqx.Module,
    state: eqx.nn.State | None = None,
    *,
    call: Call | None = None,
    axis_name: str = "batch",
) -> Equinox:
    """`(apply, params, model_state)` of an Equinox module, following the library's contract.

    The module is mapped over the batch; each example gets its own key, as `key=`, and the state, if
    there is one, as the second argument. `train=False` runs the module in inference mode
    (`eqx.nn.inference_mode`), so dropout is off and statistics are frozen. Arguments and fields
    with a common name (`train`, `inference`, `deterministic`, `enable_dropout`, …, also within
    `**kwargs`) are set as well. To put trained parameters back into the module, call
    `equinox.with_params(module, params)`.

    Args:
      module: from its constructor, or the first value of `eqx.nn.make_with_state(...)`.
      state: the second value, if there is one.
      call: how to call the module on one example, if not in the usual way.
      axis_name: the axis that the module's batch norms reduce over.

    Raises:
      TypeError: if this is not a module, or keeps a state that is not given.
      ValueError: when `apply` is traced, if dropout or batch statistics are not in the requested
        mode.
    """
    if isinstance(module, functools.partial):
        raise TypeError(
            "module must be a module of Equinox, got functools.partial: JAX sees no arrays in it. "
            "Give the module itself, and pass call= to say how it is called."
        )
    _modes.check_module(module, callable(module) and not isinstance(module, type), "Equinox")
    if state is None and call is None and keeps_state(module):
        raise TypeError(
            f"{type(module).__name__} keeps a state, such as batch statistics. Make both, and give "
            f"both: module, state = eqx.nn.make_with_state({type(module).__name__})(...)."
        )
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        prepared = eqx.nn.inference_mode(eqx.combine(params, static), value=not train)
        prepared = _set_fields(prepared, train)
        size = jax.tree.leaves(inputs)[0].shape[0]
        keys = None if key is None else jax.random.split(key, size)

        def run_batch(way: Call) -> tuple[Any, Any]:
            return way(prepared, _copy_state(model_state), inputs, key, train)

        def run_mapped(way: Call) -> tuple[Any, Any]:
            state_copy = _copy_state(model_state)
            return jax.vmap(
                lambda x, k: way(prepared, state_copy, x, k, train),
                in_axes=(0, None if keys is None else 0),
                out_axes=(0, None),
                axis_name=axis_name,
            )(inputs, keys)

        def run_checked(run: Callable[[Call], tuple[Any, Any]]) -> tuple[Any, Any]:
            def modes(way: Call) -> dict[str, bool]:
                modes_found = _modes_of(module, lambda: run(way), model_state)
                if keys is not None and not train and "dropout" not in modes_found:
                    modes_found["dropout"] = _modes.draws(lambda: run(way))  # in a custom layer
                return modes_found

            way = _modes.first_that_follows(_ways(module, train), train, modes)
            _modes.check(modes(way), train, type(module).__name__, _CALL)
            return run(way)

        if call is not None:
            outputs, new_state = run_mapped(call)
        else:
            try:
                outputs, new_state = run_checked(run_mapped)
            except RuntimeError as error:
                if "requires a key" not in str(error):
                    raise
                raise ValueError(
                    f"{type(module).__name__} has dropout that was given no key. Pass key=, which "
                    f"a module takes as its argument `key`, or say how to call it: {_CALL}."
                ) from error
            except Exception:  # whatever a module raises for a shape it does not accept
                if not _maps_itself(prepared, _ways(module, train), model_state, inputs):
                    raise
                outputs, new_state = run_checked(run_batch)
        return _taps.outputs_of(outputs), new_state if train else model_state

    return Equinox(apply, params, state)


def keeps_state(module: eqx.Module) -> bool:
    """Whether a module keeps values apart, in a state of `eqx.nn.make_with_state`."""

    def is_index(x: Any) -> bool:
        return isinstance(x, eqx.nn.StateIndex)

    return any(map(is_index, jax.tree.leaves(module, is_leaf=is_index)))


def _ways(module: Any, train: bool) -> list[Call]:
    function = type(module).__call__
    takes_key = "key" in inspect.signature(function).parameters or _modes.is_open(function)

    def way(flags: _modes.Flags) -> Call:
        def call(module: Any, state: Any, inputs: Any, key: Any, train: bool) -> Any:
            flags_and_key = flags | ({"key": key} if takes_key else {})
            positional = (inputs,) if state is None else (inputs, state)
            args, kwargs = _modes.arguments(function, 1 + len(positional), flags_and_key, _CALL)
            outputs = module(*positional, *args, **kwargs)
            return (outputs, None) if state is None else outputs

        return call

    return [way(flags) for flags in _modes.candidates(function, train)]


def _copy_state(state: Any) -> Any:
    """Copies a state, because Equinox refuses a state that was used before."""
    return jax.tree.map(lambda leaf: leaf, state)


def _maps_itself(module: Any, ways: list[Call], state: Any, inputs: Any) -> bool:
    """Whether a module takes batches of any size, and gives one row per example."""

    def rows(size: int) -> set[tuple[int, ...]]:
        batch = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), inputs)
        outputs = jax.eval_shape(
            lambda x: ways[-1](module, _copy_state(state), x, jax.random.key(0), False)[0], batch
        )
        return {x.shape[:1] for x in jax.tree.leaves(outputs)}

    try:
        return all(rows(size) == {(size,)} for size in (5, 7))
    except Exception:  # as above
        return False


def _set_fields(module: Any, train: bool) -> Any:
    """Sets every boolean field of a known name, static ones too, on a copy."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for node in _submodules(copy):
        fields = [name for name, value in vars(node).items() if isinstance(value, bool)]
        for name, value in _modes.flags(fields, train).items():
            object.__setattr__(node, name, value)  # safe on a fresh copy
    return copy


def _submodules(module: Any) -> list[Any]:
    def is_child(x: Any) -> bool:
        return isinstance(x, eqx.Module) and x is not module

    children = [x for x in jax.tree.leaves(module, is_leaf=is_child) if is_child(x)]
    itself = [module] if isinstance(module, eqx.Module) else []
    return itself + [part for child in children for part in _submodules(child)]


def _modes_of(module: Any, run: Callable[[], tuple[Any, Any]], state: Any) -> dict[str, bool]:
    """Whether dropout and batch statistics run in training mode: they draw, or change the state."""
    layers = _submodules(module)
    modes: dict[str, bool] = {}
    if any(isinstance(layer, eqx.nn.Dropout) and layer.p for layer in layers):
        modes["dropout"] = _modes.draws(run)
    if state is not None:
        modes["batch statistics"] = _modes.changes(lambda: run()[1], state)
    return modes


def with_params(module: Any, params: Params) -> Any:
    """The module with its inexact arrays replaced by `params` (same structure).

    Raises:
      ValueError: if the structure differs from that of the module's own arrays.
    """
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    if jax.tree.structure(arrays) != jax.tree.structure(params):
        raise ValueError(
            "params must have the structure of the module's own arrays; fill "
            "them with transforms.transfer(source, equinox.model(module).params)."
        )
    return eqx.combine(params, static)
