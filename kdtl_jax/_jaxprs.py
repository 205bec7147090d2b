"""What a traced program is made of."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def primitives(function: Callable[..., Any], *args: Any) -> frozenset[str]:
    """Names of the primitives in the traced function, those of its inner programs included.

    The trace is the one that a call of `jax.jit(function)` uses, so that asking again is cheap.
    """
    return frozenset(_names(jax.jit(function).trace(*args).jaxpr.jaxpr))


def _names(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _names(inner)
