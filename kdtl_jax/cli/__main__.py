"""`python -m kdtl_jax.cli`: the same as `kdtl`."""

from kdtl_jax.cli import command

command()
