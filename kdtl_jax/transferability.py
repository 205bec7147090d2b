"""Transferability scores: which source model to start from, before any training.

Higher is better within one target task; scores of different tasks or methods do not compare. Work
in float64 (`jax.enable_x64`) where features are many: LogME and the H-score need the spectrum.
"""

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array


def leep(source_probabilities: Array, labels: Array, *, num_classes: int) -> Array:
    """`mean_i log sum_z p(y_i | z) theta(x_i)_z`: the log-likelihood of predicting through z.

    Args:
      source_probabilities: `[N, Z]`, the source head's on target samples, rows summing to 1.
      labels: int `[N]`, target classes.
      num_classes: number of target classes.

    Returns:
      `[]`, nats, <= 0. Source classes without any mass contribute nothing.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if labels are not integers.

    References:
      Nguyen et al., LEEP, 2020 (2002.12462).
    """
    theta = _features("leep", source_probabilities, labels, num_classes)
    member = jax.nn.one_hot(labels, num_classes, dtype=theta.dtype)
    joint = member.T @ theta
    mass = jnp.sum(joint, axis=0, keepdims=True)
    conditional = joint / jnp.where(mass > 0, mass, 1)
    likelihood = jnp.sum(conditional[labels] * theta, axis=-1)
    return jnp.mean(jnp.log(jnp.maximum(likelihood, jnp.finfo(theta.dtype).tiny)))


def nce(source_labels: Array, labels: Array, *, num_source_classes: int, num_classes: int) -> Array:
    """`-H(Y | Z)`: the negative conditional entropy of target labels given source labels.

    Args:
      source_labels: int `[N]`, the source model's hard predictions on target samples.
      labels: int `[N]`, target classes.
      num_source_classes: number of source classes.
      num_classes: number of target classes.

    Returns:
      `[]`, nats, <= 0.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if labels are not integers.

    References:
      Tran, Nguyen and Hassner, Transferability and Hardness of Supervised Classification Tasks,
      2019 (1908.08142).
    """
    count = jnp.shape(labels)[0]
    _checks.labels(labels, jnp.zeros((count, num_classes)))
    _checks.labels(source_labels, jnp.zeros((count, num_source_classes)))
    dtype = jnp.result_type(float)
    member = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    source = jax.nn.one_hot(source_labels, num_source_classes, dtype=dtype)
    joint = member.T @ source / count
    mass = jnp.sum(joint, axis=0, keepdims=True)
    ratio = joint / jnp.where(mass > 0, mass, 1)
    return jnp.sum(joint * jnp.log(jnp.where(joint > 0, ratio, 1)))


