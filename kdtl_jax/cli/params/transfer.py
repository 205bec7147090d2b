"""`kdtl params transfer`: `theta_target = alpha * adapt(theta_source)`."""

import argparse

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _inputs, _rewrite, scale

EXAMPLE = (
    "kdtl params transfer large.safetensors small.safetensors --rename 'encoder/(.*)=>\\1' "
    "--on-mismatch uniform --policy 'head/.*=keep' --write new.safetensors"
)

POLICIES = {
    "error": transforms.raise_on_mismatch,
    "keep": transforms.keep_on_mismatch,
    "crop": transforms.crop,
    "pad": transforms.pad,
    "crop-or-pad": transforms.crop_or_pad,
    "uniform": transforms.select_uniform,
    "resize": transforms.resize_linear,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl params transfer`."""
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="where values come from")
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="what is filled: its names, shapes and dtypes"
    )
    _inputs.add_where(parser, "fill these tensors of the target")
    parser.add_argument(
        "--rename",
        action="append",
        metavar="'REGEX=>NEW'",
        help="source names to target names, by whole name, \\1 for groups; the first match wins",
    )
    parser.add_argument(
        "--drop", action="append", metavar="REGEX", help="source tensors that go nowhere"
    )
    scale.add_alpha(parser)
    parser.add_argument(
        "--on-missing",
        choices=("error", "keep"),
        default="error",
        help="target tensors that the source lacks (default: error)",
    )
    parser.add_argument(
        "--on-extra",
        choices=("error", "ignore"),
        default="error",
        help="source tensors that the target lacks (default: error)",
    )
    parser.add_argument(
        "--on-mismatch",
        choices=tuple(POLICIES),
        default="error",
        help="tensors of another shape (default: error)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="SELECTOR=POLICY",
        help="another --on-mismatch for these target tensors; the first match wins",
    )
    _rewrite.add_write(parser)
    _inputs.show_example(parser, EXAMPLE)


def run(args: argparse.Namespace) -> int:
    """Reports, and writes if asked to."""
    _inputs.required(args, EXAMPLE, "source", "target")
    source, target = _inputs.opened(args.source), _inputs.opened(args.target)
    policies = _inputs.rules("policy", args.policy, POLICIES.__getitem__)
    otherwise = POLICIES[args.on_mismatch]
    named = trees.any_of(*[selector for selector, _ in policies])
    if policies and not all(trees.mask(target.specs, named, expect=None).values()):
        policies.append((trees.everything, otherwise))  # a rule that nothing is left for raises
    plan = transforms.plan_transfer(
        source.specs,
        target.specs,
        where=_inputs.selected(args, target.specs),
        rename=_inputs.renames(args),
        alpha=scale.alphas(args, target.specs),
        on_missing=args.on_missing,
        on_extra=args.on_extra,
        on_mismatch=policies or otherwise,
    )
    produce = _rewrite.planned(plan, source, target)
    rewrite = _rewrite.Rewrite(target.specs, produce, plan.report, [target, source], target.names)
    return _rewrite.finish(args, rewrite)
