"""Sets a module's mode, training or evaluation, through arguments of any common name.

A recognized argument is set by its name. Arguments hidden in `**kwargs` are tried by name until the
module's dropout and batch statistics follow. If they cannot be made to follow, the adapter raises
an error: training in evaluation mode, or a teacher in training mode, would otherwise be silent.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from kdtl_jax import _jaxprs

TRAINING = (
    "train", "training", "is_training", "is_train", "train_mode", "training_mode",
    "enable_dropout", "use_dropout", "apply_dropout", "update_stats", "update_batch_stats",
)  # fmt: skip
EVALUATION = (
    "deterministic", "is_deterministic", "inference", "is_inference", "inference_mode",
    "use_running_average", "eval", "is_eval", "eval_mode", "evaluate", "evaluation",
    "test", "is_test", "test_mode", "testing",
)  # fmt: skip

Flags = dict[str, bool]
Call = Callable[[Any, Any, bool], Any]  # (module, inputs, train) -> outputs
Way = TypeVar("Way")


def flags(names: Iterable[str], train: bool) -> Flags:
    """`{name: value}` of every recognized name."""
    values = dict.fromkeys(TRAINING, train) | dict.fromkeys(EVALUATION, not train)
    return {name: values[name] for name in names if name in values}


def accepted(function: Callable[..., Any]) -> list[str]:
    """Arguments that default to a bool, 0, 1 or None, or have no default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in variadic
        and (
            parameter.default is inspect.Parameter.empty
            or parameter.default is None
            or (isinstance(parameter.default, (int, np.bool_)) and parameter.default in (0, 1))
        )
    ]


def is_open(function: Callable[..., Any]) -> bool:
    """Whether a function takes `**kwargs`."""
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def candidates(function: Callable[..., Any], train: bool) -> list[Flags]:
    """Ways to set the mode of `function`: names in its signature, or guesses for `**kwargs`."""
    known_flags = flags(accepted(function), train)
    if known_flags or not is_open(function):
        return [known_flags]
    return [*(flags([name], train) for name in TRAINING + EVALUATION), {}]


def arguments(
    function: Callable[..., Any], skip: int, values: Mapping[str, Any], example: str
) -> tuple[list[Any], dict[str, Any]]:
    """Splits `values` into positional and keyword arguments of `function`, after `skip` others.

    Those that follow the others without a gap are passed by position, because `nn.remat` and
    `nn.jit` mark static arguments by their position. `example` says how to call a function that
    requires another argument.
    """
    kinds = inspect.Parameter
    named_kinds = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind in named_kinds
    ][skip:]
    missing = [p.name for p in parameters if p.default is kinds.empty and p.name not in values]
    if missing:
        raise TypeError(
            f"the module needs {', '.join(map(repr, missing))} besides its inputs, no known name "
            f"of a mode ({', '.join(TRAINING[:3])}, deterministic, ...). Say how to call it: "
            f"{example}."
        )
    leading = []
    for parameter in parameters:
        if parameter.kind is kinds.KEYWORD_ONLY or parameter.name not in values:
            break
        leading.append(parameter.name)
    return [values[name] for name in leading], {n: x for n, x in values.items() if n not in leading}


def calls(function: Callable[..., Any], train: bool, example: str) -> list[Call]:
    """The ways to call a module whose `__call__` is `function`, one per candidate for its mode."""
    ways = [
        arguments(function, 2, mode_flags, example) for mode_flags in candidates(function, train)
    ]
    return [lambda module, x, train, a=args, k=kwargs: module(x, *a, **k) for args, kwargs in ways]


def first_that_follows(
    ways: list[Way], train: bool, modes: Callable[[Way], Mapping[str, bool]]
) -> Way:
    """Returns the first way that puts all layers in the right mode, or else the last one."""
    for way in ways[:-1]:
        try:
            layer_modes = modes(way)
        except (TypeError, KeyError):  # some layer has another argument of this name
            continue
        if all(training == train for training in layer_modes.values()):
            return way
    return ways[-1]


def check(modes: Mapping[str, bool], train: bool, name: str, example: str) -> None:
    """Refuses a module that cannot be put in the requested mode.

    In evaluation, every layer must be in evaluation mode; in training, one layer in training mode
    is enough, since authors freeze batch statistics on purpose. `modes` says of each dropout or
    normalization layer, by path, whether it ran in training mode; `example` is a call that sets the
    mode, for the message.
    """
    if not modes or (any(modes.values()) if train else not any(modes.values())):
        return
    disagreeing = [path for path, training in modes.items() if training != train]
    requested, other = ("training", "evaluation") if train else ("evaluation", "training")
    paths = ", ".join(repr(path) for path in disagreeing[:5]) + (
        ", ..." if len(disagreeing) > 5 else ""
    )
    raise ValueError(
        f"{name} was asked for {requested} mode, but {paths} ran in {other} mode. Its mode cannot "
        f"be set by an argument of a known name ({', '.join(TRAINING[:3])}, deterministic, ...). "
        f"Say how to call it: {example}."
    )


def changed(old_arrays: Mapping[str, Any], new_arrays: Mapping[str, Any]) -> set[str]:
    """Paths whose array was replaced; modules return unchanged arrays as the same object."""
    return {path for path, leaf in new_arrays.items() if leaf is not old_arrays.get(path)}


def changes(function: Callable[[], Any], state: Any) -> bool:
    """Whether a traced function of no arguments returns another state than `state`."""
    differences: list[bool] = []

    def compare() -> None:
        new_leaves = jax.tree.leaves(function())
        differences.extend(
            a is not b for a, b in zip(new_leaves, jax.tree.leaves(state), strict=True)
        )

    jax.eval_shape(compare)
    return any(differences)


def draws(function: Callable[..., Any], *args: Any) -> bool:
    """Whether random bits are drawn anywhere in the traced function."""
    return not _jaxprs.primitives(function, *args).isdisjoint({"random_bits", "threefry2x32"})


def check_module(module: Any, is_valid: bool, framework: str) -> None:
    """Refuses anything that is not a module of a framework, such as its class or its parameters."""
    if not is_valid:
        repair = f": write {module.__name__}(...)" if isinstance(module, type) else ""
        kind = module.__name__ if isinstance(module, type) else type(module).__name__
        raise TypeError(f"module must be a module of {framework}, got {kind}{repair}.")
