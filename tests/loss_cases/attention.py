"""Rows of the transformer losses: attention, relations, Gram matrices of states."""

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase

Pair = tuple[np.ndarray, np.ndarray]


def scores(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 2, 3, 3)), rng.normal(size=(batch, 2, 3, 3))


def pairs(rng: np.random.Generator, batch: int) -> tuple[Pair, Pair]:
    student = rng.normal(size=(2, batch, 3, 4))
    teacher = rng.normal(size=(2, batch, 3, 6))
    return (student[0], student[1]), (teacher[0], teacher[1])


def vectors(
    rng: np.random.Generator, batch: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    student = {name: rng.normal(size=(batch, 3, 4)) for name in ("key", "query", "value")}
    return student, {name: rng.normal(size=(batch, 3, 6)) for name in ("key", "query", "value")}


def token_gram(student: Pair, teacher: Pair) -> np.ndarray:
    def gram(pair: Pair) -> np.ndarray:
        return np.einsum("bid,bjd->bij", *pair) / pair[0].shape[-1]

    return ((gram(student) - gram(teacher)) ** 2).mean(-1)


def attention_mse(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((student - teacher) ** 2).mean((1, 3))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z)
    return e / e.sum(-1, keepdims=True)


def attention_kl(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    p, q = softmax(teacher), softmax(student)
    return (p * np.log(p / q)).sum(-1).mean(1)


def relation(pair: Pair, heads: int) -> np.ndarray:
    width = pair[0].shape[-1] // heads
    columns = [slice(h * width, (h + 1) * width) for h in range(heads)]
    per_head = [np.einsum("bid,bjd->bij", pair[0][..., c], pair[1][..., c]) for c in columns]
    return np.stack(per_head, axis=1) / np.sqrt(width)


def minilm_relation(student: Pair, teacher: Pair, relation_heads: int) -> np.ndarray:
    return attention_kl(relation(student, relation_heads), relation(teacher, relation_heads))


def minilm_v2(
    student: dict[str, np.ndarray], teacher: dict[str, np.ndarray], relation_heads: int
) -> np.ndarray:
    return np.sum(
        [
            minilm_relation((x, x), (teacher[name], teacher[name]), relation_heads)
            for name, x in student.items()
        ],
        axis=0,
    )


CASES: dict[str, LossCase] = {
    "token_gram": LossCase(losses.token_gram, pairs, token_gram, where_rank=2),
    "attention_mse": LossCase(losses.attention_mse, scores, attention_mse),
    "attention_kl": LossCase(losses.attention_kl, scores, attention_kl),
    "minilm_relation": LossCase(
        losses.minilm_relation, pairs, minilm_relation, {"relation_heads": 2}, where_rank=2
    ),
    "minilm_v2": LossCase(
        losses.minilm_v2, vectors, minilm_v2, {"relation_heads": 2}, where_rank=2
    ),
}
