"""`kdtl params average`: `sum w theta / sum w`, the uniform soup without weights."""

import argparse

from kdtl_jax.cli.params import _inputs, merge
from kdtl_jax.cli.params._methods import METHODS, Options

EXAMPLE = "kdtl params average a.safetensors b.safetensors --weights 3,1 --write soup.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl params average`."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints of one structure")
    parser.add_argument(
        "--weights", type=_inputs.numbers, metavar="W,W", help="one per model (default: 1 each)"
    )
    merge.add_common(parser)
    _inputs.show_example(parser, EXAMPLE)


def run(args: argparse.Namespace) -> int:
    """Reports, and writes if asked to."""
    _inputs.required(args, EXAMPLE, "models")
    models = [_inputs.opened(path) for path in args.models]
    return merge.merged(args, METHODS["linear"], Options(weights=args.weights), None, models)
