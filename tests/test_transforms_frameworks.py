"""Selection, scaling and transfer on the trees that real frameworks make."""

from typing import Any, NamedTuple

import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms, trees
from kdtl_jax._types import Array

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Pair(NamedTuple):
    """A user's own container."""

    left: Any
    right: Any


def _linen(seed: int, boxed: bool = False) -> Any:
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            init: Any = nn.initializers.lecun_normal()
            x = nn.Dense(4, kernel_init=nn.with_partitioning(init, ("a", "b")) if boxed else init)(
                x
            )
            x = nn.BatchNorm(use_running_average=False)(x)
            return nn.Dense(2)(x)

    return Model().init(jax.random.key(seed), jnp.ones((2, 3)))


def _nnx(seed: int) -> Any:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    return nnx.split(Model(nnx.Rngs(seed)))[1]


def _equinox(seed: int) -> Any:
    return equinox.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(seed))


def _haiku(seed: int) -> Any:
    def forward(x: Array) -> Array:
        return haiku.nets.MLP([4, 2], name="net")(x)

    return haiku.transform(forward).init(jax.random.key(seed), jnp.ones((1, 3)))


def _plain(seed: int) -> Any:
    return {
        "list": [jnp.full(2, float(seed)), None, Pair(jnp.full(3, float(seed)), jax.nn.relu)],
        "key": jax.random.key(seed),
        "count": jnp.uint32(seed),
    }


MAKERS = {
    "linen": _linen,
    "linen boxed": lambda seed: _linen(seed, boxed=True),
    "nnx": _nnx,
    "equinox": _equinox,
    "haiku": _haiku,
    "plain": _plain,
}


def _assert_equal(got: Any, want: Any) -> None:
    if isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if isinstance(want, (jax.Array, np.ndarray)):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
    else:
        assert got is want or got == want


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_every_framework(make: Any) -> None:
    source, target = make(0), make(1)
    inexact = [trees.is_inexact(leaf) for leaf in jax.tree.leaves(target)]

    combined = trees.combine(*trees.partition(source, lambda path, leaf: len(path) % 2 == 0))
    assert jax.tree.structure(combined) == jax.tree.structure(source)
    jax.tree.map(_assert_equal, combined, source)

    params, report = transforms.transfer(source, source)
    assert jax.tree.structure(params) == jax.tree.structure(source) and report.fraction == 1
    jax.tree.map(_assert_equal, params, source)

    params, report = transforms.transfer(source, target, alpha=0.5)
    assert jax.tree.structure(params) == jax.tree.structure(target)
    for i, got, s, t in zip(inexact, *map(jax.tree.leaves, (params, source, target)), strict=True):
        _assert_equal(got, 0.5 * s if i else t)  # counters, keys and functions stay the target's
    assert report.fraction == 1 and len(report.scaled) == sum(inexact)
    assert not any(path.endswith("/value") for path in report.scaled)

    scaled = transforms.scale(source, 0.5)
    for i, got, s in zip(inexact, *map(jax.tree.leaves, (scaled, source)), strict=True):
        _assert_equal(got, 0.5 * s if i else s)


def test_linen_collections_move_together() -> None:
    _, report = transforms.transfer(_linen(0), _linen(1))
    assert "batch_stats/BatchNorm_0/mean" in report.copied
    assert "params/Dense_0/kernel" in report.copied


def test_frameworks_meet_by_path() -> None:
    nnx_state, linen = _nnx(0), _linen(1)
    rules = [
        (r"layers/(\d)/(.*)", r"params/Dense_\1/\2"),
        (r"norm/(mean|var)", r"batch_stats/BatchNorm_0/\1"),
        (r"norm/(.*)", r"params/BatchNorm_0/\1"),
    ]
    params, report = transforms.transfer(nnx_state, linen, rename=rules)
    assert report.fraction == 1 and not report.extra
    np.testing.assert_array_equal(
        params["params"]["Dense_1"]["kernel"], nnx_state["layers"][1]["kernel"][...]
    )
    boxed, _ = transforms.transfer(linen, _linen(2, boxed=True))
    np.testing.assert_array_equal(
        boxed["params"]["Dense_0"]["kernel"].value, linen["params"]["Dense_0"]["kernel"]
    )


def test_equinox_kernels_are_transposed_by_a_policy() -> None:
    model, linen = _equinox(0), _linen(1)
    rules = [
        (r"layers/(\d)/weight", r"params/Dense_\1/kernel"),
        (r"layers/(\d)/bias", r"params/Dense_\1/bias"),
    ]
    params, report = transforms.transfer(
        model,
        linen,
        where=r"params/Dense.*",
        rename=rules,
        on_mismatch=[(r".*/kernel", lambda leaf, shape, path: leaf.T)],
    )
    np.testing.assert_array_equal(params["params"]["Dense_0"]["kernel"], model.layers[0].weight.T)
    assert len(report.adapted) == 2


def test_nnx_models_are_restored_whole() -> None:
    from flax import nnx

    source, target = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    graph, state = nnx.split(target)
    params, _ = transforms.transfer(nnx.state(source), state)
    x = jnp.ones((1, 3))
    np.testing.assert_array_equal(nnx.merge(graph, params)(x), source(x))


def test_orbax_int_keys_as_strings_meet_nnx_ints() -> None:
    from flax import nnx

    state = _nnx(0)
    pure = nnx.to_pure_dict(state)
    restored = {**pure, "layers": {str(i): layer for i, layer in pure["layers"].items()}}
    params, report = transforms.transfer(restored, _nnx(1))
    assert report.fraction == 1
    np.testing.assert_array_equal(
        params["layers"][1]["kernel"][...], state["layers"][1]["kernel"][...]
    )
