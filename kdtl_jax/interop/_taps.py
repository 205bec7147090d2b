"""Outputs of submodules by path, and their selection by regular expressions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from kdtl_jax import trees


def named(calls: Iterable[tuple[str, Sequence[Any]]]) -> dict[str, Array]:
    """`{path: array}` of the outputs of submodules.

    Repeated calls of one module are `path/0`, `path/1`, …; a tuple or dict of outputs is split in
    the same way, `path/0` or `path/weights`. If a submodule has such a name, its output takes
    precedence over an entry of the enclosing module's output.
    """
    found: dict[str, Any] = {}
    whole: set[str] = set()  # paths of whole outputs of submodules, not of entries
    for path, outputs in calls:
        for i, output in enumerate(outputs):
            here = path if len(outputs) == 1 else f"{path}/{i}"
            for key_path, leaf in jax.tree_util.tree_leaves_with_path(output):
                inner = jax.tree_util.keystr(key_path, simple=True, separator="/")
                name = f"{here}/{inner}" if inner else here
                if isinstance(leaf, (jax.Array, np.ndarray)) and not (inner and name in whole):
                    found[name] = leaf
                    whole |= set() if inner else {name}
    return found


def joined(
    returned: Any, taps: Sequence[str], found: dict[str, Array], hint: str = ""
) -> dict[str, Array]:
    """A module's outputs, and those of submodules that the taps select.

    An output of the module keeps its name even if a submodule has the same: `logits` are those that
    the module returns, even if the layer before a soft cap is called `logits`.
    """
    outputs = outputs_of(returned)
    tapped = select(taps, found, hint)
    return outputs | {path: x for path, x in tapped.items() if path not in outputs}


def select(taps: Sequence[str], found: dict[str, Array], hint: str = "") -> dict[str, Array]:
    """The outputs that the taps match; every tap must match one.

    Raises:
      ValueError: if a tap matches nothing, with the nearest paths.
    """
    chosen: dict[str, Array] = {}
    for tap in [taps] if isinstance(taps, str) else taps:
        hits = {path: x for path, x in found.items() if re.fullmatch(tap, path)}
        if not hits:
            near = ", ".join(repr(path) for path in trees.nearest(tap, list(found), n=8))
            raise ValueError(
                f"tap {tap!r} matches no submodule with an array output. Nearest paths: "
                f"{near or 'none, there are no submodules'}.{hint}"
            )
        chosen |= hits
    return chosen


def outputs_of(returned: Any) -> dict[str, Array]:
    """A module's outputs as a dict: the one it returns, or an array under `"logits"`.

    In a tuple, the first array is the logits and the others are `"features"`. Nested outputs are
    named by their path, `"features/first"` or `"features/0"`.

    Raises:
      ValueError: naming an output beside the logits that is not an array.
    """
    outputs = returned
    if isinstance(returned, (tuple, list)) and hasattr(next(iter(returned), None), "shape"):
        logits, *others = returned
        outputs = {"logits": logits, "features": others[0] if len(others) == 1 else others}
    if not isinstance(outputs, Mapping):
        return {"logits": outputs}
    found: dict[str, Any] = {}
    for name, x in outputs.items():
        for inner, leaf in ({"": x} if name == "logits" else trees.flatten(x)).items():
            found[path := f"{name}/{inner}" if inner else name] = leaf
            if name != "logits" and not hasattr(leaf, "shape"):
                raise ValueError(
                    f"the model returns {path!r} as a {type(leaf).__name__}. Every output must be "
                    "an array."
                )
    return found
