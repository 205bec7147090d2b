"""Flax NNX modules as model functions.

    model, params, state = nnx.model(MyModule(rngs=nnx.Rngs(0)))
    outputs, state = model(params, state, images, key=key, train=True)

`params` and `state` are the module's own split states. Any selector, transform, or optimizer
accepts them as they are, with paths such as `layers/0/kernel`. Pass a teacher to a step as
`Variables(params, state)`, and a student as `init_state(params, ..., model_state=state)`. To put
trained parameters back into the module, call `nnx.update(module, params)`; nothing was renamed.

Only this file imports `flax.nnx`, which fails to import with some pairs of flax and jax versions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kdtl_jax import trees
from kdtl_jax._types import ModelFn, Outputs, PyTree
from kdtl_jax.interop import _modes, _taps

Call = Callable[[nnx.Module, Any, bool], Any]  # (module, inputs, train) -> outputs

_CALL = "nnx.model(module, call=lambda module, x, train: module(x, flag=train))"

# Added for NNX to the message about a tap that matches nothing.
INHERITED = (
    " A class that inherits its __call__ is not seen by nnx.capture: let it define one."
    if hasattr(nnx, "capture")
    else " Outputs of submodules need flax >= 0.12.6; values that are sown do not."
)


class NNX(NamedTuple):
    """A module as a model function, its parameters, and its other state."""

    apply: ModelFn
    params: nnx.State
    model_state: nnx.State


def model(module: nnx.Module, *, taps: Sequence[str] = (), call: Call | None = None) -> NNX:
    """`(apply, params, model_state)` of an NNX module, following the library's model contract.

    `model_state` holds everything that is not an `nnx.Param`: batch statistics, random streams,
    counters. `apply` merges a fresh module, so nothing outside is ever mutated. With `key`, every
    random stream is re-keyed from it, whatever its name (`nnx.reseed(m, dropout=key)` silently
    does nothing to a module built with `nnx.Rngs(0)`). `train` switches between the module's
    `train()` and `eval()` modes, and sets arguments and fields with a common name, if there are
    any: `train`, `training`, `deterministic`, `use_running_average`, …, also within `**kwargs`.

    Args:
      module: the module; it is read once and never changed.
      taps: submodules whose output is added to the outputs under their path, `"layers/0"`; each is
        a regular expression that must match whole paths. A module called more than once, or one
        that returns a tuple, gives `path/0`, `path/1`, and so on. Outputs that the module itself
        returns keep their names. Values stored with `module.sow(nnx.Intermediate, ...)` are found
        under their own name; before flax 0.12.6, taps find only these.
      call: `call(module, inputs, train)`, for modules that are not called in the usual way.

    Raises:
      ValueError: when `apply` is traced, if a tap matches no output (the existing ones are listed),
        or dropout or batch statistics are not in the requested mode.
    """
    _modes.check_module(module, isinstance(module, nnx.Module), "NNX")
    clean = nnx.clone(module)
    nnx.pop(clean, nnx.Intermediate)  # values that an earlier call may have sown
    graph, params, state = nnx.split(clean, nnx.Param, ...)
    count = len(jax.tree.leaves(state))

    def apply(
        params: nnx.State,
        model_state: nnx.State,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        count_given = len(jax.tree.leaves(model_state))
        if count_given != count:
            raise ValueError(
                f"{type(module).__name__} has {count} arrays besides its parameters (batch "
                f"statistics, random streams), got {count_given}. Give the model's state: "
                "train.init_state(..., model_state=state) for a student, Variables(params, state) "
                "for a teacher."
            )

        def run(way: Call) -> _CallResult:
            # Without the copy the module would share, and so mutate, the caller's variables.
            merged = nnx.merge(graph, params, model_state, copy=True)
            _set_mode(merged, train)
            if key is not None:
                rekey(merged, key)
            old_params, old_arrays = _variables(merged)
            outputs, submodule_outputs = _capture(
                merged, lambda module, x: way(module, x, train), inputs, bool(taps)
            )
            new_params, new_arrays = _variables(merged)
            modes = _modes_of(merged, _modes.changed(old_arrays, new_arrays))
            is_jitted = bool(_modes.changed(old_params, new_params))
            return _CallResult(merged, outputs, submodule_outputs, modes, is_jitted)

        ways = [call] if call else _modes.calls(type(module).__call__, train, _CALL)
        way = _modes.first_that_follows(ways, train, lambda way: _traced_modes(run, way))
        ran = run(way)
        if call is None:
            modes = _traced_modes(run, way) if ran.is_jitted else ran.modes
            _modes.check(modes, train, type(module).__name__, _CALL)
        all_outputs = _taps.with_taps(ran.outputs, taps, ran.submodule_outputs, INHERITED)
        return all_outputs, nnx.split(ran.module, nnx.Param, ...)[2] if train else model_state

    return NNX(apply, params, state)


def rekey(module: nnx.Module, key: Array) -> None:
    """Gives every random stream of a module its own key, folded from `key` by path, in place.

    Streams that layers share are re-keyed once. Counters restart at zero, so the draws depend only
    on `key`.
    """
    streams: dict[int, tuple[str, nnx.RngStream]] = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.RngStream):
            streams.setdefault(id(node), ("/".join(map(str, path)), node))
    ordered = sorted(streams.values(), key=lambda item: trees.natural_key(item[0]))
    for number, (_, stream) in enumerate(ordered):
        old_key = stream.key.get_value()
        data = jax.random.key_data(jax.random.fold_in(key, number))
        new_key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(old_key))
        # Layers that are stacked (nnx.vmap, nnx.scan) have one key each.
        stream.key.set_value(jax.random.split(new_key, old_key.shape) if old_key.shape else new_key)
        stream.count.set_value(jnp.zeros_like(stream.count.get_value()))


class _CallResult(NamedTuple):
    """A module after a call."""

    module: nnx.Module
    outputs: Any
    submodule_outputs: dict[str, Array]
    modes: dict[str, bool]
    is_jitted: bool  # nnx.jit replaces every array, changed or not


def _traced_modes(run: Callable[[Call], _CallResult], way: Call) -> dict[str, bool]:
    """Traces a call to find its modes."""
    modes: dict[str, bool] = {}
    jitted: list[bool] = []

    def shapes() -> None:
        ran = run(way)
        modes.update(ran.modes)
        jitted.append(ran.is_jitted)

    jax.eval_shape(shapes)
    if any(jitted):
        with jax.disable_jit():
            jax.eval_shape(shapes)
    return modes


def _set_mode(module: nnx.Module, train: bool) -> None:
    """Calls `module.train()` or `.eval()`, and sets every boolean field of a known name."""
    if train:
        module.train()
    else:
        module.eval()
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            fields = [name for name, value in vars(node).items() if isinstance(value, bool)]
            for name, value in _modes.flags(fields, train).items():
                setattr(node, name, value)


def _modes_of(module: nnx.Module, changed: set[str]) -> dict[str, bool]:
    """Whether each layer ran in training mode, judged by the statistics and streams it changed.

    A custom layer that draws is recognized by its stream, unless there is a recurrent layer, whose
    first carry is drawn in either mode.
    """
    modes: dict[str, bool] = {}
    drawn_streams: set[str] = set()
    draws_carry = False
    for key_path, node in nnx.iter_graph(module):
        path = "/".join(map(str, key_path))
        changed_inside = {name for name in changed if name.startswith(f"{path}/" if path else "")}
        if isinstance(node, nnx.Module) and (_has_statistics(node) or _has_dropout(node)):
            modes[path or type(node).__name__] = bool(changed_inside)
        elif isinstance(node, (nnx.RNN, nnx.RNNCellBase)):
            draws_carry = True
        elif isinstance(node, nnx.RngStream) and changed_inside:
            drawn_streams.add(path)
    if draws_carry:
        return modes
    custom = {
        path for path in drawn_streams if not any(path.startswith(f"{layer}/") for layer in modes)
    }
    return modes | dict.fromkeys(sorted(custom), True)


def _has_statistics(layer: nnx.Module) -> bool:
    return any(isinstance(value, nnx.BatchStat) for value in vars(layer).values())


def _has_dropout(layer: nnx.Module) -> bool:
    if getattr(layer, "rngs", None) is None:
        return False
    if isinstance(layer, nnx.Dropout):
        return bool(layer.rate)
    return isinstance(layer, nnx.MultiHeadAttention) and bool(layer.dropout_rate)


def _variables(module: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters, and everything else, by path."""
    _, *states = nnx.split(module, nnx.Param, ...)
    params, rest = (
        {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}
        for state in states
    )
    return params, rest


def _capture(
    module: nnx.Module, call: Callable[[nnx.Module, Any], Any], inputs: Any, with_submodules: bool
) -> tuple[Any, dict[str, Array]]:
    """Runs the module; also returns sown values and the outputs of its submodules by path.

    Sown values are removed from the module's state, which would otherwise grow.
    """
    if hasattr(nnx, "capture"):
        run = nnx.capture(
            lambda module: call(module, inputs),
            nnx.Intermediate,
            method_outputs=nnx.Intermediate if with_submodules else None,
        )
        outputs, captured = run(module)
    else:  # flax < 0.12.6: sown values are in the module, outputs of submodules are unavailable
        outputs = call(module, inputs)
        captured = nnx.pop(module, nnx.Intermediate)
    calls = []
    for key_path, variable in nnx.to_flat_state(captured):
        path = "/".join(str(key) for key in key_path if key != "__call__")
        value = variable.get_value()
        if path:  # a tuple of values, or whatever a sow's reduce_fn makes of them
            calls.append((path, value if isinstance(value, tuple) else (value,)))
    return outputs, _taps.outputs_by_path(calls)
