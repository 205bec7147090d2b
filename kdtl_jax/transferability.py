"""Transferability of source models to a target task, before training: scores and class relations.

Use scores to choose the model to start from: higher is better within one target task; scores of
different tasks or methods are not comparable. Work in float64 (`jax.enable_x64`) if there are many
features: LogME and the H-score need the spectrum. Relations between classes are Co-Tuning's targets
(`losses.co_tuning`).

Features are `[N, D]` and labels int `[N]`, classes of the target in `0..num_classes-1`, of which
empty ones contribute nothing. Scores are `[]`. `where` (bool `[N]`) marks the samples to include;
padded rows have no effect and may hold anything. ValueError: shapes do not fit or labels are out of
range; under `jit`, a label out of range makes the result NaN. TypeError: features are not floating
point, or labels are not integers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array


def leep(
    source_probabilities: Array, labels: Array, *, num_classes: int, where: Array | None = None
) -> Array:
    """`mean_i log sum_z p(y_i | z) theta(x_i)_z`: the log-likelihood of predicting through z.

    Args:
      source_probabilities: `[N, Z]`, from the source head on target samples, with rows that sum to
        1.

    Returns:
      `[]`, nats, <= 0. Source classes without mass contribute nothing.

    References:
      Nguyen et al., LEEP, 2020 (2002.12462).
    """
    _check_several_classes(source_probabilities=source_probabilities)
    theta, labels, one_hot, nan_if_invalid = _check_labeled(
        source_probabilities, labels, num_classes, where
    )
    joint = one_hot.T @ theta
    mass = jnp.sum(joint, axis=0, keepdims=True)
    conditional = joint / _numerics.nonzero(mass)
    likelihood = jnp.sum(conditional[labels] * theta, axis=-1)
    # The smallest number of the dtype: the log of a likelihood of 0 would be minus infinity.
    logs = jnp.log(jnp.maximum(likelihood, jnp.finfo(theta.dtype).tiny))
    return nan_if_invalid(_numerics.masked_mean(logs, where))


def nce(
    source_labels: Array,
    labels: Array,
    *,
    num_source_classes: int,
    num_classes: int,
    where: Array | None = None,
) -> Array:
    """`-H(Y | Z)`: the negative conditional entropy of target labels given source labels.

    Args:
      source_labels: int `[N]`, the source model's hard predictions on target samples.
      num_source_classes: number of source classes.

    Returns:
      `[]`, nats, <= 0.

    References:
      Tran, Nguyen and Hassner, Transferability and Hardness of Supervised Classification Tasks,
      2019 (1908.08142).
    """
    ones = jnp.ones((jnp.shape(labels)[0], 1), jnp.result_type(float))
    _, _, one_hot, nan_if_invalid = _check_labeled(ones, labels, num_classes, where)
    _, _, source_one_hot, source_nan_if_invalid = _check_labeled(
        ones, source_labels, num_source_classes, where
    )
    joint = one_hot.T @ source_one_hot / _numerics.row_count(ones, where)
    mass = jnp.sum(joint, axis=0, keepdims=True)
    ratio = joint / _numerics.nonzero(mass)
    return source_nan_if_invalid(
        nan_if_invalid(jnp.sum(joint * jnp.log(jnp.where(joint != 0, ratio, 1))))
    )


def logme(
    features: Array, targets: Array, *, iterations: int = 11, where: Array | None = None
) -> Array:
    """Log maximum evidence per sample of Bayesian linear regression from features to targets.

    Alternates `alpha = gamma / ||m||^2`, `beta = (N - gamma) / ||y - F m||^2` until
    `alpha / beta` moves by less than 1%. Scaling the features has no effect; scaling the targets by
    c subtracts `log c`.

    Args:
      targets: `[N]` or `[N, K]` real, averaged over K; for classes `jax.nn.one_hot(labels, C)`.
      iterations: maximum number of iterations.

    References:
      You et al., LogME, 2021 (2102.11005), algorithm 1.
    """
    _checks.floating(features=features, targets=targets)
    _checks.rank(2, 2, features=features)
    _checks.rank(1, 2, targets=targets)
    _checks.same_batch(features=features, targets=targets)
    _checks.nonempty(features=features)
    _checks.mask(where, jnp.shape(features)[:1])
    _checks.count(0, iterations=iterations)
    # Rows of zeros, targets included, add nothing to the spectrum, the fit or the residual.
    features = _numerics.rescaled(_numerics.kept(_numerics.upcast(features), where))
    count, width = _numerics.row_count(features, where), features.shape[1]
    u, s, _ = jnp.linalg.svd(features, full_matrices=False)
    s2 = jnp.square(s)
    targets = _numerics.kept(_numerics.upcast(targets).astype(features.dtype), where)
    columns = targets.reshape(len(features), -1)
    units = _numerics.largest(columns, axis=0)  # their squares stay in range
    rounding = jnp.finfo(features.dtype).eps
    largest_eigenvalue = jnp.where(s2[0] != 0, s2[0], 1)

    def evidence(y: Array) -> Array:
        projected = u.T @ y
        energy = jnp.sum(jnp.square(y))
        energy = jnp.where(energy != 0, energy, 1)
        residual_energy = jnp.maximum(jnp.sum(jnp.square(y)) - jnp.sum(jnp.square(projected)), 0)

        def terms(alpha: Array, beta: Array) -> tuple[Array, Array, Array]:
            # m = V (s beta u^T y) / (alpha + beta s^2), so norms need only the spectrum.
            denominator = alpha + beta * s2
            gamma = jnp.sum(beta * s2 / denominator)
            m2 = jnp.sum(jnp.square(beta * s * projected / denominator))
            residual = residual_energy + jnp.sum(jnp.square(alpha / denominator * projected))
            # A perfect fit, or none, up to rounding, in the units of each.
            m2 = jnp.maximum(m2, rounding * energy / largest_eigenvalue)
            return gamma, m2, jnp.maximum(residual, rounding * energy)

        def body(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            alpha, beta, is_done = state
            gamma, m2, residual = terms(alpha, beta)
            new_alpha = gamma / m2
            new_beta = jnp.maximum(count - gamma, rounding) / residual
            ratio, new_ratio = alpha / beta, new_alpha / new_beta
            settled = jnp.abs(new_ratio - ratio) / ratio < 0.01
            alpha = jnp.where(is_done, alpha, new_alpha)
            return alpha, jnp.where(is_done, beta, new_beta), is_done | settled

        # 1 and 1 for features of spectral norm 1 and targets of mean square 1: units do not matter.
        beta = count / energy
        start = (largest_eigenvalue * beta, beta, jnp.asarray(False))
        alpha, beta, _ = jax.lax.fori_loop(0, iterations, body, start)
        _, m2, residual = terms(alpha, beta)
        # Directions beyond the spectrum have s = 0.
        logdet = jnp.sum(jnp.log(alpha + beta * s2)) + (width - s.shape[0]) * jnp.log(alpha)
        fit = width * jnp.log(alpha) + count * jnp.log(beta) - logdet
        return (fit - beta * residual - alpha * m2 - count * jnp.log(2 * jnp.pi)) / (2 * count)

    return jnp.mean(jax.vmap(evidence, in_axes=1)(columns / units) - jnp.log(units[0]))


def h_score(
    features: Array, labels: Array, *, num_classes: int, where: Array | None = None
) -> Array:
    """`tr(pinv(cov(f)) cov(E[f | y]))`: the share of whitened variance that classes explain.

    Takes `[N, D]` features and int `[N]` labels.

    Returns:
      `[]`, in `[0, min(D, C - 1)]`.

    References:
      Bao et al., An Information-Theoretic Approach to Transferability, 2019.
    """
    centered, between, count, nan_if_invalid = _class_means(features, labels, num_classes, where)
    whitening = jnp.linalg.pinv(centered.T @ centered / count, hermitian=True)
    return nan_if_invalid(jnp.sum(whitening * (between.T @ between / count)))


def regularized_h_score(
    features: Array, labels: Array, *, num_classes: int, where: Array | None = None
) -> Array:
    """`h_score` with Ledoit and Wolf's shrunken covariance, for few samples with many features.

    `(1 - a) tr(((1 - a) S + a mu I)^-1 cov(E[f | y]))`, with `mu = tr S / D` and a the optimal
    share.

    Takes `[N, D]` features and int `[N]` labels; returns `[]`. Errors are as in `h_score`.

    References:
      Ibrahim, Ponomareva and Mazumder, Newer is not always better, 2021 (2110.06893); Ledoit
      and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.
    """
    centered, between, count, nan_if_invalid = _class_means(features, labels, num_classes, where)
    width = centered.shape[1]
    covariance = centered.T @ centered / count
    mu = jnp.trace(covariance) / width
    spread = jnp.sum(jnp.square(covariance - mu * jnp.eye(width, dtype=covariance.dtype)))
    fourth = jnp.sum(jnp.square(jnp.sum(jnp.square(centered), axis=-1))) / count
    noise = jnp.minimum((fourth - jnp.sum(jnp.square(covariance))) / count, spread)
    shrinkage = _numerics.ratio(noise, spread, 1)
    eye = jnp.eye(width, dtype=covariance.dtype)
    # Features that never vary explain nothing; any invertible matrix then gives 0.
    regularized = (1 - shrinkage) * covariance + shrinkage * jnp.where(mu != 0, mu, 1) * eye
    explained = between.T @ between / count
    return nan_if_invalid((1 - shrinkage) * jnp.trace(jnp.linalg.solve(regularized, explained)))


def transrate(
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    eps: float = 1e-4,
    where: Array | None = None,
) -> Array:
    """`R(f) - sum_c n_c / n R(f_c)`, the coding rate `R = 1/2 logdet(I + f^T f / (n eps))`.

    Args:
      features: `[N, D]`; their mean is removed.
      eps: distortion, in squared feature units: scale the features first, as the authors do.

    Returns:
      `[]`, nats. The published code averages over classes without the weights `n_c / n`.

    References:
      Huang et al., Frustratingly Easy Transferability Estimation, 2022 (2106.09362).
    """
    _checks.scalar(eps=eps)
    _checks.positive(eps=eps)
    features, _, one_hot, nan_if_invalid = _check_labeled(features, labels, num_classes, where)
    features = _numerics.centered(features, where)

    def rate(weights: Array) -> Array:
        count = jnp.maximum(jnp.sum(weights), 1)
        gram = (features * weights[:, None]).T @ features / (count * eps)
        return jnp.linalg.slogdet(jnp.eye(features.shape[1], dtype=features.dtype) + gram)[1] / 2

    shares = jnp.sum(one_hot, axis=0) / _numerics.row_count(features, where)
    by_class = jax.vmap(rate, in_axes=1)(one_hot)
    ones = jnp.ones(features.shape[:1], features.dtype)
    return nan_if_invalid(rate(_numerics.kept(ones, where)) - jnp.sum(shares * by_class))


def category_relation(
    probabilities: Array, labels: Array, *, num_classes: int, where: Array | None = None
) -> Array:
    """Row c = mean of the source probabilities over the target samples of class c.

    This is the direct relation `p(source class | target class)`. For the calibrated relation, pass
    `softmax(temperatures.fit_logit_scale(...) * logits)`.

    Args:
      probabilities: `[N, Cs]`, from the source head on target samples, with rows that sum to 1.
      num_classes: Ct.

    Returns:
      `[Ct, Cs]`. A class without samples gets the mean over all samples.

    References:
      You et al., Co-Tuning for Transfer Learning, NeurIPS 2020, direct approach.
    """
    _checks.floating(probabilities=probabilities)
    _checks.rank(2, 2, probabilities=probabilities)
    _check_several_classes(probabilities=probabilities)
    rows, _, one_hot, nan_if_invalid = _check_labeled(probabilities, labels, num_classes, where)
    count = jnp.sum(one_hot, axis=0)[:, None]
    means = one_hot.T @ rows / jnp.maximum(count, 1)
    return nan_if_invalid(jnp.where(count != 0, means, _numerics.row_mean(rows, where)))


def reverse_relation(conditional: Array, prior: Array) -> Array:
    """`R[c, s] = p(c | s) p(s) / sum_s' p(c | s') p(s')`: the reverse relation, by Bayes' rule.

    Args:
      conditional: `[Cs, Ct]`, `p(target class | source class)`: a classifier trained from source
        probabilities to target labels, evaluated at one-hot rows.
      prior: `[Cs]`, mean source probabilities over the target samples.

    Returns:
      `[Ct, Cs]`, with rows that sum to 1; a target class that no source class predicts gets the
      prior.

    References:
      You et al., Co-Tuning for Transfer Learning, NeurIPS 2020, reverse approach.
    """
    _checks.floating(conditional=conditional, prior=prior)
    _checks.rank(2, 2, conditional=conditional)
    _checks.rank(1, 1, prior=prior)
    _checks.nonempty(conditional=conditional)
    conditional, prior = _numerics.upcast(conditional), _numerics.upcast(prior)
    if prior.shape[0] != conditional.shape[0]:
        raise ValueError(
            "expected conditional [Cs, Ct] and prior [Cs], got "
            f"{_checks.described(conditional=conditional, prior=prior)}."
        )
    prior = prior.astype(conditional.dtype)
    joint = (conditional * prior[:, None]).T
    total = jnp.sum(joint, axis=-1, keepdims=True)
    fallback = (prior / jnp.sum(prior))[None, :]
    return _numerics.ratio(joint, total, fallback)


def _check_several_classes(**probabilities: Array) -> None:
    for name, rows in probabilities.items():
        if jnp.shape(rows)[-1:] == (1,):
            raise ValueError(
                f"{name} of one class are always 1, got {_checks.described(**{name: rows})}. For a "
                "sigmoid's p, use jnp.concatenate([1 - p, p], axis=-1)."
            )


NanIfInvalid = Callable[[Array], Array]  # of a value, if a label is out of range


def _check_labeled(
    features: Array, labels: Array, num_classes: int, where: Array | None
) -> tuple[Array, Array, Array, NanIfInvalid]:
    """Features, labels and one-hot labels, 0 in masked rows."""
    _checks.floating(features=features)
    _checks.rank(2, 2, features=features)
    _checks.nonempty(features=features)
    _checks.count(1, num_classes=num_classes)
    count = jnp.shape(features)[0]
    _checks.labels(labels, jax.ShapeDtypeStruct((count, num_classes), jnp.float32), where)
    features = _numerics.kept(_numerics.upcast(features), where)
    labels, usable = _numerics.usable_labels(labels, num_classes, where)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
    is_valid = jnp.all(usable if where is None else usable | ~where)
    one_hot = _numerics.kept(one_hot, None if where is None else usable)
    return features, labels, one_hot, lambda value: jnp.where(is_valid, value, jnp.nan)


def _class_means(
    features: Array, labels: Array, num_classes: int, where: Array | None
) -> tuple[Array, Array, Array, NanIfInvalid]:
    """Centered features, their class mean for every sample, and the number of samples."""
    features, labels, one_hot, nan_if_invalid = _check_labeled(features, labels, num_classes, where)
    centered = _numerics.centered(_numerics.rescaled(features), where)
    sizes = jnp.maximum(jnp.sum(one_hot, axis=0), 1)
    means = one_hot.T @ centered / sizes[:, None]
    between = _numerics.kept(means[labels], where)
    return centered, between, _numerics.row_count(features, where), nan_if_invalid
