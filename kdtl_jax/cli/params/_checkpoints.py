"""Shared by all actions: reading checkpoints by canonical path, selectors, and writing."""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kdtl_jax
from kdtl_jax import _files, _text, trees
from kdtl_jax.cli.params import _folders
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes.settings import UsageError, selector, setting
from kdtl_jax.transforms import Report

RECIPE = "kdtl_recipe"  # the metadata key
# Metadata of models that give their entries a meaning beyond names and shapes.
MEANING = ("model", "class_names", "input_mean", "input_scale")
BLOCK = 1 << 20  # entries of a piece: 4 MB of float32
WIDEST = 200  # characters of a name in a printed column
SELECTORS = """
A SELECTOR is a regular expression for the whole name of a tensor, 'encoder/.*/kernel', or a shell
pattern after 'glob:', as in 'glob:**/kernel' ('*' stays within one '/'-segment, '**' crosses them).
A checkpoint is a .safetensors file, a *.index.json, or a folder with either.
"""


@dataclass(frozen=True)
class TensorSelection:
    """The settings that select tensors."""

    where: tuple[str, ...] = setting(
        (), "only these tensors; repeat for more (default: all)", metavar="SELECTOR", repeat=True
    )
    except_: tuple[str, ...] = setting(
        (), "leave these out of --where; repeat for more", metavar="SELECTOR", repeat=True
    )


@dataclass(frozen=True)
class Writing:
    """The settings of the output."""

    write: str | None = setting(
        None,
        "write OUT.safetensors, or a new folder of shards with config and tokenizer; without it, "
        "nothing is written",
        metavar="OUT",
    )
    force: bool = setting(False, "replace OUT.safetensors (atomically) if it exists")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "dtype of the floating-point tensors written (default: unchanged)"
    )
    shard_bytes: int = setting(
        5_000_000_000, "largest file in a folder of shards", metavar="N", least=1, most=10**13
    )
    skip_sha256: bool = setting(
        False, "record only the sizes of the inputs, which saves reading them again"
    )


class Opened(NamedTuple):
    """The headers of a checkpoint: `tensors` and `specs` by canonical path."""

    name: str
    tensors: dict[str, safetensors.Tensor]
    specs: dict[str, jax.ShapeDtypeStruct]
    names: dict[str, str]  # canonical path -> name in the file, which may end in "/value"
    checkpoint: safetensors.Checkpoint


class Rewrite(NamedTuple):
    """What will be written; `produce` makes a tensor, or an iterator of its pieces.

    It computes in float32 or wider; the result is rounded once to its dtype.
    """

    specs: Mapping[str, Any]
    produce: Callable[[str], Any]
    report: Report
    inputs: Sequence[Opened]  # the first gives the metadata and, for a folder, the configuration
    names: Mapping[str, str] | None = None  # canonical path -> name; None: as in the first input
    layers: Sequence[int] | None = None  # the first input's layers that were kept, in order
    dtype: str | None = None  # to write, unless `--dtype` names another


# --- reading -------------------------------------------------------------------------------------


def opened(path: str | None, what: str, examples: str) -> Opened:
    """Reads a checkpoint's headers.

    Raises:
      UsageError: if no path was given.
      ValueError: as `safetensors.index`, or if two names have one canonical path.
      TypeError: if a tensor is an 8-bit float.
    """
    if not path:
        example = re.sub(r"\\\n\s*", "", examples.strip()).splitlines()[0].strip()
        raise UsageError(f"name {what}, for example: {example}")
    checkpoint = safetensors.index(path)
    names: dict[str, str] = {}
    for name in checkpoint.tensors:
        canonical = trees.path_string((jax.tree_util.DictKey(name),))
        if canonical in names:
            raise ValueError(f"{path}: {names[canonical]!r} and {name!r} are one path. Rename one.")
        names[canonical] = name
    tensors = {path: checkpoint.tensors[name] for path, name in names.items()}
    abstract = safetensors.abstract(checkpoint)
    return Opened(path, tensors, {p: abstract[n] for p, n in names.items()}, names, checkpoint)


def as_flags(message: str) -> str:
    """A library's message, with shell patterns written as on the command line."""
    return re.sub(r"Glob\((?:pattern=)?'([^']*)'\)", r"'glob:\1'", message)


