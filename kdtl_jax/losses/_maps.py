"""Losses on feature maps of single examples: where the response is and how it is spread.

Maps are float `[B, ..., C]`, channels last, student first, and of one shape unless stated
otherwise. All return `[B]` in float32 or wider. Most compare normalized maps, so only *where* the
response is matters, not how strong it is.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _pooling
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def attention_map(x: Array, *, power: int | float = 2) -> Array:
    """`mean_c |f|^p`, flattened over positions and divided by its L2 norm.

    Args:
      x: `[B, ..., C]`, channels last.
      power: `p > 0`, a Python number.

    Returns:
      `[B, positions]` of unit length; a zero map stays zero. The scale of x does not matter as long
      as `|x|^p` is in float32's range: 1e-18 to 1e18 for p = 2.

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017 (1612.03928).
    """
    x = _sides.single(x, "x", at_least=3)
    _checks.scalar(power=power)
    _checks.positive(power=power)
    return _numerics.normalize(_numerics.batch_flat(jnp.mean(_power(x, power), axis=-1)))


def attention_transfer(student: Array, teacher: Array, *, power: int | float = 2) -> Array:
    """`mean_i (a_S - a_T)_i^2` of unit attention maps: attention transfer as in the authors' code.

    `.mean()` is RepDistiller's and mdistiller's number (they weight it by 1000); see
    `attention_transfer_paper` for the paper's.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same positions; pool the larger map first (`connectors.pool`).
      power: `p` of `attention_map`.

    Returns:
      `[B]`.

    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017 (1612.03928), and code.
    """
    return jnp.mean(jnp.square(_map_difference(student, teacher, power)), axis=-1)


def attention_transfer_paper(student: Array, teacher: Array, *, power: int | float = 2) -> Array:
    """`||a_S - a_T||_2` of unit attention maps: attention transfer as in the paper (eq. 2).

    `.mean()` is torchdistill's number with `mode="paper"`. Its gradient at equality is set to 0.

    The arguments are those of `attention_transfer`.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same positions; pool the larger map first (`connectors.pool`).
      power: `p` of `attention_map`.

    Returns:
      `[B]`, in `[0, 2]`.

    References:
      Zagoruyko and Komodakis, 2017 (1612.03928).
    """
    return _numerics.safe_norm(_map_difference(student, teacher, power))


def factor_transfer(
    student: Array, teacher: Array, *, p: int | float = 1, q: int | float = 2
) -> Array:
    """`|| f_S / ||f_S||_q - f_T / ||f_T||_q ||_p` of flattened factors: factor transfer (FT).

    The factors come from `connectors.translator` (student) and a trained `connectors.paraphraser`
    (teacher). With p = 1 torchdistill and mmrazor average over elements: divide `.mean()` by the
    elements per example. Knowledge adaptation (1903.04688) is the same formula on adapted features.
    The scale of either side does not matter as long as `|x|^q` is in float32's range: 1e-18 to 1e18
    for q = 2. Takes `[B, ...]` factors of one shape; returns `[B]`.

    Args:
      p: norm of the difference, a Python number >= 1.
      q: norm that scales each factor, a Python number >= 1.

    References:
      Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, 2018
      (1802.04977).
    """
    student, teacher = _sides.same_shape(student, teacher)
    _checks.scalar(p=p, q=q)
    if not (p >= 1 and q >= 1):
        raise ValueError(f"norms need p >= 1 and q >= 1, got p={p}, q={q}.")
    student, teacher = _numerics.batch_flat(student), _numerics.batch_flat(teacher)
    return _vector_norm(_unit(student, q) - _unit(teacher, q), p)


def _map_difference(student: Array, teacher: Array, power: float) -> Array:
    student, teacher = _sides.same_positions(student, teacher)
    return attention_map(student, power=power) - attention_map(teacher, power=power)


def _power(x: Array, p: float) -> Array:
    """`|x|^p`; even integers need no absolute value and stay smooth at 0."""
    even = isinstance(p, int) and p % 2 == 0
    return x**p if even else jnp.abs(x) ** p


def _unit(x: Array, q: float) -> Array:
    """Rows over their q-norm; a zero row stays zero."""
    norm = _vector_norm(x, q)[:, None]
    return x * _numerics.ratio(1, norm)


def _vector_norm(x: Array, p: float) -> Array:
    """p-norm of rows, gradient 0 at 0."""
    total = jnp.sum(jnp.abs(x) if p == 1 else _power(x, p), axis=-1)
    if p == 1:
        return total
    return jnp.where(total != 0, jnp.where(total != 0, total, 1) ** (1 / p), 0)


def catkd(student: Array, teacher: Array, *, resolution: int = 2) -> Array:
    """`mean (c_S - c_T)^2` of class activation maps, pooled and normalized per class.

    The last layer before the global average pooling must be a 1x1 convolution, so that it has one
    map per class. `.mean()` is the authors' number in the cases where they normalize, which are
    pairs of different families (weights 10 to 600; 400 by default).

    Args:
      student: `[B, Hs, Ws, classes]`.
      teacher: `[B, Ht, Wt, classes]`.
      resolution: side of the pooled maps.

    Returns:
      `[B]`.

    References:
      Guo et al., Class Attention Transfer Based Knowledge Distillation, 2023.
    """
    student, teacher = _sides.same_channels(student, teacher, at_least=4, at_most=4)
    _checks.count(1, resolution=resolution)
    pooled = (_pooling.pool_to(x, (resolution, resolution)) for x in (student, teacher))
    difference = jnp.subtract(*(_numerics.normalize(x, axis=(1, 2)) for x in pooled))
    return jnp.mean(jnp.square(difference), axis=(1, 2, 3))


def hcl(student: Array, teacher: Array, *, sizes: Sequence[int] = (4, 2, 1)) -> Array:
    """`sum_l w_l mean (pool_l(f_S) - pool_l(f_T))^2 / sum_l w_l`: hierarchical context loss.

    Level 0 is the full map with weight 1; each pool to `k x k`, `k` smaller than the height,
    halves the weight. `.mean()`, summed over the pairs of fused maps (`connectors.abf`), is
    mdistiller's number (weight 1, 5 or 8, depending on the pair of models).

    Args:
      student: `[B, H, W, C]`, fused.
      teacher: the same shape.
      sizes: sides of the pools, tried in order.

    Returns:
      `[B]`, squared feature units.

    References:
      Chen et al., Distilling Knowledge via Knowledge Review, 2021 (2104.09044).
    """
    student, teacher = _sides.same_shape(student, teacher, at_least=4, at_most=4)
    difference = student - teacher  # pooling is linear: pool the difference
    total, weight, weights = jnp.mean(jnp.square(difference), axis=(1, 2, 3)), 1.0, 1.0
    for size in sizes:
        if size < difference.shape[1]:
            weight /= 2
            pooled = _pooling.pool_to(difference, (size, size))
            total = total + weight * jnp.mean(jnp.square(pooled), axis=(1, 2, 3))
            weights += weight
    return total / weights


def wkd_feature(
    student: Array,
    teacher: Array,
    *,
    grid: int = 1,
    mean_weight: Scalar = 2.0,
    ddof: int = 0,
    eps: Scalar = 1e-5,
) -> Array:
    """`mean over cells of w ||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2`: WKD-F.

    The squared Wasserstein-2 distance between diagonal Gaussians fitted to the pixels of each cell
    of a `grid x grid` partition (w = 1 is the exact distance; the authors weight the means by 2
    to 4). `.mean()` is their number with `ddof=1`: their variance divides by n - 1.

    Args:
      student: `[B, H, W, C]`, projected to the teacher's width.
      grid: cells per side (the authors use 1 or 4).
      mean_weight: w.
      ddof: the variance of a cell divides by `n - ddof`, which must be positive.
      eps: added to the variance under the root, in squared feature units; the authors' constant.

    Returns:
      `[B]`, squared feature units.

    References:
      Lv et al., Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
      Distillation, 2024 (2412.08139).
    """
    student, teacher = _sides.same_shape(student, teacher, at_least=4, at_most=4)
    _checks.count(1, grid=grid)
    _checks.count(0, ddof=ddof)
    _checks.positive(eps=eps)
    _checks.non_negative(mean_weight=mean_weight)
    rows, columns = (_pooling.pool_bounds(n, grid) for n in student.shape[1:3])
    cells = [(slice(*row), slice(*column)) for row in rows for column in columns]
    smallest = min((r.stop - r.start) * (c.stop - c.start) for r, c in cells)
    if smallest <= ddof:
        raise ValueError(
            f"every cell needs more than ddof={ddof} pixels, the smallest of a "
            f"{grid} x {grid} grid has {smallest} of {_checks.described(student=student)}. "
            "Use a coarser grid or ddof=0."
        )
    total = jnp.zeros((len(student),), student.dtype)
    weight = _numerics.scalar(mean_weight, student, "mean_weight")
    for cell in cells:
        mean_s, std_s = _moments(student[:, *cell], ddof, eps)
        mean_t, std_t = _moments(teacher[:, *cell], ddof, eps)
        means = weight * jnp.sum(jnp.square(mean_s - mean_t), axis=-1)
        total = total + means + jnp.sum(jnp.square(std_s - std_t), axis=-1)
    return total / len(cells)


def _moments(x: Array, ddof: int, eps: Scalar) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel, `[B, C]` each."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    count = x.shape[1] * x.shape[2]
    variance = jnp.sum(jnp.square(x - mean), axis=(1, 2)) / (count - ddof)
    return mean[:, 0, 0], jnp.sqrt(variance + _numerics.scalar(eps, x, "eps"))
