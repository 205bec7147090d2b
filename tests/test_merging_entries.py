"""Merging that ranks, draws or chooses entries: ties, densities, scales, and two of mergekit's."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms


def leaf(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_della_keeps_its_density_at_the_ends(density: float) -> None:
    tau = {"w": leaf(0, 40, 50)}
    chances = transforms.della_probabilities(tau, density=density)["w"]
    np.testing.assert_allclose(jnp.mean(chances), density, atol=1e-6)
    assert float(jnp.min(chances)) >= 0 and float(jnp.max(chances)) <= 1
    kept = transforms.della(jax.random.key(0), tau, density=density)["w"]
    if density in (0.0, 1.0):
        np.testing.assert_array_equal(kept, density * tau["w"])


@pytest.mark.parametrize("size", [1e-12, 1e-5, 1.0, 1e8])
def test_model_stock_depends_on_angles_alone(size: float) -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 64))
    other = 0.6 * one + 0.8 * other
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    want = 2 * cosine / (1 + cosine) * (one + other) / 2
    models = [{"b": jnp.asarray(size * x, jnp.float32)} for x in (one, other)]
    got = transforms.model_stock({"b": jnp.zeros(64)}, models)["b"]
    np.testing.assert_allclose(np.asarray(got, np.float64) / size, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "moves", [(0.04, -0.06), (1e-5, -1e-5), (0.3, 0.1), (0.0, 0.2), (0.0, 0.0)]
)
def test_model_stock_of_one_entry_is_finite(moves: tuple[float, float]) -> None:
    """Alike: the mean; opposite, or one unmoved: the base."""
    base, models = jnp.float32(2.5), [jnp.float32(2.5 + move) for move in moves]
    got = transforms.model_stock({"s": base}, [{"s": model} for model in models])["s"]
    alike = moves[0] * moves[1] > 0
    np.testing.assert_allclose(got, 2.5 + (sum(moves) / 2 if alike else 0), rtol=1e-6)
    slope = jax.grad(
        lambda m: transforms.model_stock({"s": base}, [{"s": m}, {"s": models[1]}])["s"]
    )
    assert bool(jnp.isfinite(slope(models[0])))


def test_multi_slerp_normalizes_its_weights_and_has_a_value_where_directions_cancel() -> None:
    base, models = {"w": jnp.zeros((3, 4))}, [{"w": leaf(i, 3, 4)} for i in (1, 2)]
    one, other = (transforms.multi_slerp(base, models, w)["w"] for w in ([3, 1], [0.75, 0.25]))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(transforms.multi_slerp(None, models)["w"],
                               transforms.multi_slerp(base, models)["w"], rtol=1e-6)  # fmt: skip
    away = [{"w": models[0]["w"]}, {"w": -3 * models[0]["w"]}]
    np.testing.assert_allclose(transforms.multi_slerp(base, away)["w"], -models[0]["w"], rtol=1e-5)


def test_near_swap_has_no_unit() -> None:
    base = {"w": jnp.asarray([1.0, 1.0, 2.0]) * 1e-9}
    model = {"w": jnp.asarray([1.0, 1.5, 4.0]) * 1e-9}
    got = transforms.near_swap(base, model, t=1e-9)["w"]
    np.testing.assert_allclose(got, np.array([1.0, 1.5, 3.0]) * 1e-9, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_arcee_fusion_by_hand(size: float) -> None:
    """Importance against the median and 1.5 times the distance of the quartiles, in NumPy.

    Weights that are fine-tuned move by 1e-4: float32 must not lose the divergence in its terms.
    """
    start = leaf(0, 24, 20)
    moved = start + size * leaf(1, 24, 20)
    before, after = (np.asarray(x, np.float64) for x in (start, moved))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) + 1e-8 for x in (after, before))
    importance = np.abs(after - before) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int(share * 479)] for share in (0.25, 0.5, 0.75))
    chosen = importance >= middle + 1.5 * (high - low)
    assert 0 < chosen.sum() < 100
    got = transforms.arcee_fusion({"w": start}, {"w": moved})["w"]
    np.testing.assert_array_equal(got, np.where(chosen, moved, start))


def test_ram_keeps_what_one_model_changed_and_averages_the_rest() -> None:
    base = {"w": jnp.zeros(5)}
    models = [{"w": jnp.asarray(x)} for x in ([2.0, 1, 0, 0, 4], [0.0, 3, 1e-6, 0, 8])]
    np.testing.assert_allclose(transforms.ram(base, models)["w"], [2, 2, 0, 0, 6])
    # The first changed 2 entries with the other and 1 alone: rho = 2, limited to 0.2.
    boosted = transforms.ram(base, models, gain=0.1)["w"]
    np.testing.assert_allclose(boosted, [2 * 1.02, 2, 0, 0, 6], rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_pieces_are_trimmed_as_the_whole(count: int) -> None:
    """Many equal magnitudes, NaN and infinity: as a stable sort, in whatever pieces."""
    whole = np.round(np.random.default_rng(0).normal(size=24), 1).astype(np.float32)
    whole[[3, 9, 11]] = [np.nan, np.inf, -0.0]
    pieces = [jnp.asarray(piece) for piece in np.split(whole, [5, 6, 15])]
    cut, before, got = transforms.magnitude_cut(lambda: pieces, count), 0, []
    for piece in pieces:
        trimmed, before = transforms.trim_to_cut(piece, cut, before)
        got.append(np.asarray(trimmed))
    ranked = np.where(np.isnan(whole), -1, np.abs(whole))
    want, kept = np.zeros_like(whole), np.argsort(-ranked, kind="stable")[:count]
    want[kept] = whole[kept]
    np.testing.assert_array_equal(np.concatenate(got), want)


def test_leaves_that_are_one_array_stay_one() -> None:
    table = {seed: leaf(seed, 4, 3) for seed in range(2)}
    trees = [{"embed": table[i], "head": table[i], "other": leaf(5 + i, 4, 3)} for i in range(2)]
    tau = transforms.task_vector(trees[1], trees[0])
    drawn = transforms.dare(jax.random.key(0), tau, density=0.5)
    merged = transforms.apply_task_vectors(trees[0], [drawn])
    assert merged["embed"] is merged["head"] and not (drawn["embed"] == drawn["other"]).all()
    apart = transforms.average(trees, [[("head", 1.0), (".*", 3.0)], 1.0])
    want = (table[0] + table[1]) / 2
    np.testing.assert_allclose(apart["head"], want, rtol=1e-6)
    assert not np.allclose(apart["embed"], want)
    trimmed = transforms.trim_global(tau, density=0.5)
    assert trimmed["embed"] is trimmed["head"]
    kept = [int(jnp.count_nonzero(trimmed[name])) for name in ("embed", "other")]
    assert sum(kept) == 12  # of 24: what is tied is ranked once


def test_ties_under_jit_are_those_made_there() -> None:
    """Equal leaves of an argument are drawn apart; what is tied inside is not."""
    table, key = leaf(0, 4, 3), jax.random.key(0)

    def drawn(tree: Any) -> Any:
        return transforms.dare(key, tree, density=0.5)

    tree = {"embed": table, "head": table}
    together, apart = drawn(tree), jax.jit(drawn)(tree)
    np.testing.assert_array_equal(together["embed"], together["head"])
    assert not (apart["embed"] == apart["head"]).all()
    inside = jax.jit(lambda tree: drawn(tree | {"head": tree["embed"]}))(tree)
    for name in tree:
        np.testing.assert_array_equal(inside[name], together["embed"], err_msg=name)
        np.testing.assert_array_equal(apart["embed"], together["embed"])


def test_leaves_of_other_processes_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn by their own paths: nothing can compare them."""
    table, key = leaf(0, 4, 3), jax.random.key(0)
    tree = {"embed": table, "head": table + 0}
    alone = {name: transforms.dare(key, {name: x}, density=0.5)[name] for name, x in tree.items()}
    for name in ("is_fully_addressable", "is_fully_replicated"):
        monkeypatch.setattr(type(table), name, property(lambda self: False))
    got = transforms.dare(key, tree, density=0.5)
    monkeypatch.undo()
    for name, want in alone.items():
        np.testing.assert_array_equal(got[name], want, err_msg=name)


