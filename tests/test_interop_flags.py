"""Modes that are told in two places, or nowhere."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import numpy as np
import pytest

from kdtl_jax.interop import equinox, linen

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 3 + 5


def test_a_field_beside_an_argument_follows_too() -> None:
    class Both(nn.Module):
        deterministic: bool = True
        train: bool | None = None

        @nn.compact
        def __call__(self, x: Any, train: bool | None = None) -> Any:
            frozen = not nn.merge_param("train", self.train, train)
            x = nn.BatchNorm(use_running_average=frozen)(x)
            return nn.Dropout(0.5, deterministic=self.deterministic)(x)

    made = linen.model(Both())
    v = made.init(jax.random.key(0), X)
    for train in (True, False):
        one, other = (
            made.apply(v.params, v.model_state, X, key=jax.random.key(i), train=train)[0]["logits"]
            for i in (0, 1)
        )
        assert np.allclose(one, other) is not train


def test_an_equinox_module_in_a_partial_would_have_no_parameters() -> None:
    module: Any = functools.partial(eqx.nn.Linear(4, 2, key=jax.random.key(0)))
    with pytest.raises(TypeError, match="JAX sees no arrays in it"):
        equinox.model(module)


class LinenNoise(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def test_a_random_stream_that_is_not_there_is_asked_for() -> None:
    key, x = jax.random.key(0), X
    plain, noisy = linen.model(LinenNoise()), linen.model(LinenNoise(), rngs=("noise",))
    v = plain.init(key, x)
    with pytest.raises(ValueError, match=r"LinenNoise reads a random .*rngs=\('dropout', 'noise'"):
        plain.apply(v.params, v.model_state, x, key=key)
    noisy.apply(v.params, v.model_state, x, key=key)
    with pytest.raises(ValueError, match="Pass key="):
        noisy.apply(v.params, v.model_state, x)
