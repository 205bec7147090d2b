"""Feature losses that come with a network of their own: connectors composed as published."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import connectors, losses

Arrays = Mapping[str, Array]
Hyper = Mapping[str, Any]


def _layers(x: Arrays, prefix: str) -> list[Array]:
    names = [f"{prefix}_{i}" for i in range(len(x))]
    return [x[name] for name in names if name in x]


def _bn(x: Arrays, scale: str, offset: str) -> dict[str, Array]:
    return {"scale": x[scale], "offset": x[offset]}


def _affine(x: Arrays, weight: str, bias: str) -> dict[str, Array]:
    return {"kernel": x[weight], "bias": x[bias]}


def _ofd(x: Arrays, hyper: Hyper) -> Array:
    return jnp.mean(losses.partial_l2(x["student"], x["teacher"], margin=x["margin"]))


def _ofd_margin(x: Arrays, hyper: Hyper) -> Array:
    return losses.ofd_margin(x["bn_scale"], x["bn_offset"])


def _ofd_full(x: Arrays, hyper: Hyper) -> Array:
    students, teachers = _layers(x, "student"), _layers(x, "teacher")
    total = jnp.zeros(())
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        channels = x[f"weight_{i}"].shape[-1]
        connector = connectors.chain(
            connectors.conv1x1(channels, bias=False), connectors.batch_norm()
        )
        params = [{"kernel": x[f"weight_{i}"]}, _bn(x, f"bn_scale_{i}", f"bn_offset_{i}")]
        pooled = connectors.pool(student.shape[1:3]).apply({}, teacher)
        margin = losses.ofd_margin(x[f"teacher_bn_scale_{i}"], x[f"teacher_bn_offset_{i}"])
        values = losses.partial_l2(connector.apply(params, student), pooled, margin=margin)
        total = total + jnp.mean(values) / 2 ** (len(students) - 1 - i)
    return total


def _reviewkd_hcl(x: Arrays, hyper: Hyper) -> Array:
    pairs = zip(_layers(x, "student"), _layers(x, "teacher"), strict=True)
    return jnp.sum(jnp.stack([jnp.mean(losses.hcl(s, t)) for s, t in pairs]))


def _hcl_sizes(x: Arrays, hyper: Hyper) -> Array:
    student, teacher, sizes = x["student"], x["teacher"], hyper["output_sizes"]
    if hyper["reduction"] != "sum":
        return jnp.mean(losses.hcl(student, teacher, sizes=sizes))
    levels = [student.shape[1], *(size for size in sizes if size < student.shape[1])]
    total = jnp.zeros(())
    for power, size in enumerate(levels):  # sums, of which each level has its own number
        pool = connectors.pool(size if power else student.shape[1:3])
        maps = pool.apply({}, student), pool.apply({}, teacher)
        total = total + 0.5**power * jnp.sum(losses.mse(*maps)) * maps[0][0].size
    return total / sum(0.5**power for power in range(len(levels)))


def _reviewkd_abf(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    fusion = connectors.abf(
        x["conv1"].shape[-1], x["conv2"].shape[-1], size=hyper["out_shape"], eps=hyper["bn_eps"]
    )
    params: dict[str, Any] = {
        "reduce": [{"kernel": x["conv1"]}, _bn(x, "bn1_scale", "bn1_offset")],
        "expand": [{"kernel": x["conv2"]}, _bn(x, "bn2_scale", "bn2_offset")],
    }
    if "residual" in x:
        params["attention"] = _affine(x, "att_weight", "att_bias")
    out, residual = fusion.apply(params, (x["student"], x.get("residual")))
    value = jnp.sum(out * x["probe_out"]) + jnp.sum(residual * x["probe_residual"])
    return {"value": value, "out": out, "residual_out": residual}


def _mgd(x: Arrays, hyper: Hyper, mask: Array) -> Array:
    student = x["student"]
    channels = x["teacher"].shape[-1]
    if "align_weight" in x:
        params = _affine(x, "align_weight", "align_bias")
        student = connectors.conv1x1(channels).apply(params, student)
    params = [
        _affine(x, "gen_weight_0", "gen_bias_0"),
        {},
        _affine(x, "gen_weight_1", "gen_bias_1"),
    ]
    generated = connectors.generator(channels).apply(params, student * mask)
    return hyper["alpha"] * jnp.mean(losses.squared_distance(generated, x["teacher"]))


def _mgd_pixels(x: Arrays, hyper: Hyper) -> Array:
    keep = x["noise"] <= 1 - hyper["mask_ratio"]
    return _mgd(x, hyper, keep.astype(x["student"].dtype))


def _mgd_channels(x: Arrays, hyper: Hyper) -> Array:
    keep = x["noise"] >= hyper["mask_ratio"]
    return _mgd(x, hyper, keep.astype(x["student"].dtype))


def _simkd(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    student, teacher = x["student"], x["teacher"]
    if student.shape[1] > teacher.shape[1]:  # heights are compared, pools are squares
        student = connectors.pool(teacher.shape[1]).apply({}, student)
    else:
        teacher = connectors.pool(student.shape[1]).apply({}, teacher)
    projector = connectors.simkd_projector(
        teacher.shape[-1], factor=hyper["factor"], eps=hyper["bn_eps"]
    )
    params: list[dict[str, Array]] = []
    for i in range(3):
        scale_offset = _bn(x, f"bn_scale_{i}", f"bn_offset_{i}")
        params += [{"kernel": x[f"weight_{i}"]}, scale_offset, {}]
    projected = projector.apply(params, student)
    pooled = jnp.mean(projected, axis=(1, 2))
    return {
        "value": jnp.mean(losses.mse(projected, teacher)),
        "logits": pooled @ x["classifier_weight"] + x["classifier_bias"],
    }


def _semckd(x: Arrays, hyper: Hyper) -> Array:
    """The attention over pairs of layers comes in as an array; every pair is a hint."""
    attention = x["attention"]
    batch, students, teachers = attention.shape
    total = jnp.zeros(())
    for i in range(students):
        for j in range(teachers):
            values = losses.mse(x[f"student_{i}_{j}"], x[f"teacher_{i}_{j}"])
            total = total + jnp.sum(attention[:, i, j] * values)
    return total / (batch * students)


def _dist_plus(x: Arrays, hyper: Hyper) -> Array:
    """DIST on logits, and on maps; the reference adds the channel correlation with the sign +."""

    def rows(student: Array, teacher: Array) -> Array:
        """1 - Pearson along the last axis, averaged: half the distance of centered directions."""
        centered = (side - jnp.mean(side, axis=-1, keepdims=True) for side in (student, teacher))
        return jnp.mean(losses.cosine_distance(*centered))

    def columns(student: Array, teacher: Array) -> Array:
        return 1 - jnp.mean(losses.feature_correlation(student, teacher))

    tau = hyper["tau"]
    softened = [jax.nn.softmax(x[f"{side}_logits"] / tau) for side in ("student", "teacher")]
    maps = [x["student"], x["teacher"]]
    flat = [jnp.sum(side, axis=-1).reshape(len(side), -1) for side in maps]
    dist = hyper["beta"] * rows(*softened) + hyper["gamma"] * columns(*softened)
    channel = 1 - rows(*maps)
    return tau**2 * dist + hyper["iota"] * channel + hyper["kappa"] * columns(*flat)


def _vitkd(x: Arrays, hyper: Hyper) -> Array:
    batch, tokens, channels = x["teacher_high"].shape
    aligned = []
    for i in range(2):
        low = x["student_low"][:, i]
        if f"align2_{i}_weight" in x:
            params = _affine(x, f"align2_{i}_weight", f"align2_{i}_bias")
            low = connectors.linear(channels).apply(params, low)
        aligned.append(low)
    low_loss = hyper["alpha"] * jnp.mean(
        losses.squared_distance(jnp.stack(aligned, axis=1), x["teacher_low"])
    )

    high = x["student_high"]
    if "align_weight" in x:
        high = connectors.linear(channels).apply(_affine(x, "align_weight", "align_bias"), high)
    kept = int(tokens * (1 - hyper["mask_ratio"]))
    replaced = jnp.argsort(jnp.argsort(x["noise"], axis=1), axis=1) >= kept
    high = connectors.mask_token().apply({"token": x["mask_token"]}, (high, replaced))
    side = round(tokens**0.5)
    params = [
        _affine(x, "gen_weight_0", "gen_bias_0"),
        {},
        _affine(x, "gen_weight_1", "gen_bias_1"),
    ]
    generated = connectors.generator(channels).apply(
        params, high.reshape(batch, side, side, channels)
    )
    values = losses.squared_distance(
        generated.reshape(batch, tokens, channels), x["teacher_high"], where=replaced
    )
    return low_loss + hyper["beta"] / hyper["mask_ratio"] * jnp.mean(values)


METHODS: dict[str, Golden] = {
    "ofd": _ofd,
    "ofd_margin": _ofd_margin,
    "ofd_full": _ofd_full,
    "reviewkd_hcl": _reviewkd_hcl,
    "hcl_sizes": _hcl_sizes,
    "reviewkd_abf": _reviewkd_abf,
    "mgd": _mgd_pixels,
    "mgd_channel": _mgd_channels,
    "simkd": _simkd,
    "semckd": _semckd,
    "dist_plus": _dist_plus,
    "vitkd": _vitkd,
}
