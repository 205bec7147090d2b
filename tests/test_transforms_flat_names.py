"""Flat state dicts and Haiku's names: many entries per layer, and names without a slash."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms, trees

PARTS = ("attn.weight", "mlp.weight", "norm.weight")
FLAT = r"model\.layers\.(\d+)\..*"
HAIKU = r"net/layer_(\d+)/.*"


def _state_dict(layers: int = 4) -> dict[str, np.ndarray]:
    """Part `j` of layer `i` holds 10 i + j."""
    named = {
        f"model.layers.{i}.{part}": np.full(2, 10.0 * i + j, np.float32)
        for i in range(layers)
        for j, part in enumerate(PARTS)
    }
    return {"embed.weight": np.zeros(2, np.float32), **named}


def _haiku(layers: int = 4) -> dict[str, dict[str, np.ndarray]]:
    return {
        f"net/layer_{i}/{part}": {"w": np.full(2, 10.0 * i + j, np.float32)}
        for i in range(layers)
        for j, part in enumerate(("attn", "mlp"))
    }


def test_a_layer_of_a_state_dict_keeps_all_its_tensors() -> None:
    selected = transforms.select_layers(_state_dict(), FLAT, [0, 3])
    assert {name: float(x[0]) for name, x in selected.items()} == {
        "embed.weight": 0,
        **{f"model.layers.0.{part}": j for j, part in enumerate(PARTS)},
        **{f"model.layers.1.{part}": 30 + j for j, part in enumerate(PARTS)},
    }
    # The same by paths alone.
    target = {name: np.zeros_like(x) for name, x in selected.items()}
    mapped, _ = transforms.transfer(
        _state_dict(), target, rename=transforms.layer_map(FLAT, [0, 3])
    )
    jax.tree.map(np.testing.assert_array_equal, mapped, selected)


def test_a_layer_of_haiku_names_keeps_all_its_modules() -> None:
    selected = transforms.select_layers(_haiku(), HAIKU, [3, 3])
    assert {path: float(x[0]) for path, x in trees.flatten(selected).items()} == {
        "net/layer_0/attn/w": 30,
        "net/layer_0/mlp/w": 31,
        "net/layer_1/attn/w": 30,
        "net/layer_1/mlp/w": 31,
    }
    assert selected["net/layer_0/mlp"]["w"] is not selected["net/layer_1/mlp"]["w"]


def test_real_haiku_parameters() -> None:
    class Layer(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x + hk.Linear(4, name="mlp")(jnp.tanh(hk.Linear(4, name="attn")(x)))

    def net(x: jax.Array, depth: int) -> jax.Array:
        for i in range(depth):
            x = Layer(name=f"layer_{i}")(x)
        return hk.Linear(2, name="head")(x)

    deep = hk.transform(lambda x: net(x, 4)).init(jax.random.key(0), jnp.ones((1, 4)))
    shallow = hk.transform(lambda x: net(x, 2))
    selected = transforms.select_layers(deep, r"layer_(\d+)/.*", [0, 3])
    want = shallow.init(jax.random.key(0), jnp.ones((1, 4)))
    assert jax.tree.map(np.shape, selected) == jax.tree.map(np.shape, want)
    np.testing.assert_array_equal(selected["layer_1/mlp"]["w"], deep["layer_3/mlp"]["w"])
    stacked = transforms.stack_layers(deep, r"layer_(\d+)/.*")
    assert stacked["layer/attn"]["w"].shape == (4, 4, 4)


def test_stacking_flat_layers_gives_one_entry_per_part() -> None:
    stacked = transforms.stack_layers(_state_dict(11), FLAT)
    assert {name: x.shape for name, x in stacked.items()} == {
        "embed.weight": (2,),
        **{f"model.layers.{part}": (11, 2) for part in PARTS},
    }
    np.testing.assert_array_equal(stacked["model.layers.mlp.weight"][:, 0], 10 * np.arange(11) + 1)
    back = transforms.unstack_layers(
        stacked, "model.layers.mlp.weight", keys="model.layers.{}.mlp.weight"
    )
    assert float(back["model.layers.10.mlp.weight"][0]) == 101
    modules = transforms.stack_layers(_haiku(), HAIKU)
    assert sorted(modules) == ["net/layer/attn", "net/layer/mlp"]


def test_several_series_of_layers_in_one_dict() -> None:
    nested = {f"{kind}_{i}": {"w": np.float32(i)} for kind in ("enc", "dec") for i in range(3)}
    selected = transforms.select_layers(nested, r"(?:enc|dec)_(\d+)/w", [2])
    assert selected == {"enc_0": {"w": 2}, "dec_0": {"w": 2}}
    assert sorted(transforms.stack_layers(nested, r"(?:enc|dec)_(\d+)/w")) == ["dec", "enc"]


def test_deepening_a_state_dict() -> None:
    deeper = transforms.deepen(
        _state_dict(2), FLAT, [1], transforms.copy_with_zeros(r".*mlp\.weight")
    )
    assert float(deeper["model.layers.2.mlp.weight"][0]) == 0
    assert float(deeper["model.layers.2.norm.weight"][0]) == 12
    assert len(deeper) == 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: transforms.select_layers(_state_dict(), r"model\.layers\.(\d+)\.mlp.*", [0]),
            "only a part",
        ),
        (lambda: transforms.select_layers(_haiku(), r"net/layer_(\d+)/mlp/w", [0]), "only a part"),
        (
            lambda: transforms.stack_layers(
                {k: x for k, x in _state_dict().items() if "2.norm" not in k}, FLAT
            ),
            r"model.layers.\*.norm.weight.* exists for layers \[0, 1, 3\]",
        ),
        (
            lambda: transforms.select_layers({"l_1": 1.0, "l_01": 2.0}, r"l_(\d+)", [0]),
            "two entries would have the name 'l_1",
        ),
    ],
)
def test_what_cannot_keep_every_tensor_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_ia3_finds_the_bias_beside_a_flat_name() -> None:
    vector = jnp.arange(1.0, 4.0)
    for kernel, bias in [
        ("fc.weight", "fc.bias"),
        ("a.0/kernel", "a.0/bias"),
        ("net/fc/w", "net/fc/b"),
    ]:
        params = {kernel: jnp.ones((2, 3)), bias: jnp.ones(3), "bias": jnp.ones(3)}
        out = transforms.ia3_output().apply(params, {kernel: transforms.ScaleWeights(vector)})
        np.testing.assert_allclose(out[bias], vector)
        np.testing.assert_allclose(out["bias"], 1)


def test_a_homogeneous_chain_of_flat_names_scales_its_biases_by_depth() -> None:
    params = {
        f"fc{i}.{part}": np.ones((1, 1), np.float32) for i in (1, 2) for part in ("weight", "bias")
    }
    scaled = transforms.scale_homogeneous(params, 3.0, [r"fc1\..*", r"fc2\..*"])
    assert {name: float(x[0, 0]) for name, x in scaled.items()} == {
        "fc1.weight": 3, "fc1.bias": 3, "fc2.weight": 3, "fc2.bias": 9,
    }  # fmt: skip


def test_globs_and_rules_take_a_flat_name_as_one_segment() -> None:
    params = _state_dict(1)
    assert trees.count(params, trees.Glob("*.mlp.weight")) == 2
    assert trees.count(params, trees.Glob("model.layers.?.*")) == 6
    with pytest.raises(ValueError, match="Nearest paths"):
        trees.mask(params, trees.Glob("**/weight"))
    labels = trees.labels(params, [(r".*norm\.weight", "n"), (trees.Glob("*"), "rest")])
    assert labels["model.layers.0.norm.weight"] == "n" and labels["embed.weight"] == "rest"
