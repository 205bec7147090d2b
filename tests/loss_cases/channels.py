"""Rows of the losses on channels: Gram matrices, flows, singular vectors."""

from typing import Any

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.maps import normal, other_positions, per_example, same, unit

Pair = tuple[np.ndarray, np.ndarray]


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


CASES: dict[str, LossCase] = {
    "ickd": LossCase(losses.ickd, other_positions, ickd),
    "nst_few_channels": LossCase(losses.nst, normal((3, 3, 2), (3, 3, 3)), nst),
    "nst_few_positions": LossCase(losses.nst, normal((2, 2, 5), (2, 2, 6)), nst),
    "fsp": LossCase(losses.fsp, flows, fsp),
    "affinity": LossCase(losses.affinity, same, affinity),
    "kdsvd": LossCase(
        losses.kdsvd,
        layers,
        kdsvd,
        {"k": 2},
        twice_differentiable=False,
        note="its eigenvectors define their own derivative; twice of it compiles for long",
    ),
}
