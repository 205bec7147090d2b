"""What a loss costs beside a direct transcription of its equation, and in how much memory it runs.

Compiled only, never run. XLA's analysis of the compiled program counts an operation per element of
all arithmetic, and of comparisons, selections and `and`; transcendentals it counts apart, one each.
Here the former are taken out (they are the guards) and the latter put in. A transcription is what
one would write in a notebook: no guards, no masks.

Two groups. `EQUATIONS` cost at most 1.1 times the transcription. `EXACT` do more arithmetic on
purpose, because the transcription loses digits: sums of non-negative terms in place of differences
(the KL family and all that contains a KL; total variation; DIST). Their price is stated and held.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from kdtl_jax import losses

f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
i32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def softmax(z: Array) -> Array:
    return jax.nn.softmax(z, axis=-1)


def kl(p: Array, q: Array) -> Array:
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)


def mean_square(s: Array, t: Array) -> Array:
    return jnp.mean(jnp.square(s - t), axis=tuple(range(1, s.ndim)))


def attention(x: Array) -> Array:
    return unit(jnp.mean(jnp.square(x), axis=-1).reshape(x.shape[0], -1))


def factor_transfer(s: Array, t: Array) -> Array:
    s, t = (unit(x.reshape(x.shape[0], -1)) for x in (s, t))
    return jnp.sum(jnp.abs(s - t), axis=-1)


def cwd(s: Array, t: Array) -> Array:
    s, t = (jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 1, 2) / 4.0 for x in (s, t))
    log_s, log_t = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    return 16.0 * jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1), axis=-1)


def flat_map(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def ickd(s: Array, t: Array) -> Array:
    s, t = (unit(jnp.einsum("bpc,bpd->bcd", flat_map(x), flat_map(x))) for x in (s, t))
    return mean_square(s, t)


def nst(s: Array, t: Array) -> Array:
    s, t = (unit(jnp.swapaxes(flat_map(x), 1, 2)) for x in (s, t))

    def k(x: Array, y: Array) -> Array:
        return jnp.mean(jnp.square(jnp.einsum("bcp,bdp->bcd", x, y)), axis=(1, 2))

    return k(s, s) + k(t, t) - 2.0 * k(s, t)


def fsp(s: tuple[Array, Array], t: tuple[Array, Array]) -> Array:
    def flow(pair: tuple[Array, Array]) -> Array:
        x, y = (flat_map(z) for z in pair)
        return jnp.einsum("bpc,bpd->bcd", x, y) / x.shape[1]

    return mean_square(flow(s), flow(t))


def activation_boundary(s: Array, t: Array) -> Array:
    on, off = jnp.square(jax.nn.relu(1 - s)), jnp.square(jax.nn.relu(1 + s))
    return jnp.sum(jnp.where(t > 0, on, off), axis=(1, 2, 3))


def hcl(s: Array, t: Array) -> Array:
    def pooled(x: Array, n: int) -> Array:
        b, h, w, c = x.shape
        return jnp.mean(x.reshape(b, n, h // n, n, w // n, c), axis=(2, 4))

    total, weights = mean_square(s, t), 1.0
    for i, n in enumerate((4, 2, 1)):
        total += 0.5 ** (i + 1) * mean_square(pooled(s, n), pooled(t, n))
        weights += 0.5 ** (i + 1)
    return total / weights


def pkd_pearson(s: Array, t: Array) -> Array:
    def z(x: Array) -> Array:
        return (x - jnp.mean(x, (0, 1, 2), keepdims=True)) / jnp.std(x, (0, 1, 2), keepdims=True)

    return 0.5 * mean_square(z(s), z(t))


def gram(x: Array) -> Array:
    return x @ x.T


def pairwise(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x[:, None] - x[None]), axis=-1))


def huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5)


def rkd_distance(s: Array, t: Array) -> Array:
    def relative(x: Array) -> Array:
        d = pairwise(x)
        return d / (jnp.sum(d) / (len(x) * (len(x) - 1)))

    return jnp.mean(huber(relative(s) - relative(t)), axis=-1)


def rkd_angle(s: Array, t: Array) -> Array:
    def cosines(x: Array) -> Array:
        e = unit(x[None] - x[:, None])
        return jnp.einsum("ijd,ikd->ijk", e, e)

    return jnp.mean(huber(cosines(s) - cosines(t)), axis=(1, 2))


def pkt(s: Array, t: Array) -> Array:
    def affinities(x: Array) -> Array:
        k = (gram(unit(x)) + 1) / 2
        return k / jnp.sum(k, axis=-1, keepdims=True)

    return kl(affinities(t), affinities(s))


def cc(s: Array, t: Array) -> Array:
    def kernel(x: Array) -> Array:
        g = gram(unit(x))
        return jnp.exp(-0.8) * (1 + 0.8 * g + 0.32 * jnp.square(g))

    return mean_square(kernel(s), kernel(t))


def correlations(x: Array) -> Array:
    return gram(unit(x - jnp.mean(x, axis=1, keepdims=True)))


def info_nce(s: Array, t: Array) -> Array:
    return -jnp.diagonal(jax.nn.log_softmax(unit(s) @ unit(t).T / 0.07))


def minilm(s: tuple[Array, Array], t: tuple[Array, Array]) -> Array:
    def relation(pair: tuple[Array, Array]) -> Array:
        b, n, d = pair[0].shape
        q, k = (x.reshape(b, n, 12, d // 12) for x in pair)
        return jnp.einsum("bnhd,bmhd->bhnm", q, k) / (d // 12) ** 0.5

    log_t, log_s = jax.nn.log_softmax(relation(t)), jax.nn.log_softmax(relation(s))
    return jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1), axis=1)


def hidden_cosine(s: Array, t: Array) -> Array:
    return 1 - jnp.sum(unit(s) * unit(t), axis=-1)


def dist(s: Array, t: Array) -> Array:
    p, q = softmax(t), softmax(s)

    def pearson(axis: int) -> Array:
        x, y = (z - jnp.mean(z, axis=axis, keepdims=True) for z in (p, q))
        norms = jnp.linalg.norm(x, axis=axis) * jnp.linalg.norm(y, axis=axis)
        return jnp.sum(x * y, axis=axis) / (norms + 1e-8)

    return 1 - pearson(1) + 1 - jnp.mean(pearson(0))


def nkd(s: Array, t: Array, labels: Array) -> Array:
    p, q = softmax(t), softmax(s)
    others = jax.nn.one_hot(labels, s.shape[-1]) == 0
    rest_p, rest_q = jnp.where(others, p, 0), jnp.where(others, q, 0)
    rest_p = rest_p / jnp.sum(rest_p, axis=-1, keepdims=True)
    rest_q = rest_q / jnp.sum(rest_q, axis=-1, keepdims=True)
    of_label = jnp.sum(jnp.where(others, 0, p * jnp.log(q)), axis=-1)
    of_rest = jnp.sum(rest_p * jnp.log(jnp.where(others, rest_q, 1)), axis=-1)
    return -of_label - 1.5 * of_rest


def of_nkd(s: Array, t: Array, labels: Array) -> Array:
    others = (losses.non_target_logits(z, labels) for z in (s, t))
    return losses.target_cross_entropy(s, t, labels) + 1.5 * losses.soft_cross_entropy(*others)


def of_standardized(s: Array, t: Array) -> Array:
    s, t = (losses.standardize_logits(z) for z in (s, t))
    return losses.kd_kl(s, t, temperature=2.0)


def uld(s: Array, t: Array) -> Array:
    s, t = (-jnp.sort(-softmax(z), axis=-1) for z in (s, t))
    return jnp.sum(jnp.abs(s - t), axis=-1)


def sinkhorn(log_s: Array, log_t: Array, cost: Array) -> Array:
    kernel = -(cost / 0.05)[None]
    u = jnp.full_like(log_s, -math.log(log_s.shape[-1]))

    def body(u: Array, _: None) -> tuple[Array, Array]:
        v = log_t - jax.nn.logsumexp(kernel + u[:, :, None], axis=1)
        return log_s - jax.nn.logsumexp(kernel + v[:, None, :], axis=2), v

    u, v = jax.lax.scan(body, u, length=10)
    plan = jnp.exp(kernel + u[:, :, None] + v[-1][:, None, :])
    return jnp.sum(plan * cost[None], axis=(1, 2))


def vid(s: Array, t: Array, v: Array) -> Array:
    return jnp.mean(0.5 * (jnp.square(s - t) / v + jnp.log(v)), axis=(1, 2, 3))


def token_gram(s: tuple[Array, Array], t: tuple[Array, Array]) -> Array:
    s_gram, t_gram = (jnp.einsum("bnd,bmd->bnm", *pair) / pair[0].shape[-1] for pair in (s, t))
    return jnp.mean(jnp.square(s_gram - t_gram), axis=-1)


def itrd(s: Array, t: Array) -> Array:
    gram_s, gram_t = gram(unit(s)), gram(unit(t))
    both = gram_s * gram_t
    return jnp.sum(
        jnp.square(gram_s / jnp.trace(gram_s)) - jnp.square(both / jnp.trace(both)), axis=-1
    )


def ofd(s: Array, t: Array, margin: Array) -> Array:
    aim = jnp.maximum(t, margin[None, None, None])
    return jnp.sum(jnp.where((s > aim) | (t > 0), jnp.square(s - aim), 0), axis=(1, 2, 3))


def soft_cross_entropy(s: Array, t: Array) -> Array:
    return -jnp.sum(softmax(t) * jax.nn.log_softmax(s), axis=-1)


def total_variation(s: Array, t: Array) -> Array:
    return jnp.sum(jnp.abs(softmax(s) - softmax(t)), axis=-1) / 2


def hard_kd(s: Array, t: Array) -> Array:
    hard = jnp.argmax(t, axis=-1)[:, None]
    return -jnp.take_along_axis(jax.nn.log_softmax(s), hard, axis=-1)[:, 0]


def standardized(s: Array, t: Array) -> Array:
    s, t = ((z - jnp.mean(z, -1, keepdims=True)) / jnp.std(z, -1, keepdims=True) for z in (s, t))
    return 4.0 * log_kl(s, t, 2.0)


def log_kl(s: Array, t: Array, temperature: float = 1.0) -> Array:
    log_s, log_t = jax.nn.log_softmax(s / temperature), jax.nn.log_softmax(t / temperature)
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


MAPS = f32((32, 8, 8, 64)), f32((32, 8, 8, 64))
ROWS = f32((128, 256)), f32((128, 256))
TOKENS = f32((8, 128, 384)), f32((8, 128, 384))
LOGITS = f32((256, 1000)), f32((256, 1000))
CHANNELS = f32((64,))

Pair = tuple[Callable[..., Array], Callable[..., Array], tuple[Any, ...]]
EQUATIONS: dict[str, Pair] = {
    "mse": (losses.mse, mean_square, MAPS),
    "mse_of_logits": (losses.mse, mean_square, LOGITS),
    "hard_kd": (losses.hard_kd, hard_kd, LOGITS),
    "soft_cross_entropy": (losses.soft_cross_entropy, soft_cross_entropy, LOGITS),
    "nkd": (of_nkd, nkd, (*LOGITS, i32((256,)))),
    "sinkhorn_cost": (
        losses.sinkhorn_cost,
        sinkhorn,
        (f32((32, 100)), f32((32, 100)), f32((100, 100))),
    ),
    "cosine_distance_of_maps": (
        losses.cosine_distance,
        hidden_cosine,
        MAPS,
    ),
    "attention_transfer": (
        losses.attention_transfer,
        lambda s, t: mean_square(attention(s), attention(t)),
        MAPS,
    ),
    "factor_transfer": (losses.factor_transfer, factor_transfer, MAPS),
    "ickd": (losses.ickd, ickd, MAPS),
    "nst": (losses.nst, nst, MAPS),
    "fsp": (losses.fsp, fsp, (MAPS, MAPS)),
    "activation_boundary": (losses.activation_boundary, activation_boundary, MAPS),
    "ofd": (lambda s, t, m: losses.partial_l2(s, t, margin=m), ofd, (*MAPS, CHANNELS)),
    "hcl": (losses.hcl, hcl, MAPS),
    "pkd_pearson": (losses.pkd_pearson, pkd_pearson, MAPS),
    "vid": (losses.vid, vid, (*MAPS, MAPS[0])),
    "sp": (losses.sp, lambda s, t: mean_square(unit(gram(s)), unit(gram(t))), ROWS),
    "pkt": (losses.pkt, pkt, ROWS),
    "cc": (losses.cc, cc, ROWS),
    "rkd_distance": (losses.rkd_distance, rkd_distance, ROWS),
    "rkd_angle": (losses.rkd_angle, rkd_angle, (f32((64, 256)), f32((64, 256)))),
    "ega_edge": (
        losses.ega_edge,
        lambda s, t: jnp.sum(jnp.square(correlations(s) - correlations(t)), axis=-1),
        ROWS,
    ),
    "itrd_mutual": (losses.itrd_mutual, itrd, ROWS),
    "info_nce": (losses.info_nce, info_nce, ROWS),
    "hidden_mse": (losses.last_axis_mse, lambda s, t: jnp.mean(jnp.square(s - t), axis=-1), TOKENS),
    "hidden_cosine": (losses.cosine_distance, hidden_cosine, TOKENS),
    "token_gram": (losses.token_gram, token_gram, (TOKENS, TOKENS)),
    "uld": (losses.uld, uld, LOGITS),
}
# With the most that the exact form may cost, times the transcription.
EXACT: dict[str, tuple[Pair, float]] = {
    "dist": ((lambda s, t: losses.dist_inter(s, t) + losses.dist_intra(s, t), dist, LOGITS), 1.25),
    "total_variation": ((losses.total_variation, total_variation, LOGITS), 5.0),
    "forward_kl": ((losses.forward_kl, log_kl, LOGITS), 5.0),
    "standardized_kd": ((of_standardized, standardized, LOGITS), 5.0),
    "cwd": ((losses.cwd, cwd, MAPS), 5.0),
    "minilm_relation": (
        (partial(losses.minilm_relation, relation_heads=12), minilm, (TOKENS, TOKENS)),
        1.5,
    ),
}
GUARD = re.compile(r"= \w+\[([\d,]*)\]\S* (?:select|compare|and|or|not)\(")


class Cost(NamedTuple):
    arithmetic: float
    transcendentals: float
    guards: float


def cost(loss: Callable[..., Array], args: tuple[Any, ...]) -> Cost:
    program = jax.jit(loss).lower(*args).compile()
    result: Any = program.cost_analysis()
    shapes = [match.split(",") for match in GUARD.findall(str(program.as_text()))]
    guards = sum(math.prod(int(n) for n in shape if n) for shape in shapes)
    transcendentals = result.get("transcendentals", 0.0)
    return Cost(result["flops"] - guards + transcendentals, transcendentals, guards)


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_loss_costs_what_its_equation_does(name: str) -> None:
    loss, transcription, args = EQUATIONS[name]
    mine, plain = cost(loss, args), cost(transcription, args)
    assert mine.arithmetic <= 1.1 * plain.arithmetic, (mine, plain)


@pytest.mark.parametrize("name", EXACT)
def test_exactness_has_its_price(name: str) -> None:
    (loss, transcription, args), times = EXACT[name]
    mine, plain = cost(loss, args), cost(transcription, args)
    assert 1.1 * plain.arithmetic < mine.arithmetic, f"{name} belongs to EQUATIONS now"
    assert mine.arithmetic <= times * plain.arithmetic, (mine, plain)


def test_the_exact_kl_takes_fewer_exponentials_than_the_plain_one() -> None:
    """Its further arithmetic is two short series of multiply-adds per logit."""
    (loss, transcription, args), _ = EXACT["forward_kl"]
    mine, plain = cost(loss, args), cost(transcription, args)
    assert mine.transcendentals < 0.7 * plain.transcendentals
    assert mine.arithmetic < 80 * math.prod(args[0].shape)


def temporary_floats(loss: Callable[..., Array], args: tuple[Any, ...]) -> int:
    """Of value and gradient, by student and teacher."""
    both = jax.value_and_grad(lambda *a: jnp.mean(loss(*a)), argnums=tuple(range(len(args))))
    memory: Any = jax.jit(both).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes // 4


RELATIONAL = ("sp", "pkt", "cc", "rkd_distance", "rkd_angle", "ega_edge", "itrd_mutual", "info_nce")


@pytest.mark.parametrize("name", RELATIONAL)
def test_relations_of_4096_examples_fit_in_a_few_gram_matrices(name: str) -> None:
    size, width = 4096, 512
    args = f32((size, width)), f32((size, width))
    floats = temporary_floats(EQUATIONS[name][0], args)
    assert floats < 24 * size**2  # a [B, B, D] array would be 512 of them


def test_angles_of_512_examples_need_no_cube() -> None:
    args = f32((512, 512)), f32((512, 512))
    assert temporary_floats(losses.rkd_angle, args) < 512**3 / 8
