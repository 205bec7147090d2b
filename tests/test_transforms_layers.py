"""Layer selection, mapping, stacking and deepening."""

from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import transforms, trees
from kdtl_jax._types import Array, Params

LAYERS = r"encoder/layer_(\d+)/.*"


def _leaf(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float32)


def _params(layers: int = 12) -> Params:
    """Layer `i` holds the value `i` everywhere."""
    named = {f"layer_{i}": {"w": _leaf(i, 2, 2), "norm": [_leaf(i, 2)]} for i in range(layers)}
    return {"embed": _leaf(-1, 3), "encoder": {**named, "final": _leaf(-2, 1)}}


def _values(params: Params) -> list[float]:
    numbers = transforms.layer_numbers(params, LAYERS)
    return [float(params["encoder"][f"layer_{n}"]["w"][0, 0]) for n in numbers]


def test_distilberts_layers() -> None:
    assert transforms.DISTILBERT_LAYERS == (0, 2, 4, 7, 9, 11)
    params = transforms.select_layers(_params(12), LAYERS, transforms.DISTILBERT_LAYERS)
    assert list(params["encoder"]) == [*(f"layer_{j}" for j in range(6)), "final"]
    assert _values(params) == [0, 2, 4, 7, 9, 11]
    assert params["encoder"]["layer_3"]["norm"][0][0] == 7
    assert params["embed"][0] == -1


@given(st.lists(st.integers(0, 11), min_size=1, max_size=14))
def test_layer_j_is_what_layer_indices_j_was(indices: list[int]) -> None:
    params = _params(12)
    selected = transforms.select_layers(params, LAYERS, indices)
    assert _values(selected) == indices
    # The same by paths alone, into a target of the wanted depth.
    target = jax.tree.map(np.zeros_like, _params(len(indices)))
    mapped, report = transforms.transfer(
        params, target, rename=transforms.layer_map(LAYERS, indices)
    )
    jax.tree.map(np.testing.assert_array_equal, mapped, selected)
    assert report.fraction == 1


def test_eleven_layers_sort_naturally() -> None:
    assert transforms.layer_numbers(_params(12), LAYERS) == list(range(12))
    stacked = transforms.stack_layers(_params(12), LAYERS)
    np.testing.assert_array_equal(stacked["encoder"]["layer"]["w"][:, 0, 0], np.arange(12))


def test_a_layer_chosen_twice_is_two_arrays() -> None:
    params = jax.tree.map(jnp.asarray, _params(2))
    selected = transforms.select_layers(params, LAYERS, [1, 1])
    first, second = (selected["encoder"][f"layer_{i}"]["w"] for i in range(2))
    np.testing.assert_array_equal(first, second)
    assert first is not second
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("params", "layers"),
    [
        ([{"w": _leaf(i, 1)} for i in range(12)], r"(\d+)/w"),
        (tuple({"w": _leaf(i, 1)} for i in range(12)), r"(\d+)/w"),
        ({"h": {str(i): {"w": _leaf(i, 1)} for i in range(12)}}, r"h/(\d+)/w"),
        ({"h": {i: {"w": _leaf(i, 1)} for i in range(12)}}, r"h/(\d+)/w"),
        ({f"net/~/linear_{i}": {"w": _leaf(i, 1)} for i in range(12)}, r"net/~/linear_(\d+)/w"),
        ({f"block{i + 1}_x": {"w": _leaf(i, 1)} for i in range(12)}, r"block(\d+)_x/w"),
    ],
    ids=["list", "tuple", "digits", "ints", "haiku", "from one"],
)
def test_containers(params: Any, layers: str) -> None:
    selected = transforms.select_layers(params, layers, [2, 11])
    assert [float(leaf[0]) for leaf in jax.tree.leaves(selected)] == [2, 11]
    assert type(selected) is type(params)
    start = transforms.layer_numbers(params, layers)[0]
    assert transforms.layer_numbers(selected, layers) == [start, start + 1]
    stacked = transforms.stack_layers(params, layers)
    np.testing.assert_array_equal(jax.tree.leaves(stacked)[0][:, 0], np.arange(12))


def test_collections_are_renumbered_together() -> None:
    variables = {
        "params": {f"layer_{i}": {"w": _leaf(i, 1)} for i in range(4)},
        "batch_stats": {f"layer_{i}": {"mean": _leaf(i, 1)} for i in (1, 3)},
    }
    selected = transforms.select_layers(variables, r"[^/]+/layer_(\d+)/.*", [0, 3])
    assert trees.flatten(selected).keys() == {
        "params/layer_0/w",
        "params/layer_1/w",
        "batch_stats/layer_1/mean",
    }
    assert selected["batch_stats"]["layer_1"]["mean"][0] == 3


def test_stack_and_unstack_are_inverse() -> None:
    params = _params(11)
    stacked = transforms.stack_layers(params, LAYERS)
    assert stacked["encoder"]["layer"]["w"].shape == (11, 2, 2)
    back = transforms.unstack_layers(stacked, "encoder/layer", keys="layer_{}")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert list(back["encoder"]) == list(params["encoder"])
    as_list = {"h": [{"w": _leaf(i, 2)} for i in range(3)]}
    stacked = transforms.stack_layers(as_list, r"h/(\d+)/.*")
    assert stacked["h"]["w"].shape == (3, 2)
    jax.tree.map(np.testing.assert_array_equal, transforms.unstack_layers(stacked, "h"), as_list)


