"""Adapters: the start changes nothing, apply is merge, and combining one gives it back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms
from kdtl_jax.transforms import Adapter

WHERE = "(.*/)?kernel"


def params(seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "layers": {  # scanned: one matrix per layer
            "kernel": jnp.asarray(rng.normal(size=(2, 6, 4)), dtype),
            "bias": jnp.asarray(rng.normal(size=(2, 4)), dtype),
        },
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(4, 5)), dtype),
            "bias": jnp.asarray(rng.normal(size=5), dtype),
        },
        "count": jnp.asarray(7, jnp.int32),
    }


def gradients() -> dict[str, Any]:
    return params(9)


STARTS = {
    "kaiming": transforms.kaiming_start,
    "gaussian": transforms.gaussian_start,
    "orthogonal": transforms.orthogonal_start,
    "pissa": transforms.pissa_start,
    "olora": transforms.olora_start,
    "gradient_svd": transforms.lora_ga_start(),
}
ADAPTERS: dict[str, Adapter] = {
    "lora": transforms.lora(2, 6.0),  # r != alpha throughout
    "rslora": transforms.lora(2, 6.0, scaling=transforms.scale_by_root_rank),
    "dora": transforms.dora(2, 6.0),
    "ia3_output": transforms.ia3_output(),
    "ia3_input": transforms.ia3_input(),
    "vera": transforms.vera(jax.random.key(5), 3),
    "oft": transforms.oft(2),
}


def trained(adapter: Adapter, seed: int = 1, where: str = WHERE) -> tuple[Any, Any]:
    """A base and weights as after some training: nothing is at its start."""
    base, weights = adapter.init(jax.random.key(seed), params(), where=where)
    leaves, treedef = jax.tree.flatten(weights)
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return base, jax.tree.unflatten(treedef, moved)


def assert_close(got: Any, want: Any, atol: float = 2e-6) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=2e-6, atol=atol)


@pytest.mark.parametrize("kind", [transforms.lora, transforms.dora])
@pytest.mark.parametrize("start", STARTS)
def test_every_low_rank_start_preserves_the_function(start: str, kind: Any) -> None:
    adapter = kind(2, 6.0, start=STARTS[start])
    base, weights = adapter.init(jax.random.key(0), params(), where=WHERE, gradients=gradients())
    assert_close(adapter.apply(base, weights), params())
    if start in ("kaiming", "gaussian"):
        assert bool(jnp.all(base["head"]["kernel"] == params()["head"]["kernel"]))  # to the bit
    else:
        pair = weights["head/kernel"]
        # Both factors learn from the first step.
        assert bool(jnp.any(pair.a != 0)) and bool(jnp.any(pair.b != 0))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_new_adapter_changes_nothing(name: str) -> None:
    base, weights = ADAPTERS[name].init(jax.random.key(0), params(), where=WHERE)
    assert_close(ADAPTERS[name].apply(base, weights), params())
    assert set(weights) == {"layers/kernel", "head/kernel"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_combining_one_adapter_with_weight_one_gives_it_back(name: str) -> None:
    adapter = ADAPTERS[name]
    base, weights = trained(adapter)
    assert_close(adapter.combine([weights]), weights)
    assert_close(
        adapter.apply(base, adapter.combine([weights], [1.0])), adapter.apply(base, weights)
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_many_users_are_one_vmap(name: str) -> None:
    adapter = ADAPTERS[name]
    base, first = trained(adapter, 1)
    _, second = trained(adapter, 2)
    both = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    one_by_one = [adapter.apply(base, w)["layers"]["kernel"] for w in (first, second)]
    together = jax.vmap(adapter.apply, in_axes=(None, 0))(base, both)["layers"]["kernel"]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), rtol=1e-5, atol=1e-6)


def layer_of(stacked: Any, i: int, *, axis: int = 0) -> Any:
    return jax.tree.map(lambda x: jnp.take(x, i, axis=axis), stacked)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_scanned_kernel_is_its_layers_one_by_one(name: str) -> None:
    adapter = ADAPTERS[name]
    base, weights = trained(adapter)
    whole = adapter.merge(base, weights)["layers"]
    for i in range(2):
        lead = 1 if name == "vera" else 0  # VeRA's terms come before the layers
        mine = layer_of(weights["layers/kernel"], i, axis=lead)
        alone = adapter.apply(layer_of(base["layers"], i), {"kernel": mine})
        assert_close(alone, layer_of(whole, i))


def test_lora_merge_is_the_two_step_forward() -> None:
    for name, scale in (("lora", 3.0), ("rslora", 6 / np.sqrt(2))):
        base, weights = trained(ADAPTERS[name])
        x, pair = np.random.default_rng(0).normal(size=(3, 4)), weights["head/kernel"]
        a, b, w = (np.asarray(z, np.float64) for z in (*pair, base["head"]["kernel"]))
        merged = ADAPTERS[name].merge(base, weights)["head"]["kernel"]
        np.testing.assert_allclose(x @ np.asarray(merged), x @ w + scale * (x @ a) @ b, rtol=1e-4)


def test_dora_forward_by_hand() -> None:
    base, weights = trained(ADAPTERS["dora"])
    a, b, m = (np.asarray(z, np.float64) for z in weights["head/kernel"])
    v = np.asarray(base["head"]["kernel"], np.float64) + 3.0 * a @ b
    want = m / np.linalg.norm(v, axis=0) * v  # one length per output
    got = ADAPTERS["dora"].apply(base, weights)["head"]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_combination_of_low_rank_adapters_is_exact(name: str) -> None:
    adapter = ADAPTERS[name]
    (_, first), (_, second) = trained(adapter, 1), trained(adapter, 2)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x), params())

    def delta(weights: Any) -> jax.Array:
        return adapter.apply(nothing, weights)["layers"]["kernel"]

    want = 0.7 * delta(first) - 0.4 * delta(second)
    joint = adapter.combine([first, second], [0.7, -0.4])
    assert joint["layers/kernel"].a.shape == (2, 6, 4)
    np.testing.assert_allclose(delta(joint), want, rtol=1e-4, atol=1e-5)
    full = adapter.combine([first, second], [0.7, -0.4], rank=4)
    np.testing.assert_allclose(delta(full), want, rtol=1e-4, atol=1e-5)
    cut = delta(adapter.combine([first, second], [0.7, -0.4], rank=1))
    u, s, vt = np.linalg.svd(np.asarray(want, np.float64), full_matrices=False)
    best = u[..., :1] * s[..., None, :1] @ vt[..., :1, :]
    np.testing.assert_allclose(cut, best, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="rank 4 at most"):
        adapter.combine([first, second], rank=5)


def test_combination_of_vera_adapters_is_exact() -> None:
    adapter = ADAPTERS["vera"]
    (_, first), (_, second) = trained(adapter, 1), trained(adapter, 2)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x), params())

    def delta(weights: Any) -> jax.Array:
        return adapter.apply(nothing, weights)["head"]["kernel"]

    joint = adapter.combine([first, second], [2.0, -1.0])
    np.testing.assert_allclose(delta(joint), 2 * delta(first) - delta(second), rtol=1e-4, atol=1e-5)


def test_veras_projections_do_not_depend_on_the_other_layers() -> None:
    adapter = ADAPTERS["vera"]
    base, weights = trained(adapter)
    alone = adapter.apply(base, {"head/kernel": weights["head/kernel"]})
    np.testing.assert_array_equal(
        alone["head"]["kernel"], adapter.apply(base, weights)["head"]["kernel"]
    )


def test_oft_rotates_exactly() -> None:
    base, weights = trained(transforms.oft(4), 3, "head/kernel")
    before, after = base["head"]["kernel"], transforms.oft(4).apply(base, weights)["head"]["kernel"]
    # Inputs turn as a whole: all angles and lengths between the columns are kept.
    np.testing.assert_allclose(after.T @ after, before.T @ before, rtol=1e-4, atol=1e-5)
    q = np.zeros((4, 4))
    q[np.triu_indices(4, 1)] = np.asarray(weights["head/kernel"].skew)[0]
    q = q - q.T
    rotation = (np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q)
    np.testing.assert_allclose(after, rotation @ np.asarray(before), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not a multiple of block_size=4"):
        transforms.oft(4).init(jax.random.key(0), params(), where="layers/kernel")


def test_ia3_scales_the_bias_with_the_outputs() -> None:
    vector = transforms.ScaleWeights(jnp.arange(1.0, 6.0))
    merged = transforms.ia3_output().apply(params(), {"head/kernel": vector})["head"]
    np.testing.assert_allclose(merged["bias"], params()["head"]["bias"] * vector.vector, rtol=1e-6)
    kept = transforms.ia3_output(bias=()).apply(params(), {"head/kernel": vector})["head"]
    np.testing.assert_array_equal(kept["bias"], params()["head"]["bias"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_any_layout_by_naming_its_axes(name: str) -> None:
    """A kernel [out, in], and attention's [in, heads, head_dim], are the same matrix."""
    make = {
        "lora": lambda **axes: transforms.lora(2, 6.0, **axes),
        "rslora": lambda **axes: transforms.lora(
            2, 6.0, scaling=transforms.scale_by_root_rank, **axes
        ),
        "dora": lambda **axes: transforms.dora(2, 6.0, **axes),
        "ia3_output": lambda **axes: transforms.ia3_output(bias=(), **axes),
        "ia3_input": lambda **axes: transforms.ia3_input(**axes),
        "vera": lambda **axes: transforms.vera(jax.random.key(5), 3, **axes),
        "oft": lambda **axes: transforms.oft(2, **axes),
    }[name]
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    plain = make()
    base, weights = plain.init(jax.random.key(0), {"w": kernel}, where="w")
    weights = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), weights
    )
    want = plain.apply(base, weights)["w"]
    transposed = make(in_axis=-1, out_axis=-2).apply({"w": base["w"].T}, weights)["w"]
    np.testing.assert_allclose(transposed.T, want, rtol=1e-5, atol=1e-6)
    heads = make(in_axis=-3, out_axis=(-2, -1)).apply({"w": base["w"].reshape(4, 2, 3)}, weights)
    np.testing.assert_allclose(heads["w"].reshape(4, 6), want, rtol=1e-5, atol=1e-6)