def logme(features: Array, targets: Array, *, iterations: int = 11) -> Array:
    """Log maximum evidence per sample of Bayesian linear regression from features to targets.

    Alternates `alpha = gamma / ||m||^2`, `beta = (N - gamma) / ||y - F m||^2` until
    `alpha / beta` moves by less than 1%.

    Args:
      features: `[N, D]`.
      targets: `[N]` or `[N, K]` real, averaged over K; for classes `jax.nn.one_hot(labels, C)`.
      iterations: at most this many.

    Returns:
      `[]`.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if an argument is not floating point.

    References:
      You et al., LogME, 2021 (2102.11005), algorithm 1.
    """
    _checks.floating(features=features, targets=targets)
    _checks.rank(2, 2, features=features)
    _checks.rank(1, 2, targets=targets)
    _checks.same_batch(features=features, targets=targets)
    _checks.nonempty(features=features)
    features = _numerics.upcast(features)
    count, width = features.shape
    u, s, _ = jnp.linalg.svd(features, full_matrices=False)
    s2 = jnp.square(s)
    columns = _numerics.upcast(targets).astype(features.dtype).reshape(count, -1)
    tiny = jnp.finfo(features.dtype).eps

    def evidence(y: Array) -> Array:
        projected = u.T @ y
        outside = jnp.maximum(jnp.sum(jnp.square(y)) - jnp.sum(jnp.square(projected)), 0)

        def terms(alpha: Array, beta: Array) -> tuple[Array, Array, Array]:
            # m = V (s beta u^T y) / (alpha + beta s^2), so norms need the spectrum alone.
            denominator = alpha + beta * s2
            gamma = jnp.sum(beta * s2 / denominator)
            m2 = jnp.sum(jnp.square(beta * s * projected / denominator))
            residual = outside + jnp.sum(jnp.square(alpha / denominator * projected))
            return gamma, jnp.maximum(m2, tiny), jnp.maximum(residual, tiny)

        def body(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            alpha, beta, done = state
            gamma, m2, residual = terms(alpha, beta)
            new_alpha = gamma / m2
            new_beta = jnp.maximum(count - gamma, tiny) / residual
            ratio, new_ratio = alpha / beta, new_alpha / new_beta
            settled = jnp.abs(new_ratio - ratio) / ratio < 0.01
            alpha = jnp.where(done, alpha, new_alpha)
            return alpha, jnp.where(done, beta, new_beta), done | settled

        one = jnp.ones((), features.dtype)
        alpha, beta, _ = jax.lax.fori_loop(0, iterations, body, (one, one, jnp.asarray(False)))
        _, m2, residual = terms(alpha, beta)
        # Directions beyond the spectrum have s = 0.
        logdet = jnp.sum(jnp.log(alpha + beta * s2)) + (width - s.shape[0]) * jnp.log(alpha)
        fit = width * jnp.log(alpha) + count * jnp.log(beta) - logdet
        return (fit - beta * residual - alpha * m2 - count * jnp.log(2 * jnp.pi)) / (2 * count)

    return jnp.mean(jax.vmap(evidence, in_axes=1)(columns))


def h_score(features: Array, labels: Array, *, num_classes: int) -> Array:
    """`tr(pinv(cov(f)) cov(E[f | y]))`: the share of whitened variance that classes explain.

    Args:
      features: `[N, D]`.
      labels: int `[N]`.
      num_classes: number of classes; empty ones contribute nothing.

    Returns:
      `[]`, in `[0, min(D, C - 1)]`.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if labels are not integers.

    References:
      Bao et al., An Information-Theoretic Approach to Transferability, 2019.
    """
    features = _features("h_score", features, labels, num_classes)
    centered, between = _class_means(features, labels, num_classes)
    within_rank = jnp.linalg.pinv(centered.T @ centered / features.shape[0], hermitian=True)
    return jnp.sum(within_rank * (between.T @ between / features.shape[0]))


def regularized_h_score(features: Array, labels: Array, *, num_classes: int) -> Array:
    """`h_score` with Ledoit and Wolf's shrunken covariance: for few samples of many features.

    `(1 - a) tr(((1 - a) S + a mu I)^-1 cov(E[f | y]))` with `mu = tr S / D`, a the optimal share.

    Arguments and errors as `h_score`'s.

    References:
      Ibrahim, Ponomareva and Mazumder, Newer is not always better, 2021 (2110.06893); Ledoit
      and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.
    """
    features = _features("regularized_h_score", features, labels, num_classes)
    count, width = features.shape
    centered, between = _class_means(features, labels, num_classes)
    covariance = centered.T @ centered / count
    mu = jnp.trace(covariance) / width
    spread = jnp.sum(jnp.square(covariance - mu * jnp.eye(width, dtype=covariance.dtype)))
    fourth = jnp.sum(jnp.square(jnp.sum(jnp.square(centered), axis=-1))) / count
    noise = jnp.minimum((fourth - jnp.sum(jnp.square(covariance))) / count, spread)
    shrinkage = jnp.where(spread > 0, noise / jnp.where(spread > 0, spread, 1), 1)
    eye = jnp.eye(width, dtype=covariance.dtype)
    # Features that never vary explain nothing; any invertible matrix then gives 0.
    shrunken = (1 - shrinkage) * covariance + shrinkage * jnp.where(mu > 0, mu, 1) * eye
    explained = between.T @ between / count
    return (1 - shrinkage) * jnp.trace(jnp.linalg.solve(shrunken, explained))


def transrate(features: Array, labels: Array, *, num_classes: int, eps: float = 1e-4) -> Array:
    """`R(f) - sum_c n_c / n R(f_c)`, the coding rate `R = 1/2 logdet(I + f^T f / (n eps))`.

    Args:
      features: `[N, D]`; their mean is removed.
      labels: int `[N]`.
      num_classes: number of classes; empty ones contribute nothing.
      eps: distortion.

    Returns:
      `[]`, nats. The published code averages over classes without the weights `n_c / n`.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if labels are not integers.

    References:
      Huang et al., Frustratingly Easy Transferability Estimation, 2022 (2106.09362).
    """
    features = _features("transrate", features, labels, num_classes)
    _checks.positive(eps=eps)
    features = features - jnp.mean(features, axis=0, keepdims=True)
    member = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)

    def rate(weights: Array) -> Array:
        count = jnp.maximum(jnp.sum(weights), 1)
        gram = (features * weights[:, None]).T @ features / (count * eps)
        return jnp.linalg.slogdet(jnp.eye(features.shape[1], dtype=features.dtype) + gram)[1] / 2

    shares = jnp.mean(member, axis=0)
    by_class = jax.vmap(rate, in_axes=1)(member)
    return rate(jnp.ones(features.shape[:1], features.dtype)) - jnp.sum(shares * by_class)


def _features(fn: str, features: Array, labels: Array, num_classes: int) -> Array:
    _checks.floating(features=features)
    _checks.rank(2, 2, features=features)
    _checks.nonempty(features=features)
    _checks.labels(labels, jnp.zeros((jnp.shape(features)[0], num_classes)))
    return _numerics.upcast(features)


def _class_means(features: Array, labels: Array, num_classes: int) -> tuple[Array, Array]:
    """Centered features, and every sample's class mean of them."""
    centered = features - jnp.mean(features, axis=0, keepdims=True)
    member = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
    count = jnp.maximum(jnp.sum(member, axis=0), 1)
    means = member.T @ centered / count[:, None]
    return centered, means[labels]
