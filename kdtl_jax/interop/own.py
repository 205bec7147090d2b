"""The user's own model as a network, whatever framework it is written in.

    net = own.network(Net, classes=10, example=images[:1])   # a class, a factory or (init, apply)

A model can be a Linen module, as a class or an instance; a class or a factory of NNX or Equinox
modules; a pair of functions `init(key, inputs) -> params` and `apply(params, inputs) -> logits`,
such as `hk.transform` returns; or a factory of any of these. `apply` may also take a key and its
mode under a common name (`key`, `rng`; `train`, `is_training`, `deterministic`, ...). Arguments of
a class, a factory, or `init` are filled in by name (`CLASSES`, `INPUTS`, `key`, `rngs`, ...); a
single argument of any other name is the number of classes.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, methods
from kdtl_jax._types import ModelFn, Outputs, PyTree, Variables
from kdtl_jax.interop import _modes, _taps, networks
from kdtl_jax.interop.networks import Network
from kdtl_jax.train import precision

# Names of arguments that take the number of classes.
CLASSES = (
    "classes", "num_classes", "n_classes", "num_labels", "n_labels", "num_outputs", "n_outputs",
    "out_features", "out_size", "features_out", "dout", "n_out",
)  # fmt: skip
# Names of arguments that take the width of flat inputs.
INPUTS = ("in_features", "in_size", "input_size", "features_in", "num_inputs", "din", "n_in")
# Names of arguments that take the channels of images.
CHANNELS = ("channels", "in_channels", "input_channels")
# Names of arguments that take a random key, or nnx.Rngs.
KEYS = ("key", "rng", "rng_key", "rngs")
# Names of arguments that take the shape of one input.
SHAPES = ("shape", "input_shape", "inputs_shape")
# What a model may be, in words, for messages.
FORMS = "a Linen module, an NNX or Equinox class, a factory of one, or functions (init, apply)"


def network(found: Any, *, classes: int, example: Any, dtype: Any = None) -> Network:
    """The user's own model as a network.

    Args:
      found: see the module.
      classes: the number of outputs.
      example: inputs `[1, ...]`.
      dtype: the precision to compute in; None leaves it unchanged.

    Raises:
      TypeError: if it is none of these; the message says what it is and what to write instead.
      ValueError: if it has no logits `[B, classes]`.
      Exception: whatever the model itself raises, for instance for inputs that it does not accept.
    """
    name = getattr(found, "__name__", type(found).__name__)
    example = jnp.asarray(example)
    made = _made(found, classes, example.shape[1:], jax.random.key(0))
    if isinstance(made, nn.Module):
        net = networks.network(made, example)
    elif pair := _pair(made):
        net = _of_pair(*pair, _values(classes, example.shape[1:]))
    elif (kind := _framework(made)) is None:
        raise TypeError(f"{name} is {_kind(made)}, not a model. Expected {FORMS}.")
    elif made is found or not (_takes(found, "key") or _takes(found, "rngs")):
        raise TypeError(
            f"{name} holds one set of weights, and every seed would start from it. Give the class, "
            f"or a factory with the argument {'rngs' if kind == 'nnx' else 'key'}."
        )
    else:
        of_key = functools.partial(_made, found, classes, example.shape[1:])
        net = (_of_nnx if kind == "nnx" else _of_equinox)(made, of_key)
    outputs = networks.output_shapes(net, example)
    logits = outputs.get("logits")
    shape = getattr(logits, "shape", None)
    if shape is None:
        what = f"a {type(logits).__name__}" if "logits" in outputs else sorted(outputs)
        raise ValueError(f'{name} returns {what}: no "logits". Return an array, or a dict with it.')
    if shape != (1, classes):
        hint = ""
        if shape == (1, 1) and classes == 2:
            hint = " One logit answers one label of 0 and 1: read the targets with --target labels."
        raise ValueError(
            f"{name} gives logits {list(shape)} for one example, expected [1, {classes}]: one "
            f"output per class. An argument called classes= is filled in.{hint}"
        )
    if not net.layout.features:
        variables = networks.abstract(net, example)
        net = net._replace(layout=methods.layout(net.apply, variables, example))
    if dtype is not None:
        net = net._replace(apply=precision.compute_in(net.apply, dtype))
    return net


def _made(found: Any, classes: int, shape: tuple[int, ...], key: Array) -> Any:
    """The model itself, as made by a class or a factory."""
    known = isinstance(found, nn.Module) or _pair(found) or _framework(found)
    if known or not callable(found):
        return found
    return found(**_arguments(found, classes, shape, key))


def _arguments(found: Any, classes: int, shape: tuple[int, ...], key: Array) -> dict[str, Any]:
    """The arguments with which a class or a factory is called."""
    name = getattr(found, "__name__", "it")
    values = _values(classes, shape) | {"key": key}
    given: dict[str, Any] = {}
    unknown = []
    for parameter in _parameters(found):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        needed = parameter.default is parameter.empty
        if parameter.name == "rngs":
            from flax import nnx

            given["rngs"] = nnx.Rngs(key)
        elif parameter.name in values and (needed or parameter.name in (*CLASSES, "key")):
            given[parameter.name] = values[parameter.name]
        elif needed:
            unknown.append(parameter.name)
    if unknown and unknown[0] == "params":
        raise TypeError(
            f"{name}(params, ...) is a function of parameters and needs another to make them. "
            f"Give a pair, net = (init, {name}), with init(key, inputs) -> params."
        )
    if len(unknown) == 1 and not set(given) & set(CLASSES):
        return {**given, unknown[0]: classes}
    if unknown:
        raise TypeError(
            f"{name} needs {', '.join(unknown)}, with no known value. Give them defaults, or "
            f"write a factory: def build(classes): return {name}(...). classes, in_features, "
            "shape, channels, key and rngs are filled in."
        )
    return given


def _values(classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The values to fill in, by argument name."""
    values = dict.fromkeys(CLASSES, classes) | dict.fromkeys(INPUTS, math.prod(shape))
    channels = dict.fromkeys(CHANNELS, shape[-1] if shape else 1)
    return {**values, **dict.fromkeys(SHAPES, shape), **channels}


