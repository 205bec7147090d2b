"""Flax Linen modules as model functions.

    model = linen.model(MLP((64, 32), classes=10))
    variables = model.init(jax.random.key(0), images[:1])
    outputs, state = model.apply(variables.params, variables.model_state, images)

A module returns either a dict of outputs, or an array, which is then the `"logits"`. (An encoder
without head has no logits; its dict passes as it is.)
`taps` adds the outputs of submodules by path, without touching the module.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables

Call = Callable[[nn.Module, Any, bool], Any]  # (bound module, inputs, train) -> outputs


class Linen(NamedTuple):
    """A module as two functions."""

    init: Callable[[Array, Any], Variables]  # (key, example inputs) -> Variables
    apply: ModelFn


def standard_call(module: nn.Module, inputs: Any, train: bool) -> Any:
    """Calls the module, with `train=` or `deterministic=` if its signature has one of them."""
    accepted = inspect.signature(type(module).__call__).parameters
    if "train" in accepted:
        return module(inputs, train=train)
    if "deterministic" in accepted:
        return module(inputs, deterministic=not train)
    return module(inputs)


def model(
    module: nn.Module,
    *,
    taps: Sequence[str] = (),
    call: Call = standard_call,
    rngs: Sequence[str] = ("dropout",),
) -> Linen:
    """`(init, apply)` of a Linen module, following the library's model contract.

    `model_state` holds every collection but `"params"` (batch statistics), or None if there is
    none; it changes only with `train=True`.

    Args:
      module: an unbound module.
      taps: submodules whose output joins the outputs under their path, `"block3/conv1"`; each is
        a regular expression that must match whole paths. A module called several times gives
        `path/0`, `path/1`, and so on.
      call: how the module is called, for signatures other than `module(inputs)`,
        `module(inputs, train=)` and `module(inputs, deterministic=)`.
      rngs: names of the random streams that the module reads when `key` is given.

    Returns:
      `Linen(init, apply)`. `init(key, inputs)` reads shapes only and is safe under `eval_shape`.

    Raises:
      ValueError: when `apply` is traced, if a tap matches no submodule (the existing ones are
        listed).
    """

    def streams(key: Array | None) -> dict[str, Array] | None:
        if key is None:
            return None
        return {name: jax.random.fold_in(key, i) for i, name in enumerate(rngs)}

    def init(key: Array, inputs: Any) -> Variables:
        key_params, key_rest = jax.random.split(key)
        variables = module.init(
            {"params": key_params, **(streams(key_rest) or {})},
            inputs,
            False,
            method=call,
        )
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
        outputs, updated = module.apply(
            {"params": params, **(model_state or {})},
            inputs,
            train,
            method=call,
            rngs=streams(key),
            mutable=[*changing, "intermediates"] if taps else changing,
            capture_intermediates=_tapped if taps else False,
        )
        named = dict(outputs) if isinstance(outputs, Mapping) else {"logits": outputs}
        if taps:
            named |= _select(taps, updated.get("intermediates") or {})
        if not changing:
            return named, model_state
        return named, {name: updated[name] for name in model_state}

    return Linen(init, apply)


def _tapped(module: nn.Module, method: str) -> bool:
    return method == "__call__" and bool(module.path)


def _select(taps: Sequence[str], intermediates: Mapping[str, Any]) -> dict[str, Array]:
    """Captured outputs by path: `a/b` for one call, `a/b/0`, `a/b/1` for several."""
    found: dict[str, Any] = {}
    for path, calls in _calls(intermediates, ""):
        for i, value in enumerate(calls):
            found[path if len(calls) == 1 else f"{path}/{i}"] = value
    arrays = {path: value for path, value in found.items() if isinstance(value, jax.Array)}
    chosen: dict[str, Array] = {}
    for tap in taps:
        hits = {path: x for path, x in arrays.items() if re.fullmatch(tap, path)}
        if not hits:
            near = ", ".join(repr(path) for path in trees.nearest(tap, list(arrays), n=8))
            raise ValueError(
                f"tap {tap!r} matches no submodule with an array output. "
                f"Nearest paths: {near or 'none, the module has no submodules'}."
            )
        chosen |= hits
    return chosen


def _calls(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, tuple[Any, ...]]]:
    out: list[tuple[str, tuple[Any, ...]]] = []
    for name, value in tree.items():
        if name == "__call__":
            out.append((prefix, value))
        elif isinstance(value, Mapping):
            out += _calls(value, f"{prefix}/{name}" if prefix else name)
        else:  # sown by the module itself
            out.append((f"{prefix}/{name}" if prefix else name, value))
    return out
