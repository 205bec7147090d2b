"""Rows of the losses on feature maps: attention, channels, grids, singular vectors, Jacobians."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase

Pair = tuple[np.ndarray, np.ndarray]


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


def ickd(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    def relation(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, x.shape[-1])
        return np.stack([unit(row) for row in flat.T @ flat])

    return per_example(lambda s, t: ((relation(s) - relation(t)) ** 2).mean(), student, teacher)


def nst(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    def one(s: np.ndarray, t: np.ndarray) -> float:
        u, v = ([unit(x[..., c].ravel()) for c in range(x.shape[-1])] for x in (s, t))

        def k(xs: list[np.ndarray], ys: list[np.ndarray]) -> float:
            return float(np.mean([(x @ y) ** 2 for x in xs for y in ys]))

        return k(u, u) + k(v, v) - 2 * k(u, v)

    return per_example(one, student, teacher)


def flows(rng: np.random.Generator, batch: int) -> tuple[Pair, Pair]:
    student = rng.normal(size=(batch, 2, 3, 3)), rng.normal(size=(batch, 2, 3, 4))
    return student, (rng.normal(size=(batch, 3, 4, 3)), rng.normal(size=(batch, 3, 4, 4)))


def fsp(student: Pair, teacher: Pair) -> np.ndarray:
    def flow(pair: Pair) -> np.ndarray:
        positions = pair[0].shape[1] * pair[0].shape[2]
        return np.einsum("bhwi,bhwj->bij", *pair) / positions

    return ((flow(student) - flow(teacher)) ** 2).mean((1, 2))


def affinity(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    def one(s: np.ndarray, t: np.ndarray) -> Any:
        total = 0.0
        for c in range(s.shape[-1]):
            x, y = unit(s[..., c].ravel()), unit(t[..., c].ravel())
            total += np.linalg.norm(np.outer(x, x) - np.outer(y, y)) / x.size
        return total

    return per_example(one, student, teacher)


def pkd_pearson(student: np.ndarray, teacher: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    def standardized(x: np.ndarray) -> np.ndarray:
        deviation = x.std((0, 1, 2), ddof=ddof)
        return (x - x.mean((0, 1, 2))) / (deviation + eps)

    return 0.5 * ((standardized(student) - standardized(teacher)) ** 2).mean((1, 2, 3))


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


def layers(rng: np.random.Generator, batch: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    student = [rng.normal(size=(batch, 3, 3, 5)), rng.normal(size=(batch, 2, 3, 4))]
    return student, [rng.normal(size=(batch, 2, 4, 5)), rng.normal(size=(batch, 3, 3, 4))]


def kdsvd(student: list[np.ndarray], teacher: list[np.ndarray], k: int) -> np.ndarray:
    def vectors(s: np.ndarray, t: np.ndarray) -> Pair:
        _, values, target = np.linalg.svd(t.reshape(-1, t.shape[-1]), full_matrices=False)
        own = np.linalg.svd(s.reshape(-1, s.shape[-1]), full_matrices=False)[2][: k + 3]
        target = np.stack([v * np.sign(v[np.abs(v).argmax()]) for v in target[:k]])
        scale = unit(values[:k])
        matched = []
        for v, weight in zip(target, scale, strict=True):
            overlaps = own @ v
            best = np.abs(overlaps).argmax()
            matched.append(weight * np.sign(overlaps[best]) * own[best])
        return np.stack(matched), scale[:, None] * target

    out = []
    for b in range(len(student[0])):
        pairs = [vectors(s[b], t[b]) for s, t in zip(student, teacher, strict=True)]
        total = 0.0
        for (below_s, below_t), (above_s, above_t) in zip(pairs, pairs[1:], strict=False):
            rbf_s = np.exp(-((above_s[:, :, None] - below_s[:, None, :]) ** 2) / 8)
            rbf_t = np.exp(-((above_t[:, :, None] - below_t[:, None, :]) ** 2) / 8)
            total += ((rbf_s - rbf_t) ** 2).sum()
        out.append(total)
    return np.asarray(out)


def models(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    """Each example has a model of its own, `tanh(W x)`: student, teacher, inputs, probes."""
    student, teacher = rng.normal(size=(2, batch, 2, 3))
    return student, teacher, rng.normal(size=(batch, 3)), rng.normal(size=(batch, 4, 2))


def model(weights: Array) -> Callable[[Array], Array]:
    return lambda x: jnp.tanh(jnp.einsum("bij,bj->bi", weights, x))


def checked(student: Array, teacher: Array) -> jnp.dtype:
    """The wrappers below stand for a user's models, who would check their own weights."""
    for weights in (student, teacher):
        if not jnp.issubdtype(jnp.asarray(weights).dtype, jnp.floating):
            raise TypeError("models must be floating point")
    if jnp.shape(student) != jnp.shape(teacher):
        shapes = list(jnp.shape(student)), list(jnp.shape(teacher))
        raise ValueError(f"models differ: {shapes}")
    dtype = jnp.asarray(student).dtype
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def jacobian_matching(student: Array, teacher: Array, inputs: Array, probes: Array) -> Array:
    dtype = checked(student, teacher)
    student, teacher, inputs, probes = (
        jnp.asarray(x, dtype) for x in (student, teacher, inputs, probes)
    )
    return losses.jacobian_matching(
        model(student), model(teacher), inputs, jnp.swapaxes(probes, 0, 1)
    )


