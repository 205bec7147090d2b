"""Rows of the table of losses, one module per module of `kdtl_jax.losses`."""
