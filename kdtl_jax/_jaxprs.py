"""The contents of a traced program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

# Primitives that only pass values on, such as a wrapper may apply to all outputs.
PASS_THROUGH = {"convert_element_type", "copy", "reduce_precision", "sharding_constraint"}


def primitives(function: Callable[..., Any], *args: Any) -> frozenset[str]:
    """Names of the primitives in the traced function, including those of its inner programs.

    The trace is the one that a call of `jax.jit(function)` uses, so repeated calls are cheap.
    """
    return frozenset(_primitive_names(jax.jit(function).trace(*args).jaxpr.jaxpr))


def outputs_by_depth(function: Callable[..., Any], *args: Any) -> tuple[list[Any], Any]:
    """Sort keys of the outputs by where they are computed, and their shapes as `jax.eval_shape`.

    There is one key per leaf of the shapes: an output that is computed later has a larger key, and
    outputs of one equation (e.g. a scan) have the same key.
    """
    closed_jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return [
        _definition(closed_jaxpr.jaxpr, output) for output in closed_jaxpr.jaxpr.outvars
    ], shapes


def _definition(jaxpr: Any, output: Any) -> tuple[int, ...]:
    """The number of the equation that defines a variable, then of the one in its inner program."""
    for number, equation in enumerate(jaxpr.eqns):
        for index, variable in enumerate(equation.outvars):
            if variable is output and equation.primitive.name in PASS_THROUGH:
                return _definition(jaxpr, equation.invars[0])
            if variable is output:
                inner = [getattr(x, "jaxpr", x) for x in equation.params.values()]
                inner = [
                    x for x in inner if len(getattr(x, "outvars", ())) == len(equation.outvars)
                ]
                return (number, *(_definition(inner[0], inner[0].outvars[index]) if inner else ()))
    return ()  # an input or a constant


def _primitive_names(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _primitive_names(inner)
