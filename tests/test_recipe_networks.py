"""What distillation reads of a network: named taps exist, layers are matched by depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax.cli import _specs
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes import _networks
from kdtl_jax.recipes._networks import Network

EXAMPLE = jnp.zeros((1, 8, 8, 1), jnp.float32)


@pytest.fixture(autouse=True)
def relaxed(standard_promotion: None) -> None:
    """Models add biases by rank promotion."""


def described(text: str) -> Network:
    return _networks.network(_specs.model(text, 3), EXAMPLE)


@pytest.mark.parametrize(
    ("text", "features", "last"),
    [
        ("mlp:6,5", ["hidden_0", "hidden_1"], "hidden_1"),
        ("mlp:", [], "logits"),
        ("cnn:4,6", ["block_0", "block_1"], "pooled"),
        ("resnet8", ["stem", "stage1", "stage2", "stage3"], "pooled"),
        ("wrn-10-1", ["stem", "stage1", "stage2", "stage3"], "pooled"),
        ("vit:layers=2,width=8,heads=2,hidden=8", ["layers_0", "layers_1"], "pooled"),
    ],
)
def test_every_named_tap_exists(text: str, features: list[str], last: str) -> None:
    net = described(text)
    found = _networks.shapes(net, 2, EXAMPLE)
    assert list(net.layout.features) == features and net.layout.last == last
    named = [*features, last, *net.layout.before_activation, *net.layout.before_activation.values()]
    named += [f"{path}/probs" for path in net.layout.attention]
    assert set(named) <= found.keys()
    assert found["logits"].shape == (2, 3)
    if last != "logits":
        assert len(found[last].shape) == 2
    for after, before in net.layout.before_activation.items():
        assert found[after].shape == found[before].shape


@pytest.mark.parametrize("text", ["mlp:6,5", "cnn:4,6"])
def test_before_activation_is_what_relu_reads(text: str) -> None:
    net = described(text)
    inputs = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = net.init(jax.random.key(0), inputs)
    outputs, _ = net.apply(*variables, inputs)
    for after, before in net.layout.before_activation.items():
        np.testing.assert_allclose(jax.nn.relu(outputs[before]), outputs[after], rtol=1e-6)
        assert (outputs[before] < 0).any()


class Foreign(nn.Module):
    """A module that the library does not know."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> dict[str, jax.Array]:
        x = inputs.reshape(inputs.shape[0], -1)
        first = nn.Dense(4, name="one")(x)
        return {"f10": first, "f9": first * 2, "logits": nn.Dense(3, name="head")(first)}


def test_foreign_modules_are_read_by_their_outputs() -> None:
    net = _networks.network(Foreign(), EXAMPLE)
    assert net.layout.features == ("f9", "f10") and net.layout.last == "f10"


def test_half_precision_gives_float32_outputs() -> None:
    net = _networks.network(_specs.model("mlp:6", 3), EXAMPLE, dtype=jnp.bfloat16)
    found = _networks.shapes(net, 2, EXAMPLE)
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}


def test_variables_go_through_a_file(tmp_path: object) -> None:
    path = f"{tmp_path}/weights.safetensors"
    for text in ("mlp:6", "resnet8"):
        net = described(text)
        variables = jax.jit(lambda net=net: net.init(jax.random.key(0), EXAMPLE))()
        safetensors.save(path, _networks.tree(variables))
        jax.tree.map(np.testing.assert_array_equal, _networks.load(path, net, EXAMPLE), variables)
    with pytest.raises(ValueError, match=r"weights.safetensors: .*missing 'head/bias'"):
        _networks.load(path, described("mlp:6"), EXAMPLE)
