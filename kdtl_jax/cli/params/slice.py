"""`kdtl params slice`: keeps some layers, units of an axis, or tensors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._checkpoints import Rewrite, TensorSelection, Writing
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes.settings import UsageError, selector, setting
from kdtl_jax.transforms import Adapted, Report

EXAMPLES = f"""
kdtl params slice model.safetensors --layers 'encoder/layer_(\\d+)/.*' --keep 0,2,4 \\
    --write small.safetensors
{_checkpoints.SELECTORS}"""


def _keep(value: Any) -> tuple[int, ...] | None:
    return None if value is None else _checkpoints.integers(value)


@dataclass(frozen=True)
class Settings(TensorSelection, Writing):
    """Keeps some layers, units or tensors."""

    source: str | None = setting(None, "a checkpoint", positional=True)
    layers: str | None = setting(
        None,
        r"pattern of the layers' tensors, with one group for the number: 'layer_(\d+)/.*'",
        metavar="REGEX",
    )
    keep: tuple[int, ...] | None = setting(
        None, "layers to keep, renumbered from 0; DistilBERT keeps 0,2,4,7,9,11",
        metavar="0,2,4..7", parse=_keep,
    )  # fmt: skip
    take: tuple[str, ...] = setting(
        (),
        "keep only the entries WHICH of these tensors along AXIS: 0,2,5..7, first:N or "
        "uniform:N (weight selection); repeat for more",
        metavar="SELECTOR@AXIS=WHICH",
        repeat=True,
    )


def run(settings: Settings) -> int:
    """Prints a report and, with `--write`, writes the result."""
    if (settings.layers is None) != (settings.keep is None):
        raise UsageError("--layers and --keep belong together")
    if not (settings.layers or settings.take or settings.where or settings.except_):
        raise UsageError("say what to keep: --layers with --keep, --take, --where")
    source = _checkpoints.opened(settings.source, "SOURCE", EXAMPLES)
    chosen = trees.mask(source.specs, _checkpoints.selected(settings, source.specs))
    kept = {path: spec for path, spec in source.specs.items() if chosen[path]}
    rename = _renaming(settings, kept)
    origin = {new: path for path in kept for new in rename(path)}
    indices_by_path = _indices(settings.take, kept)
    transforms.refuse_codes(source.specs, indices_by_path.keys())
    shapes = {
        new: _shape(kept[path], indices_by_path.get(path, {})) for new, path in origin.items()
    }
    specs = {n: jax.ShapeDtypeStruct(shapes[n], kept[path].dtype) for n, path in origin.items()}

    def produce(new: str) -> Any:
        tensor, indices_of_axes = source.tensors[origin[new]], indices_by_path.get(origin[new])
        if indices_of_axes:
            return safetensors.take(tensor, indices_of_axes, _checkpoints.BLOCK)
        return safetensors.blocks(tensor, _checkpoints.BLOCK)

    taken = {new: path for new, path in origin.items() if indices_by_path.get(path)}
    report = Report(
        copied=tuple(new for new in origin if new not in taken),
        adapted=tuple(
            Adapted(new, kept[path].shape, shapes[new], "take") for new, path in taken.items()
        ),
        unused=tuple(path for path in source.specs if path not in origin.values()),
        shapes=shapes,
        sizes={new: math.prod(shape) for new, shape in shapes.items()},
    )
    # A name keeps the ending that its canonical path lacks ("/value").
    names = {n: n + source.names[path].removeprefix(path) for n, path in origin.items()}
    rewrite = Rewrite(specs, produce, report, [source], names, settings.keep)
    return _checkpoints.finish(settings, "slice", rewrite)


def _renaming(settings: Settings, specs: Mapping[str, Any]) -> Callable[[str], tuple[str, ...]]:
    if settings.layers is None or settings.keep is None:
        return lambda path: (path,)
    numbers = transforms.layer_numbers(specs, settings.layers)
    absent = sorted(set(settings.keep) - set(numbers))
    if absent:
        raise ValueError(f"--keep names layers {absent}; there are {numbers}.")
    return transforms.layer_map(settings.layers, settings.keep)


def _indices(texts: Sequence[str], specs: Mapping[str, Any]) -> dict[str, dict[int, np.ndarray]]:
    """`{path: {axis: indices}}` selected by `--take`."""
    out: dict[str, dict[int, np.ndarray]] = {}
    for text in texts:
        head, equals, which = text.rpartition("=")
        pattern, at, axis = head.rpartition("@")
        if not (equals and at and axis.lstrip("-").isdecimal()):
            raise UsageError(f"--take {text!r}: expected SELECTOR@AXIS=WHICH")
        chosen = trees.mask(specs, selector(pattern))
        for path in [path for path in specs if chosen[path]]:
            shape = specs[path].shape
            if not -len(shape) <= int(axis) < len(shape):
                raise ValueError(f"{path!r} {list(shape)} has no axis {axis} ({text!r}).")
            position = int(axis) % len(shape)
            if position in out.setdefault(path, {}):
                raise ValueError(f"two --take name axis {position} of {path!r}.")
            out[path][position] = _which(text, which, path, shape[position])
    return out


def _which(text: str, which: str, path: str, length: int) -> np.ndarray:
    kind, colon, count = which.partition(":")
    selectors = {"first": transforms.first_indices, "uniform": transforms.uniform_indices}
    try:
        indices = selectors[kind](length, int(count)) if colon else _checkpoints.integers(which)
    except KeyError:
        raise UsageError(f"--take {text!r}: expected {' or '.join(selectors)}") from None
    except ValueError as error:
        raise ValueError(f"{path!r}, {text!r}: {error}") from None
    indices = np.asarray(indices)
    if not indices.size or indices.min() < 0 or indices.max() >= length:
        raise ValueError(f"{path!r} has the indices 0..{length - 1} on that axis, got {which!r}.")
    return indices


def _shape(spec: Any, indices: Mapping[int, np.ndarray]) -> tuple[int, ...]:
    return tuple(
        len(indices[axis]) if axis in indices else length for axis, length in enumerate(spec.shape)
    )
