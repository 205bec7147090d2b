"""Outputs of submodules by path, and the choice among them by regular expressions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from kdtl_jax import trees


def named(calls: Iterable[tuple[str, Sequence[Any]]]) -> dict[str, Array]:
    """`{path: array}` of what submodules returned.

    Several calls of one module are `path/0`, `path/1`, …; a tuple or dict of outputs is taken apart
    in the same way, `path/0` or `path/weights`. What a submodule of such a name returns goes before
    an entry of what the module around it returns.
    """
    found: dict[str, Any] = {}
    whole: set[str] = set()  # paths of what a submodule returned, not of an entry of it
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

    An output of the module keeps its name where a submodule has the same: logits are those that
    the module returns, even if the layer before a soft cap is called `logits`.
    """
    outputs = outputs_of(returned)
    tapped = select(taps, found, hint)
    return outputs | {path: x for path, x in tapped.items() if path not in outputs}


def select(taps: Sequence[str], found: dict[str, Array], hint: str = "") -> dict[str, Array]:
    """What the taps, or the one, match: each of them something.

    Raises:
      ValueError: for a tap that matches nothing, with the nearest paths.
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
    """A module's outputs as a dict: what it returns, or an array under `"logits"`.

    Of a tuple the first array is the logits and the others are `"features"`. Outputs within others
    are called by their path, `"features/first"` or `"features/0"`.

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
