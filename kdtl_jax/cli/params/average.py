"""`kdtl params average`: `sum w theta / sum w`, the uniform soup without weights."""

from dataclasses import dataclass

from kdtl_jax.cli.params import _checkpoints, _jobs, merge
from kdtl_jax.cli.params._checkpoints import Selection, Writing
from kdtl_jax.cli.params._methods import Options

EXAMPLES = f"""
kdtl params average a.safetensors b.safetensors --weights 3,1 --write soup.safetensors
{_checkpoints.SELECTORS}"""


@dataclass(frozen=True)
class Settings(merge.Several, Selection, Writing):
    """The weighted mean of several models."""


def run(settings: Settings) -> int:
    """Reports, and writes if asked to."""
    job = merge.several(settings, "linear", Options(weights=settings.weights), EXAMPLES)
    return _checkpoints.finish(settings, "average", _jobs.rewrite(job))