def _pair(found: Any) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`(init, apply)`, if it is such a pair."""
    if isinstance(found, nn.Module) or isinstance(found, type):
        return None
    init, apply = getattr(found, "init", None), getattr(found, "apply", None)
    if init is None and isinstance(found, (tuple, list)) and len(found) == 2:
        init, apply = found
    return (init, apply) if callable(init) and callable(apply) else None


def _framework(found: Any) -> str | None:
    """`"nnx"` or `"equinox"` for one of their modules; neither is imported here."""
    first = found[0] if isinstance(found, tuple) and len(found) == 2 else found
    for base in type(first).__mro__:
        if base.__module__.startswith("flax.nnx") and base.__name__ == "Module":
            return "nnx"
        if base.__module__.startswith("equinox") and base.__name__ == "Module":
            return "equinox"
    return None


def _takes(found: Any, name: str) -> bool:
    return callable(found) and any(p.name == name for p in _parameters(found))


def _parameters(found: Any) -> list[inspect.Parameter]:
    """The parameters of a factory, or of a class's `__init__`, which a metaclass may hide."""
    if isinstance(found, type):
        return list(inspect.signature(found.__init__).parameters.values())[1:]
    return list(inspect.signature(found).parameters.values())


def _of_pair(
    init: Callable[..., Any], apply: Callable[..., Any], values: dict[str, Any]
) -> Network:
    """A network of two functions; a model function and its variables are used as they are.

    `values` are the arguments of `init` by name, in addition to the key and the inputs.
    """
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(apply).parameters
    names = [p.name for p in parameters.values() if p.kind in places]
    needs_key = len(names) > 1 and names[1] in KEYS  # Haiku's order
    named_key = [name for name in parameters if name in KEYS and not needs_key]
    inputs_like = [name for name in names if name not in KEYS and not _modes.flags([name], True)]
    is_model = len(inputs_like) > 2
    if is_model and not ({"key", "train"} <= set(parameters) or _modes.is_open(apply)):
        raise TypeError(
            f"apply({', '.join(parameters)}) is not understood. Expected apply(params, inputs), "
            "optionally with key and train, or apply(params, model_state, inputs, *, key=None, "
            "train=False), which returns (outputs, model_state). For a Haiku function with state, "
            "give interop.haiku.model(net), before it is transformed."
        )

    def start(key: Array, inputs: Any) -> Variables:
        _, *others = inspect.signature(init).parameters.values()
        flags = _modes.flags(_modes.accepted(init), True)
        needed = [p.name for p in others if p.default is p.empty and p.name not in flags]
        asked = [p.name for p in others if p.name in needed or p.name in CLASSES]
        known = {name: values[name] for name in asked if name in values}
        unknown = [name for name in needed if name not in known][:1]
        if unknown and unknown[0] == others[0].name:
            made = init(key, inputs, **known, **flags)
        else:
            made = init(key, **dict.fromkeys(unknown, inputs), **known, **flags)
        return made if isinstance(made, Variables) else Variables(made)

    def run(
        params: Any,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        if is_model:
            return apply(params, model_state, inputs, key=key, train=train)
        before = (params, key) if needs_key else (params,)

        def call(flags: _modes.Flags) -> Any:
            return apply(*before, inputs, **dict.fromkeys(named_key, key), **flags)

        def modes(flags: _modes.Flags) -> dict[str, bool]:
            jax.eval_shape(lambda: call(flags))  # all that can be checked: whether it takes them
            return {}

        way = _modes.first_that_follows(_modes.candidates(apply, train), train, modes)
        return _taps.outputs_of(call(way)), model_state

    return Network(start, run, methods.Layout(()))


def _of_nnx(made: Any, build: Callable[[Array], Any]) -> Network:
    from flax import nnx

    from kdtl_jax.interop import nnx as door

    inner = door.model(made)

    def start(key: Array, inputs: Any) -> Variables:
        _, params, rest = nnx.split(build(key), nnx.Param, ...)
        return Variables(params, stored(rest))

    return Network(start, _with_state(inner.apply, inner.model_state), methods.Layout(()))


def _of_equinox(made: Any, build: Callable[[Array], Any]) -> Network:
    import equinox as eqx

    from kdtl_jax.interop import equinox as door

    module, state = made if isinstance(made, tuple) else (made, None)
    inner = door.model(module, state)

    def start(key: Array, inputs: Any) -> Variables:
        new = build(key)
        own, first = new if isinstance(new, tuple) else (new, None)
        params, _ = eqx.partition(own, eqx.is_inexact_array)
        return Variables(params, stored(first))

    return Network(start, _with_state(inner.apply, inner.model_state), methods.Layout(()))


def stored(state: Any) -> PyTree:
    """A framework's state as a collection that files can hold, with random keys as numbers."""
    if not jax.tree.leaves(state):
        return None
    return {
        "state": jax.tree.map(lambda x: jax.random.key_data(x) if _checks.is_key(x) else x, state)
    }


def _with_state(apply: ModelFn, like: Any) -> ModelFn:
    """The model function with its state as `stored` keeps it."""
    empty = not jax.tree.leaves(like)

    def run(
        params: Any,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        state = like
        if not empty:
            state = jax.tree.map(
                lambda own, x: (
                    jax.random.wrap_key_data(x, impl=jax.random.key_impl(own))
                    if _checks.is_key(own)
                    else x
                ),
                like,
                model_state["state"],
            )
        outputs, new = apply(params, state, inputs, key=key, train=train)
        return outputs, None if empty else stored(new)

    return run


def _kind(made: Any) -> str:
    if hasattr(made, "dtype"):
        return "an array"
    return "a plain function" if inspect.isfunction(made) else f"{type(made).__name__}"
