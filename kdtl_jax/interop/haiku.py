"""Haiku functions as model functions.

    run = haiku.model(lambda x, train: MLP(...)(x))
    variables = run.init(jax.random.key(0), images)
    outputs, state = run.apply(variables.params, variables.model_state, images)

Parameters are Haiku's two-level dicts. A module's name may itself contain `/`: selectors match the
joined path, `"net/~/linear_1/w"`, and never split it again. Features are returned by the function
(a dict with `"logits"`), or tapped by module name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables


class Haiku(NamedTuple):
    """A function as two functions."""

    init: Callable[[Array, Any], Variables]  # (key, example inputs) -> Variables
    apply: ModelFn


def model(net: Callable[[Any, bool], Any], *, taps: Sequence[str] = ()) -> Haiku:
    """`(init, apply)` of an untransformed Haiku function `net(inputs, train)`.

    `model_state` is Haiku's state (batch statistics), or None if there is none; it changes only
    with `train=True`.

    Args:
      net: builds and calls its modules, as given to `hk.transform_with_state`.
      taps: modules whose output joins the outputs under their name, `"net/~/linear_0"`; each is a
        regular expression that must match whole names. A module called several times
        gives `name/0`, `name/1`, and so on.

    Raises:
      ValueError: when `apply` is traced, if a tap matches no module (the existing ones are listed).
    """
    transformed = hk.transform_with_state(net)

    def init(key: Array, inputs: Any) -> Variables:
        # Batch norm makes its averages in training mode only.
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

        def record(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            out = next_call(*args, **kwargs)
            if context.method_name == "__call__":
                calls.setdefault(context.module.module_name, []).append(out)
            return out

        state = {} if model_state is None else model_state
        with hk.intercept_methods(record):
            outputs, new_state = transformed.apply(params, state, key, inputs, train)
        named = dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs}
        named |= _select(taps, calls)
        return named, new_state if train and model_state is not None else model_state

    return Haiku(init, apply)


def _select(taps: Sequence[str], calls: Mapping[str, list[Any]]) -> dict[str, Array]:
    found = {
        name if len(outputs) == 1 else f"{name}/{i}": out
        for name, outputs in calls.items()
        for i, out in enumerate(outputs)
        if isinstance(out, jax.Array)
    }
    chosen: dict[str, Array] = {}
    for tap in taps:
        hits = {name: x for name, x in found.items() if re.fullmatch(tap, name)}
        if not hits:
            near = ", ".join(repr(name) for name in trees.nearest(tap, list(found), n=8))
            raise ValueError(f"tap {tap!r} matches no module. Nearest names: {near}.")
        chosen |= hits
    return chosen