@pytest.mark.parametrize("shape", [(23, 6), (3, 4, 5), (20, 1), (30,), ()])
@pytest.mark.parametrize("method", [transforms.dare, transforms.della])
def test_blocks_of_rows_draw_what_the_whole_leaf_draws(
    method: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdtl_jax.transforms._blocks.BLOCK", 12)
    key, tau = jax.random.key(1), leaf(0, *shape)
    whole = method(key, {"w": tau}, density=0.5)["w"]
    traced = jax.jit(lambda key, tau: method(key, {"w": tau}, density=0.5))(key, tau)["w"]
    np.testing.assert_allclose(traced, whole, rtol=1e-6)
    rows = jnp.reshape(tau, (-1, *shape[-1:])) if len(shape) > 1 else tau[None]
    per = transforms.block_rows(rows.shape)
    parts = [
        method(key, {"w": rows[i : i + per]}, density=0.5, block=i // per)["w"]
        for i in range(0, len(rows), per)
    ]
    np.testing.assert_array_equal(jnp.concatenate(parts).reshape(shape), whole)
    if whole.ndim > 1 and len(parts) > 2:
        zeros = [np.asarray(part == 0).tolist() for part in parts[:-1]]
        assert any(zero != zeros[0] for zero in zeros)  # every block draws for itself


@pytest.mark.parametrize("method", [transforms.dare, transforms.della])
def test_draws_do_not_depend_on_the_dtype(method: Any) -> None:
    key, tau = jax.random.key(1), leaf(0, 8, 6)
    with jax.enable_x64(True):
        kinds = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
        kept = [method(key, {"w": tau.astype(x)}, density=0.5)["w"] != 0 for x in kinds]
    for other in kept:
        np.testing.assert_array_equal(other, kept[2])


def test_draws_are_uniform_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtl_jax.transforms._blocks.BLOCK", 1000)
    kept = transforms.dare(jax.random.key(0), {"w": jnp.ones((500, 100))}, density=0.3)["w"] != 0
    np.testing.assert_allclose(jnp.mean(kept), 0.3, atol=0.01)
    np.testing.assert_allclose(jnp.mean(kept, axis=1), 0.3, atol=0.2)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_ties_that_are_stored_twice_are_ranked_once(density: float) -> None:
    """An entry at the cut is kept in each of three copies, or in none; zeros are no ties."""
    table, zero = leaf(0, 7, 5), jnp.zeros((7, 5))
    copies = {"a": table, "c": table + 0, "e": np.asarray(table)}
    tree = copies | {"b": leaf(1, 7, 5), "d": zero, "f": zero + 0}
    got = transforms.trim_global(tree, density=density)
    np.testing.assert_array_equal(got["a"], got["c"])
    np.testing.assert_array_equal(got["a"], got["e"])
    assert sum(int(jnp.count_nonzero(got[name])) for name in "ab") == int(density * 4 * 35)
    merged = transforms.ties([tree, tree], density=density)
    np.testing.assert_array_equal(merged["a"], merged["e"])


def test_ties_that_are_stored_twice_share_their_draws() -> None:
    """As a file has them: equal arrays under two names."""
    rng = np.random.default_rng(0)
    table, other = (rng.normal(size=(5, 3)).astype(np.float32) for _ in range(2))
    other[0] = table[0]  # a beginning alone is no tie
    tree = {"a": table, "b": other, "c": table.copy()}
    key = jax.random.key(0)
    for merged in (
        transforms.dare(key, tree, density=0.5),
        transforms.della(key, tree, density=0.5, epsilon=0.1),
        transforms.mixout(key, tree, {name: 0 * x for name, x in tree.items()}, rate=0.5),
    ):
        np.testing.assert_array_equal(merged["a"], merged["c"])
        zeros = [np.asarray(merged[name]) == 0 for name in "ab"]
        assert not np.array_equal(*zeros), "another leaf has draws of its own"


@pytest.mark.parametrize("shape", [(1,), (3, 4)])
def test_karcher_mean_of_opposite_models_is_the_heavier_one(shape: tuple[int, ...]) -> None:
    one = leaf(3, *shape)
    merged = transforms.karcher_mean([{"w": one}, {"w": -one}, {"w": 3 * one}], [0.7, 0.2, 0.5])
    np.testing.assert_allclose(merged["w"], (0.7 + 0.2 + 1.5) / 1.4 * one, rtol=2e-6)


EMPTY: list[Any] = [{"w": jnp.zeros((0, 3), jnp.bfloat16)}] * 2
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "merged",
    [
        lambda: transforms.average(EMPTY),
        lambda: transforms.slerp(EMPTY[0], EMPTY[1], 0.3, axis=-1),
        lambda: transforms.karcher_mean(EMPTY),
        lambda: transforms.multi_slerp(EMPTY[0], EMPTY),
        lambda: transforms.model_stock(EMPTY[0], EMPTY, axis=0),
        lambda: transforms.sce(EMPTY[0], EMPTY, top=0.5),
        lambda: transforms.arcee_fusion(*EMPTY),
        lambda: transforms.ram(EMPTY[0], EMPTY, gain=0.1),
        lambda: transforms.fisher_merge(EMPTY, EMPTY),
        lambda: transforms.ties(EMPTY),
        lambda: transforms.ties_per_leaf(EMPTY, density=0.5),
        lambda: transforms.breadcrumbs(EMPTY[0], density=0.5, outliers=0.1),
        lambda: transforms.dare(KEY, EMPTY[0], density=0.5),
        lambda: transforms.della(KEY, EMPTY[0], density=0.5),
        lambda: transforms.rescale_l1(*EMPTY),
        lambda: transforms.mixout(KEY, *EMPTY, rate=0.5),
    ],
)
def test_leaves_without_entries_stay(merged: Callable[[], Any]) -> None:
    assert merged()["w"].shape == (0, 3)


DIVIDED: dict[str, Callable[[list[Any], list[float]], Any]] = {
    "average": transforms.average,
    "multi_slerp": lambda models, weights: transforms.multi_slerp(None, models, weights),
    "karcher_mean": transforms.karcher_mean,
}


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("weights", [[0.1, 0.2, -0.3], [0.3, -0.1, -0.2]])
def test_weights_that_cancel_up_to_rounding_do_not_divide(name: str, weights: list[float]) -> None:
    models = [{"w": leaf(seed, 4)} for seed in range(3)]
    with pytest.raises(ValueError, match="must have a finite sum other than 0"):
        DIVIDED[name](models, weights)
    divisor = transforms.agreeing_weight(weights)
    np.testing.assert_allclose(divisor(jnp.asarray([[True], [True], [True]])), [0])
    np.testing.assert_allclose(divisor(jnp.asarray([[True], [True], [False]])), sum(weights[:2]))


def test_a_share_means_the_same_in_every_precision() -> None:
    tau = {"w": jnp.arange(1.0, 11.0)}
    for density in (0.7, np.float32(0.7), jnp.float32(0.7)):
        assert int(jnp.count_nonzero(transforms.trim(tau, density=density)["w"])) == 7


def test_nan_of_one_model_stays_visible_and_spoils_no_election() -> None:
    taus = [{"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([jnp.nan, 4.0])}]
    merged = transforms.disjoint_merge(taus, transforms.elect_sign(taus))["w"]
    np.testing.assert_array_equal(merged, [np.nan, 3.0])


COEFFICIENTS: dict[str, Callable[[Any, Any], Any]] = {
    "alpha": lambda x, value: transforms.interpolate(x, x, value),
    "t": lambda x, value: transforms.slerp(x, x, value),
    "scale": lambda x, value: transforms.apply_task_vectors(x, [x], scale=value),
    "density": lambda x, value: transforms.dare(jax.random.key(0), x, density=value),
    "weights[1]": lambda x, value: transforms.weighted_sum([x, x], [1.0, value]),
    "weights": lambda x, value: transforms.average([x, x], value),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_are_named_and_finite(name: str) -> None:
    for value in (float("nan"), np.float32(np.inf), "0.5", None if name != "weights" else 0.5):
        with pytest.raises((ValueError, TypeError), match=f"^{re.escape(name)}[, ]"):
            COEFFICIENTS[name]({"w": jnp.ones(3)}, value)
