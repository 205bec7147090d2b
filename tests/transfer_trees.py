"""Trees of dense layers for the tests of transfers."""

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax._types import Array, Params


def dense_tree(*, width: int = 4, classes: int = 3, layers: int = 2, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)

    def dense(n: int, m: int) -> dict[str, Array]:
        return {
            "kernel": jnp.asarray(rng.normal(size=(n, m)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=m), jnp.float32),
        }

    body = {f"layer_{i}": dense(width, width) for i in range(layers)}
    return {**body, "head": dense(width, classes)}


def assert_equal(got: Params, want: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