def selected(settings: TensorSelection, specs: Mapping[str, Any]) -> trees.Selector:
    """`--where` without `--except`, each pattern checked to match something.

    Raises:
      ValueError: if a pattern matches nothing, listing the nearest paths; or if nothing is left.
    """
    included = [selector(text) for text in settings.where] or [trees.everything]
    excluded = [selector(text) for text in settings.except_]
    selection = trees.all_of(trees.any_of(*included), trees.none_of(*excluded))
    try:
        for pattern in [*included, *excluded, selection]:
            trees.mask(specs, pattern)
    except ValueError as error:
        raise ValueError(as_flags(str(error))) from None
    return selection if len(included) > 1 or excluded else included[0]


def rules(flag: str, texts: Sequence[str], parse: Callable[[str], Any]) -> list[Any]:
    """`[(selector, value), ...]` from `SELECTOR=VALUE` texts; the last '=' separates."""
    out = []
    for text in texts:
        pattern, separator, value = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(f"--{flag} {text!r}: expected SELECTOR=VALUE")
        try:
            out.append((selector(pattern), parse(value)))
        except (ValueError, KeyError) as error:
            raise UsageError(f"--{flag} {text!r}: {value!r} is not a value ({error})") from None
    return out


def integers(value: Any) -> tuple[int, ...]:
    """`0,2,5..7` as whole numbers; `5..7` is 5, 6, 7."""
    if not isinstance(value, str):
        value = ",".join(map(str, value if isinstance(value, (list, tuple)) else [value]))
    out: list[int] = []
    for item in value.split(","):
        low, dots, high = item.partition("..")
        first, last = int(low), int(high if dots else low)
        if len(out) + last - first >= 10**7:
            raise ValueError(f"{item!r} is more numbers than any tensor needs")
        out += range(first, last + 1)
    return tuple(out)


# --- writing -------------------------------------------------------------------------------------


def finish(settings: Writing, command: str, rewrite: Rewrite) -> int:
    """Prints the report; with `--write`, writes atomically and reports NaN and infinity by path.

    Raises:
      FileExistsError: if the output exists and `--force` was not given.
      OSError: if the disk is full; existing files stay unchanged.
    """
    settings = replace(settings, dtype=settings.dtype or rewrite.dtype)
    print(rewrite.report)
    if command in ("average", "merge"):
        _warn_of_metadata(rewrite.inputs)
    specs = dict(rewrite.specs)
    for path, spec in specs.items() if settings.dtype else ():
        if jnp.issubdtype(spec.dtype, jnp.floating):
            specs[path] = jax.ShapeDtypeStruct(spec.shape, jnp.dtype(settings.dtype))
    total = sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs.values())
    contents = f"{len(specs)} tensors, {size(total)}"
    if settings.write is None:
        print(f"dry run: nothing was written; --write OUT.safetensors would write {contents}")
        return 0
    out = Path(settings.write)
    _check_output(out, settings.force, total)
    recipe = {RECIPE: _recipe(settings, command, rewrite.inputs)}
    metadata = rewrite.inputs[0].checkpoint.metadata | recipe
    nonfinite: list[str] = []
    names = rewrite.inputs[0].names if rewrite.names is None else rewrite.names
    paths = {names.get(path, path): path for path in specs}
    specs_by_name = {name: specs[path] for name, path in paths.items()}
    advance = progress(total, "writing: ")

    def convert(path: str, result: Any) -> np.ndarray:
        array = np.asarray(result)
        if trees.is_inexact(array) and trees.is_inexact(specs[path]):
            with np.errstate(over="ignore"):  # infinity is reported by tensor
                array = array.astype(specs[path].dtype, copy=False)
        advance(array.nbytes)
        if trees.is_inexact(array) and path not in nonfinite and not np.isfinite(array).all():
            nonfinite.append(path)
        # Another command may write there in the meantime, so check after every piece.
        _check_absent(out, settings.force)
        return array

    def produce(name: str) -> Any:
        path, result = paths[name], rewrite.produce(paths[name])
        if isinstance(result, Iterator):
            return (convert(path, piece) for piece in result)
        return convert(path, result)  # as a whole, so that its shape is checked

    # Double precision is kept; without x64, JAX would convert it to float32.
    with jax.enable_x64(True):
        if out.suffix == ".safetensors":
            safetensors.stream(out, specs_by_name, produce, metadata=metadata)
        else:
            companions = _folders.companions(
                rewrite.inputs[0].checkpoint, specs_by_name, rewrite.layers
            )
            safetensors.stream_sharded(
                out, specs_by_name, produce, max_bytes=settings.shard_bytes, metadata=metadata,
                beside=companions,
            )  # fmt: skip
    print(f"wrote {out}: {contents}")
    for path in sorted(nonfinite, key=trees.natural_key):
        print(f"warning: {path} holds NaN or infinity", file=sys.stderr)
    return 0


