"""Relational losses: `.mean()` of one value per anchor, times each code's constant."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import connectors, losses

Arrays = Mapping[str, Array]
Hyper = Mapping[str, Any]


def _rkd(x: Arrays, hyper: Hyper) -> Array:
    student, teacher = x["student"], x["teacher"]
    distance = jnp.mean(losses.rkd_distance(student, teacher))
    angle = jnp.mean(losses.rkd_angle(student, teacher))
    return hyper["w_d"] * distance + hyper["w_a"] * angle


def _rkd_normalized(x: Arrays, hyper: Hyper) -> Array:
    unit = connectors.unit_norm()
    student, teacher = (unit.apply({}, x[name]) for name in ("student", "teacher"))
    part = {"distance": losses.rkd_distance, "angle": losses.rkd_angle}[hyper["part"]]
    return hyper["weight"] * jnp.mean(part(student, teacher))


def _pkt(x: Arrays, hyper: Hyper) -> Array:
    """RepDistiller averages over B^2 entries."""
    values = losses.pkt(x["student"], x["teacher"], eps=hyper["eps"])
    return jnp.mean(values) / len(values)


def _cc(x: Arrays, hyper: Hyper) -> Array:
    """Not correlation congruence: what RepDistiller names so, products of consecutive rows.

    `<a, b> = (|a|^2 + |b|^2 - |a - b|^2) / 2`, each square a hint.
    """
    apart = jnp.abs(x["student"] - x["teacher"])
    above, below = apart[1:], apart[:-1]
    zero = jnp.zeros_like(above)
    squares = losses.mse(above, zero) + losses.mse(below, zero) - losses.mse(above, below)
    return 0.5 * jnp.mean(squares) * apart.shape[1]


def _cckd(x: Arrays, hyper: Hyper) -> Array:
    """torchdistill: the unsquared Frobenius norm, rows not normalized."""

    def kernel(rows: Array) -> Array:
        if hyper["type"] == "bilinear":
            return rows @ rows.T
        return losses.gaussian_taylor_kernel(rows, gamma=hyper["gamma"], order=hyper["max_p"])

    # One value per row of the kernels, as if they were embeddings.
    values = losses.mse(kernel(x["student"]), kernel(x["teacher"]))
    norm = jnp.sqrt(jnp.sum(values) * len(values))
    return norm / len(values) ** 2 if hyper["reduction"] == "batchmean" else norm


def _ickd(x: Arrays, hyper: Hyper) -> Array:
    batch, channels = x["student"].shape[0], x["student"].shape[-1]
    return jnp.mean(losses.ickd(x["student"], x["teacher"])) * channels / batch


def _embedded(x: Arrays) -> Array:
    if "weight" not in x:
        return x["student"]
    params = {"kernel": x["weight"], "bias": x["bias"]}
    return connectors.linear(x["weight"].shape[1]).apply(params, x["student"])


def _itrd_correlation(x: Arrays, hyper: Hyper) -> Array:
    """The code standardizes with B - 1 and averages with B, which shrinks every correlation."""
    batch = len(x["student"])
    rho = losses.feature_correlation(_embedded(x), x["teacher"]) * (batch - 1) / batch
    return jnp.log2(jnp.sum(jnp.abs(rho - 1) ** (2 * hyper["alpha"])))


def _itrd_mutual(x: Arrays, hyper: Hyper) -> Array:
    same = x["student"].shape[-1] == x["teacher"].shape[-1]
    student = x["student"] if same else _embedded(x)
    return jnp.sum(losses.itrd_mutual(student, x["teacher"]))


def _ega(x: Arrays, hyper: Hyper) -> Array:
    node = jnp.sqrt(jnp.sum(losses.ega_node(x["student"], x["teacher"])))
    edge = jnp.sqrt(jnp.sum(losses.ega_edge(x["student"], x["teacher"])))
    return hyper["node_weight"] * node + hyper["edge_weight"] * edge


METHODS: dict[str, Golden] = {
    "sp": lambda x, h: jnp.mean(losses.sp(x["student"], x["teacher"])),
    "rkd": _rkd,
    "rkd_normalized": _rkd_normalized,
    "pkt": _pkt,
    "cc": _cc,
    "cckd": _cckd,
    "ickd": _ickd,
    "itrd_correlation": _itrd_correlation,
    "itrd_mutual": _itrd_mutual,
    "ega": _ega,
}
