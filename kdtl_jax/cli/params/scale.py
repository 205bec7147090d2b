"""`kdtl params scale`: `theta_small = alpha * theta_large`."""

import argparse

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _inputs, _rewrite

EXAMPLE = (
    "kdtl params scale model.safetensors --alpha 0.1 --where 'glob:**/kernel' "
    "--write small.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl params scale`."""
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a checkpoint")
    add_alpha(parser)
    _inputs.add_where(parser, "scale these tensors")
    _rewrite.add_write(parser)
    _inputs.show_example(parser, EXAMPLE)


def add_alpha(parser: argparse.ArgumentParser) -> None:
    """`--alpha`, `--rule`."""
    parser.add_argument(
        "--alpha", type=float, default=1.0, metavar="A", help="the factor (default: 1)"
    )
    parser.add_argument(
        "--rule",
        action="append",
        metavar="SELECTOR=A",
        help="another factor for these tensors; repeat for more, the first match wins",
    )


def alphas(args: argparse.Namespace, specs: object) -> object:
    """One factor per tensor, from `--rule` and `--alpha`."""
    rules = _inputs.rules("rule", args.rule, float)
    return trees.labels(specs, rules, default=args.alpha) if rules else args.alpha


def run(args: argparse.Namespace) -> int:
    """Reports, and writes if asked to."""
    _inputs.required(args, EXAMPLE, "source")
    source = _inputs.opened(args.source)
    plan = transforms.plan_transfer(
        source.specs,
        source.specs,
        where=_inputs.selected(args, source.specs),
        alpha=alphas(args, source.specs),
    )
    return _rewrite.finish(args, _rewrite.same_as(source, plan))
