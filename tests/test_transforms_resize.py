"""Resampled positions, patch kernels and input channels against their definitions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import transforms
from kdtl_jax.transforms import _mismatch

SIZES = st.integers(1, 9)
MATRICES = [
    _mismatch.corner_aligned,
    _mismatch.half_pixel_linear,
    _mismatch.half_pixel_cubic,
    _mismatch.antialiased_cubic,
]


@pytest.mark.parametrize("matrix", MATRICES)
@given(n_in=SIZES, n_out=SIZES)
def test_rows_sum_to_one_and_equal_sizes_change_nothing(
    matrix: Callable[[int, int], np.ndarray], n_in: int, n_out: int
) -> None:
    np.testing.assert_allclose(matrix(n_in, n_out).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix(n_in, n_in), np.eye(n_in), atol=1e-12)


@given(n_in=st.integers(2, 9), n_out=st.integers(2, 9))
def test_corner_aligned_is_interpolation_between_the_end_points(n_in: int, n_out: int) -> None:
    values = np.random.default_rng(n_in).normal(size=n_in)
    want = np.interp(np.linspace(0, n_in - 1, n_out), np.arange(n_in), values)
    np.testing.assert_allclose(_mismatch.corner_aligned(n_in, n_out) @ values, want, atol=1e-12)


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 8), (8, 3), (5, 7)])
def test_half_pixel_matrices_are_jax_image_resize(n_in: int, n_out: int, x64: None) -> None:
    eye = jnp.eye(n_in, dtype=jnp.float64)
    linear = jax.image.resize(eye, (n_out, n_in), "linear", antialias=False)
    np.testing.assert_allclose(_mismatch.half_pixel_linear(n_in, n_out), linear, atol=1e-7)
    cubic = jax.image.resize(eye, (n_out, n_in), "cubic", antialias=True)
    np.testing.assert_allclose(_mismatch.antialiased_cubic(n_in, n_out), cubic, atol=1e-7)


def test_positions_keep_the_prefix_and_work_on_stacks() -> None:
    embeddings = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1 + 6, 3)), jnp.float32)
    for resized in (
        transforms.resize_positions(embeddings, (4, 5), old_grid=(2, 3), prefix=1),
        transforms.resize_positions_bicubic(embeddings, (4, 5), old_grid=(2, 3)),
    ):
        assert resized.shape == (2, 1, 21, 3)
        np.testing.assert_array_equal(resized[..., :1, :], embeddings[..., :1, :])
    same = transforms.resize_positions_bicubic(embeddings, (2, 3), old_grid=(2, 3))
    assert same is embeddings
    half = transforms.resize_positions(
        embeddings[..., 1:, :].astype(jnp.bfloat16), (4, 6), old_grid=(2, 3)
    )
    assert half.dtype == jnp.bfloat16


def test_a_linear_ramp_stays_a_linear_ramp() -> None:
    ramp = jnp.stack(jnp.meshgrid(jnp.arange(3.0), jnp.arange(4.0), indexing="ij"), -1)
    resized = transforms.resize_positions(ramp.reshape(12, 2), (5, 7), old_grid=(3, 4))
    want = np.stack(np.meshgrid(np.linspace(0, 2, 5), np.linspace(0, 3, 7), indexing="ij"), -1)
    np.testing.assert_allclose(resized, want.reshape(35, 2), atol=1e-6)


def test_the_resized_patch_kernel_embeds_the_resized_patch_alike() -> None:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 3, 2, 5)), jnp.float32)
    patch = jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32)
    larger = transforms.resize_patch_kernel(kernel, (8, 7))
    rows, columns = _mismatch.half_pixel_linear(4, 8), _mismatch.half_pixel_linear(3, 7)
    resized = np.einsum("ij,kl,jlc->ikc", rows, columns, patch)
    np.testing.assert_allclose(
        np.einsum("hwc,hwco->o", resized, larger),
        np.einsum("hwc,hwco->o", patch, kernel),
        rtol=1e-4,
    )
    # The definition, without the Kronecker structure.
    flat = np.linalg.pinv(np.kron(rows, columns).T) @ np.asarray(kernel).reshape(12, -1)
    np.testing.assert_allclose(larger.reshape(56, -1), flat, atol=1e-5)
    assert transforms.resize_patch_kernel(kernel, (4, 3)).dtype == kernel.dtype


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_equal_channels_give_the_output_they_gave(channels: int) -> None:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 4)), jnp.float32)
    adapted = transforms.adapt_input_channels(kernel, channels)
    assert adapted.shape == (2, 2, channels, 4)
    if channels % 3 == 0 or channels == 1:
        np.testing.assert_allclose(adapted.sum(2), kernel.sum(2), rtol=1e-5, atol=1e-6)
    if channels > 1:
        tiled = np.tile(kernel, (1, 1, -(-channels // 3), 1))[:, :, :channels] * 3 / channels
        np.testing.assert_allclose(adapted, tiled, rtol=1e-6)


def test_bad_geometry_says_what_to_pass() -> None:
    positions, kernel = jnp.ones((1, 8, 2)), jnp.ones((4, 4, 3, 2))
    with pytest.raises(ValueError, match="prefix= for class"):
        transforms.resize_positions(positions, (4, 4))
    with pytest.raises(ValueError, match="two positive integers"):
        transforms.resize_positions_bicubic(positions, (0, 4), old_grid=(1, 7))
    with pytest.raises(ValueError, match="kernel must have 4 dimension"):
        transforms.resize_patch_kernel(jnp.ones((4, 4, 3)), (2, 2))
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        transforms.adapt_input_channels(kernel, 0)
    with pytest.raises(TypeError, match="floating"):
        transforms.adapt_input_channels(kernel.astype(jnp.int8), 1)


def test_resizing_is_a_policy_and_differentiable() -> None:
    source = {"pos_embed": jnp.ones((1, 5, 2)), "patch": jnp.ones((2, 2, 3, 2))}
    target = {"pos_embed": jnp.zeros((1, 10, 2)), "patch": jnp.zeros((4, 4, 1, 2))}

    def patch(leaf: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
        return transforms.adapt_input_channels(
            transforms.resize_patch_kernel(leaf, (shape[0], shape[1])), shape[2]
        )

    rules = [
        ("pos_embed", lambda x, shape, path: transforms.resize_positions_bicubic(x, (3, 3))),
        ("patch", patch),
    ]
    params, report = transforms.transfer(source, target, on_mismatch=rules)
    np.testing.assert_allclose(params["pos_embed"], np.ones((1, 10, 2)), rtol=1e-5)
    assert [a.policy for a in report.adapted] == ["patch", "<lambda>"]
    planned = transforms.plan_transfer(source, target, on_mismatch=rules)
    slope = jax.grad(lambda s: transforms.apply_plan(planned, s, target)["pos_embed"].sum())(source)
    np.testing.assert_allclose(slope["pos_embed"].sum(), 20, rtol=1e-5)
