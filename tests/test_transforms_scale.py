"""`scale`, `scale_homogeneous` and `fit_alpha`: meaning first, then what passes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import transforms
from kdtl_jax._types import Array, Params
from kdtl_jax.trees import Glob


def _params() -> Params:
    draw = np.random.default_rng(0).normal
    return {
        "Dense_0": {"kernel": jnp.asarray(draw(size=(3, 4)), jnp.float32), "bias": jnp.ones(4)},
        "Dense_1": {"kernel": jnp.asarray(draw(size=(4, 2)), jnp.float32), "bias": jnp.ones(2)},
    }


def _forward(params: Params, x: Array) -> Array:
    hidden = jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]


# Products below float32's normal range are left out: there XLA flushes to zero on some machines.
@given(alpha=st.floats(-3, 3, width=32).filter(lambda a: a == 0 or abs(a) > 1e-30))
def test_every_leaf_is_alpha_times_itself_bit_for_bit(alpha: float) -> None:
    params = _params()
    scaled = transforms.scale(params, alpha)
    for got, leaf in zip(jax.tree.leaves(scaled), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, np.float32(alpha) * np.asarray(leaf))
        assert got.dtype == leaf.dtype and not got.weak_type


def test_one_is_the_identity() -> None:
    params = _params()
    jax.tree.map(np.testing.assert_array_equal, transforms.scale(params, 1.0), params)


def test_forms_of_alpha_agree() -> None:
    params = _params()
    want = transforms.scale(params, 0.5, where=".*kernel")
    prefix = {"Dense_0": {"kernel": 0.5, "bias": 1.0}, "Dense_1": {"kernel": 0.5, "bias": 1.0}}
    layers = {"Dense_0": 0.5, "Dense_1": 0.25}
    same = [
        transforms.scale(params, [(".*kernel", 0.5)]),
        transforms.scale(params, [(Glob("**/bias"), 1.0), (".*", jnp.float32(0.5))]),
        transforms.scale(params, lambda path: 0.5 if path.endswith("kernel") else 1.0),
        transforms.scale(params, prefix),
        transforms.scale(params, np.float64(0.5), where=".*kernel"),
        jax.jit(lambda a: transforms.scale(params, a, where=".*kernel"))(0.5),
    ]
    for got in same:
        jax.tree.map(np.testing.assert_array_equal, got, want)
    by_layer = transforms.scale(params, layers)
    np.testing.assert_array_equal(by_layer["Dense_1"]["bias"], [0.25, 0.25])


def test_a_scanned_kernel_takes_one_alpha_per_layer() -> None:
    scaled = transforms.scale(
        {"w": jnp.ones((2, 3, 4))}, {"w": jnp.array([1.0, 2.0])[:, None, None]}
    )
    np.testing.assert_array_equal(scaled["w"][:, 0, 0], [1, 2])


def test_differentiable_in_alpha_and_one_vmap_per_sweep() -> None:
    params, x = _params(), jnp.ones((2, 3))

    def loss(alpha: Array) -> Array:
        return jnp.sum(_forward(transforms.scale(params, alpha), x) ** 2)

    step = 1e-2
    numeric = (loss(jnp.float32(0.7 + step)) - loss(jnp.float32(0.7 - step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.7)), numeric, rtol=1e-2)
    alphas = jnp.array([0.1, 0.5, 2.0])
    np.testing.assert_allclose(jax.vmap(loss)(alphas), [loss(a) for a in alphas], rtol=1e-6)


def test_a_learned_alpha_per_leaf() -> None:
    params = _params()
    alphas = jax.tree.map(lambda _: jnp.float32(1.0), params)
    x = jnp.ones((2, 3))
    target = _forward(transforms.scale(params, 0.5), x)

    def loss(alphas: Params) -> Array:
        return jnp.mean((_forward(transforms.scale(params, alphas), x) - target) ** 2)

    start = loss(alphas)
    for _ in range(20):
        alphas = jax.tree.map(lambda a, g: a - 0.05 * g, alphas, jax.grad(loss)(alphas))
    assert loss(alphas) < 0.05 * start


def test_only_inexact_arrays_are_touched() -> None:
    tree = {
        "w": jnp.ones(2, jnp.bfloat16),
        "half": jnp.ones(2, jnp.float16),
        "z": jnp.ones(2, jnp.complex64),
        "count": jnp.array(3, jnp.uint32),
        "key": jax.random.key(0),
        "flag": jnp.array(True),
        "activation": jax.nn.relu,
        "nothing": None,
    }
    scaled = transforms.scale(tree, np.float32(0.3))
    for name in ("count", "key", "flag", "activation", "nothing"):
        assert scaled[name] is tree[name]
    for name in ("w", "half", "z"):
        assert scaled[name].dtype == tree[name].dtype
    # Rounded once, from the float32 product.
    np.testing.assert_array_equal(scaled["w"], jnp.full(2, np.float32(0.3)).astype(jnp.bfloat16))


def test_numpy_leaves_become_jax_arrays() -> None:
    scaled = transforms.scale({"w": np.ones(2), "v": 2.0}, 0.5)
    np.testing.assert_array_equal(scaled["w"], [0.5, 0.5])
    assert scaled["w"].dtype == jnp.float32 and scaled["v"] == 1.0


def test_float64_stays_float64(x64: None) -> None:
    scaled = transforms.scale({"w": jnp.ones(2, jnp.float64)}, 1 / 3)
    np.testing.assert_array_equal(scaled["w"], np.ones(2) / 3)


@pytest.mark.parametrize(
    ("alpha", "where", "error", "words"),
    [
        (0.5, "kernle", ValueError, "Nearest paths"),
        ([("Dense_9/.*", 0.5)], ".*", ValueError, "labels no leaf"),
        ({"Dense_0": 0.5}, ".*", ValueError, "prefix"),
        ("half", ".*", TypeError, "real number"),
        (jnp.ones(3), ".*", ValueError, "scalar"),
        (True, ".*", TypeError, "real number"),
        (1j, ".*", TypeError, "real number"),
    ],
)
def test_bad_alphas(alpha: object, where: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        transforms.scale(_params(), alpha, where=where)


@given(alpha=st.floats(0.125, 2.0, width=32))
def test_a_homogeneous_chain_scales_its_output_by_a_power(alpha: float) -> None:
    params, x = _params(), jnp.array([[1.0, -2.0, 0.5], [0.3, 0.1, -0.7]])
    scaled = transforms.scale_homogeneous(params, alpha, ["Dense_0/.*", "Dense_1/.*"])
    want = np.float32(alpha) ** 2 * _forward(params, x)
    np.testing.assert_allclose(_forward(scaled, x), want, rtol=1e-5, atol=1e-6)


def test_plain_scaling_breaks_at_the_biases() -> None:
    params, x = _params(), jnp.ones((1, 3))
    plain = _forward(transforms.scale(params, 0.5), x)
    assert np.abs(plain - 0.25 * _forward(params, x)).max() > 1e-2


def test_homogeneous_scaling_is_a_temperature_and_differentiable() -> None:
    params, x = _params(), jnp.ones((1, 3))

    def peak(alpha: Array) -> Array:
        scaled = transforms.scale_homogeneous(params, alpha, ["Dense_0/.*", "Dense_1/.*"])
        return jnp.max(jax.nn.softmax(_forward(scaled, x)))

    assert jax.grad(peak)(jnp.float32(0.5)) > 0
    tempered = jnp.max(jax.nn.softmax(_forward(params, x) / 4.0))
    np.testing.assert_allclose(peak(jnp.float32(0.5)), tempered, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "alpha", "words"),
    [
        (["Dense_0/.*"], 0.5, "no layer contains"),
        (["Dense_0/.*", "Dense_2/.*"], 0.5, "labels no leaf"),
        ("Dense_.*", 0.5, "one selector per layer"),
        (["Dense_0/.*", "Dense_1/bias", "Dense_1/kernel"], 0.5, "hold no weight"),
        (["Dense_0/.*", "Dense_1/.*"], -0.5, "lie in"),
    ],
)
def test_bad_layers(layers: list[str], alpha: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transforms.scale_homogeneous(_params(), alpha, layers)


def test_fit_alpha_is_least_squares() -> None:
    draw = np.random.default_rng(1).normal
    student, teacher = draw(size=(6, 3)), draw(size=(6, 3))
    want = np.linalg.lstsq(student.reshape(-1, 1), teacher.reshape(-1), rcond=None)[0][0]
    got = transforms.fit_alpha(jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    padded = jnp.float32(np.concatenate([student, np.full((2, 3), np.nan)]))
    targets = jnp.float32(np.concatenate([teacher, np.full((2, 3), np.nan)]))
    weights = jnp.array([1.0] * 6 + [0.0] * 2)
    np.testing.assert_allclose(transforms.fit_alpha(padded, targets, weights=weights), want, 1e-5)


def test_fit_alpha_recovers_the_coefficient_of_a_chain() -> None:
    params, x = _params(), jnp.array([[1.0, -2.0, 0.5], [0.3, 0.1, -0.7]])
    large = transforms.scale_homogeneous(params, 1.7, ["Dense_0/.*", "Dense_1/.*"])
    fitted = transforms.fit_alpha(_forward(params, x), _forward(large, x))
    np.testing.assert_allclose(jnp.sqrt(fitted), 1.7, rtol=1e-5)


def test_fit_alpha_of_silence_is_one_with_a_finite_gradient() -> None:
    zeros, ones = jnp.zeros((2, 3)), jnp.ones((2, 3))
    assert transforms.fit_alpha(zeros, ones) == 1
    assert np.isfinite(jax.grad(lambda s: transforms.fit_alpha(s, ones))(zeros)).all()


def test_fit_alpha_checks_its_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        transforms.fit_alpha(jnp.ones((4, 1)), jnp.ones(4))
    with pytest.raises(ValueError, match="empty"):
        transforms.fit_alpha(jnp.ones((0, 1)), jnp.ones((0, 1)))
    with pytest.raises(TypeError, match="floating"):
        transforms.fit_alpha(jnp.ones((4, 1), jnp.int32), jnp.ones((4, 1)))
