"""Taps of unusual outputs, and plain functions as models."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx

from kdtl_jax import interop
from kdtl_jax.interop import linen, nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        self.sow("intermediates", "last", x, reduce_fn=lambda old, new: new, init_fn=lambda: 0)
        return x, {"weights": 2 * x}


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Pair(name="pair")(x)[0]


class NNXPair(fnnx.Module):
    def __call__(self, x: Any) -> Any:
        self.sow(fnnx.Intermediate, "last", x, reduce_fn=lambda old, new: new, init_fn=lambda: 0)
        return x, {"weights": 2 * x}


class NNXOuter(fnnx.Module):
    def __init__(self):
        self.pair = NNXPair()

    def __call__(self, x: Any) -> Any:
        return self.pair(x)[0]


def test_taps_take_tuples_apart_and_leave_sown_arrays_whole() -> None:
    taps = ["pair/.*"]
    run = linen.model(Outer(), taps=taps)
    ours = run.apply({}, None, X)[0]
    theirs = nnx.model(NNXOuter(), taps=taps)
    for outputs in (ours, theirs.apply(theirs.params, theirs.model_state, X)[0]):
        assert set(outputs) == {"logits", "pair/0", "pair/1/weights", "pair/last"}
        np.testing.assert_array_equal(outputs["pair/1/weights"], 2 * X)
        np.testing.assert_array_equal(outputs["pair/last"], X)


class Capped(nn.Module):
    """Its layer before the soft cap is called as its output is; its block returns a part's name."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = Block(name="block")(x)["part"]
        return {"logits": jnp.tanh(Part(name="logits")(x))}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return {"part": -Part(name="part")(x)}


class Part(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return 2 * x


class NNXPart(fnnx.Module):
    def __call__(self, x: Any) -> Any:
        return 2 * x


class NNXBlock(fnnx.Module):
    def __init__(self):
        self.part = NNXPart()

    def __call__(self, x: Any) -> Any:
        return {"part": -self.part(x)}


class NNXCapped(fnnx.Module):
    def __init__(self):
        self.block, self.logits = NNXBlock(), NNXPart()

    def __call__(self, x: Any) -> Any:
        return {"logits": jnp.tanh(self.logits(self.block(x)["part"]))}


def test_a_tap_never_replaces_the_models_own_output() -> None:
    theirs = nnx.model(NNXCapped(), taps=".*")
    for outputs in (
        linen.model(Capped(), taps=".*").apply({}, None, X)[0],
        theirs.apply(theirs.params, theirs.model_state, X)[0],
    ):
        assert set(outputs) == {"logits", "block/part"}
        np.testing.assert_allclose(outputs["logits"], np.tanh(-4 * X), rtol=1e-6)
        np.testing.assert_array_equal(outputs["block/part"], 2 * X)  # the submodule's


def test_one_tap_needs_no_list() -> None:
    one: Any = "pair/0"
    outputs = linen.model(Outer(), taps=one).apply({}, None, X)[0]
    assert set(outputs) == {"logits", "pair/0"}


def test_a_plain_function_is_a_model_function() -> None:
    model = interop.function(lambda params, x: x @ params["w"])
    outputs, state = model({"w": jnp.ones((4, 2))}, None, X, key=None, train=True)
    assert outputs["logits"].shape == (6, 2) and state is None
    named = interop.function(lambda params, x: {"logits": x, "hidden": x})
    assert set(named({}, None, X)[0]) == {"logits", "hidden"}
