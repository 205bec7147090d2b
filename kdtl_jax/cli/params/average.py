"""`kdtl params average`: `sum w theta / sum w`; without weights, the uniform soup."""

from dataclasses import dataclass

from kdtl_jax.cli.params import _checkpoints, merge
from kdtl_jax.cli.params._checkpoints import TensorSelection, Writing

EXAMPLES = f"""
kdtl params average a.safetensors b.safetensors --weights 3,1 --write soup.safetensors
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Settings(merge.Several, TensorSelection, Writing):
    """The weighted mean of several models."""


def run(settings: Settings) -> int:
    """Prints a report and, with `--write`, writes the result."""
    as_merge = merge.Settings(**vars(settings))  # its default method is linear
    return _checkpoints.finish(settings, "average", merge.merged(as_merge, EXAMPLES))