def test_stacked_layers_run_under_scan_and_abstractly() -> None:
    params = {f"dense_{i}": {"w": jnp.eye(2) * (i + 1)} for i in range(3)}
    stacked = transforms.stack_layers(params, r"dense_(\d+)/w")
    last, _ = jax.lax.scan(lambda x, w: (x @ w, None), jnp.ones((1, 2)), stacked["dense"]["w"])
    np.testing.assert_array_equal(last, [[6, 6]])
    shapes = jax.eval_shape(lambda: params)
    assert transforms.stack_layers(shapes, r"dense_(\d+)/w")["dense"]["w"].shape == (3, 2, 2)


def _chain(params: Params, x: Array) -> Array:
    for number in transforms.layer_numbers(params, r"dense_(\d+)/.*"):
        layer = params[f"dense_{number}"]
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x


def test_deepening_a_chain_by_identities() -> None:
    rng = np.random.default_rng(0)
    params = {
        f"dense_{i}": {"w": jnp.float32(rng.normal(size=(3, 3))), "b": jnp.ones(3)}
        for i in range(2)
    }
    deeper = transforms.deepen(params, r"dense_(\d+)/.*", [0, 1], transforms.identity_layer)
    assert list(deeper) == [f"dense_{i}" for i in range(4)]
    x = jnp.float32(rng.normal(size=(2, 3)))
    np.testing.assert_array_equal(_chain(deeper, x), _chain(params, x))
    kernel = transforms.identity_layer("w", jnp.ones((3, 3, 2, 2)))
    image = jnp.float32(rng.normal(size=(1, 4, 4, 2)))
    dims = ("NHWC", "HWIO", "NHWC")
    same = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", None, None, dims)
    np.testing.assert_array_equal(same, image)


def test_deepening_residual_blocks_by_zeroed_projections() -> None:
    rng = np.random.default_rng(0)
    params = {
        "blocks": [
            {"up": np.float32(rng.normal(size=(3, 5))), "down": np.float32(rng.normal(size=(5, 3)))}
            for _ in range(2)
        ]
    }

    def forward(params: Params, x: np.ndarray) -> np.ndarray:
        for block in params["blocks"]:
            x = x + np.tanh(x @ block["up"]) @ np.asarray(block["down"])
        return x

    x = rng.normal(size=(2, 3)).astype(np.float32)
    make = transforms.copy_with_zeros(".*/down")
    deeper = transforms.deepen(params, r"blocks/(\d+)/.*", [0], make)
    assert len(deeper["blocks"]) == 3
    np.testing.assert_array_equal(deeper["blocks"][1]["up"], params["blocks"][0]["up"])
    np.testing.assert_array_equal(forward(deeper, x), forward(params, x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: transforms.select_layers(p, r"encoder/layr_(\d+)/.*", [0]), "Nearest paths"),
        (lambda p: transforms.select_layers(p, r"encoder/layer_\d+/.*", [0]), "exactly one group"),
        (lambda p: transforms.select_layers(p, r"encoder/(layer)_\d+/.*", [0]), "layer's number"),
        (lambda p: transforms.select_layers(p, "((", [0]), "not a regular expression"),
        (lambda p: transforms.select_layers(p, LAYERS, [12]), "positions must lie in 0..11"),
        (lambda p: transforms.select_layers(p, LAYERS, [-1]), "positions must lie in"),
        (lambda p: transforms.select_layers(p, LAYERS, []), "positions must lie in"),
        (lambda p: transforms.select_layers(p, r"encoder/layer_(\d+)/w", [0]), "only a part"),
        (
            lambda p: transforms.select_layers([p["embed"], p], r"1/encoder/layer_(\d+)/.*", [12]),
            "lie in",
        ),
        (
            lambda p: transforms.stack_layers([np.ones(1), {"w": np.ones(1)}], r"(1)/w"),
            "layers only",
        ),
        (
            lambda p: transforms.stack_layers(
                {"h_0": {"w": np.ones(2)}, "h_1": {"w": np.ones(3)}}, r"h_(\d)/w"
            ),
            r"differ at \['w'\]",
        ),
        (
            lambda p: transforms.stack_layers({"0": {"w": np.ones(2)}, "x": 1}, r"(\d)/w"),
            "Move them into a dict",
        ),
        (lambda p: transforms.unstack_layers(p, "encoder/layr"), "no dict entry"),
        (lambda p: transforms.unstack_layers(p, "encoder", keys="layer_{}"), "leading layer axis"),
        (lambda p: transforms.unstack_layers(p, "encoder", keys="layer"), "must contain"),
        (
            lambda p: transforms.deepen(p, LAYERS, [0, 0], transforms.copy_with_zeros(".*")),
            "must hold each position once",
        ),
        (lambda p: transforms.deepen(p, LAYERS, [12], transforms.copy_with_zeros(".*")), "lie in"),
        (lambda p: transforms.identity_layer("w", np.ones((2, 3))), "as many outputs"),
    ],
)
def test_bad_layers(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(_params(12))


def test_other_containers_are_sent_to_layer_map() -> None:
    model = equinox.nn.MLP(2, 2, 2, depth=3, key=jax.random.key(0))
    layers = r"layers/(\d+)/.*"
    with pytest.raises(ValueError, match="layer_map"):
        transforms.select_layers(model, layers, [0, 2])
    small = equinox.nn.MLP(2, 2, 2, depth=1, key=jax.random.key(1))
    mapped, _ = transforms.transfer(model, small, rename=transforms.layer_map(layers, [0, 3]))
    np.testing.assert_array_equal(mapped.layers[1].weight, model.layers[3].weight)
