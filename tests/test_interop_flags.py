"""Modes that are told in two places, or nowhere."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx

from kdtl_jax.interop import equinox, haiku, linen, nnx

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


class Layers(fnnx.Module):
    """Two layers with dropout, stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self) -> None:
        def layer(rngs: Any) -> Any:
            return fnnx.Dropout(0.5, rngs=rngs)

        self.layers = fnnx.split_rngs(splits=2)(fnnx.vmap(layer))(fnnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        def one(layer: Any, x: Any) -> Any:
            return x, layer(jnp.ones_like(x))

        return fnnx.scan(one, in_axes=(0, fnnx.Carry), out_axes=(fnnx.Carry, 0))(self.layers, x)[1]


def test_stacked_nnx_layers_draw_apart() -> None:
    made = nnx.model(Layers(), call=lambda module, x, train: module(x))
    out, _ = made.apply(made.params, made.model_state, X, key=jax.random.key(1), train=True)
    first, second = np.asarray(out["logits"])
    assert {0.0, 2.0} == set(np.unique(first))
    assert not np.array_equal(first, second)


@functools.partial(fnnx.jit, static_argnums=2)
def normalized(module: Any, x: Any, train: bool) -> Any:
    return module.norm(x, use_running_average=not train)


class NNXJitted(fnnx.Module):
    def __init__(self) -> None:
        self.norm = fnnx.BatchNorm(4, rngs=fnnx.Rngs(0))

    def __call__(self, x: Any, train: bool = False) -> Any:
        return normalized(self, x, train)


class NNXJittedFrozen(NNXJitted):
    def __call__(self, x: Any, frozen: bool = True) -> Any:
        return normalized(self, x, not frozen)


def test_nnx_jit_replaces_all_arrays_whatever_the_mode() -> None:
    made = nnx.model(NNXJitted())
    args = made.params, made.model_state
    evaluated = made.apply(*args, X)[0]["logits"]
    np.testing.assert_allclose(made.apply(*args, X[:1])[0]["logits"], evaluated[:1], rtol=1e-5)
    assert not np.allclose(made.apply(*args, X, train=True)[0]["logits"], evaluated)
    frozen = nnx.model(NNXJittedFrozen())
    with pytest.raises(ValueError, match="asked for training mode, but 'norm' ran in evaluation"):
        frozen.apply(frozen.params, frozen.model_state, X, train=True)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.BatchNorm(use_running_average=not train)(x)


class ByPosition(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool, /) -> Any:
        return nn.BatchNorm(use_running_average=not train)(x)


@pytest.mark.parametrize("make", [nn.remat(Block, static_argnums=2), ByPosition])
def test_a_mode_is_given_by_position_where_it_follows_the_inputs(make: Any) -> None:
    """A wrapper knows static arguments by their position."""
    made = linen.model(make())
    v = made.init(jax.random.key(0), X)
    evaluated = made.apply(v.params, v.model_state, X)[0]["logits"]
    np.testing.assert_allclose(evaluated, X / np.sqrt(1 + 1e-5), rtol=1e-6)
    trained = made.apply(v.params, v.model_state, X, train=True)[0]["logits"]
    np.testing.assert_allclose(np.mean(trained, 0), 0, atol=1e-5)


class Required(nn.Module):
    @nn.compact
    def __call__(self, x: Any, mode: str) -> Any:
        return x


class OwnStatistics(nn.Module):
    @nn.compact
    def __call__(self, x: Any, phase: bool = True) -> Any:
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(4))
        if phase and not self.is_initializing():
            mean.value = jnp.mean(x, axis=0)
        return x - mean.value


class EquinoxRequired(eqx.Module):
    def __call__(self, x: Any, mode: str) -> Any:
        return x


class EquinoxRng(eqx.Module):
    def __call__(self, x: Any, rng: Any = None) -> Any:
        return eqx.nn.Dropout(0.5)(x, key=rng)


class HaikuNet(hk.Module):
    def __call__(self, x: Any) -> Any:
        return hk.Linear(2)(x)


TRANSFORMED: Any = hk.transform(lambda x: x)


def of_linen(module: Any, train: bool) -> None:
    made = linen.model(module)
    v = made.init(jax.random.key(0), X)
    made.apply(v.params, v.model_state, X, train=train)


def of_equinox(module: Any) -> None:
    made = equinox.model(module)
    made.apply(made.params, made.model_state, X, key=jax.random.key(0), train=True)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: of_linen(Required(), True), "needs 'mode' besides its inputs.*linen.model"),
        (lambda: of_linen(OwnStatistics(), False), "in evaluation mode: .*mean.*linen.model"),
        (lambda: of_linen(nn.Sequential([nn.Dropout(0.5)] * 2), True), "a layer without a mode"),
        (lambda: of_linen(nn.remat(Block)(), True), "Mark it static where the module is wrapped"),
        (lambda: of_equinox(EquinoxRequired()), "needs 'mode' besides its inputs.*equinox.model"),
        (lambda: of_equinox(EquinoxRng()), "dropout that was given no key.*equinox.model"),
        (lambda: haiku.model(HaikuNet), "got HaikuNet. Write haiku.model"),
        (lambda: haiku.model(TRANSFORMED), "got Transformed. .* without hk.transf"),
    ],
)
def test_what_cannot_be_called_is_refused_and_the_call_is_shown(run: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run()
