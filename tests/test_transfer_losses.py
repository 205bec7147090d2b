"""Transfer objectives that have no row in the table: batch statistics, relations, norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses, normalization


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_bss_is_the_smallest_of_the_spectrum() -> None:
    x = normal(0, 5, 3)
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    np.testing.assert_allclose(losses.bss(x, k=1), s[-1] ** 2, rtol=1e-5)
    np.testing.assert_allclose(losses.bss(x, k=3), np.square(np.asarray(x)).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
        losses.bss(x, k=4)


@pytest.mark.parametrize("x", [jnp.eye(3), jnp.zeros((3, 3)), jnp.ones((3, 2))])
def test_bss_gradient_is_finite_for_repeated_and_zero_singular_values(x: jnp.ndarray) -> None:
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda x: losses.bss(x, k=2))(x))))


def test_coral_by_hand() -> None:
    a, b = normal(0, 6, 3), normal(1, 4, 3)
    gap = np.cov(np.asarray(a).T) - np.cov(np.asarray(b).T)
    np.testing.assert_allclose(losses.coral(a, b), (gap**2).sum() / (4 * 9), rtol=1e-5)
    assert losses.coral(a, a) == 0
    with pytest.raises(ValueError, match="of one width"):
        losses.coral(a, normal(1, 4, 2))


def test_mmd_by_double_loop() -> None:
    a, b, alphas = normal(0, 4, 3), normal(1, 5, 3), (0.5, 2.0)
    joint = np.concatenate([a, b]).astype(np.float64)
    every = np.square(joint[:, None] - joint[None]).sum(-1)
    np.testing.assert_allclose(losses.mean_squared_distance(a, b), every.mean(), rtol=1e-5)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        square = np.square(np.float64(x) - np.float64(y)).sum()
        return sum(np.exp(-square / (2 * alpha * 3.0)) for alpha in alphas)

    x, y = np.asarray(a), np.asarray(b)
    inside = [
        np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (x, y)
    ]
    want = sum(inside) - 2 * np.mean([kernel(p, q) for p in x for q in y])
    got = losses.mk_mmd(a, b, scale=3.0, alphas=alphas)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    linear = np.mean([
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 0))
    ])  # fmt: skip
    got = losses.mk_mmd_linear(a, b[:4], scale=3.0, alphas=alphas)
    np.testing.assert_allclose(got, linear, rtol=1e-4, atol=1e-6)


def test_mcc_is_zero_for_sure_predictions_and_largest_for_unsure_ones() -> None:
    sure = 1e4 * jnp.eye(3)[jnp.asarray([0, 1, 2, 0])]
    assert losses.mcc(sure) == 0
    np.testing.assert_allclose(losses.mcc(jnp.zeros((4, 3))), 2 / 3, rtol=1e-6)
    unused = sure.at[:, 2].set(-1e4)  # nobody predicts class 2: no NaN
    assert bool(jnp.isfinite(jax.grad(lambda z: losses.mcc(z))(unused)).all())
    weights = losses.entropy_weights(normal(0, 4, 3))
    np.testing.assert_allclose(jnp.mean(weights), 1, rtol=1e-6)


def test_afn_asks_every_norm_to_grow() -> None:
    x = normal(0, 4, 3)
    grads = jax.grad(lambda x: losses.afn(x, jax.lax.stop_gradient(losses.feature_norms(x))).sum())
    norms = np.linalg.norm(np.asarray(x), axis=-1, keepdims=True)
    np.testing.assert_allclose(grads(x), -2 * np.asarray(x) / norms, rtol=1e-5)
    assert bool(jnp.all(grads(jnp.zeros((2, 3))) == 0))


def test_uniform_contrast_by_hand_and_without_positives() -> None:
    scores = normal(0, 3, 4)
    positives = jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], jnp.bool_)
    log_p = np.log(softmax(np.asarray(scores, np.float64) / 0.5))
    want = [-np.log(2) - log_p[0, :2].mean(), -log_p[1, 3], 0]
    got = losses.uniform_contrast(scores, positives, temperature=0.5)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bi_tuning_classifier_by_hand() -> None:
    features, kernel, bias = normal(0, 4, 3), normal(1, 3, 2), normal(2, 2)
    labels = jnp.asarray([0, 1, 1, 0])
    f, w, b = (np.asarray(each, np.float64) for each in (features, kernel, bias))
    g = np.concatenate([f, np.ones((4, 1))], -1)
    v = np.concatenate([w.T, b[:, None]], -1)
    g, v = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (g, v))
    log_p = np.log(softmax(v[np.asarray(labels)] @ g.T / 0.07))
    same = np.asarray(labels)[:, None] == np.asarray(labels)[None]
    want = [-np.log(2) - row[mask].mean() for row, mask in zip(log_p, same, strict=True)]
    got = losses.bi_tuning_classifier(features, labels, class_weights=kernel, class_bias=bias)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_delta_attention_sums_to_one_and_prefers_damage() -> None:
    damage = jnp.asarray([0.0, 1.0, 3.0])
    standard = (np.asarray(damage) - 4 / 3) / np.std(np.asarray(damage), ddof=1)
    np.testing.assert_allclose(losses.delta_attention(damage), softmax(standard / 5), rtol=1e-6)
    np.testing.assert_allclose(losses.delta_attention(jnp.ones(4)), 0.25, rtol=1e-6)


def test_category_relation_with_an_empty_class_is_the_mean_and_never_nan() -> None:
    p = jnp.asarray([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    relation = losses.category_relation(p, jnp.asarray([0, 0, 2]), num_classes=4)
    np.testing.assert_allclose(
        relation, [[0.7, 0.3], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5]], rtol=1e-6
    )
    value = losses.co_tuning(normal(0, 4, 2), relation)
    assert bool(jnp.all(jnp.isfinite(value)))


def test_reverse_relation_is_bayes_rule() -> None:
    conditional = softmax(np.random.default_rng(0).normal(size=(3, 2)))
    prior = np.asarray([0.2, 0.3, 0.5])
    joint = conditional * prior[:, None]
    got = losses.reverse_relation(jnp.asarray(conditional), jnp.asarray(prior))
    np.testing.assert_allclose(got, (joint / joint.sum(0)).T, rtol=1e-5)
    empty = losses.reverse_relation(jnp.asarray([[1.0, 0.0]] * 3), jnp.asarray(prior))
    np.testing.assert_allclose(empty[1], prior, rtol=1e-6)


def test_fitted_logit_scale_minimizes_the_cross_entropy() -> None:
    logits, labels = 3 * normal(0, 40, 4), jnp.asarray(np.random.default_rng(1).integers(0, 4, 40))
    labels = jnp.where(
        jnp.arange(40) < 25, jnp.argmax(logits, axis=-1).astype(labels.dtype), labels
    )
    scale = losses.fit_logit_scale(logits, labels)

    def entropy(s: float) -> float:
        log_p = np.log(softmax(s * np.asarray(logits, np.float64)))
        return -log_p[np.arange(40), np.asarray(labels)].mean()

    s = float(scale)
    assert entropy(s) <= min(entropy(0.99 * s), entropy(1.01 * s))


def test_stoch_norm_is_batch_norm_where_drawn_and_the_running_one_elsewhere() -> None:
    x, one, zero = normal(0, 8, 3), jnp.ones(3), jnp.zeros(3)
    running = normalization.Running(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([1.0, 4.0, 9.0]))
    drawn = jnp.asarray([True, False, True])
    out, new = normalization.stoch_norm(x, one, zero, running, drawn)
    a = np.asarray(x, np.float64)
    batch = (a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
    fixed = (a - np.asarray(running.mean)) / np.sqrt(np.asarray(running.var) + 1e-5)
    np.testing.assert_allclose(
        out, np.where([True, False, True], batch, fixed), rtol=1e-4, atol=1e-5
    )
    want = 0.9 * np.asarray(running.var) + 0.1 * a.var(0, ddof=1)
    np.testing.assert_allclose(new.var, want, rtol=1e-5)
    assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(
        lambda leaf: leaf.dtype, running
    )
    with pytest.raises(ValueError, match="one value per channel"):
        normalization.stoch_norm(x[:1], one, zero, running, drawn)
