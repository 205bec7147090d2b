"""Resampling matrices `[n_out, n_in]` for one axis, computed in float64 from lengths alone."""

import numpy as np


def corner_aligned(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation with the end points kept: output `i` reads at `i (n_in-1)/(n_out-1)`.

    A single output reads at 0, a single input is repeated.
    """
    at = np.arange(n_out) * ((n_in - 1) / max(n_out - 1, 1))
    low = np.clip(np.floor(at).astype(np.int64), 0, max(n_in - 2, 0))
    fraction = at - low
    matrix = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    matrix[rows, low] += 1 - fraction
    matrix[rows, np.minimum(low + 1, n_in - 1)] += fraction
    return matrix
