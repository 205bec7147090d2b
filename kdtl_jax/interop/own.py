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
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, methods, trees
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
# The accepted forms of a model, for messages.
FORMS = "a Linen module, an NNX or Equinox class, a factory of one, or functions (init, apply)"


def network(model: Any, *, classes: int, example: Any, dtype: Any = None) -> Network:
    """Builds a network from the user's own model.

    Args:
      model: any of the forms above.
      classes: the number of outputs.
      example: inputs `[1, ...]`.
      dtype: the precision to compute in; None leaves it unchanged.

    Raises:
      TypeError: if it has none of these forms; the message says what it is and what to write.
      ValueError: if it does not return logits `[B, classes]`.
      Exception: whatever the model itself raises, for instance on inputs it does not accept.
    """
    name = getattr(model, "__name__", type(model).__name__)
    example = jnp.asarray(example)
    built = _build(model, classes, example.shape[1:], jax.random.key(0))
    if isinstance(built, nn.Module):
        net = networks.network(built, example)
    elif pair := _pair(built):
        net = _pair_network(*pair, _values(classes, example.shape[1:]))
    elif (kind := _framework(built)) is None:
        raise TypeError(f"{name} is {_describe(built)}, not a model. Expected {FORMS}.")
    elif built is model or not {"key", "rngs"} & {p.name for p in _parameters(model)}:
        raise TypeError(
            f"{name} holds one set of weights, and every seed would start from it. Give the class, "
            f"or a factory with the argument {'rngs' if kind == 'nnx' else 'key'}."
        )
    else:
        build = functools.partial(_build, model, classes, example.shape[1:])
        net = _framework_network(kind, built, build)
    outputs = networks.output_shapes(net, example)
    logits = outputs.get("logits")
    shape = getattr(logits, "shape", None)
    if shape is None:
        returned = f"a {type(logits).__name__}" if "logits" in outputs else sorted(outputs)
        raise ValueError(
            f'{name} returns {returned}: no "logits". Return an array, or a dict with it.'
        )
    if shape != (1, classes):
        hint = ""
        if shape == (1, 1) and classes == 2:
            hint = " One logit answers one label of 0 and 1: read the targets with --target labels."
        raise ValueError(
            f"{name} gives logits {list(shape)} for one example, expected [1, {classes}]: one "
            f"output per class. An argument called classes= is filled in.{hint}"
        )
    dtype_of_logits = outputs["logits"].dtype
    if not jnp.issubdtype(dtype_of_logits, jnp.floating):
        raise ValueError(f"{name} gives logits {dtype_of_logits}, expected floating point.")
    variables = networks.abstract(net, example)
    if not any(map(trees.is_inexact, jax.tree.leaves(variables.params))):
        raise ValueError(f"{name} has no floating-point parameters: there is nothing to train.")
    if not net.layout.features:
        net = net._replace(layout=methods.layout(net.apply, variables, example))
    if dtype is not None:
        net = net._replace(apply=precision.compute_in(net.apply, dtype))
    return net


def _build(model: Any, classes: int, shape: tuple[int, ...], key: Array) -> Any:
    """The model itself; a class or a factory is called."""
    is_model = isinstance(model, nn.Module) or _pair(model) or _framework(model)
    if is_model or not callable(model):
        return model
    return model(**_arguments(model, classes, shape, key))


def _arguments(model: Any, classes: int, shape: tuple[int, ...], key: Array) -> dict[str, Any]:
    """The arguments for calling a class or a factory."""
    name = getattr(model, "__name__", "it")
    values = _values(classes, shape) | {"key": key}
    arguments: dict[str, Any] = {}
    unknown = []
    for parameter in _parameters(model):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        is_required = parameter.default is parameter.empty
        if parameter.name == "rngs":
            from flax import nnx

            arguments["rngs"] = nnx.Rngs(key)
        elif parameter.name in values and (is_required or parameter.name in (*CLASSES, "key")):
            arguments[parameter.name] = values[parameter.name]
        elif is_required:
            unknown.append(parameter.name)
    if unknown and unknown[0] == "params":
        raise TypeError(
            f"{name}(params, ...) is a function of parameters and needs another to make them. "
            f"Give a pair, net = (init, {name}), with init(key, inputs) -> params."
        )
    if len(unknown) == 1 and not set(arguments) & set(CLASSES):
        return {**arguments, unknown[0]: classes}
    if unknown:
        raise TypeError(
            f"{name} needs {', '.join(unknown)}, with no known value. Give them defaults, or "
            f"write a factory: def build(classes): return {name}(...). classes, in_features, "
            "shape, channels, key and rngs are filled in."
        )
    return arguments


