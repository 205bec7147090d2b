"""Named axes on a real block: attention, gated MLP, LayerNorm and a convolution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import Axis

EMBED, HEADS, WIDTH, MLP, CLASSES = 6, 4, 3, 8, 5

SPEC = [
    (r"attention/qkv/kernel", (None, Axis("heads", inner=WIDTH, outer=3))),
    (r"attention/qkv/bias", (Axis("heads", inner=WIDTH, outer=3),)),
    (r"attention/out/kernel", (Axis("heads", inner=WIDTH, summed=True), None)),
    (r"attention/out/bias", (None,)),
    (r"mlp/(up|gate)/kernel", (None, "mlp")),
    (r"mlp/(up|gate)/bias", ("mlp",)),
    (r"mlp/down/kernel", (Axis("mlp", summed=True), None)),
    (r"mlp/down/bias|norm/.*", None),
    (r"head/kernel", (None, "class")),
    (r"head/bias", ("class",)),
]


def _draw(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _block(seed: int = 0, heads: int = HEADS, mlp: int = MLP) -> Params:
    rng = np.random.default_rng(seed)

    def dense(n: int, m: int) -> dict[str, Array]:
        return {"kernel": _draw(rng, n, m), "bias": _draw(rng, m)}

    return {
        "attention": {"qkv": dense(EMBED, 3 * heads * WIDTH), "out": dense(heads * WIDTH, EMBED)},
        "mlp": {
            "up": dense(EMBED, mlp),
            "gate": dense(EMBED, mlp),
            "down": dense(mlp, EMBED),
        },
        "norm": {"scale": jnp.ones(EMBED), "bias": jnp.zeros(EMBED)},
        "head": dense(EMBED, CLASSES),
    }


def _dense(params: Params, x: Array) -> Array:
    return x @ params["kernel"] + jnp.broadcast_to(
        params["bias"], (*x.shape[:-1], params["bias"].size)
    )


@jax.jit
def _forward(params: Params, x: Array) -> Array:
    """`[L, EMBED] -> [L, CLASSES]`: one pre-norm block with fused qkv and a gated MLP."""
    heads = params["attention"]["out"]["kernel"].shape[0] // WIDTH
    normed = jax.nn.standardize(x, axis=-1)
    qkv = _dense(params["attention"]["qkv"], normed).reshape(x.shape[0], 3, heads, WIDTH)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    weights = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", q, k) / np.float32(WIDTH**0.5), axis=-1)
    mixed = jnp.einsum("hij,jhd->ihd", weights, v).reshape(x.shape[0], -1)
    x = x + _dense(params["attention"]["out"], mixed)
    normed = jax.nn.standardize(x, axis=-1)
    mlp = params["mlp"]
    hidden = jax.nn.gelu(_dense(mlp["gate"], normed)) * _dense(mlp["up"], normed)
    return _dense(params["head"], x + _dense(mlp["down"], hidden))


X = jnp.asarray(np.random.default_rng(9).normal(size=(4, EMBED)), jnp.float32)


def test_permuting_hidden_units_and_heads_changes_nothing() -> None:
    params = _block()
    rng = np.random.default_rng(1)
    order = {"heads": rng.permutation(HEADS), "mlp": rng.permutation(MLP)}
    permuted = jax.jit(lambda p: transforms.permute_units(p, SPEC, order))(params)
    assert np.abs(permuted["mlp"]["up"]["kernel"] - params["mlp"]["up"]["kernel"]).max() > 0.1
    np.testing.assert_allclose(_forward(permuted, X), _forward(params, X), rtol=1e-5, atol=1e-5)
    inverse = {name: np.argsort(p) for name, p in order.items()}
    back = jax.jit(lambda p: transforms.permute_units(p, SPEC, inverse))(permuted)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_widening_preserves_the_function(key: Array | None) -> None:
    params = _block()
    wider = jax.jit(lambda p: transforms.widen(p, SPEC, {"heads": 7, "mlp": 12}, key=key))(params)
    assert transforms.axis_sizes(wider, SPEC) == {"heads": 7, "mlp": 12, "class": CLASSES}
    np.testing.assert_allclose(_forward(wider, X), _forward(params, X), rtol=2e-5, atol=2e-5)
    # The old units come back up to the split.
    back = transforms.select_width(wider, SPEC, {"heads": np.arange(HEADS), "mlp": np.arange(MLP)})
    jax.tree.map(np.testing.assert_array_equal, back["mlp"]["up"], params["mlp"]["up"])
    ratio = params["mlp"]["down"]["kernel"] / back["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(ratio, np.round(ratio[:, :1]) * np.ones((1, EMBED)), rtol=1e-5)


def test_widening_a_query_key_width_needs_the_softmax_scale_restored() -> None:
    rng = np.random.default_rng(0)
    params = {name: _draw(rng, EMBED, 2, WIDTH) for name in ("query", "key", "value")}
    params["out"] = _draw(rng, 2, WIDTH, EMBED)
    spec = [
        ("query", (None, "heads", Axis("qk", summed=True))),
        ("key", (None, "heads", "qk")),
        ("value", (None, "heads", "v")),
        ("out", (Axis("heads", summed=True), Axis("v", summed=True), None)),
    ]

    @jax.jit
    def attend(p: Params) -> Array:
        q, k, v = (jnp.einsum("le,ehd->lhd", X, p[name]) for name in ("query", "key", "value"))
        logits = jnp.einsum("ihd,jhd->hij", q, k) / np.float32(q.shape[-1] ** 0.5)
        return jnp.einsum("hij,jhd,hde->ie", jax.nn.softmax(logits, axis=-1), v, p["out"])

    @jax.jit
    def grow(p: Params) -> Params:
        wider = transforms.widen(p, spec, {"qk": 5, "v": 4, "heads": 3})
        return transforms.scale(wider, (5 / WIDTH) ** 0.5, where="query")

    restored = grow(params)
    np.testing.assert_allclose(attend(restored), attend(params), rtol=1e-4, atol=1e-4)


def test_widening_convolutions_and_flattened_channels() -> None:
    rng = np.random.default_rng(0)
    params = {
        "conv": _draw(rng, 3, 3, 2, 4),
        "conv2": _draw(rng, 3, 3, 4, 5),
        "dense": _draw(rng, 4 * 4 * 5, 3),
    }
    spec = [
        ("conv", (None, None, None, "c")),
        ("conv2", (None, None, Axis("c", summed=True), "c2")),
        ("dense", (Axis("c2", outer=16, summed=True), None)),
    ]
    image = _draw(rng, 1, 4, 4, 2)

    @jax.jit
    def forward(p: Params) -> Array:
        x = image
        for name in ("conv", "conv2"):
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(x, p[name], (1, 1), "SAME", None, None, dims)
            )
        return x.reshape(1, -1) @ p["dense"]

    widths = {"c": 6, "c2": [0, 1, 2, 3, 4, 4, 0]}
    wider = jax.jit(lambda p: transforms.widen(p, spec, widths))(params)
    np.testing.assert_allclose(forward(wider), forward(params), rtol=1e-4, atol=1e-4)


def test_uniform_selection_of_a_named_axis_is_weight_selection() -> None:
    params = _block()
    small = transforms.select_width(params, SPEC, {"mlp": transforms.uniform_indices(MLP, 3)})
    leaf, _ = transforms.transfer(
        {"w": params["mlp"]["up"]["kernel"]},
        {"w": jnp.zeros((EMBED, 3))},
        on_mismatch=transforms.select_uniform,
    )
    np.testing.assert_array_equal(small["mlp"]["up"]["kernel"], leaf["w"])
    assert small["head"]["kernel"] is params["head"]["kernel"]


@pytest.mark.usefixtures("optimized")
def test_pruning_a_silent_head_changes_nothing() -> None:
    params = _block()
    silent = params["attention"]["out"]["kernel"].at[WIDTH : 2 * WIDTH].set(0.0)
    params["attention"]["out"]["kernel"] = silent
    pruned = jax.jit(lambda p: transforms.prune_heads(p, SPEC, [1]))(params)
    assert pruned["attention"]["qkv"]["kernel"].shape == (EMBED, 3 * 3 * WIDTH)
    np.testing.assert_allclose(_forward(pruned, X), _forward(params, X), rtol=1e-5, atol=1e-5)


def test_padding_with_units_of_zeros_changes_nothing_where_zero_stays_zero() -> None:
    params = _block()
    padded = transforms.pad_width(params, SPEC, {"mlp": 11})
    assert padded["mlp"]["down"]["kernel"].shape == (11, EMBED)
    np.testing.assert_allclose(_forward(padded, X), _forward(params, X), rtol=1e-5, atol=1e-5)
    back = transforms.select_width(padded, SPEC, {"mlp": np.arange(MLP)})
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_selection_works_under_jit_with_traced_indices_and_keeps_dtypes() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _block())
    index = jnp.array([3, 1])
    select = jax.jit(lambda p, i: transforms.select_width(p, SPEC, {"mlp": i}))
    got = select(params, index)
    jax.tree.map(
        np.testing.assert_array_equal, got, transforms.select_width(params, SPEC, {"mlp": index})
    )
    assert got["mlp"]["up"]["bias"].dtype == jnp.bfloat16
    wider = transforms.widen(params, SPEC, {"mlp": 9})
    assert {leaf.dtype for leaf in jax.tree.leaves(wider)} == {jnp.dtype(jnp.bfloat16)}


# --- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_weight_matching_finds_the_permutation(seed: int) -> None:
    params = _block(seed)
    spec = [*SPEC[:-2], ("head/.*", None)]
    rng = np.random.default_rng(seed)
    order = {"heads": rng.permutation(HEADS), "mlp": rng.permutation(MLP)}
    shuffled = jax.jit(lambda p: transforms.permute_units(p, spec, order))(params)
    noisy = jax.tree.map(lambda x: np.asarray(x) + 0.01 * np.sign(x), shuffled)
    actual = transforms.match_permutations(params, noisy, spec)
    for name, perm in order.items():
        np.testing.assert_array_equal(perm[actual[name]], np.arange(len(perm)))
    aligned = jax.jit(lambda p: transforms.permute_units(p, spec, actual))(shuffled)
    jax.tree.map(np.testing.assert_array_equal, aligned, params)


def test_weight_matching_in_a_deep_chain_improves_the_inner_product() -> None:
    rng = np.random.default_rng(4)

    def chain() -> Params:
        return {
            "a": _draw(rng, 3, 6),
            "b": _draw(rng, 6, 7),
            "c": _draw(rng, 7, 2),
            "r": _draw(rng, 6, 6),
        }

    spec = [("a", (None, "x")), ("b", ("x", "y")), ("c", ("y", None)), ("r", ("x", "x"))]
    one, two = chain(), chain()
    result = transforms.match_permutations(one, two, spec)
    aligned = transforms.permute_units(two, spec, result)
    before, after = (sum(float(np.vdot(one[k], p[k])) for k in one) for p in (two, aligned))
    assert after > before + 1


# --- metadata ------------------------------------------------------------------------------------


def test_axis_names_are_read_from_boxed_linen_and_nnx_parameters(standard_promotion: None) -> None:
    import flax.linen as nn
    from flax import nnx

    names = ("embed", "mlp")
    init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
    boxed = nn.Dense(4, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))
    spec = transforms.axis_spec_from_metadata(boxed)
    assert dict(spec) == {"params/kernel": names, "params/bias": None}
    narrow = transforms.select_width(boxed, spec, {"mlp": [0, 2]})
    assert narrow["params"]["kernel"].value.shape == (3, 2)

    nnx_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names, eager_sharding=False)
    state = nnx.state(nnx.Linear(3, 4, kernel_init=nnx_init, rngs=nnx.Rngs(0)))
    spec = transforms.axis_spec_from_metadata(state)
    assert dict(spec)["kernel"] == names
    with pytest.raises(ValueError, match="no leaf carries axis names"):
        transforms.axis_spec_from_metadata(_block())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: transforms.axis_sizes(p, SPEC[:-1]), r"does not cover \['head/bias'\]"),
        (lambda p: transforms.axis_sizes(p, [("hed/.*", None), (".*", None)]), "labels no leaf"),
        (lambda p: transforms.axis_sizes(p, [("head/bias", ("a", "b")), (".*", None)]), "names 2"),
        (
            lambda p: transforms.axis_sizes(p, [("head/kernel", ("a", "a")), (".*", None)]),
            "6 units in 'head/kernel' but 5",
        ),
        (
            lambda p: transforms.axis_sizes(
                p, [("head/bias", (Axis("a", inner=2),)), (".*", None)]
            ),
            "length 5, which is not",
        ),
        (lambda p: transforms.select_width(p, SPEC, {"mpl": [0]}), "no axis is named 'mpl'"),
        (lambda p: transforms.select_width(p, SPEC, {"mlp": [0, MLP]}), "must lie in"),
        (lambda p: transforms.select_width(p, SPEC, {"mlp": [-1]}), "must lie in"),
        (lambda p: transforms.permute_units(p, SPEC, {"mlp": [0] * MLP}), "every index"),
        (lambda p: transforms.permute_units(p, SPEC, {"mlp": [0, 1]}), "every index"),
        (lambda p: transforms.prune_heads(p, SPEC, [0, 0]), "distinct"),
        (lambda p: transforms.prune_heads(p, SPEC, range(HEADS)), "leave something"),
        (lambda p: transforms.widen(p, SPEC, {"mlp": 3}), "cannot shrink"),
        (lambda p: transforms.widen(p, SPEC, {"class": 7}), "no leaf is marked as summing"),
        (lambda p: transforms.widen(p, SPEC, {"mlp": [0, 1]}), "must contain every unit"),
        (lambda p: transforms.pad_width(p, SPEC, {"mlp": 3}), "cannot shrink"),
        (
            lambda p: transforms.match_permutations(p, _block(mlp=9), SPEC),
            r"'mlp/down/kernel' has shapes \[8, 6\] and \[9, 6\]",
        ),
        (lambda p: transforms.match_permutations(p, {"w": 1.0}, SPEC), "one structure"),
    ],
)
def test_bad_specs_and_indices(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(_block())


def test_float_indices_raise() -> None:
    with pytest.raises(TypeError, match="integers"):
        transforms.select_width(_block(), SPEC, {"mlp": jnp.ones(2)})
