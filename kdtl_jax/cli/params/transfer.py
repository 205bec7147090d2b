"""`kdtl params transfer`: `theta_target = alpha * adapt(theta_source)`."""

import re
from dataclasses import dataclass
from typing import Literal

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _checkpoints, scale
from kdtl_jax.cli.params._checkpoints import Rewrite, TensorSelection, Writing
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import setting

EXAMPLES = f"""
kdtl params transfer large.safetensors small.safetensors --rename 'encoder/(.*)=>\\1' \\
    --on-mismatch uniform --policy 'head/.*=keep' --write new.safetensors
{_checkpoints.SELECTORS}"""

POLICIES = {name.replace("_", "-"): policy for name, policy in types.POLICIES.items()}
# The library's Python words, and the flags for them.
FLAGS = (
    ("rename=, or on_missing='keep'", "--rename, or --on-missing keep"),
    (
        "rename=, a rename to None, where=, or on_extra='ignore'",
        "--rename, --drop, --where, or --on-extra ignore",
    ),
    ("with a rename to None", "with --drop"),
    ("the rule (path, None)", "--drop"),
)


@dataclass(frozen=True)
class Settings(scale.Factors, TensorSelection, Writing):
    """Fills a target's weights from a source's."""

    source: str | None = setting(None, "the checkpoint that values come from", positional=True)
    target: str | None = setting(
        None, "the checkpoint to fill: its names, shapes and dtypes", positional=True
    )
    rename: tuple[str, ...] = setting(
        (), "map whole source names to target names, \\1 for groups; the first match wins; an "
        "empty NAME drops the tensor",
        metavar="'REGEX=>NAME'", repeat=True,
    )  # fmt: skip
    drop: tuple[str, ...] = setting((), "source tensors to leave out", metavar="REGEX", repeat=True)
    on_missing: Literal["error", "keep"] = setting("error", "target tensors that the source lacks")
    on_extra: Literal["error", "ignore"] = setting("error", "source tensors that the target lacks")
    on_mismatch: Literal["error", "keep", "crop", "pad", "crop-or-pad", "uniform", "resize"] = (
        setting("error", "tensors of another shape")
    )
    policy: tuple[str, ...] = setting(
        (), "another --on-mismatch for these target tensors; the first match wins",
        metavar="SELECTOR=POLICY", repeat=True,
    )  # fmt: skip


def run(settings: Settings) -> int:
    """Prints a report and, with `--write`, writes the result."""
    source = _checkpoints.opened(settings.source, "SOURCE", EXAMPLES)
    target = _checkpoints.opened(settings.target, "TARGET", EXAMPLES)
    policies = _checkpoints.rules("policy", settings.policy, POLICIES.__getitem__)
    default = POLICIES[settings.on_mismatch]
    with_policy = trees.any_of(*[selector for selector, _ in policies])
    if policies and not all(trees.mask(target.specs, with_policy, expect=None).values()):
        policies.append((trees.everything, default))  # a rule that matches nothing raises
    drops = [(pattern, None) for pattern in settings.drop]
    rename = [*drops, *types.renames(settings.rename)]
    try:
        plan = transforms.plan_transfer(
            source.specs,
            target.specs,
            where=_checkpoints.selected(settings, target.specs),
            rename=rename,
            alpha=scale.alphas(settings, target.specs),
            on_missing=settings.on_missing,
            on_extra=settings.on_extra,
            on_mismatch=policies or default,
        )
    except ValueError as error:
        raise ValueError(_as_flags(str(error))) from None
    produce = scale.planned(plan, source, target)
    rewrite = Rewrite(target.specs, produce, plan.report, [target, source])
    return _checkpoints.finish(settings, "transfer", rewrite)


def _as_flags(message: str) -> str:
    for words, flag in FLAGS:
        message = message.replace(words, flag)
    policies = "Pass --on-mismatch keep, crop, pad, uniform or resize"
    message = re.sub("Pass on_mismatch=: .* or a function", policies, message)
    return _checkpoints.as_flags(message)
