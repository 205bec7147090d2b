"""The contents of a traced program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

# Primitives that only pass values on, as a wrapper does with all outputs at its end.
PASSING = {"convert_element_type", "copy", "reduce_precision", "sharding_constraint"}


def primitives(function: Callable[..., Any], *args: Any) -> frozenset[str]:
    """Names of the primitives in the traced function, including those of its inner programs.

    The trace is the one that a call of `jax.jit(function)` uses, so repeated calls are cheap.
    """
    return frozenset(_names(jax.jit(function).trace(*args).jaxpr.jaxpr))


def outputs_by_depth(function: Callable[..., Any], *args: Any) -> tuple[list[Any], Any]:
    """Where each output is computed, and the tree of the outputs' shapes, as from `jax.eval_shape`.

    The first result lists sort keys, one per leaf of the second: an output that is computed later
    has a larger key; outputs of one equation (e.g. a scan) have the same key.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return [_place(traced.jaxpr, output) for output in traced.jaxpr.outvars], shapes


def _place(jaxpr: Any, output: Any) -> tuple[int, ...]:
    """The number of the equation that defines a variable, then of the one in its inner program."""
    for number, equation in enumerate(jaxpr.eqns):
        for at, variable in enumerate(equation.outvars):
            if variable is output and equation.primitive.name in PASSING:
                return _place(jaxpr, equation.invars[0])
            if variable is output:
                inner = [getattr(x, "jaxpr", x) for x in equation.params.values()]
                inner = [
                    x for x in inner if len(getattr(x, "outvars", ())) == len(equation.outvars)
                ]
                return (number, *(_place(inner[0], inner[0].outvars[at]) if inner else ()))
    return ()  # an input or a constant


def _names(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _names(inner)
