"""A decoder's logits are those of one device, however its batch and weights are placed."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses, models
from kdtl_jax.interop import decoders
from kdtl_jax.run import sharding

LLAMA = Path(__file__).parent / "data" / "decoders" / "llama"


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 1, 4), (2, 2, 2)]
)
def test_placed_decoders_give_the_logits_of_one_device(data: int, fsdp: int, tensor: int):
    source = decoders.load(LLAMA)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        hidden, _ = source.model.apply(params, tokens)
        return losses.head_logits(hidden, source.model.head(params))

    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    params = sharding.place(source.params, mesh, smallest=1, tensor=models.TENSOR_AXES)
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp * tensor == 1)
    if tensor > 1:
        assert kernel.sharding.spec[1] == "tensor", "each device has some of the hidden units"
        out = params["layers_0"]["attention"]["out"]["kernel"]
        assert out.sharding.spec[0] == "tensor", "each device has some of the heads"
    batch = sharding.place_batch({"tokens": tokens}, mesh)
    # A sum over devices is taken in another order.
    atol, rtol = (1e-6, 1e-6) if tensor == 1 else (1e-5, 1e-5)
    actual, whole = logits(params, batch["tokens"]), logits(source.params, tokens)
    np.testing.assert_allclose(actual, whole, atol=atol, rtol=rtol)
