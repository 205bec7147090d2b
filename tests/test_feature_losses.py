"""What the table of losses cannot say of features, maps and derivatives: values by hand, edges."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import losses, testing


def test_attention_map_is_a_unit_vector_of_where(x64: None) -> None:
    x = jnp.zeros((1, 2, 2, 3)).at[0, 0, 1].set(5.0).at[0, 1, 0, 0].set(2.0)
    np.testing.assert_allclose(
        losses.attention_map(x)[0], np.asarray([0, 75, 4, 0]) / math.hypot(75, 4), rtol=1e-12
    )
    np.testing.assert_array_equal(losses.attention_map(0 * x), jnp.zeros((1, 4)))


def test_flow_matrix_by_hand_and_masked(x64: None) -> None:
    first, second = jnp.asarray([[[1.0], [2.0], [9.0]]]), jnp.asarray([[[3.0], [4.0], [9.0]]])
    where = jnp.asarray([[True, True, False]])
    np.testing.assert_allclose(losses.flow_matrix(first, second, where=where), [[[5.5]]])
    empty = losses.flow_matrix(first, second, where=jnp.zeros_like(where))
    np.testing.assert_array_equal(empty, [[[0.0]]])


@pytest.mark.parametrize("bn", [(0.7, 0.3), (1.5, -1.0), (-0.4, 0.0), (0.5, 1.4)])
def test_ofd_margin_is_a_conditional_mean(x64: None, bn: tuple[float, float]) -> None:
    scale, offset = bn
    x = np.linspace(offset - 12 * abs(scale), 0, 200_001)
    density = np.exp(-0.5 * ((x - offset) / scale) ** 2)
    want = np.trapezoid(x * density, x) / np.trapezoid(density, x)
    got = losses.ofd_margin(jnp.asarray([scale]), jnp.asarray([offset]))
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_ofd_margin_names_its_own_arguments() -> None:
    with pytest.raises(ValueError, match=r"bn_scale\[3\], bn_offset\[4\]"):
        losses.ofd_margin(jnp.ones(3), jnp.ones(4))
    with pytest.raises(TypeError, match="bn_offset must be floating point"):
        losses.ofd_margin(jnp.ones(3), jnp.ones(3, jnp.int32))


def test_ofd_margin_of_channels_that_are_never_negative(x64: None) -> None:
    scale, offset = jnp.asarray([0.5, 0.5, 0.0, 0.0]), jnp.asarray([1.6, 50.0, 2.0, -2.0])
    got = losses.ofd_margin(scale, offset)
    np.testing.assert_allclose(got, [-1.5, -1.5, 0.0, -2.0])


def test_all_sign_probes_give_the_exact_jacobian_loss(x64: None) -> None:
    """E[v v^T] = I over all sign vectors, so Hutchinson's estimate is exact there."""
    rng = np.random.default_rng(4)
    weights = jnp.asarray(rng.normal(size=(2, 3, 2)))
    inputs = jnp.asarray(rng.normal(size=(4, 3)))
    student, teacher = (lambda x, w=w: jnp.sin(x @ w) for w in weights)
    signs = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=2)))
    probes = jnp.broadcast_to(signs[:, None, :], (4, 4, 2))
    np.testing.assert_allclose(
        losses.jacobian_matching(student, teacher, inputs, probes),
        losses.jacobian_matching_exact(student, teacher, inputs),
        rtol=1e-12,
    )


def test_jacobian_probes_must_fit_the_output() -> None:
    inputs = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"probes\[2, 4\], output\[4, 3\]"):
        losses.jacobian_matching(jnp.sin, jnp.cos, inputs, jnp.ones((2, 4)))


def test_kdsvd_is_finite_where_singular_values_repeat() -> None:
    equal = jnp.broadcast_to(jnp.eye(4, dtype=jnp.float32).reshape(1, 2, 2, 4), (2, 2, 2, 4))
    student, teacher = [equal, 2 * equal], [equal + 0.1, equal]

    def total(student: list[Array]) -> Array:
        return jnp.sum(losses.kdsvd(student, teacher))

    value, gradient = testing.compiled(jax.value_and_grad(total), student)(student)
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.isfinite(g).all()) for g in gradient)
    with pytest.raises(ValueError, match="two or more, got 1 and 1"):
        losses.kdsvd([equal], [equal])


def test_two_layers_of_one_side_are_not_called_student_and_teacher() -> None:
    wide, narrow = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 3))
    with pytest.raises(ValueError, match=r"first and second .* first\[.*\], second\[.*\]"):
        losses.flow_matrix(wide, narrow)
    tokens, longer = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 4))
    with pytest.raises(ValueError, match=r"first\[2, 5, 3\], second\[2, 5, 4\]"):
        losses.token_gram((tokens, longer), (tokens, tokens))


def test_hcl_skips_pools_that_are_not_smaller(x64: None) -> None:
    student, teacher = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
    np.testing.assert_allclose(losses.hcl(student, teacher), [1.0])
    x = jnp.asarray([[1.0, -1.0], [-1.0, 1.0]]).reshape(1, 2, 2, 1)
    # Only the pool to 1 x 1 is smaller; there the map vanishes: 1 / (1 + 1/2).
    np.testing.assert_allclose(losses.hcl(x, 0 * x), [2 / 3], rtol=1e-12)


def test_wkd_feature_wants_enough_pixels_per_cell() -> None:
    maps = jnp.ones((2, 3, 3, 2))
    with pytest.raises(ValueError, match="Use a coarser grid or ddof=0"):
        losses.wkd_feature(maps, maps, grid=3, ddof=1)


def test_a_variance_has_channels() -> None:
    features: Any = np.ones((2, 3), np.float32)
    variance: Any = 1.0
    with pytest.raises(ValueError, match="variance must have one value per channel"):
        losses.vid(features, features, variance)
