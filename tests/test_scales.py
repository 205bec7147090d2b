"""Features in any unit: what does not depend on the scale does not, what does scales exactly."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import connectors, losses, projection, transforms
from kdtl_jax import transferability as tr

RNG = np.random.default_rng(0)
ROWS = [jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32) for _ in range(2)]
MAPS = [jnp.asarray(RNG.normal(size=(3, 2, 3, 4)), jnp.float32) for _ in range(2)]
SCALES = (2.0**-40, 2.0**-23, 2.0**23, 2.0**40)  # powers of two: all else is rounding
LABELS = jnp.asarray([0, 0, 1, 1, 2, 2])

# Functions of two sides that do not change when each is multiplied by a number of its own.
SCALE_FREE: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "sp": (losses.sp, ROWS),
    "pkt": (functools.partial(losses.pkt, eps=1e-30), ROWS),
    "cc": (losses.cc, ROWS),
    "rkd_distance": (losses.rkd_distance, ROWS),
    "rkd_angle": (losses.rkd_angle, ROWS),
    "ega_edge": (losses.ega_edge, ROWS),
    "itrd_mutual": (losses.itrd_mutual, ROWS),
    "feature_correlation": (losses.feature_correlation, ROWS),
    "pkd_pearson": (functools.partial(losses.pkd_pearson, eps=0.0), MAPS),
    "info_nce": (losses.info_nce, ROWS),
    "cosine_distance": (losses.cosine_distance, ROWS),
    "attention_transfer": (losses.attention_transfer, MAPS),
    "factor_transfer": (losses.factor_transfer, MAPS),
    "catkd": (losses.catkd, MAPS),
    "ickd": (losses.ickd, MAPS),
    "nst": (losses.nst, MAPS),
    "affinity": (losses.affinity, MAPS),
    "skd_direction": (losses.skd_direction, ROWS),
    "ega_node": (losses.ega_node, ROWS),
    "dcd_invariance": (losses.dcd_invariance, ROWS),
    "kdsvd": (lambda s, t: losses.kdsvd([s, 2 * s], [t, s]), MAPS),
}


# Those that need squares of the features themselves, and say in what range.
IN_RANGE = {"pkt", "pkd_pearson", "cosine_distance", "attention_transfer", "factor_transfer"}
FAR = ((1e-20, 1e-20), (1e-28, 1.0), (1.0, 1e20), (1e20, 1e20))
NEAR = ((1e-15, 1e-15), (1e15, 1e15))


@pytest.mark.parametrize("name", SCALE_FREE)
def test_scale_free_losses(name: str) -> None:
    fn, (student, teacher) = SCALE_FREE[name]
    run = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(fn(s, t) ** 2)))
    want, slope = run(student, teacher)
    opposite = tuple((scale, 1 / scale) for scale in SCALES)
    for scale, other in opposite + (NEAR if name in IN_RANGE else FAR):
        value, gradient = run(scale * student, other * teacher)
        np.testing.assert_allclose(value, want, rtol=1e-3, atol=1e-6)
        # Homogeneous of degree -1, like the derivative of any function of directions.
        np.testing.assert_allclose(
            gradient * scale, slope, rtol=1e-2, atol=1e-4 * float(jnp.abs(slope).max())
        )


@pytest.mark.parametrize("scale", SCALES)
def test_ridge_hint_scales_with_the_teacher_alone(scale: float) -> None:
    student, teacher = ROWS
    want = losses.ridge_hint(student, teacher)
    np.testing.assert_allclose(losses.ridge_hint(scale * student, teacher), want, rtol=1e-3)


@pytest.mark.parametrize("scale", (1e-15, 1e-7, 1e7, 1e15))
def test_unit_norm_has_length_one_at_any_scale(scale: float) -> None:
    y = connectors.unit_norm().apply({}, scale * ROWS[0])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("scale", (1e-25, 2.0**-23, 2.0**23, 1e25))
def test_scores_of_features_in_any_unit(scale: float) -> None:
    features, labels = ROWS[0] + LABELS[:, None].astype(jnp.float32), LABELS
    for score in (tr.h_score, tr.regularized_h_score):
        want = score(features, labels, num_classes=3)
        got = score(scale * features, labels, num_classes=3)
        np.testing.assert_allclose(got, want, rtol=1e-3)
    targets = ROWS[1]
    for y in (targets, features[:, 0]):  # noise, and a perfect fit
        want = tr.logme(features, y)
        np.testing.assert_allclose(tr.logme(scale * features, y), want, rtol=1e-3)
        shifted = want - np.log(scale)
        np.testing.assert_allclose(tr.logme(features, scale * y), shifted, rtol=1e-3)


def test_projection_scales_with_the_ridge() -> None:
    x, y = ROWS
    want = projection.fit(x, y, ridge=0.1)
    for scale in (1e-7, 1e7):
        got = projection.fit(scale * x, y, ridge=0.1 * scale**2)
        np.testing.assert_allclose(got.kernel * scale, want.kernel, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got.bias, want.bias, rtol=1e-3, atol=1e-5)
    for scale, ridge in ((1e25, 0.1), (1.0, 1e39)):
        assert bool(jnp.isnan(projection.fit(scale * x, y, ridge=ridge).kernel).all())


@pytest.mark.parametrize("scale", (2.0**-60, 1.0, 2.0**40))
def test_fisher_information_in_any_unit(scale: float) -> None:
    a, b = jnp.asarray([1.0, 1.0, 1.0]), jnp.asarray([3.0, 3.0, 3.0])
    fishers = [scale * jnp.asarray([1.0, 3.0, 0.0]), scale * jnp.asarray([1.0, 1.0, 0.0])]
    merged = transforms.fisher_merge([a, b], fishers, [1.0, 3.0])
    np.testing.assert_allclose(merged, [2.5, 2.0, 2.5], rtol=1e-6)


@pytest.mark.parametrize("scale", (1e-12, 1.0))
def test_small_task_vectors_are_rescaled_too(scale: float) -> None:
    whole = scale * jnp.asarray([1.0, -2.0, 3.0])
    kept = whole * jnp.asarray([0.0, 1.0, 0.0])
    got = transforms.rescale_l1(kept, whole)
    np.testing.assert_allclose(got, scale * np.asarray([0, -6, 0]), rtol=1e-6)
    np.testing.assert_array_equal(transforms.rescale_l1(0 * kept, whole), jnp.zeros(3))


@pytest.mark.parametrize("scale", (1e-25, 1e25))
def test_fits_of_outputs_and_ranks_in_any_unit(scale: float) -> None:
    student, teacher = ROWS
    want = transforms.fit_alpha(student, teacher)
    for ours, theirs in ((scale, scale), (scale, 1.0), (1.0, scale)):
        got = transforms.fit_alpha(ours * student, theirs * teacher)
        np.testing.assert_allclose(got, want * (theirs / ours), rtol=1e-4)
    assert transforms.rank_for_energy(scale * student, 0.9) == transforms.rank_for_energy(
        student, 0.9
    )


def test_permutations_are_found_for_weights_in_any_unit() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(3, 6)), rng.normal(size=(6, 2))
    order = rng.permutation(6)
    axes = [("a", (None, "hidden")), ("b", ("hidden", None))]
    for scale in (1e-9, 1.0, 1e9):
        mine = {"a": scale * first, "b": scale * second}
        other = {"a": scale * first[:, order], "b": scale * second[order]}
        actual = transforms.match_permutations(mine, other, axes)
        np.testing.assert_array_equal(order[actual["hidden"]], np.arange(6))
