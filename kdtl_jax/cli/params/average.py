"""`kdtl params average`: `sum w theta / sum w`; without weights, the uniform soup."""

from dataclasses import dataclass

from kdtl_jax.cli.params import _checkpoints, merge
from kdtl_jax.cli.params._checkpoints import Selection, Writing

EXAMPLES = f"""
kdtl params average a.safetensors b.safetensors --weights 3,1 --write soup.safetensors
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Settings(merge.Several, Selection, Writing):
    """The weighted mean of several models."""


def run(settings: Settings) -> int:
    """Reports, and writes if asked to."""
    as_merge = merge.Settings(**vars(settings))  # whose method is linear by default
    return _checkpoints.finish(settings, "average", merge.merged(as_merge, EXAMPLES))
