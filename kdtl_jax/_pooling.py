"""Adaptive average pooling of channels-last maps, with torch's cells."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def pool_bounds(size_in: int, size_out: int) -> list[tuple[int, int]]:
    """Cells of adaptive pooling: cell k covers `floor(k n / m) .. ceil((k + 1) n / m) - 1`."""
    return [(k * size_in // size_out, -(-(k + 1) * size_in // size_out)) for k in range(size_out)]


def pool_to(x: Array, size: tuple[int, int]) -> Array:
    """Adaptive average pooling `[B, H, W, C] -> [B, *size, C]`, with torch's cells at any size.

    If both sizes divide evenly, it takes plain means of blocks. Otherwise cells overlap, which
    needs an explicit matrix per axis.
    """
    if all(n % m == 0 for n, m in zip(x.shape[1:3], size, strict=True)):
        batch, height, width, channels = x.shape
        rows, columns = size
        blocks = (batch, rows, height // rows, columns, width // columns, channels)
        return jnp.mean(x.reshape(blocks), axis=(2, 4))
    for axis, size_out in zip((1, 2), size, strict=True):
        size_in = x.shape[axis]
        if size_in == size_out:
            continue
        weights = np.zeros((size_out, size_in))
        for row, (start, stop) in enumerate(pool_bounds(size_in, size_out)):
            weights[row, start:stop] = 1 / (stop - start)
        matrix = jnp.asarray(weights, x.dtype)
        spec = "ih,bhwc->biwc" if axis == 1 else "iw,bhwc->bhic"
        x = jnp.einsum(spec, matrix, x, precision=jax.lax.Precision.HIGHEST)
    return x