def test_half_precision_bases_keep_their_dtype_and_train_float32_adapters() -> None:
    base, weights = transforms.lora(2).init(jax.random.key(0), params(0, "bfloat16"), where=WHERE)
    assert weights["head/kernel"].a.dtype == jnp.float32
    merged = transforms.lora(2).merge(base, weights)
    assert merged["head"]["kernel"].dtype == jnp.bfloat16
    assert merged["count"] is base["count"]


def test_a_draw_does_not_depend_on_the_other_leaves() -> None:
    adapter = transforms.lora(2)
    _, both = adapter.init(jax.random.key(0), params(), where=WHERE)
    _, one = adapter.init(jax.random.key(0), params(), where="head/kernel")
    np.testing.assert_array_equal(both["head/kernel"].a, one["head/kernel"].a)


def test_only_the_adapter_is_trained_through_an_adapted_model() -> None:
    def linear(params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False):
        head = params["head"]
        return {"logits": inputs @ head["kernel"] + head["bias"][None, :]}, model_state

    adapter = transforms.lora(2)
    base, weights = adapter.init(jax.random.key(0), params(), where="head/kernel")
    model = transforms.adapted_model(linear, adapter)
    x = jnp.ones((2, 4))
    outputs, state = model({"base": base, "adapter": weights}, None, x)
    np.testing.assert_allclose(outputs["logits"], linear(base, None, x)[0]["logits"], rtol=1e-5)
    assert state is None


