"""Weight-space arithmetic: identities, NumPy oracles, and the traps of the published merges."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms


def model(seed: int, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype),
            "bias": jnp.asarray(rng.normal(size=3), dtype),
        },
        "scale": jnp.asarray(rng.normal(), dtype),
        "count": jnp.asarray(seed, jnp.int32),
    }


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


BASE = model(0)
GRAMS = [{"dense/kernel": jnp.eye(4)}] * 3

MERGES: dict[str, Callable[[list[Any], Any], Any]] = {
    "average": lambda ms, base: transforms.average(ms),
    "average_weighted": lambda ms, base: transforms.average(ms, [0.2, 3.0, 1.0]),
    "interpolate": lambda ms, base: transforms.interpolate(ms[0], ms[1], 0.3),
    "slerp": lambda ms, base: transforms.slerp(ms[0], ms[1], 0.3),
    "slerp_rows": lambda ms, base: transforms.slerp(ms[0], ms[1], 0.3, axis=-1),
    "karcher_mean": lambda ms, base: transforms.karcher_mean(ms),
    "multi_slerp": lambda ms, base: transforms.multi_slerp(base, ms),
    "model_stock": lambda ms, base: transforms.model_stock(base, ms),
    "fisher_merge": lambda ms, base: transforms.fisher_merge(
        ms, [jax.tree.map(jnp.ones_like, base)] * 3
    ),
    "regmean": lambda ms, base: transforms.regmean(ms, GRAMS),
    "sce": lambda ms, base: transforms.sce(base, ms),
    "near_swap": lambda ms, base: transforms.near_swap(ms[0], ms[1], t=0.1),
    "ties": lambda ms, base: transforms.apply_task_vectors(
        base, [transforms.ties([transforms.task_vector(m, base) for m in ms], density=1.0)]
    ),
    "ties_per_leaf": lambda ms, base: transforms.apply_task_vectors(
        base, [transforms.ties_per_leaf([transforms.task_vector(m, base) for m in ms], density=1.0)]
    ),
    "greedy_soup": lambda ms, base: transforms.greedy_soup(ms, lambda m: 1.0)[0],
}


@pytest.mark.parametrize("name", MERGES)
def test_merging_a_model_with_itself_gives_the_model(name: str) -> None:
    one = model(1)
    merged = MERGES[name]([one] * 3, BASE)
    close(merged, one | {"count": merged["count"]}, rtol=2e-5)


@pytest.mark.parametrize("name", MERGES)
def test_merging_nothing_new_is_finite_and_gives_the_base(name: str) -> None:
    close(MERGES[name]([BASE] * 3, BASE), BASE, rtol=2e-5)


@pytest.mark.parametrize("name", MERGES)
def test_half_precision_stays_and_other_leaves_pass_through(name: str) -> None:
    ms = [model(i, "bfloat16") | {"key": jax.random.key(i)} for i in (1, 2, 3)]
    if name in ("multi_slerp", "model_stock", "sce", "ties", "ties_per_leaf", "fisher_merge"):
        ms = [{k: v for k, v in m.items() if k != "key"} for m in ms]  # BASE has no key
    merged = MERGES[name](ms, BASE)
    assert merged["count"].dtype == jnp.int32
    if "key" in merged:
        assert bool(merged["key"] == ms[0]["key"])
        assert merged["dense"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", [n for n in MERGES if n != "greedy_soup"])
def test_merges_are_differentiable(name: str) -> None:
    base, *floats = [{"dense": {"kernel": model(i)["dense"]["kernel"]}} for i in range(4)]

    @jax.jit
    @jax.grad
    def slope(ms: list[Any]) -> jax.Array:
        return jnp.sum(MERGES[name](ms, base)["dense"]["kernel"])

    for ms in (floats, [floats[0]] * 3):  # equal models are where norms and angles have kinks
        grads = slope(ms)
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads)), name
        assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads)), name


def test_names_and_shapes_are_checked_and_all_differences_listed() -> None:
    other = model(1)
    other["dense"] = {"kernl": other["dense"]["kernel"], "bias": jnp.ones(1)}
    with pytest.raises(ValueError, match="lacks 'dense/kernel'.*'dense/kernl'.*'dense/bias' is"):
        transforms.interpolate(BASE, other, 0.5)
    with pytest.raises(ValueError, match="expected 2 weights"):
        transforms.average([BASE, BASE], [1.0])
    with pytest.raises(ValueError, match="do not cover 'scale'"):
        transforms.average([BASE, BASE], [[("dense/.*", 1.0)], 1.0])


@pytest.mark.parametrize(
    "merge",
    [
        transforms.ties,
        transforms.average,
        transforms.weighted_sum,
        transforms.karcher_mean,
        lambda models, weights: transforms.fisher_merge(models, models, weights),
    ],
    ids=["ties", "average", "weighted_sum", "karcher_mean", "fisher_merge"],
)
def test_nothing_cannot_be_merged(merge: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^\w+ must be a non-empty list .*an empty one"):
        merge([], [])


@pytest.mark.parametrize("merge", [transforms.average, transforms.karcher_mean])
@pytest.mark.parametrize("weights", [[1.0, -1.0], np.zeros(2)])
def test_weights_that_divide_have_a_sum(merge: Callable[..., Any], weights: Any) -> None:
    with pytest.raises(ValueError, match=r"the weights of .* other than 0"):
        merge([BASE, BASE], weights)


def test_a_share_outside_0_and_1_is_blamed_by_its_name() -> None:
    for fn, shares in [
        (transforms.trim, {"density": 2.0}),
        (transforms.breadcrumbs, {"density": 0.5, "outliers": -1.0}),
    ]:
        name = [*shares][-1]
        with pytest.raises(ValueError, match=rf"^{name} must lie in \[0, 1\]"):
            fn(BASE, **shares)
    with pytest.raises(ValueError, match=r"^density must lie in \[0, 1\]"):
        transforms.ties([BASE], density=2.0)


def test_interpolate_is_exact_at_its_ends_and_takes_rules_and_traced_coefficients() -> None:
    a, b = model(1), model(2)
    for alpha, end in ((0.0, a), (1.0, b)):
        close(transforms.interpolate(a, b, alpha)["dense"], end["dense"], rtol=0, atol=0)
    by_rule = transforms.interpolate(a, b, [(".*/kernel", 1.0)])
    close(by_rule, a | {"dense": {"kernel": b["dense"]["kernel"], "bias": a["dense"]["bias"]}})
    sweep = jax.vmap(lambda alpha: transforms.interpolate(a, b, alpha)["scale"])
    alphas = jnp.asarray([0.0, 0.25, 1.0])
    np.testing.assert_allclose(sweep(alphas), a["scale"] + alphas * (b["scale"] - a["scale"]), 1e-5)


def test_a_soup_is_learned_in_two_lines() -> None:
    models = [jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0]), jnp.asarray([-5.0, -5.0])]
    target = jnp.asarray([0.5, 0.5])
    # the two lines: the soup of traced weights, and a loss of it
    soup = lambda logits: transforms.average(models, jax.nn.softmax(logits))  # noqa: E731  # one line, as users would write it
    loss = lambda logits: jnp.sum((soup(logits) - target) ** 2)  # noqa: E731  # one line, as users would write it
    descend = jax.jit(lambda logits: logits - 0.3 * jax.grad(loss)(logits))

    logits = jnp.zeros(3)
    for _ in range(200):
        logits = descend(logits)
    np.testing.assert_allclose(jax.nn.softmax(logits), [0.5, 0.5, 0.0], atol=0.03)


def test_alpha_per_leaf_is_learned_in_two_lines() -> None:
    source, tuned = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    target = {"a": jnp.full(2, 0.2), "b": jnp.full(2, 0.9)}

    def gap(p: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.stack([jnp.sum((p[k] - target[k]) ** 2) for k in p]))

    # the two lines: alpha is a tree of scalars, differentiated through the merge
    slope = jax.jit(jax.grad(lambda alpha: gap(transforms.interpolate(source, tuned, alpha))))
    step = lambda alpha: jax.tree.map(lambda a, g: a - 0.2 * g, alpha, slope(alpha))  # noqa: E731  # one line

    alpha = {"a": jnp.asarray(0.5), "b": jnp.asarray(0.5)}
    for _ in range(20):
        alpha = step(alpha)
    close(alpha, {"a": jnp.asarray(0.2), "b": jnp.asarray(0.9)}, rtol=1e-3)


def test_greedy_soup_takes_what_helps_and_leaves_the_rest() -> None:
    def score(m: jax.Array) -> float:
        return -float(jnp.sum(m**2))

    models = [jnp.asarray([1.0, 0.1]), jnp.asarray([9.0, 9.0]), jnp.asarray([-1.2, 0.0])]
    soup, chosen = transforms.greedy_soup(models, score)
    assert chosen == [0, 2]
    np.testing.assert_allclose(soup, [-0.1, 0.05], rtol=1e-5)
    assert score(soup) >= max(score(m) for m in models)
    broken = jnp.asarray([jnp.nan, 0.0])
    assert transforms.greedy_soup([broken, *models], score)[1] == [1, 3]
    with pytest.raises(ValueError, match=r"no model has a finite score, got \[nan\]"):
        transforms.greedy_soup([broken], score)


def test_ema_keeps_the_shadows_precision() -> None:
    shadow, params = {"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0, jnp.bfloat16)}
    for _ in range(3):
        shadow = transforms.ema(shadow, params, decay=0.999)
    assert shadow["w"].dtype == jnp.float32
    np.testing.assert_allclose(shadow["w"], 2 - 0.999**3, rtol=1e-6)


def test_task_vectors_add_up_and_subtract() -> None:
    base, tuned = model(1, "bfloat16"), model(2, "bfloat16")
    tau = transforms.task_vector(tuned, base)
    assert tau["dense"]["kernel"].dtype == jnp.float32
    restored = transforms.apply_task_vectors(base, [tau])
    close(restored["dense"], tuned["dense"], rtol=0, atol=0)  # no bit is lost on the way
    assert int(restored["count"]) == int(base["count"])
    forgot = transforms.apply_task_vectors(
        BASE, [transforms.task_vector(model(1), BASE)] * 2, [1, -1]
    )
    close(forgot, BASE)
    half = transforms.apply_task_vectors(BASE, [transforms.task_vector(model(1), BASE)], scale=0.5)
    close(half["dense"], transforms.average([BASE, model(1)])["dense"])


def test_trim_keeps_an_exact_count_even_of_equal_magnitudes() -> None:
    tau = {"w": jnp.asarray([1.0, -1.0, 1.0, -1.0, 1.0]), "z": jnp.arange(10.0)}
    kept = transforms.trim(tau, density=0.4)
    np.testing.assert_array_equal(kept["w"], [1, -1, 0, 0, 0])
    np.testing.assert_array_equal(jnp.nonzero(kept["z"])[0], [6, 7, 8, 9])
    traced = jax.jit(lambda d: transforms.trim(tau, density=d))(0.4)
    close(traced, kept)


def test_trimming_globally_and_by_leaf_differ() -> None:
    rng = np.random.default_rng(0)
    tau = {
        "emb": jnp.asarray(0.1 * rng.uniform(0.5, 1, 100), jnp.float32),
        "head": jnp.asarray(rng.uniform(0.5, 1, 100), jnp.float32),
    }

    def share(tree: Any) -> dict[str, float]:
        return {k: float(jnp.mean(v != 0)) for k, v in tree.items()}

    assert share(transforms.trim_global(tau, density=0.2)) == pytest.approx({"emb": 0, "head": 0.4})
    assert share(transforms.trim(tau, density=0.2)) == pytest.approx({"emb": 0.2, "head": 0.2})


def test_ties_of_one_model_at_full_density_is_its_task_vector() -> None:
    tau = transforms.task_vector(model(1), BASE)
    for merged in (
        transforms.ties([tau], density=1.0),
        transforms.ties_per_leaf([tau], density=1.0),
    ):
        close(merged, tau, rtol=0, atol=0)


def test_ties_follows_its_paper() -> None:
    rng = np.random.default_rng(3)
    flat = rng.normal(size=(3, 20))
    flat[:, 7] = [1.0, -1.0, 0.0]  # undecided: takes the majority's sign
    taus = [{"a": jnp.asarray(row[:15].reshape(3, 5)), "b": jnp.asarray(row[15:])} for row in flat]
    kept = np.zeros_like(flat)
    for i, row in enumerate(flat):
        top = np.argsort(-np.abs(row), kind="stable")[:10]
        kept[i, top] = row[top]
    sign = np.sign(kept.sum(0))
    sign[sign == 0] = 1 if sign.sum() >= 0 else -1
    agree = (np.sign(kept) == sign) & (kept != 0)
    want = (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)
    got = transforms.ties(taus, density=0.5)
    np.testing.assert_allclose(np.concatenate([got["a"].ravel(), got["b"]]), want, rtol=1e-5)


def test_breadcrumbs_keeps_half_of_a_small_leaf() -> None:
    tau = jnp.arange(1.0, 51.0)
    kept = transforms.breadcrumbs(tau, density=0.5, outliers=0.01)
    assert int(jnp.sum(kept != 0)) == 25  # mergekit keeps 0: its slice of no outliers is empty
    kept = transforms.breadcrumbs(tau, density=0.5, outliers=0.1)
    np.testing.assert_array_equal(jnp.nonzero(kept)[0], np.arange(20, 45))


@pytest.mark.parametrize("method", ["dare", "della"])
def test_random_sparsification_is_unbiased_over_keys(method: str) -> None:
    tau = {"w": jnp.asarray([[0.5, -1.0, 2.0, 3.0]])}
    fn = {
        "dare": lambda key: transforms.dare(key, tau, density=0.4),
        "della": lambda key: transforms.della(key, tau, density=0.4, epsilon=0.2),
    }[method]
    draws = jax.vmap(fn)(jax.random.split(jax.random.key(0), 4000))["w"]
    np.testing.assert_allclose(jnp.mean(draws, axis=0), tau["w"], rtol=0.1)
    if method == "dare":
        values = np.unique(np.round(np.asarray(draws[:, 0, 3]), 4))
        np.testing.assert_allclose(values, [0, 7.5], rtol=1e-5)


@pytest.mark.parametrize("method", ["dare", "della", "mixout"])
def test_a_draw_does_not_depend_on_the_other_leaves(method: str) -> None:
    # Of two values, because leaves that are equal are tied and share their draws.
    key, whole = jax.random.key(3), {"a": jnp.ones(40), "b": jnp.full(40, 2.0)}
    fn = {
        "dare": lambda t: transforms.dare(key, t, density=0.5),
        "della": lambda t: transforms.della(key, t, density=0.5),
        "mixout": lambda t: transforms.mixout(key, t, jax.tree.map(jnp.zeros_like, t), rate=0.5),
    }[method]
    np.testing.assert_array_equal(fn(whole)["b"], fn({"b": whole["b"]})["b"])
    # Leaves draw differently.
    assert not bool(jnp.all((fn(whole)["a"] == 0) == (fn(whole)["b"] == 0)))


def test_della_keeps_large_entries_more_often() -> None:
    p = transforms.della_probabilities(
        {"w": jnp.asarray([[3.0, -1.0, 2.0]]), "s": jnp.asarray([5.0])}, density=0.5, epsilon=0.2
    )
    np.testing.assert_allclose(p["w"], [[0.7, 0.3, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(p["s"], [0.5])


def test_mixout_drops_toward_the_source() -> None:
    params, source = {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([0.0, 5.0])}
    same = transforms.mixout(jax.random.key(0), params, source, rate=0.0)
    close(same, params, rtol=0, atol=0)

    def draw(key: jax.Array) -> jax.Array:
        return transforms.mixout(key, params, source, rate=0.3)["w"]

    draws = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), 4000)))
    np.testing.assert_allclose(draws.mean(0), params["w"], atol=0.1)
    np.testing.assert_allclose(np.unique(draws[:, 0].round(4)), [0, 1 / 0.7], atol=1e-4)
    with pytest.raises(ValueError, match="below 1"):
        transforms.mixout(jax.random.key(0), params, source, rate=1.0)


def test_slerp_walks_the_arc() -> None:
    a, b = jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])
    third = transforms.slerp(a, b, 1 / 3)
    np.testing.assert_allclose(third, [np.cos(np.pi / 6), np.sin(np.pi / 6)], rtol=1e-5)
    opposite = jax.grad(lambda t: transforms.slerp(a, -a, t)[0])(0.5)
    assert bool(jnp.isfinite(opposite))  # no arc is defined: the straight line is taken
    rows = transforms.slerp(jnp.eye(2), jnp.eye(2)[::-1], 0.5, axis=-1)
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, rtol=1e-5)


def test_karcher_mean_of_a_frame_is_its_diagonal() -> None:
    mean = transforms.karcher_mean(list(2 * jnp.eye(3)))
    np.testing.assert_allclose(mean, np.full(3, 2 / np.sqrt(3)), rtol=1e-5)
    first = transforms.karcher_mean(list(jnp.eye(3)), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(first, [1, 0, 0], atol=1e-5)


def test_model_stock_trusts_agreement() -> None:
    base = jnp.zeros(2)
    apart = transforms.model_stock(base, [jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])])
    np.testing.assert_allclose(apart, base, atol=1e-6)  # orthogonal moves are noise
    cosine = 1 / np.sqrt(2)
    ratio = 2 * cosine / (1 + cosine)
    near = transforms.model_stock(base, [jnp.asarray([1.0, 0.0]), jnp.asarray([1.0, 1.0])])
    np.testing.assert_allclose(near, ratio * np.asarray([1.0, 0.5]), rtol=1e-5)


def test_fisher_merging_weighs_entry_by_entry() -> None:
    a, b = jnp.asarray([1.0, 1.0, 1.0]), jnp.asarray([3.0, 3.0, 3.0])
    fishers = [jnp.asarray([1.0, 3.0, 0.0]), jnp.asarray([1.0, 1.0, 0.0])]
    np.testing.assert_allclose(transforms.fisher_merge([a, b], fishers), [2.0, 1.5, 2.0], rtol=1e-6)


def test_regmean_is_the_least_squares_fit_and_survives_dead_inputs() -> None:
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(9, 4)) for _ in range(2)]
    for x in xs:
        x[:, 3] = 0.0  # an input that nobody ever saw
    ws = [rng.normal(size=(4, 2)) for _ in range(2)]
    models = [
        {"d": {"kernel": jnp.asarray(w), "bias": jnp.full(2, float(i))}} for i, w in enumerate(ws)
    ]
    grams = [{"d/kernel": jnp.asarray(x.T @ x)} for x in xs]
    merged = transforms.regmean(models, grams, shrink=1.0, ridge=1e-7)["d"]
    want = np.linalg.lstsq(
        np.concatenate(xs)[:, :3],
        np.concatenate([x @ w for x, w in zip(xs, ws, strict=True)]),
        rcond=None,
    )[0]
    np.testing.assert_allclose(merged["kernel"][:3], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(merged["kernel"][3], (ws[0][3] + ws[1][3]) / 2, rtol=0.05, atol=1e-3)
    np.testing.assert_allclose(merged["bias"], 0.5)
    with pytest.raises(ValueError, match="no leaf 'd/kernl'"):
        transforms.regmean(models, [{"d/kernl": g["d/kernel"]} for g in grams])


def test_sce_by_hand() -> None:
    base = jnp.zeros(3)
    models = [jnp.asarray([1.0, 2.0, -1.0]), jnp.asarray([1.0, -1.0, -2.0])]
    weights = np.asarray([6.0, 6.0]) / 12
    want = [1.0, 2.0, -(weights[0] * 1 + weights[1] * 2)]
    np.testing.assert_allclose(transforms.sce(base, models), want, rtol=1e-6)
    # two entries vary; the more varying half of them is one
    np.testing.assert_allclose(transforms.sce(base, models, top=0.5), [0, 2.0, 0], rtol=1e-6)
    # a model of a share of 1e-8 has an entry for itself: all of its change
    models = [jnp.asarray([1.0, 0.0, 1.0]), jnp.asarray([0.0, 1e-4, 0.0])]
    np.testing.assert_allclose(transforms.sce(base, models), [1, 1e-4, 1], rtol=1e-5)
