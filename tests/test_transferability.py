"""Transferability scores against their definitions, and with classes that never occur."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses
from kdtl_jax import transferability as tr

RNG = np.random.default_rng(0)
LABELS = np.asarray([0, 0, 1, 1, 2, 2, 0, 1, 2, 2], np.int32)
FEATURES = RNG.normal(size=(10, 4)) + LABELS[:, None]
SOURCE = RNG.dirichlet(np.ones(3), size=10)


def class_means(features: np.ndarray) -> np.ndarray:
    centered = features - features.mean(0)
    return np.stack([centered[LABELS == label].mean(0) for label in LABELS])


@pytest.mark.usefixtures("x64")
def test_leep_by_its_definition_and_with_a_source_class_nobody_predicts() -> None:
    joint = np.stack([SOURCE[LABELS == y].sum(0) for y in range(3)]) / 10
    conditional = joint / joint.sum(0)
    want = np.mean(np.log((conditional[LABELS] * SOURCE).sum(-1)))
    got = tr.leep(jnp.asarray(SOURCE), jnp.asarray(LABELS), num_classes=3)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    unused = jnp.asarray(np.concatenate([SOURCE, np.zeros((10, 1))], -1))
    np.testing.assert_allclose(
        tr.leep(unused, jnp.asarray(LABELS), num_classes=5), want, rtol=1e-10
    )


@pytest.mark.usefixtures("x64")
def test_nce_is_the_negative_conditional_entropy() -> None:
    z = np.asarray([0, 0, 1, 1, 1, 3, 0, 0, 3, 3], np.int32)  # source class 2 is never predicted
    want = 0.0
    for label in range(3):
        for source in (0, 1, 3):
            p = np.mean((LABELS == label) & (z == source))
            want += p * np.log(p / np.mean(z == source)) if p else 0.0
    got = tr.nce(jnp.asarray(z), jnp.asarray(LABELS), num_source_classes=4, num_classes=3)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    same = tr.nce(jnp.asarray(LABELS), jnp.asarray(LABELS), num_source_classes=3, num_classes=3)
    assert same == 0  # knowing the source label tells everything


def log_evidence(f: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """log N(y; 0, I / beta + f f^T / alpha) / N, the quantity LogME maximizes."""
    covariance = np.eye(len(y)) / beta + f @ f.T / alpha
    logdet = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return float(-(logdet + y @ np.linalg.solve(covariance, y)) / 2 / len(y))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [4, 15])  # fewer and more features than samples
def test_logme_is_the_largest_evidence(width: int) -> None:
    rng = np.random.default_rng(width)
    f = rng.normal(size=(10, width))
    y = f[:, 0] - 0.5 * f[:, 1] + 0.5 * rng.normal(size=10)
    got = float(tr.logme(jnp.asarray(f), jnp.asarray(y), iterations=100))
    grid = np.exp(np.linspace(-4, 6, 41))
    best = max(log_evidence(f, y, a, b) for a in grid for b in grid)
    assert got == pytest.approx(best, abs=0.02)


@pytest.mark.usefixtures("x64")
def test_logme_averages_over_columns_and_is_finite_at_its_edges() -> None:
    f, y = jnp.asarray(FEATURES), jnp.asarray(np.eye(4)[LABELS])  # class 3 never occurs
    columns = [tr.logme(f, y[:, i]) for i in range(4)]
    np.testing.assert_allclose(tr.logme(f, y), np.mean(columns), rtol=1e-10)
    assert np.isfinite(tr.logme(f, f[:, 0]))  # a perfect fit


def score(name: str, features: Any, labels: Any, num_classes: int) -> float:
    return float(
        getattr(tr, name)(jnp.asarray(features), jnp.asarray(labels), num_classes=num_classes)
    )


@pytest.mark.usefixtures("x64")
def test_h_score_by_its_definition() -> None:
    centered, means = FEATURES - FEATURES.mean(0), class_means(FEATURES)
    want = np.trace(np.linalg.pinv(centered.T @ centered) @ means.T @ means)
    assert score("h_score", FEATURES, LABELS, 3) == pytest.approx(want, rel=1e-9)
    doubled = np.concatenate([FEATURES, FEATURES], -1)  # a singular covariance adds nothing
    assert score("h_score", doubled, LABELS, 3) == pytest.approx(want, rel=1e-6)


@pytest.mark.usefixtures("x64")
def test_regularized_h_score_by_its_definition() -> None:
    n, d = FEATURES.shape
    x, means = FEATURES - FEATURES.mean(0), class_means(FEATURES)
    s = x.T @ x / n
    mu = np.trace(s) / d
    delta = ((s - mu * np.eye(d)) ** 2).sum()
    beta = sum(((np.outer(row, row) - s) ** 2).sum() for row in x) / n**2
    a = min(beta, delta) / delta
    shrunken = (1 - a) * s + a * mu * np.eye(d)
    want = (1 - a) * np.trace(np.linalg.solve(shrunken, means.T @ means / n))
    assert score("regularized_h_score", FEATURES, LABELS, 3) == pytest.approx(want, rel=1e-9)


@pytest.mark.usefixtures("x64")
def test_transrate_by_its_definition() -> None:
    def rate(z: np.ndarray) -> float:
        return np.linalg.slogdet(np.eye(4) + z.T @ z / (len(z) * 1e-4))[1] / 2

    z = FEATURES - FEATURES.mean(0)
    want = rate(z) - sum(np.mean(LABELS == c) * rate(z[LABELS == c]) for c in range(3))
    assert score("transrate", FEATURES, LABELS, 3) == pytest.approx(want, rel=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["h_score", "regularized_h_score", "transrate"])
def test_scores_rank_separated_features_first_and_ignore_empty_classes(name: str) -> None:
    noise = np.random.default_rng(1).normal(size=(10, 4))
    apart = noise + 5 * np.eye(4)[LABELS]
    assert score(name, apart, LABELS, 3) > score(name, noise, LABELS, 3)
    assert score(name, apart, LABELS, 6) == pytest.approx(score(name, apart, LABELS, 3), rel=1e-9)


def test_constant_features_give_no_nan() -> None:
    flat = jnp.ones((10, 4))
    for name in ("h_score", "regularized_h_score", "transrate"):
        assert np.isfinite(score(name, flat, LABELS, 3)), name
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        tr.leep(flat, jnp.asarray(LABELS), num_classes=2)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_category_relation_with_an_empty_class_is_the_mean_and_never_nan() -> None:
    p = jnp.asarray([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    relation = tr.category_relation(p, jnp.asarray([0, 0, 2]), num_classes=4)
    np.testing.assert_allclose(
        relation, [[0.7, 0.3], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5]], rtol=1e-6
    )
    value = losses.co_tuning(jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32), relation)
    assert bool(jnp.all(jnp.isfinite(value)))


def test_reverse_relation_is_bayes_rule() -> None:
    conditional = softmax(np.random.default_rng(0).normal(size=(3, 2)))
    prior = np.asarray([0.2, 0.3, 0.5])
    joint = conditional * prior[:, None]
    got = tr.reverse_relation(jnp.asarray(conditional), jnp.asarray(prior))
    np.testing.assert_allclose(got, (joint / joint.sum(0)).T, rtol=1e-5)
    empty = tr.reverse_relation(jnp.asarray([[1.0, 0.0]] * 3), jnp.asarray(prior))
    np.testing.assert_allclose(empty[1], prior, rtol=1e-6)


def test_sigmoid_outputs_are_not_taken_for_the_only_class() -> None:
    p, labels = jnp.asarray([[0.9], [0.2]]), jnp.asarray([1, 0])
    for score in (tr.leep, tr.category_relation):
        with pytest.raises(ValueError, match=r"of one class are always 1, got .*\[2, 1\]"):
            score(p, labels, num_classes=2)
        assert bool(
            jnp.isfinite(score(jnp.concatenate([1 - p, p], -1), labels, num_classes=2)).all()
        )
