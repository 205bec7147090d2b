"""Rows of the losses on feature maps: attention, class activations, grids."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase


def normal(*shapes: Sequence[int]) -> Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]:
    def example(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
        return tuple(rng.normal(size=(batch, *shape)) for shape in shapes)

    return example


same, other_channels = normal((2, 3, 4), (2, 3, 4)), normal((2, 3, 4), (2, 3, 5))
other_positions = normal((2, 3, 4), (3, 4, 4))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def per_example(
    fn: Callable[..., Any], student: np.ndarray, teacher: np.ndarray, **hyper: Any
) -> np.ndarray:
    return np.asarray([fn(s, t, **hyper) for s, t in zip(student, teacher, strict=True)])


def attention(x: np.ndarray, power: int) -> np.ndarray:
    return unit((np.abs(x) ** power).mean(-1).ravel())


def attention_transfer(student: np.ndarray, teacher: np.ndarray, power: int) -> np.ndarray:
    return per_example(
        lambda s, t: ((attention(s, power) - attention(t, power)) ** 2).mean(), student, teacher
    )


def attention_transfer_paper(student: np.ndarray, teacher: np.ndarray, power: int) -> np.ndarray:
    return per_example(
        lambda s, t: np.linalg.norm(attention(s, power) - attention(t, power)), student, teacher
    )


def factor_transfer(student: np.ndarray, teacher: np.ndarray, p: float, q: float) -> np.ndarray:
    def one(s: np.ndarray, t: np.ndarray) -> float:
        u, v = (x.ravel() / np.linalg.norm(x.ravel(), q) for x in (s, t))
        return float(np.linalg.norm(u - v, p))

    return per_example(one, student, teacher)


def catkd(student: np.ndarray, teacher: np.ndarray, resolution: int) -> np.ndarray:
    def pooled(x: np.ndarray) -> np.ndarray:
        out = np.zeros((resolution, resolution, x.shape[-1]))
        for i, j in np.ndindex(resolution, resolution):
            rows = slice(i * x.shape[0] // resolution, -(-(i + 1) * x.shape[0] // resolution))
            columns = slice(j * x.shape[1] // resolution, -(-(j + 1) * x.shape[1] // resolution))
            out[i, j] = x[rows, columns].mean((0, 1))
        return np.stack([unit(out[..., c]) for c in range(x.shape[-1])], axis=-1)

    return per_example(lambda s, t: ((pooled(s) - pooled(t)) ** 2).mean(), student, teacher)


def cwd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    def one(s: np.ndarray, t: np.ndarray) -> float:
        total = 0.0
        for c in range(s.shape[-1]):
            q, p = (np.exp(x[..., c] / temperature) for x in (s, t))
            q, p = q / q.sum(), p / p.sum()
            total += (p * np.log(p / q)).sum()
        return temperature**2 * total / s.shape[-1]

    return per_example(one, student, teacher)


def pool(x: np.ndarray, size: int) -> np.ndarray:
    """By averaging over a grid fine enough to divide: each pixel repeated."""
    out = np.zeros((size, size, x.shape[-1]))
    for i, j in np.ndindex(size, size):
        rows = range(i * x.shape[0] // size, -(-(i + 1) * x.shape[0] // size))
        columns = range(j * x.shape[1] // size, -(-(j + 1) * x.shape[1] // size))
        out[i, j] = np.mean([x[a, b] for a in rows for b in columns], axis=0)
    return out


def hcl(student: np.ndarray, teacher: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    def one(s: np.ndarray, t: np.ndarray) -> float:
        total, weights, weight = ((s - t) ** 2).mean(), 1.0, 1.0
        for size in sizes:
            if size < s.shape[0]:
                weight /= 2
                total += weight * ((pool(s, size) - pool(t, size)) ** 2).mean()
                weights += weight
        return total / weights

    return per_example(one, student, teacher)


def wkd_feature(
    student: np.ndarray, teacher: np.ndarray, grid: int, mean_weight: float, eps: float
) -> np.ndarray:
    def one(s: np.ndarray, t: np.ndarray) -> float:
        # By E[x^2] - E[x]^2, unlike the library.
        means = [pool(x, grid) for x in (s, t)]
        squares = [pool(x**2, grid) for x in (s, t)]
        spread = [np.sqrt(m2 - m**2 + eps) for m, m2 in zip(means, squares, strict=True)]
        apart = mean_weight * (means[0] - means[1]) ** 2 + (spread[0] - spread[1]) ** 2
        return apart.sum() / grid**2

    return per_example(one, student, teacher)


CASES: dict[str, LossCase] = {
    "attention_transfer": LossCase(
        losses.attention_transfer, other_channels, attention_transfer, {"power": 2}
    ),
    "attention_transfer_power": LossCase(
        losses.attention_transfer, other_channels, attention_transfer, {"power": 3}
    ),
    "attention_transfer_paper": LossCase(
        losses.attention_transfer_paper, other_channels, attention_transfer_paper, {"power": 2}
    ),
    "factor_transfer": LossCase(losses.factor_transfer, same, factor_transfer, {"p": 1, "q": 2}),
    "factor_transfer_norms": LossCase(
        losses.factor_transfer, same, factor_transfer, {"p": 3, "q": 1}
    ),
    "catkd": LossCase(losses.catkd, other_positions, catkd, {"resolution": 2}),
    "cwd": LossCase(losses.cwd, same, cwd, {"temperature": 2.0}),
    "hcl": LossCase(losses.hcl, normal((5, 3, 2), (5, 3, 2)), hcl, {"sizes": (4, 2, 1)}),
    "wkd_feature": LossCase(
        losses.wkd_feature,
        normal((5, 3, 2), (5, 3, 2)),
        wkd_feature,
        {"grid": 2, "mean_weight": 3.0, "eps": 0.01},
    ),
}
