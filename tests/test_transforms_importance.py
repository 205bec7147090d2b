"""Indices, importance scores and low-rank factors."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import transforms
from kdtl_jax._types import Array, Params
from kdtl_jax.transforms import Axis

SPEC = [
    ("up", (None, "mlp")),
    ("down", (Axis("mlp", summed=True), None)),
    ("heads", (Axis("heads", inner=2, outer=3),)),
    ("rest", None),
]


def _params(seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    shapes = {"up": (3, 4), "down": (4, 2), "heads": (3 * 5 * 2,), "rest": (7,)}
    return {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


# --- indices -------------------------------------------------------------------------------------


@given(st.integers(1, 4096), st.data())
def test_uniform_indices(size: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, size))
    index = transforms.uniform_indices(size, n)
    assert index.shape == (n,) and index[0] == 0 and (np.diff(index) > 0).all()
    if size % n:
        assert index[-1] == size - 1
        # Exact rationals; Python rounds halves to even, as the published code does.
        assert index.tolist() == [round(Fraction(i * (size - 1), n - 1)) for i in range(n)]
    else:
        assert index.tolist() == list(range(0, size, size // n))


def test_first_random_and_complementary_indices() -> None:
    np.testing.assert_array_equal(transforms.first_indices(5, 3), [0, 1, 2])
    drawn = transforms.random_indices(jax.random.key(0), 20, 8)
    assert drawn.shape == (8,) and (np.diff(drawn) > 0).all() and drawn.max() < 20
    assert not np.array_equal(drawn, transforms.random_indices(jax.random.key(1), 20, 8))
    np.testing.assert_array_equal(transforms.remaining_indices(5, [3, 0]), [1, 2, 4])


def test_top_indices_whole_and_by_group() -> None:
    scores = jnp.array([1.0, 5.0, 4.0, 2.0, 2.0, 9.0])
    np.testing.assert_array_equal(transforms.top_indices(scores, 3), [1, 2, 5])
    np.testing.assert_array_equal(transforms.top_indices(scores, 4, groups=2), [1, 2, 3, 5])
    np.testing.assert_array_equal(transforms.top_indices(jnp.ones(4), 2), [0, 1])
    jitted = jax.jit(lambda s: transforms.top_indices(s, 3))
    np.testing.assert_array_equal(jitted(scores), [1, 2, 5])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: transforms.uniform_indices(4, 5), r"lie in 1..4"),
        (lambda: transforms.uniform_indices(4, 0), r"lie in 1..4"),
        (lambda: transforms.first_indices(4, 5), r"lie in 1..4"),
        (lambda: transforms.random_indices(jax.random.key(0), 4, 5), r"lie in 1..4"),
        (lambda: transforms.top_indices(jnp.ones(4), 5), r"lie in 1..4"),
        (lambda: transforms.top_indices(jnp.ones(4), 3, groups=2), "groups must divide"),
        (lambda: transforms.top_indices(jnp.ones((2, 2)), 1), "1 dimension"),
        (lambda: transforms.remaining_indices(4, [4]), "distinct"),
    ],
)
def test_bad_counts(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- importance ----------------------------------------------------------------------------------


def test_importance_sums_over_everything_a_unit_has() -> None:
    params, other = _params(), _params(1)
    up, down = (np.asarray(params[name], np.float64) for name in ("up", "down"))
    g_up, g_down = (np.asarray(other[name], np.float64) for name in ("up", "down"))
    magnitude = transforms.importance_by_magnitude(params, SPEC, "mlp")
    np.testing.assert_allclose(magnitude, np.sqrt((up**2).sum(0) + (down**2).sum(1)), rtol=1e-5)
    taylor = transforms.importance_by_taylor(params, other, SPEC, "mlp")
    want = np.abs(up * g_up).sum(0) + np.abs(down * g_down).sum(1)
    np.testing.assert_allclose(taylor, want, rtol=1e-5)
    fisher = jax.tree.map(jnp.square, other)
    loss = transforms.importance_by_fisher(params, fisher, SPEC, "mlp")
    want = 0.5 * ((up * g_up) ** 2).sum(0) + 0.5 * ((down * g_down) ** 2).sum(1)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    heads = np.asarray(params["heads"], np.float64).reshape(3, 5, 2)
    got = transforms.importance_by_magnitude(params, SPEC, "heads")
    np.testing.assert_allclose(got, np.sqrt((heads**2).sum((0, 2))), rtol=1e-5)


def test_importance_by_activation_is_minitrons_in_batches() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(3, 7, 6)) for _ in range(2)]
    want = np.sqrt(sum((np.abs(x).mean(1) ** 2).sum(0) for x in batches))
    score: Array | None = None
    for batch in batches:
        score = transforms.importance_by_activation(jnp.float32(batch), previous=score)
    assert score is not None
    np.testing.assert_allclose(score, want, rtol=1e-5)
    heads = transforms.importance_by_activation(jnp.float32(batches[0]), inner=2)
    per_feature = np.abs(batches[0]).mean(1) ** 2
    np.testing.assert_allclose(
        heads, np.linalg.norm(np.sqrt(per_feature.sum(0)).reshape(3, 2), axis=1), rtol=1e-5
    )


def test_importance_by_activation_of_padded_rows_and_positions_in_any_unit() -> None:
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 4, 6)), jnp.float32)
    score = transforms.importance_by_activation
    rows = jnp.arange(3) < 2
    actual = score(x.at[2].set(jnp.nan), where=rows, inner=2)
    np.testing.assert_allclose(actual, score(x[:2], inner=2), rtol=1e-6)
    positions = jnp.asarray([[True, True, False, False], [True] * 4, [False] * 4])
    actual = score(jnp.where(positions[..., None], x, jnp.inf), where=positions)
    alone = score(x[1:2], previous=score(x[:1, :2]))
    np.testing.assert_allclose(actual, alone, rtol=1e-5)
    for scale in (1e-30, 1e30):
        got = score(scale * x, previous=scale * score(x))
        np.testing.assert_allclose(got / scale, score(x, previous=score(x)), rtol=1e-5)
    with pytest.raises(TypeError, match="where must be bool"):
        score(x, where=jnp.ones(3))


def test_important_units_survive() -> None:
    params = _params()
    params["up"] = params["up"].at[:, 2].mul(1e-4)
    params["down"] = params["down"].at[2].mul(1e-4)
    kept = transforms.top_indices(transforms.importance_by_magnitude(params, SPEC, "mlp"), 3)
    small = transforms.select_width(params, SPEC, {"mlp": kept})
    x = np.float32(np.random.default_rng(3).normal(size=(2, 3)))
    full, pruned = (np.tanh(x @ p["up"]) @ np.asarray(p["down"]) for p in (params, small))
    np.testing.assert_allclose(pruned, full, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: transforms.importance_by_magnitude(p, SPEC, "mpl"), "no axis is named"),
        (lambda p: transforms.importance_by_taylor(p, {"up": p["up"]}, SPEC, "mlp"), "structure"),
        (
            lambda p: transforms.importance_by_taylor(
                p, {**p, "up": jnp.ones((3, 1))}, SPEC, "mlp"
            ),
            "one shape",
        ),
        (
            lambda p: transforms.importance_by_activation(jnp.ones((2, 5)), inner=2),
            "units of width",
        ),
        (lambda p: transforms.importance_by_activation(jnp.ones((0, 4))), "empty"),
        (
            lambda p: transforms.importance_by_activation(jnp.ones((2, 4)), previous=jnp.ones(2)),
            "one shape",
        ),
    ],
)
def test_bad_importance(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(_params())


# --- low rank ------------------------------------------------------------------------------------


def test_factors_are_the_best_of_their_rank() -> None:
    matrix = np.random.default_rng(0).normal(size=(6, 4))
    s = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 3, 4):
        low = transforms.factor_low_rank(jnp.float32(matrix), rank)
        assert low.a.shape == (6, rank) and low.b.shape == (rank, 4)
        error = np.linalg.norm(matrix - low.product())
        np.testing.assert_allclose(error, np.sqrt((s[rank:] ** 2).sum()), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(low.a.T @ low.a, low.b @ low.b.T, atol=1e-4)  # balanced


def test_the_rank_for_an_energy() -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    matrix = jnp.float32(q * np.array([10.0, 3.0, 1.0, 0.0, 0.0]) @ q.T)  # energies 100, 9, 1
    ranks = {0.5: 1, 0.9: 1, 0.95: 2, 0.995: 3}
    assert {e: transforms.rank_for_energy(matrix, e) for e in ranks} == ranks
    assert transforms.rank_for_energy(jnp.stack([matrix, jnp.eye(5)]), 0.9) == 5


def test_stacked_and_half_precision_matrices() -> None:
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.bfloat16)
    low = transforms.factor_low_rank(stack, 2)
    assert low.a.shape == (3, 4, 2) and low.product().dtype == jnp.bfloat16
    tree = {"kernel": stack, "bias": jnp.ones(4)}
    cut = transforms.truncate_rank(tree, 2, where="kernel")
    assert cut["kernel"].shape == (3, 4, 4) and cut["bias"] is tree["bias"]
    s = np.linalg.svd(np.asarray(cut["kernel"], np.float32), compute_uv=False)
    assert (s[:, 2:] < 0.02 * s[:, :1]).all()
    assert transforms.truncate_rank(tree, 4, where="kernel")["kernel"] is stack


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: transforms.factor_low_rank(jnp.ones((3, 2)), 3), r"rank must lie in 1..2"),
        (lambda: transforms.factor_low_rank(jnp.ones(3), 1), "at least 2 dimension"),
        (lambda: transforms.rank_for_energy(jnp.ones((2, 2)), 0.0), "energy must lie"),
        (
            lambda: jax.jit(lambda m: transforms.rank_for_energy(m, 0.9))(jnp.ones((2, 2))),
            "outside jit",
        ),
        (lambda: transforms.truncate_rank({"b": jnp.ones(3)}, 1, where="b"), "is not a matrix"),
        (lambda: transforms.truncate_rank({"w": jnp.ones((3, 3))}, 0, where="w"), "rank must lie"),
    ],
)
def test_bad_ranks(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