def jacobian_matching_exact(student: Array, teacher: Array, inputs: Array, _: Array) -> Array:
    dtype = checked(student, teacher)
    student, teacher, inputs = (jnp.asarray(x, dtype) for x in (student, teacher, inputs))
    return losses.jacobian_matching_exact(model(student), model(teacher), inputs)


def jacobian(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (1 - np.tanh(weights @ x) ** 2)[:, None] * weights


def probed(
    student: np.ndarray, teacher: np.ndarray, inputs: np.ndarray, probes: np.ndarray
) -> np.ndarray:
    out = []
    for s, t, x, vs in zip(student, teacher, inputs, probes, strict=True):
        apart = jacobian(s, x) - jacobian(t, x)
        out.append(np.mean([((v @ apart) ** 2).sum() for v in vs]))
    return np.asarray(out)


def frobenius(
    student: np.ndarray, teacher: np.ndarray, inputs: np.ndarray, _: np.ndarray
) -> np.ndarray:
    zipped = zip(student, teacher, inputs, strict=True)
    return np.asarray([((jacobian(s, x) - jacobian(t, x)) ** 2).sum() for s, t, x in zipped])


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
    "ickd": LossCase(losses.ickd, other_positions, ickd),
    "nst_few_channels": LossCase(losses.nst, normal((3, 3, 2), (3, 3, 3)), nst),
    "nst_few_positions": LossCase(losses.nst, normal((2, 2, 5), (2, 2, 6)), nst),
    "fsp": LossCase(losses.fsp, flows, fsp),
    "affinity": LossCase(losses.affinity, same, affinity),
    "pkd_pearson": LossCase(
        losses.pkd_pearson, same, pkd_pearson, {"ddof": 1, "eps": 1e-3}, relational=True
    ),
    "hcl": LossCase(losses.hcl, normal((5, 3, 2), (5, 3, 2)), hcl, {"sizes": (4, 2, 1)}),
    "wkd_feature": LossCase(
        losses.wkd_feature,
        normal((5, 3, 2), (5, 3, 2)),
        wkd_feature,
        {"grid": 2, "mean_weight": 3.0, "eps": 0.01},
    ),
    "kdsvd": LossCase(
        losses.kdsvd,
        layers,
        kdsvd,
        {"k": 2},
        twice_differentiable=False,
        note="its eigenvectors define their own derivative; twice of it compiles for long",
    ),
    "jacobian_matching": LossCase(jacobian_matching, models, probed),
    "jacobian_matching_exact": LossCase(jacobian_matching_exact, models, frobenius),
}
