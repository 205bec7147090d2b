"""Fake quantization: on the grid, stable, straight through."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms

QUANTIZERS: dict[str, Any] = {
    "int_per_channel": transforms.int_per_channel,
    "int_by_group": partial(transforms.int_by_group, group=8),
    "mxfp4": transforms.mxfp4,
    "nvfp4": transforms.nvfp4,
}
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rounded_once_is_rounded_and_gradients_pass(name: str) -> None:
    quantizer = QUANTIZERS[name]
    weight = jax.random.normal(jax.random.key(0), (20, 3))
    params = {"layer": {"kernel": weight, "bias": jnp.ones(3), "step": jnp.zeros((), jnp.int32)}}

    def rounded(params: Any) -> Any:
        return transforms.fake_quantize(params, quantizer, where=".*kernel")

    actual = rounded(params)["layer"]
    assert np.any(actual["kernel"] != weight)
    np.testing.assert_array_equal(actual["bias"], 1)
    np.testing.assert_array_equal(quantizer(actual["kernel"]), actual["kernel"])
    gradient = jax.grad(lambda k: jnp.sum(jnp.square(quantizer(k))))(weight)
    np.testing.assert_array_equal(gradient, 2 * actual["kernel"])
    half = quantizer(weight.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(quantizer(jnp.zeros((20, 3))), 0)


def test_scales_are_of_the_inputs_of_one_channel() -> None:
    weight = jnp.asarray([[127.0, 1.0], [-0.6, 0.3]])
    np.testing.assert_allclose(transforms.int_per_channel(weight), [[127, 1], [-1, 38 / 127]])
    amax = jnp.asarray([[1.0, 2.0]])
    actual, pull = jax.vjp(lambda w: transforms.int_per_channel(w, amax=amax), weight)
    assert actual[0, 0] == 1
    np.testing.assert_array_equal(pull(jnp.ones_like(weight))[0], [[0, 1], [1, 1]])


def test_mxfp4_follows_the_specification() -> None:
    """The exponent is floor(log2 max) - 2: 7 saturates at 6; halves go to the even code."""
    weight = jnp.asarray([7.0, 0.25, 0.75, 1.25, 2.5, 3.5, -5.0, 0.1])[:, None]
    want = [6, 0, 1, 1, 2, 4, -4, 0]
    np.testing.assert_array_equal(transforms.mxfp4(weight)[:, 0], want)
    np.testing.assert_array_equal(transforms.e2m1(jnp.asarray(E2M1), jnp.ones(())), E2M1)


def test_what_does_not_fit_is_refused() -> None:
    params = {"kernel": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="matches no leaf"):
        transforms.fake_quantize(params, transforms.mxfp4, where="missing")
    with pytest.raises(ValueError, match="must keep shape and dtype"):
        transforms.fake_quantize(params, lambda w: w[:1], where="kernel")
    for bits in (1, 17, 32):
        with pytest.raises(ValueError, match=r"bits must"):
            transforms.int_by_group(jnp.ones((4, 2)), bits=bits)
    np.testing.assert_array_equal(transforms.int_per_channel(jnp.full((2, 1), 2.0**-24)), 0)
    with pytest.raises(ValueError, match="axis -2 is outside"):
        transforms.nvfp4(jnp.ones(4))
    with pytest.raises(TypeError, match="floating point"):
        transforms.int_per_channel(jnp.ones((2, 2), jnp.int32))
