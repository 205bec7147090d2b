"""`python -m kdtl_jax`: the same as `kdtl`."""

from kdtl_jax.cli import command

command()