def test_errors_name_the_leaf() -> None:
    adapter = transforms.lora(2)
    base, weights = adapter.init(jax.random.key(0), params(), where="head/kernel")
    with pytest.raises(ValueError, match="'head/kernl'.*nearest paths.*'head/kernel'"):
        adapter.apply(base, {"head/kernl": weights["head/kernel"]})
    with pytest.raises(ValueError, match="adapter of 'layers/kernel' does not fit"):
        adapter.apply(base, {"layers/kernel": weights["head/kernel"]})
    with pytest.raises(ValueError, match="'count'|no floating-point"):
        adapter.init(jax.random.key(0), params(), where="count")
    with pytest.raises(ValueError, match="'head/bias' has shape"):
        adapter.init(jax.random.key(0), params(), where="head/bias")
    with pytest.raises(ValueError, match="even"):
        transforms.lora(3, start=transforms.orthogonal_start).init(
            jax.random.key(0), params(), where=WHERE
        )
    with pytest.raises(ValueError, match="no 8 singular directions"):
        transforms.lora(8, start=transforms.pissa_start).init(
            jax.random.key(0), params(), where=WHERE
        )
    with pytest.raises(ValueError, match="pass gradients="):
        transforms.lora(1, start=transforms.lora_ga_start()).init(
            jax.random.key(0), params(), where=WHERE
        )
    with pytest.raises(ValueError, match="same keys"):
        adapter.combine([weights, {}])