def _values(classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The values to fill in, by argument name."""
    values = dict.fromkeys(CLASSES, classes) | dict.fromkeys(INPUTS, math.prod(shape))
    channels = dict.fromkeys(CHANNELS, shape[-1] if shape else 1)
    return {**values, **dict.fromkeys(SHAPES, shape), **channels}


def _pair(model: Any) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`(init, apply)`, if it is such a pair."""
    if isinstance(model, nn.Module) or isinstance(model, type):
        return None
    init, apply = getattr(model, "init", None), getattr(model, "apply", None)
    if init is None and isinstance(model, (tuple, list)) and len(model) == 2:
        init, apply = model
    return (init, apply) if callable(init) and callable(apply) else None


def _framework(model: Any) -> str | None:
    """`"nnx"` or `"equinox"` for one of their modules; neither is imported here."""
    module = model[0] if isinstance(model, tuple) and len(model) == 2 else model
    for base in type(module).__mro__:
        if base.__module__.startswith("flax.nnx") and base.__name__ == "Module":
            return "nnx"
        if base.__module__.startswith("equinox") and base.__name__ == "Module":
            return "equinox"
    return None


def _parameters(model: Any) -> list[inspect.Parameter]:
    """The parameters of a factory, or of a class's `__init__`, which a metaclass may hide."""
    if isinstance(model, type):
        return list(inspect.signature(model.__init__).parameters.values())[1:]
    return list(inspect.signature(model).parameters.values())


def _pair_network(
    init: Callable[..., Any], apply: Callable[..., Any], values: dict[str, Any]
) -> Network:
    """Builds a network from two functions; a model function and its variables are used unchanged.

    `values` are the arguments of `init` by name, in addition to the key and the inputs.
    """
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    accepted = inspect.signature(apply).parameters
    positional = [p.name for p in accepted.values() if p.kind in places]
    needs_key = len(positional) > 1 and positional[1] in KEYS  # Haiku's order
    key_names = [name for name in accepted if name in KEYS and not needs_key]
    data = [name for name in positional if name not in KEYS and not _modes.flags([name], True)]
    is_model = len(data) > 2
    if is_model and not ({"key", "train"} <= set(accepted) or _modes.is_open(apply)):
        raise TypeError(
            f"apply({', '.join(accepted)}) is not understood. Expected apply(params, inputs), "
            "optionally with key and train, or apply(params, model_state, inputs, *, key=None, "
            "train=False), which returns (outputs, model_state). For a Haiku function with state, "
            "give interop.haiku.model(net), before it is transformed."
        )

    def start(key: Array, inputs: Any) -> Variables:
        _, *parameters = inspect.signature(init).parameters.values()
        flags = _modes.flags(_modes.accepted(init), True)
        required = [p.name for p in parameters if p.default is p.empty and p.name not in flags]
        names = [p.name for p in parameters if p.name in required or p.name in CLASSES]
        arguments = {name: values[name] for name in names if name in values}
        unknown = [name for name in required if name not in arguments][:1]
        if unknown and unknown[0] == parameters[0].name:
            variables = init(key, inputs, **arguments, **flags)
        else:
            variables = init(key, **dict.fromkeys(unknown, inputs), **arguments, **flags)
        return variables if isinstance(variables, Variables) else Variables(variables)

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
        leading = (params, key) if needs_key else (params,)

        def call(flags: _modes.Flags) -> Any:
            return apply(*leading, inputs, **dict.fromkeys(key_names, key), **flags)

        def modes(flags: _modes.Flags) -> dict[str, bool]:
            # This only checks that `apply` accepts the flags; its layers cannot be inspected.
            jax.eval_shape(lambda: _taps.outputs_of(call(flags)))
            return {}

        flags = _modes.first_that_follows(_modes.candidates(apply, train), train, modes)
        return _taps.outputs_of(call(flags)), model_state

    return Network(start, run, methods.Layout(()))


def _framework_network(kind: str, model: Any, build: Callable[[Array], Any]) -> Network:
    """Builds a network of an NNX or Equinox module; `build` makes another one from a key."""
    adapter = importlib.import_module(f"kdtl_jax.interop.{kind}")
    if kind == "equinox" and not isinstance(model, tuple) and adapter.keeps_state(model):
        build = adapter.eqx.nn.make_with_state(build)
        model = build(jax.random.key(0))

    def adapt(model: Any) -> Any:
        return adapter.model(*model) if isinstance(model, tuple) else adapter.model(model)

    def start(key: Array, inputs: Any) -> Variables:
        adapted = adapt(build(key))
        return Variables(adapted.params, stored(adapted.model_state))

    adapted = adapt(model)
    return Network(start, _with_state(adapted.apply, adapted.model_state), methods.Layout(()))


def stored(state: Any) -> PyTree:
    """Converts a framework's state to a collection for files, with random keys as numbers."""
    if not jax.tree.leaves(state):
        return None
    data = jax.tree.map(lambda x: jax.random.key_data(x) if _checks.is_key(x) else x, state)
    return {"state": data}


def _with_state(apply: ModelFn, template: Any) -> ModelFn:
    """Wraps a model function so that its state has the form of `stored`."""
    is_stateless = not jax.tree.leaves(template)

    def run(
        params: Any,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        state = template
        if not is_stateless:
            state = jax.tree.map(
                lambda leaf, x: (
                    jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf))
                    if _checks.is_key(leaf)
                    else x
                ),
                template,
                model_state["state"],
            )
        outputs, updated = apply(params, state, inputs, key=key, train=train)
        return outputs, None if is_stateless else stored(updated)

    return run


def _describe(model: Any) -> str:
    if hasattr(model, "dtype"):
        return "an array"
    return "a plain function" if inspect.isfunction(model) else f"{type(model).__name__}"
