"""Connectors: shapes alone, hand-made values, composition, gradients, half precision."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import connectors, losses, testing
from kdtl_jax.connectors import Connector

KEY = jax.random.key(0)


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


MAP, TOKENS = spec(2, 4, 4, 6), spec(2, 3, 6)
SHAPES: dict[str, tuple[Connector, Any, Any]] = {
    "linear": (connectors.linear(5), TOKENS, (2, 3, 5)),
    "linear_of_map": (connectors.conv1x1(5, bias=False), MAP, (2, 4, 4, 5)),
    "conv": (connectors.conv(5, kernel=4, stride=2, padding=1), MAP, (2, 2, 2, 5)),
    "conv3x3": (connectors.conv3x3(5), MAP, (2, 4, 4, 5)),
    "conv3x3_strided": (connectors.conv3x3(5, stride=2, bias=False), MAP, (2, 2, 2, 5)),
    "batch_norm": (connectors.batch_norm(), MAP, (2, 4, 4, 6)),
    "mlp": (connectors.mlp((7, 5)), TOKENS, (2, 3, 5)),
    "pool": (connectors.pool(3), MAP, (2, 3, 3, 6)),
    "resize_nearest": (connectors.resize_nearest((5, 2)), MAP, (2, 5, 2, 6)),
    "resize_bilinear": (connectors.resize_bilinear((5, 2)), MAP, (2, 5, 2, 6)),
    "unit_norm": (connectors.unit_norm(), TOKENS, (2, 3, 6)),
    "identity": (connectors.identity(), TOKENS, (2, 3, 6)),
    "variance": (connectors.variance(), MAP, (6,)),
    "generator": (connectors.generator(6), MAP, (2, 4, 4, 6)),
    "simkd_projector": (connectors.simkd_projector(8), MAP, (2, 4, 4, 8)),
    "translator": (connectors.translator(6, 3), MAP, (2, 4, 4, 3)),
    "paraphraser": (connectors.paraphraser(6), MAP, ((2, 4, 4, 3), (2, 4, 4, 6))),
    "mask_token": (connectors.mask_token(), (TOKENS, spec(2, 3, dtype=jnp.bool_)), (2, 3, 6)),
    "abf": (
        connectors.abf(5, 7, size=(8, 8)),
        (MAP, spec(2, 2, 2, 5)),
        ((2, 8, 8, 7), (2, 8, 8, 5)),
    ),
    "abf_deepest": (connectors.abf(5, 7), (MAP, None), ((2, 4, 4, 7), (2, 4, 4, 5))),
    "chain": (
        connectors.chain(connectors.pool(2), connectors.conv3x3(3), connectors.batch_norm()),
        MAP,
        (2, 2, 2, 3),
    ),
    "group": (
        connectors.group({"a": connectors.linear(2), "b": connectors.pool(1)}),
        {"a": TOKENS, "b": MAP, "c": TOKENS},
        {"a": (2, 3, 2), "b": (2, 1, 1, 6)},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_needs_shapes_alone(name: str, dtype: Any) -> None:
    connector, shapes, want = SHAPES[name]

    def of_dtype(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x if x.dtype == jnp.bool_ else spec(*x.shape, dtype=dtype)

    shapes = jax.tree.map(of_dtype, shapes)
    params = jax.eval_shape(lambda key: connector.init(key, shapes), KEY)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    out = jax.eval_shape(connector.apply, params, shapes)
    got = jax.tree.map(lambda x: x.shape, out)
    assert got == want
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(out)}
    assert dtypes == ({jnp.dtype(jnp.float32)} if name == "variance" else {jnp.dtype(dtype)})


def test_init_from_arrays_and_from_shapes_agree() -> None:
    connector = connectors.chain(connectors.linear(3), connectors.mlp((4, 2)))
    x = jnp.ones((2, 5))
    left, right = connector.init(KEY, x), connector.init(KEY, spec(2, 5))
    jax.tree.map(np.testing.assert_array_equal, left, right)
    kernels = [leaf for leaf in jax.tree.leaves(left) if leaf.ndim == 2]
    assert len(kernels) == 3
    assert all(float(jnp.std(kernel)) > 0 for kernel in kernels)


def test_float64_stays(x64: None) -> None:
    params = connectors.linear(3).init(KEY, spec(2, 5, dtype=jnp.float64))
    assert params["kernel"].dtype == params["bias"].dtype == jnp.float64


def test_linear_by_hand() -> None:
    params = {"kernel": jnp.asarray([[1.0, 0.0], [2.0, -1.0]]), "bias": jnp.asarray([0.5, 0.0])}
    y = connectors.linear(2).apply(params, jnp.asarray([[3.0, 4.0]]))
    np.testing.assert_allclose(y, [[11.5, -4.0]])


@pytest.mark.parametrize("side", [5, 1])
def test_conv_is_a_padded_cross_correlation(side: int) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, side, side, 2)), rng.normal(size=(3, 3, 2, 4))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = np.zeros((1, (side + 1) // 2, (side + 1) // 2, 4))
    for i, j in np.ndindex(want.shape[1:3]):
        patch = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        want[0, i, j] = np.einsum("hwc,hwco->o", patch, kernel)
    connector = connectors.conv3x3(4, stride=2, bias=False)
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    got = connector.apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_batch_norm_standardizes_the_batch() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(3, 5, size=(4, 2, 3, 2)), jnp.float32)
    connector = connectors.batch_norm()
    params = connector.init(KEY, x)
    y = connector.apply(params, x)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(jnp.var(y, (0, 1, 2)), 1, rtol=1e-4)
    shifted = {"scale": jnp.asarray([2.0, 0.0]), "offset": jnp.asarray([1.0, -1.0])}
    z = connector.apply(shifted, x)
    np.testing.assert_allclose(z[..., 0], 2 * y[..., 0] + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z[..., 1], -1)


def test_pooling_cells_overlap_where_sizes_do_not_divide() -> None:
    x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    y = connectors.pool((3, 1)).apply({}, x)  # rows 0-1, 1-3, 3-4
    np.testing.assert_allclose(y.ravel(), [0.5, 2.0, 3.5])
    np.testing.assert_allclose(connectors.pool((5, 1)).apply({}, x), x)
    # Growing repeats: cell k covers floor(k 5 / 10) .. ceil((k + 1) 5 / 10) - 1.
    grown = connectors.pool((10, 1)).apply({}, x)
    np.testing.assert_allclose(grown.ravel(), np.repeat(np.arange(5.0), 2))


def test_pooling_by_blocks_and_by_matrix_agree() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 9, 3)), jnp.float32)
    mixed = connectors.pool((2, 4)).apply({}, x)  # 9 to 4 needs the matrix, for both axes
    rows = connectors.pool((2, 9)).apply({}, x)
    np.testing.assert_allclose(mixed, connectors.pool((2, 4)).apply({}, rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows[:, 0], jnp.mean(x[:, :3], axis=1), rtol=1e-5, atol=1e-6)


def test_resizing_takes_the_pixels_it_names() -> None:
    x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    y = connectors.resize_nearest((5, 1)).apply({}, x)
    np.testing.assert_array_equal(y.ravel(), [0, 0, 1, 1, 2])  # floor(3 i / 5)
    z = connectors.resize_bilinear((6, 1)).apply({}, x)
    np.testing.assert_allclose(z.ravel(), [0, 0.25, 0.75, 1.25, 1.75, 2], atol=1e-6)


def test_unit_norm_of_zero_has_a_zero_gradient() -> None:
    connector = connectors.unit_norm()
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(connector.apply({}, x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(connector.apply({}, x)))(x)
    assert bool(jnp.isfinite(gradient).all())


def test_variance_starts_where_asked_and_is_trained_with_vid() -> None:
    head = connectors.variance(initial=3.0)
    params = head.init(KEY, MAP)
    student, teacher = jnp.zeros((2, 6)), jnp.ones((2, 6))
    np.testing.assert_allclose(head.apply(params, student), 3.0, rtol=1e-6)

    def loss(params: Any) -> Array:
        return jnp.mean(losses.vid(student, teacher, head.apply(params, student)))

    gradient = jax.grad(loss)(params)["raw"]
    assert float(gradient.min()) > 0  # errors of 1 want a variance of 1, below 3


def test_chain_composes_and_keeps_its_parameters_apart() -> None:
    chained = connectors.chain(connectors.linear(3), connectors.activation(jnp.tanh))
    x = jnp.asarray([[1.0, -2.0]])
    params = chained.init(KEY, x)
    assert len(params) == 2 and params[1] == {}
    np.testing.assert_allclose(
        chained.apply(params, x), jnp.tanh(connectors.linear(3).apply(params[0], x))
    )
    np.testing.assert_array_equal(connectors.chain().apply(connectors.chain().init(KEY, x), x), x)
    with pytest.raises(ValueError, match="params must be what this chain made, a list of"):
        chained.apply(params[:1], x)


def test_group_names_what_is_missing() -> None:
    grouped = connectors.group({"deep": connectors.linear(2), "low": connectors.linear(2)})
    x = {"deep": jnp.ones((1, 3))}
    with pytest.raises(ValueError, match=r"no input named \['low'\], got \['deep'\]"):
        grouped.init(KEY, x)
    both = {"deep": x["deep"], "low": x["deep"]}
    params = grouped.init(KEY, both)
    assert not np.array_equal(params["deep"]["kernel"], params["low"]["kernel"])
    with pytest.raises(ValueError, match="no input named"):
        grouped.apply(params, x)


def test_mask_token_replaces_where_it_should() -> None:
    x, where = jnp.ones((1, 2, 3)), jnp.asarray([[True, False]])
    params = {"token": jnp.asarray([7.0, 8.0, 9.0])}
    y = connectors.mask_token().apply(params, (x, where))
    np.testing.assert_array_equal(y[0], [[7, 8, 9], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"where must have shape \[1, 2\]"):
        connectors.mask_token().apply(params, (x, where[:, :1]))


def test_mask_token_leaves_nothing_of_masked_rows() -> None:
    x, replaced = jnp.full((2, 3, 6), jnp.nan).at[0].set(1.0), jnp.ones((2, 3), jnp.bool_)
    apply, where = connectors.mask_token().apply, jnp.asarray([True, False])
    slope = jax.grad(lambda token: jnp.sum(apply({"token": token}, (x, replaced), where=where)))
    np.testing.assert_array_equal(slope(jnp.zeros(6)), 3)  # of the first row's three tokens alone
    y = apply({"token": jnp.ones(6)}, (x, ~replaced), where=where)
    np.testing.assert_array_equal(y[1], 0)
    with pytest.raises(ValueError, match="rate must be finite and > 0"):
        connectors.paraphraser(4, rate=-1.0)


@pytest.mark.slow
def test_abf_without_attention_weights_mixes_in_halves() -> None:
    """Zero attention is sigmoid(0) = 1/2 for both streams."""
    fusion = connectors.abf(2, 3)
    x, residual = jnp.ones((1, 2, 2, 2)), jnp.full((1, 1, 1, 2), 4.0)
    params = testing.compiled(fusion.init, KEY, (x, residual))(KEY, (x, residual))
    params["attention"] = jax.tree.map(jnp.zeros_like, params["attention"])
    run = testing.compiled(fusion.apply, params, (x, residual))
    _, mixed = run(params, (x, residual))  # constant maps are 0 after normalization
    np.testing.assert_allclose(mixed, 2.0, atol=1e-5)


@pytest.mark.slow
def test_paraphraser_learns_to_reconstruct() -> None:
    connector = connectors.paraphraser(2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 2, 2)), jnp.float32)

    def loss(params: Any) -> Array:
        return jnp.mean(losses.mse(connector.apply(params, x)[1], x))

    params = testing.compiled(connector.init, KEY, x)(KEY, x)
    step = testing.compiled(jax.value_and_grad(loss), params)
    value, gradient = step(params)
    stepped = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
    assert float(step(stepped)[0]) < float(value)


def test_maps_need_four_axes() -> None:
    for connector in (
        connectors.pool(2),
        connectors.resize_nearest(2),
        connectors.resize_bilinear(2),
    ):
        with pytest.raises(ValueError, match="must have 4 dimension"):
            connector.apply({}, jnp.ones((2, 4, 4)))
    with pytest.raises(ValueError, match=r"^x must have 4 dimension"):
        connectors.conv3x3(2).apply({"kernel": jnp.ones((3, 3, 4, 2))}, jnp.ones((2, 4, 4)))


BAD_USES: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "features must be at least 1, got -1": (ValueError, lambda: connectors.linear(-1)),
    "features must be an integer, got 2.5": (TypeError, lambda: connectors.linear(2.5)),  # type: ignore[arg-type]  # wrong on purpose
    "stride must be at least 1, got 0": (ValueError, lambda: connectors.conv(2, stride=0)),
    r"x must have the width 4 .* got x\[2, 3\]": (
        ValueError,
        lambda: connectors.linear(3).apply({"kernel": jnp.ones((4, 3))}, jnp.ones((2, 3))),
    ),
    r"x must have the width 4 .* got x\[1, 2, 2, 3\]": (
        ValueError,
        lambda: connectors.conv3x3(3).apply(
            {"kernel": jnp.ones((3, 3, 4, 3))}, jnp.ones((1, 2, 2, 3))
        ),
    ),
    r"x must have the width 1 .* got x\[2, 3\]": (
        ValueError,
        lambda: connectors.batch_norm().apply({"scale": jnp.ones(1)}, jnp.ones((2, 3))),
    ),
    r"x must have 4 dimension\(s\), got x\[2, 3\]": (
        ValueError,
        lambda: connectors.conv3x3(3).init(KEY, jnp.ones((2, 3))),
    ),
    "x must be floating point, got int32": (
        TypeError,
        lambda: connectors.linear(3).init(KEY, jax.ShapeDtypeStruct((2, 3), jnp.int32)),
    ),
}


@pytest.mark.parametrize("says", BAD_USES)
def test_bad_uses_are_refused(says: str) -> None:
    error, use = BAD_USES[says]
    with pytest.raises(error, match=f"^{says}"):
        use()


X2, IMAGE = jnp.ones((4, 3)), jnp.ones((2, 4, 4, 3))
MADE = connectors.chain(connectors.linear(2), connectors.batch_norm())


def any_(wrong: Any) -> Any:
    return wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: connectors.linear(2).init(any_(None), X2), "key must be a PRNG key"),
        (lambda: connectors.linear(2).init(KEY, jnp.ones((4, 0))), "features on its last axis"),
        (lambda: connectors.linear(2).apply({"w": X2}, X2), r"a dict with \['kernel'\], got \['w"),
        (lambda: connectors.conv(2).apply(X2, IMAGE), "params must be what this connector's init"),
        (lambda: connectors.batch_norm().apply(any_(7), X2), "params must be what"),
        (lambda: connectors.variance().apply(X2, X2), "params must be what"),
        (lambda: MADE.apply([{}], X2), "params must be what this chain made, a list of 2, got 1"),
        (lambda: MADE.evaluate(MADE.init(KEY, X2), "abc", X2), "statistics must be what this"),
        (lambda: MADE.evaluate(MADE.init(KEY, X2), [{}, X2], X2), "statistics must be those of"),
        (lambda: connectors.identity().apply({}, None), "x must be an array, got NoneType"),
        (lambda: connectors.identity().apply({}, X2, where=any_("a")), "where must be an array"),
        (lambda: connectors.identity().apply({}, X2, where=any_(True)), "where must have shape"),
        (lambda: connectors.identity().apply({}, X2, where=jnp.ones(3, bool)), r"have shape \[4\]"),
        (lambda: connectors.pool(any_("ab")), "the height of size must be an integer"),
        (lambda: connectors.pool((1, 2, 3)), r"size must be one side or \(height, width\)"),
        (lambda: connectors.activation(any_(None)), "fn must be a function"),
        (lambda: connectors.chain(any_(jnp.tanh)), "connector 0 must be a connector such as"),
        (lambda: connectors.group(any_([1])), "connectors must be a dict by name, got list"),
        (lambda: connectors.group({"a": any_(1)}), r"connectors\['a'\] must be a connector"),
        (lambda: connectors.group({"a": MADE}).init(KEY, any_(X2)), "x must be a dict of inputs"),
        (lambda: connectors.mlp(any_("a")), "sizes must be a list of widths"),
        (lambda: connectors.mlp([]), "at least one width"),
        (lambda: connectors.abf(2, 2).init(KEY, any_(IMAGE)), "x must be a pair, the features"),
        (lambda: connectors.mask_token().apply({}, any_(X2)), "params must be what"),
        (lambda: connectors.running_init(any_(None), {}, X2), "connector must be a connector"),
        (lambda: connectors.running_update(any_(None), {}), "statistics of one connector"),
        (lambda: connectors.running_update(X2, X2), "statistics of one connector"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
