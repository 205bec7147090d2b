"""Collects outputs of submodules by path, and selects them by regular expressions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from kdtl_jax import trees


def outputs_by_path(calls: Iterable[tuple[str, Sequence[Any]]]) -> dict[str, Array]:
    """`{path: array}` of the outputs of submodules.

    Repeated calls of one module are `path/0`, `path/1`, …; a tuple or dict of outputs is split in
    the same way, `path/0` or `path/weights`. If a submodule has such a name, its output takes
    precedence over an entry of the enclosing module's output.
    """
    arrays: dict[str, Any] = {}
    module_paths: set[str] = set()  # paths of a submodule's own output, not of its entries
    for path, outputs in calls:
        for i, output in enumerate(outputs):
            call_path = path if len(outputs) == 1 else f"{path}/{i}"
            for key_path, leaf in jax.tree_util.tree_leaves_with_path(output):
                suffix = jax.tree_util.keystr(key_path, simple=True, separator="/")
                name = f"{call_path}/{suffix}" if suffix else call_path
                if isinstance(leaf, (jax.Array, np.ndarray)) and not (
                    suffix and name in module_paths
                ):
                    arrays[name] = leaf
                    module_paths |= set() if suffix else {name}
    return arrays


def with_taps(
    returned: Any, taps: Sequence[str], submodule_outputs: dict[str, Array], hint: str = ""
) -> dict[str, Array]:
    """Adds the outputs of submodules that the taps select to a module's own.

    An output of the module keeps its name even if a submodule has the same: `logits` are those that
    the module returns, even if the layer before a soft cap is called `logits`.
    """
    outputs = outputs_of(returned)
    selected = select(taps, submodule_outputs, hint)
    return outputs | {path: x for path, x in selected.items() if path not in outputs}


def select(taps: Sequence[str], outputs: dict[str, Array], hint: str = "") -> dict[str, Array]:
    """Selects the outputs that the taps match; every tap must match one."""
    selected: dict[str, Array] = {}
    for tap in [taps] if isinstance(taps, str) else taps:
        matches = {path: x for path, x in outputs.items() if re.fullmatch(tap, path)}
        if not matches:
            nearest = ", ".join(repr(path) for path in trees.nearest(tap, list(outputs), n=8))
            raise ValueError(
                f"tap {tap!r} matches no submodule with an array output. Nearest paths: "
                f"{nearest or 'none, there are no submodules'}.{hint}"
            )
        selected |= matches
    return selected


def outputs_of(returned: Any) -> dict[str, Array]:
    """Converts what a module returns to a dict; a bare array becomes `"logits"`.

    In a tuple, the first array is the logits and the others are `"features"`. Nested outputs are
    named by their path, `"features/first"` or `"features/0"`, and must be arrays; names are text.
    """
    outputs = returned
    if isinstance(returned, (tuple, list)) and hasattr(next(iter(returned), None), "shape"):
        logits, *features = returned
        outputs = {"logits": logits, "features": features[0] if len(features) == 1 else features}
    if not isinstance(outputs, Mapping):
        return {"logits": outputs}
    arrays: dict[str, Any] = {}
    for name, x in outputs.items():
        if not isinstance(name, str):
            raise ValueError(
                f"the model returns an output named {name!r}. Names of outputs must be text."
            )
        for suffix, leaf in ({"": x} if name == "logits" else trees.flatten(x)).items():
            arrays[path := f"{name}/{suffix}" if suffix else name] = leaf
            if name != "logits" and not hasattr(leaf, "shape"):
                raise ValueError(
                    f"the model returns {path!r} as a {type(leaf).__name__}. Every output must be "
                    "an array."
                )
    return arrays
