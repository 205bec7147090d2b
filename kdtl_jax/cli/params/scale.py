"""`kdtl params scale`: `theta_small = alpha * theta_large`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._checkpoints import Opened, Rewrite, TensorSelection, Writing
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes.settings import setting
from kdtl_jax.transforms import Plan, Report

EXAMPLES = f"""
kdtl params scale model.safetensors --alpha 0.1 --where 'glob:**/kernel' --write small.safetensors
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Factors:
    """The factors of tensors."""

    alpha: float = setting(1.0, "the factor", metavar="A")
    rule: tuple[str, ...] = setting(
        (), "another factor for these tensors; repeat for more, the first match wins",
        metavar="SELECTOR=A", repeat=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Settings(Factors, TensorSelection, Writing):
    """Multiplies weights by a factor."""

    source: str | None = setting(None, "a checkpoint", positional=True)


def run(settings: Settings) -> int:
    """Prints a report and, with `--write`, writes the result."""
    source = _checkpoints.opened(settings.source, "SOURCE", EXAMPLES)
    where = _checkpoints.selected(settings, source.specs)
    chosen = trees.mask(source.specs, where)
    transforms.refuse_codes(source.specs, [path for path, c in chosen.items() if c])
    plan = transforms.plan_transfer(
        source.specs, source.specs, where=where, alpha=alphas(settings, source.specs)
    )
    rewrite = Rewrite(source.specs, planned(plan, source, source), plan.report, [source])
    return _checkpoints.finish(settings, "scale", rewrite)


def alphas(settings: Factors, specs: object) -> object:
    """One factor per tensor, from `--rule` and `--alpha`."""
    rules: Sequence[Any] = _checkpoints.rules("rule", settings.rule, float)
    return trees.labels(specs, rules, default=settings.alpha) if rules else settings.alpha


def planned(plan: Plan, source: Opened, target: Opened) -> Callable[[str], Any]:
    """Executes a plan tensor by tensor, in pieces if no shape changes."""
    steps = {step.path: step for step in plan.steps}

    def produce(path: str) -> Any:
        step, spec = steps[path], target.specs[path]
        if step.source is None:
            return safetensors.blocks(target.tensors[path], _checkpoints.BLOCK)
        tensor = source.tensors[step.source]
        if step.policy is not None:
            return _applied(step, safetensors.read(tensor), spec)
        return (
            _applied(step, block, jax.ShapeDtypeStruct(block.shape, spec.dtype))
            for block in safetensors.blocks(tensor, _checkpoints.BLOCK)
        )

    return produce


def _applied(step: Any, value: np.ndarray, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    # A NumPy target without memory.
    like = np.broadcast_to(_checkpoints.widened(np.zeros((), spec.dtype)), spec.shape)
    plan = Plan((step,), {step.source: value.shape}, {step.path: like.shape}, Report())
    source = {step.source: _checkpoints.widened(value)}
    return transforms.apply_plan(plan, source, {step.path: like})[step.path]
