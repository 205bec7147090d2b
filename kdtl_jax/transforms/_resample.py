"""Resampling matrices `[n_out, n_in]` for one axis, computed in float64 from lengths alone."""

import numpy as np


def corner_aligned(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation with the end points kept: output `i` reads at `i (n_in-1)/(n_out-1)`.

    A single output reads at 0, a single input is repeated.
    """
    return _linear(np.arange(n_out) * ((n_in - 1) / max(n_out - 1, 1)), n_in)


def half_pixel_linear(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation between pixel centers, without antialiasing, borders repeated."""
    at = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    return _linear(np.clip(at, 0, n_in - 1), n_in)


def half_pixel_cubic(n_in: int, n_out: int) -> np.ndarray:
    """Cubic convolution (A = -0.75, four taps) between pixel centers, borders repeated."""
    at = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    rows, low = np.arange(n_out), np.floor(at).astype(np.int64)
    matrix = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        weight = _cubic_kernel(at - low - tap, -0.75)
        np.add.at(matrix, (rows, np.clip(low + tap, 0, n_in - 1)), weight)
    return matrix


def antialiased_cubic(n_in: int, n_out: int) -> np.ndarray:
    """Cubic convolution (A = -0.5), widened when shrinking; taps inside only, rows sum to 1."""
    at = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    stretch = max(n_in / n_out, 1.0)
    matrix = _cubic_kernel((at[:, None] - np.arange(n_in)) / stretch, -0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _linear(at: np.ndarray, n_in: int) -> np.ndarray:
    low = np.clip(np.floor(at).astype(np.int64), 0, max(n_in - 2, 0))
    matrix = np.zeros((len(at), n_in))
    rows = np.arange(len(at))
    matrix[rows, low] += 1 - (at - low)
    matrix[rows, np.minimum(low + 1, n_in - 1)] += at - low
    return matrix


def _cubic_kernel(t: np.ndarray, a: float) -> np.ndarray:
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))
