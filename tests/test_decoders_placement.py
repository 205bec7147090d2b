"""A decoder's logits are those of one device, however its batch and weights are placed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses
from kdtl_jax.interop import decoders
from kdtl_jax.run import sharding

LLAMA = Path(__file__).parent / "data" / "decoders" / "llama"


@pytest.mark.parametrize(("data", "fsdp"), [(2, 1), (1, 2), (2, 2)])
def test_placed_decoders_give_the_logits_of_one_device(data: int, fsdp: int):
    source = decoders.load(LLAMA)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        hidden, _ = source.model.apply(params, tokens)
        return losses.head_logits(hidden, source.model.head(params))

    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    params = sharding.place(source.params, mesh, smallest=1)
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp == 1)
    batch = sharding.place_batch({"tokens": tokens}, mesh)
    np.testing.assert_allclose(
        logits(params, batch["tokens"]), logits(source.params, tokens), atol=1e-6, rtol=1e-6
    )
