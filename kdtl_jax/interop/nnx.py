"""Flax NNX modules as model functions.

    model, params, state = nnx.model(MyModule(rngs=nnx.Rngs(0)))
    outputs, state = model(params, state, images, key=key, train=True)

`params` and `state` are the module's own split states: any selector, transform or optimizer of this
library takes them as they are, with paths such as `layers/0/kernel`. As a step's teacher give
`Variables(params, state)`, as its student `init_state(..., model_state=state)`. To put trained
parameters back: `nnx.update(module, params)` (exact here, because nothing was renamed).

This file alone imports `flax.nnx`, which does not import on every pair of flax and jax versions.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import ModelFn, Outputs, PyTree

Call = Callable[[nnx.Module, Any], Any]


class NNX(NamedTuple):
    """A module as a model function, its parameters and everything else it holds."""

    apply: ModelFn
    params: nnx.State
    model_state: nnx.State


def model(
    module: nnx.Module,
    *,
    taps: Sequence[str] = (),
    call: Call = lambda module, inputs: module(inputs),
) -> NNX:
    """`(apply, params, model_state)` of an NNX module, following the library's model contract.

    `model_state` holds what is not an `nnx.Param`: batch statistics, random streams, counters.
    Within `apply` a fresh module is merged, so nothing outside is ever mutated. With `key`,
    every random stream is re-keyed from it, whatever it is called (`nnx.reseed(m, dropout=key)`
    does nothing, in silence, to a module built with `nnx.Rngs(0)`). `train` switches between
    the module's `train()` and `eval()` modes.

    Args:
      module: the module; it is read once and left as it is.
      taps: submodules whose output joins the outputs under their path, `"layers/0"`; each is a
        regular expression that must match whole paths. A module called several times gives
        `path/0`, `path/1`, and so on. Values stored with `module.sow(nnx.Intermediate, ...)` are
        found under their own name.
      call: how the module is called, for anything but `module(inputs)`.

    Raises:
      ValueError: when `apply` is traced, if a tap matches no output (the existing ones are listed).
    """
    clean = nnx.clone(module)
    nnx.pop(clean, nnx.Intermediate)  # what an earlier call may have sown
    graph, params, rest = nnx.split(clean, nnx.Param, ...)

    def apply(
        params: nnx.State,
        model_state: nnx.State,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        # Without the copy the module would share, and so mutate, the caller's variables.
        merged = nnx.merge(graph, params, model_state, copy=True)
        if train:
            merged.train()
        else:
            merged.eval()
        if key is not None:
            rekey(merged, key)
        outputs, found = _captured(merged, call, inputs, with_submodules=bool(taps))
        named = dict(outputs) if isinstance(outputs, dict) else {"logits": outputs}
        named |= _select(taps, found)
        return named, nnx.split(merged, nnx.Param, ...)[2] if train else model_state

    return NNX(apply, params, rest)


def rekey(module: nnx.Module, key: Array) -> None:
    """Gives every random stream of a module its own key, folded from `key` by path; in place.

    Streams that several layers share are re-keyed once. Counters start again at zero, so the draws
    are a function of `key` alone.
    """
    streams: dict[int, tuple[str, nnx.RngStream]] = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.RngStream):
            streams.setdefault(id(node), ("/".join(map(str, path)), node))
    ordered = sorted(streams.values(), key=lambda item: trees.natural_key(item[0]))
    for number, (_, stream) in enumerate(ordered):
        old = stream.key.get_value()
        data = jax.random.key_data(jax.random.fold_in(key, number))
        stream.key.set_value(jax.random.wrap_key_data(data, impl=jax.random.key_impl(old)))
        stream.count.set_value(jnp.zeros_like(stream.count.get_value()))


def _captured(
    module: nnx.Module, call: Call, inputs: Any, with_submodules: bool
) -> tuple[Any, dict[str, Any]]:
    """Runs the module; also returns what it sows, and the outputs of its submodules, by path.

    Capturing also keeps sown values out of the module's state, which would grow otherwise.
    """
    run = nnx.capture(
        lambda module: call(module, inputs),
        nnx.Intermediate,
        method_outputs=nnx.Intermediate if with_submodules else None,
    )
    outputs, caught = run(module)
    found: dict[str, Any] = {}
    for key_path, variable in nnx.to_flat_state(caught):
        path = "/".join(str(key) for key in key_path if key != "__call__")
        calls = variable.get_value()
        for i, value in enumerate(calls):
            found[path if len(calls) == 1 else f"{path}/{i}"] = value
    return outputs, {path: x for path, x in found.items() if path and isinstance(x, jax.Array)}


def _select(taps: Sequence[str], found: dict[str, Any]) -> dict[str, Array]:
    chosen: dict[str, Array] = {}
    for tap in taps:
        hits = {path: x for path, x in found.items() if re.fullmatch(tap, path)}
        if not hits:
            near = ", ".join(repr(path) for path in trees.nearest(tap, list(found), n=8))
            raise ValueError(
                f"tap {tap!r} matches no output. Nearest paths: {near or 'none'}. A "
                "class that inherits its __call__ is not seen by nnx.capture: let it define one."
            )
        chosen |= hits
    return chosen
