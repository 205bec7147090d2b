"""`kdtl params slice`: some layers, some units of an axis, some tensors."""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli import _config
from kdtl_jax.cli.params import _inputs, _rewrite
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import Adapted, Report

EXAMPLE = (
    r"kdtl params slice model.safetensors --layers 'encoder/layer_(\d+)/.*' --keep 0,2,4 "
    "--write small.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl params slice`."""
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a checkpoint")
    _inputs.add_where(parser, "keep these tensors, drop the others")
    parser.add_argument(
        "--layers",
        metavar="REGEX",
        help=r"matches the layers' tensors, its one group their number: 'layer_(\d+)/.*'",
    )
    parser.add_argument(
        "--keep",
        type=_inputs.integers,
        metavar="0,2,4..7",
        help="these layers, renumbered from 0; DistilBERT's are 0,2,4,7,9,11",
    )
    parser.add_argument(
        "--take",
        action="append",
        metavar="SELECTOR@AXIS=WHICH",
        help="of these tensors keep the entries WHICH along AXIS: 0,2,5..7, first:N or uniform:N "
        "(weight selection); repeat for more",
    )
    _rewrite.add_write(parser)
    _inputs.show_example(parser, EXAMPLE)


def run(args: argparse.Namespace) -> int:
    """Reports, and writes if asked to."""
    _inputs.required(args, EXAMPLE, "source")
    if (args.layers is None) != (args.keep is None):
        raise _config.UsageError("--layers and --keep belong together")
    if not (args.layers or args.take or args.where or getattr(args, "except")):
        raise _config.UsageError("say what to keep: --layers with --keep, --take, --where")
    source = _inputs.opened(args.source)
    chosen = trees.mask(source.specs, _inputs.selected(args, source.specs))
    kept = {path: spec for path, spec in source.specs.items() if chosen[path]}
    rename = _renaming(args, kept)
    origin = {new: path for path in kept for new in rename(path)}
    indices = _indices(args.take, kept)
    shapes = {new: _shape(kept[path], indices.get(path, {})) for new, path in origin.items()}
    specs = {n: jax.ShapeDtypeStruct(shapes[n], kept[path].dtype) for n, path in origin.items()}

    def produce(new: str) -> Any:
        tensor = source.tensors[origin[new]]
        if not indices.get(origin[new]):
            return safetensors.blocks(tensor, _rewrite.BLOCK)
        array = safetensors.read(tensor)
        for axis, which in indices[origin[new]].items():
            array = np.take(array, which, axis)
        return array

    report = Report(
        copied=tuple(new for new, path in origin.items() if not indices.get(path)),
        adapted=tuple(
            Adapted(new, kept[path].shape, shapes[new], "take")
            for new, path in origin.items()
            if indices.get(path)
        ),
        unused=tuple(path for path in source.specs if path not in origin.values()),
        shapes=shapes,
        sizes={new: math.prod(shape) for new, shape in shapes.items()},
    )
    # A name keeps the ending that its canonical path lacks ("/value").
    names = {n: n + source.names[path].removeprefix(path) for n, path in origin.items()}
    return _rewrite.finish(args, _rewrite.Rewrite(specs, produce, report, [source], names))


def _renaming(
    args: argparse.Namespace, specs: Mapping[str, Any]
) -> Callable[[str], tuple[str, ...]]:
    if args.layers is None:
        return lambda path: (path,)
    numbers = transforms.layer_numbers(specs, args.layers)
    absent = sorted(set(args.keep) - set(numbers))
    if absent:
        raise ValueError(f"--keep names layers {absent}; there are {numbers}.")
    return transforms.layer_map(args.layers, args.keep)


def _indices(texts: list[str] | None, specs: Mapping[str, Any]) -> dict[str, dict[int, np.ndarray]]:
    """`{path: {axis: indices}}` of what `--take` selects."""
    out: dict[str, dict[int, np.ndarray]] = {}
    for text in texts or []:
        head, equals, which = text.rpartition("=")
        pattern, at, axis = head.rpartition("@")
        if not (equals and at and axis.lstrip("-").isdecimal()):
            raise _config.UsageError(f"--take {text!r}: expected SELECTOR@AXIS=WHICH")
        chosen = trees.mask(specs, _inputs.selector(pattern))
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
    known = {"first": transforms.first_indices, "uniform": transforms.uniform_indices}
    try:
        found = known[kind](length, int(count)) if colon else np.array(_inputs.integers(which))
    except KeyError:
        raise _config.UsageError(f"--take {text!r}: expected {' or '.join(known)}") from None
    except ValueError as error:
        raise ValueError(f"{path!r}, {text!r}: {error}") from None
    if not found.size or found.min() < 0 or found.max() >= length:
        raise ValueError(f"{path!r} has the indices 0..{length - 1} on that axis, got {which!r}.")
    return found


def _shape(spec: Any, indices: Mapping[int, np.ndarray]) -> tuple[int, ...]:
    return tuple(
        len(indices[axis]) if axis in indices else length for axis, length in enumerate(spec.shape)
    )
