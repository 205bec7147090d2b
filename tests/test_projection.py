"""Output distillation: the closed form against NumPy, streaming, folding, differentiability."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import projection, train

RIDGE = 0.3


def _oracle(f: np.ndarray, y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    n, d = f.shape
    fc, yc = f - f.mean(0), y - y.mean(0)
    w = np.linalg.solve(fc.T @ fc / n + ridge * np.eye(d), fc.T @ yc / n)
    return w, y.mean(0) - f.mean(0) @ w


def _data(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    f = rng.normal(size=(n, 5)) + 3
    return f, f @ rng.normal(size=(5, 3)) + rng.normal(size=(n, 3))


@pytest.mark.usefixtures("x64")
def test_fit_is_the_ridge_solution() -> None:
    f, y = _data()
    got = projection.fit(jnp.asarray(f), jnp.asarray(y), ridge=RIDGE)
    kernel, bias = _oracle(f, y, RIDGE)
    np.testing.assert_allclose(got.kernel, kernel, rtol=1e-12)
    np.testing.assert_allclose(got.bias, bias, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_batches_merge_to_the_whole_in_any_order() -> None:
    f, y = map(jnp.asarray, _data())
    parts = [projection.moments(f[i:j], y[i:j]) for i, j in [(0, 7), (7, 8), (8, 40)]]
    whole = projection.moments(f, y)
    a = projection.merge(projection.merge(parts[0], parts[1]), parts[2])
    b = projection.merge(parts[2], projection.merge(parts[1], parts[0]))
    for left, right in zip(jax.tree.leaves((a, b)), jax.tree.leaves((whole, whole)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-11)


def test_weight_zero_is_absence_even_for_nan() -> None:
    f, y = (jnp.asarray(x, jnp.float32) for x in _data())
    padded_f = jnp.concatenate([f, jnp.full((3, 5), jnp.nan, jnp.float32)])
    padded_y = jnp.concatenate([y, jnp.full((3, 3), jnp.nan, jnp.float32)])
    weights = jnp.concatenate([jnp.ones(40, jnp.float32), jnp.zeros(3, jnp.float32)])
    got = projection.fit(padded_f, padded_y, ridge=RIDGE, weights=weights)
    want = projection.fit(f, y, ridge=RIDGE)
    np.testing.assert_allclose(got.kernel, want.kernel, rtol=1e-5, atol=1e-6)


def test_fold_merges_exactly_into_the_head() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    h, a, bias = (jax.random.normal(next(keys), s) for s in [(6, 4), (4, 5), (5,)])
    w = projection.Projection(
        jax.random.normal(next(keys), (5, 3)), jax.random.normal(next(keys), (3,))
    )
    two = projection.apply(w, h @ a + bias[None])
    one = projection.apply(projection.fold(w, a, bias), h)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_the_fit_jits_vmaps_and_differentiates() -> None:
    f, y = (jnp.asarray(x, jnp.float32) for x in _data())

    def error(ridge: jax.Array) -> jax.Array:
        w = projection.fit(f, y, ridge=ridge)
        return jnp.mean(jnp.square(projection.apply(w, f) - y))

    ridges = jnp.array([0.1, 1.0, 10.0], jnp.float32)
    errors, slopes = jax.jit(jax.vmap(jax.value_and_grad(error)))(ridges)
    assert bool(jnp.all(jnp.diff(errors) > 0)) and bool(jnp.all(slopes > 0))


@pytest.mark.usefixtures("standard_promotion")
def test_w_learned_by_gradient_reaches_the_closed_form() -> None:
    f, y = (jnp.asarray(x, jnp.float32) for x in _data())
    f = f - 3

    def base(
        params: Any,
        model_state: Any,
        inputs: jax.Array,
        *,
        key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[dict[str, jax.Array], Any]:
        return {"logits": inputs * params["scale"]}, model_state

    params = {
        "base": {"scale": jnp.ones((), jnp.float32)},
        "projection": projection.Projection(jnp.zeros((5, 3)), jnp.zeros((3,))),
    }
    step = train.make_step(
        projection.model(base),
        lambda x: {"mse": jnp.mean(jnp.square(x.student["logits"] - x.batch["targets"]), axis=-1)},
        {"mse": 1.0},
        optax.sgd(0.3),
        trainable="projection/.*",
    )
    state = train.init_state(
        params, optax.sgd(0.3), key=jax.random.key(0), trainable="projection/.*"
    )
    epoch = jax.jit(train.scan_epoch(step))
    index = jnp.tile(jnp.arange(40, dtype=jnp.int32)[None], (300, 1))
    state, _ = epoch(state, {"inputs": f, "targets": y}, index)
    want = projection.fit(f, y, ridge=1e-9)
    np.testing.assert_allclose(state.params["projection"].kernel, want.kernel, atol=1e-3)
    assert state.params["base"]["scale"] == 1.0


def test_an_encoder_needs_no_logits_of_its_own() -> None:
    def encoder(
        params: Any, model_state: Any, inputs: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[dict[str, jax.Array], Any]:
        return {"hidden": inputs}, model_state

    w = projection.Projection(jnp.ones((5, 3)), jnp.zeros(3))
    model = projection.model(encoder, features="hidden")
    outputs, _ = model({"base": {}, "projection": w}, None, jnp.ones((2, 5)))
    assert outputs.keys() == {"hidden", "logits"} and outputs["logits"].shape == (2, 3)


def test_bad_inputs_say_what_to_do() -> None:
    f, y = (jnp.asarray(x, jnp.float32) for x in _data())
    with pytest.raises(ValueError, match=r"features\[40, 5\], targets\[39, 3\]"):
        projection.fit(f, y[:39])
    with pytest.raises(ValueError, match="ridge must be finite and > 0"):
        projection.fit(f, y, ridge=0.0)
    with pytest.raises(ValueError, match="must have width 5"):
        projection.apply(projection.fit(f, y), f[:, :4])
    with pytest.raises(ValueError, match=r"kernel must be \[H, 5\]"):
        projection.fold(projection.fit(f, y), f.T)
    for weights, says in [
        (jnp.ones((40, 1)), r"weights must have 1 dimension\(s\), got weights\[40, 1\]"),
        ([1.0] * 39, r"features\[40, 5\], weights\[39\]"),
        ([-1.0] * 40, "weights must be finite and >= 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            projection.fit(f, y, weights=weights)
    with pytest.raises(ValueError, match=r"bias must be \[5\].*got bias\[3\], kernel\[40, 5\]"):
        projection.fold(projection.fit(f, y), f, jnp.ones(3))
    with pytest.raises(ValueError, match=r"a.cross\[5, 3\], b.cross\[4, 3\]"):
        projection.merge(projection.moments(f, y), projection.moments(f[:, :4], y))
    with pytest.raises(TypeError, match="targets must be floating"):
        projection.fit(f, jnp.ones((40, 3), jnp.int32))


@pytest.mark.parametrize("weight", [1e-6, 0.1, 1.0, 7.0])
def test_the_solution_does_not_depend_on_the_scale_of_the_weights(weight: float) -> None:
    x = jnp.asarray([[0.0], [1.0]])
    w = projection.fit(x, x, ridge=1.0, weights=[weight, weight])
    np.testing.assert_allclose(w.kernel, [[0.2]], rtol=1e-5)  # 1/4 over 1/4 + 1
    np.testing.assert_allclose(w.bias, [0.4], rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_masked_rows_leave_the_moments_alone(jit: bool) -> None:
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(rng.normal(size=(5, n)), jnp.float32) for n in (3, 2))
    weights = jnp.asarray([1.0, jnp.nan, 2.0, 0.5, 9.0])
    where = jnp.asarray([True, False, True, True, False])
    garbage = x.at[1].set(jnp.nan).at[4].set(1e20), y.at[1].set(jnp.inf).at[4].set(jnp.nan)

    def run(x: jnp.ndarray, y: jnp.ndarray) -> projection.Moments:
        return projection.moments(x, y, weights=weights, where=where)

    got = (jax.jit(run) if jit else run)(*garbage)
    want = projection.moments(x[where], y[where], weights=weights[where])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    gradient = jax.grad(lambda x: jnp.sum(projection.solve(run(x, garbage[1]), ridge=0.1).kernel))(
        garbage[0]
    )
    assert bool(jnp.isfinite(gradient).all()) and not gradient[~where].any()
    nothing = projection.fit(*garbage, where=jnp.zeros(5, jnp.bool_))
    assert not nothing.kernel.any() and not nothing.bias.any()