def widened(array: np.ndarray) -> np.ndarray:
    """Half precision as float32, so that results are rounded only when written."""
    is_half = trees.is_inexact(array) and array.dtype.itemsize < 4
    return array.astype(np.float32) if is_half else array


def _warn_of_metadata(inputs: Sequence[Opened]) -> None:
    """Warns if models to be combined have different metadata.

    Equal names and shapes do not make two networks alike: heads or classes may be reordered.
    """
    first, *others = inputs
    for model in others:
        theirs, ours = model.checkpoint.metadata, first.checkpoint.metadata
        for key in MEANING:
            if key in theirs and key in ours and theirs[key] != ours[key]:
                values = [_text.shown(metadata[key], WIDEST) for metadata in (theirs, ours)]
                print(
                    f"warning: {model.name} says {key} {values[0]}, {first.name} {values[1]}: its "
                    "entries may mean something else.",
                    file=sys.stderr,
                )


def size(count: int) -> str:
    """A human-readable number of bytes: `1.5 GB`."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} bytes"


def progress(total: int, what: str = "") -> Callable[[int], None]:
    """Prints to stderr how many of `total` bytes are done, every few seconds."""
    start = last = time.monotonic()
    done = 0

    def add(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last > 3:
            last = now
            share = f"{100 * done / max(total, 1):3.0f}% of {size(total)}"
            print(f"{now - start:6.1f} s  {what}{share}", file=sys.stderr, flush=True)

    return add


def _check_output(out: Path, force: bool, total: int) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--write {out}: the folder {out.parent} does not exist.")
    if out.is_dir() and (out.suffix == ".safetensors" or any(out.iterdir())):
        raise FileExistsError(f"--write {out} is a folder that exists. Name a new one.")
    if out.is_file() and out.suffix != ".safetensors":
        raise FileExistsError(f"--write {out} is a file; name OUT.safetensors or a new folder.")
    _check_absent(out, force)
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise OSError(f"--write {out} needs {size(total)}, but its disk has {size(free)} free.")


def _check_absent(out: Path, force: bool) -> None:
    if out.is_file() and not force:
        raise FileExistsError(f"--write {out} exists. Name another file, or pass --force.")


def _recipe(settings: Writing, command: str, inputs: Sequence[Opened]) -> str:
    """The command, the options it was given, and its inputs, as JSON."""
    output_fields = {field.name for field in fields(Writing)} - {"dtype"}
    options = {
        field.name: value
        for field in fields(settings)
        if (value := getattr(settings, field.name)) != field.metadata["default"]
        and field.name not in output_fields
    }
    paths = [file for source in inputs for file in source.checkpoint.files]
    files = [{"file": path.name, "bytes": path.stat().st_size} for path in paths]
    if not settings.skip_sha256:
        total = sum(file["bytes"] for file in files)
        if total > 1e9:
            print(f"sha256 of {size(total)} of inputs …", file=sys.stderr, flush=True)
        digests = map(_files.sha256, paths)
        files = [file | {"sha256": d} for file, d in zip(files, digests, strict=True)]
    recipe = {"command": f"kdtl params {command}", "options": options, "inputs": files}
    recipe["version"] = kdtl_jax.__version__
    if previous := inputs[0].checkpoint.metadata.get(RECIPE):
        try:
            recipe["before"] = json.loads(previous)
        except (ValueError, RecursionError):  # written by another program
            recipe["before"] = previous
    return json.dumps(recipe)
