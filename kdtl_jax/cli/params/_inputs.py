"""What the actions read: checkpoints by canonical path, selectors, and `SELECTOR=VALUE` rules."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kdtl_jax import trees
from kdtl_jax.cli import _config
from kdtl_jax.interop import safetensors

SELECTORS = """
A SELECTOR is a regular expression for the whole name of a tensor, 'encoder/.*/kernel', or a shell
pattern after 'glob:', as in 'glob:**/kernel' ('*' stays within one '/'-segment, '**' crosses them).
A checkpoint is a .safetensors file, a *.index.json, or a folder with either.
"""


class Opened(NamedTuple):
    """A checkpoint whose headers were read: `tensors` and `specs` by canonical path."""

    name: str
    tensors: dict[str, safetensors.Tensor]
    specs: dict[str, jax.ShapeDtypeStruct]
    names: dict[str, str]  # canonical path -> name in the file, which may end in "/value"
    checkpoint: safetensors.Checkpoint


def opened(path: str) -> Opened:
    """Reads a checkpoint's headers.

    Raises:
      ValueError: as `safetensors.index`, or if two names have one canonical path.
      TypeError: if a tensor is an 8-bit float.
    """
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


def show_example(parser: argparse.ArgumentParser, example: str) -> None:
    """What `--help` ends with."""
    parser.epilog = f"Example: {example}\n{SELECTORS}"


def required(args: argparse.Namespace, example: str, *names: str) -> None:
    """Positional arguments may come from `--config`, so argparse cannot ask for them.

    Raises:
      UsageError: naming the first that is missing.
    """
    for name in names:
        if not getattr(args, name):
            raise _config.UsageError(f"name {name.upper()}, for example: {example}")


def add_where(parser: argparse.ArgumentParser, acts: str) -> None:
    """`--where`, `--except`."""
    parser.add_argument(
        "--where",
        action="append",
        metavar="SELECTOR",
        help=f"{acts}; repeat for more (default: every tensor)",
    )
    parser.add_argument(
        "--except",
        dest="except",
        action="append",
        metavar="SELECTOR",
        help="leave these out of --where; repeat for more",
    )


def selector(text: str) -> trees.Selector:
    """`glob:PATTERN` or a regular expression."""
    return trees.Glob(text.removeprefix("glob:")) if text.startswith("glob:") else text


def selected(args: argparse.Namespace, specs: Mapping[str, Any]) -> trees.Selector:
    """`--where` without `--except`, each pattern checked to match something.

    Raises:
      ValueError: if a pattern matches nothing, listing the nearest paths; or if nothing is left.
    """
    wanted = [selector(text) for text in args.where or [trees.everything]]
    unwanted = [selector(text) for text in getattr(args, "except") or []]
    for each in [*wanted, *unwanted]:
        trees.mask(specs, each)
    if len(wanted) == 1 and not unwanted:
        return wanted[0]
    both = trees.all_of(trees.any_of(*wanted), trees.none_of(*unwanted))
    trees.mask(specs, both)
    return both


def rules(flag: str, texts: Sequence[str] | None, parse: Callable[[str], Any]) -> list[Any]:
    """`[(selector, value), ...]` from `SELECTOR=VALUE` texts; the last '=' separates.

    Raises:
      UsageError: if a text has no '=' or its value cannot be parsed.
    """
    found = []
    for text in texts or []:
        pattern, separator, value = text.rpartition("=")
        if not separator or not pattern:
            raise _config.UsageError(f"--{flag} {text!r}: expected SELECTOR=VALUE")
        try:
            found.append((selector(pattern), parse(value)))
        except (ValueError, KeyError) as error:
            raise _config.UsageError(
                f"--{flag} {text!r}: {value!r} is no value ({error})"
            ) from None
    return found


def renames(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """`--drop REGEX` and `--rename 'REGEX=>REPLACEMENT'` as rename rules, drops first.

    Raises:
      UsageError: if a rename has no '=>'.
    """
    found: list[tuple[str, str | None]] = [(pattern, None) for pattern in args.drop or []]
    for text in args.rename or []:
        pattern, separator, replacement = text.partition("=>")
        if not separator:
            raise _config.UsageError(f"--rename {text!r}: expected 'REGEX=>REPLACEMENT'")
        found.append((pattern.strip(), replacement.strip()))
    return found


def numbers(text: str) -> list[float]:
    """`1,2,0.5` as a list of numbers."""
    return [float(item) for item in text.split(",")]


def integers(text: str) -> list[int]:
    """`0,2,5..7` as a list of whole numbers; `5..7` is 5, 6, 7."""
    out: list[int] = []
    for item in text.split(","):
        low, dots, high = item.partition("..")
        out += range(int(low), int(high) + 1) if dots else [int(low)]
    return out
