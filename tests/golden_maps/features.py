"""Feature losses: how each published number follows from the library's.

Several references pool or resize inside the loss; here that is a connector. BN below is the
reference's training-mode batch normalization, `connectors.batch_norm`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import connectors, losses

Arrays = Mapping[str, Array]
Hyper = Mapping[str, Any]

_relu = connectors.activation(jax.nn.relu)


def _pooled(x: Array, size: int | tuple[int, int]) -> Array:
    return connectors.pool(size).apply({}, x)


def _smaller(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Quirk of RepDistiller: heights alone are compared, and maps are pooled to squares."""
    if student.shape[1] > teacher.shape[1]:
        return _pooled(student, teacher.shape[1]), teacher
    if student.shape[1] < teacher.shape[1]:
        return student, _pooled(teacher, student.shape[1])
    return student, teacher


def _layers(x: Arrays, prefix: str) -> list[Array]:
    names = [f"{prefix}_{i}" for i in range(len(x))]
    return [x[name] for name in names if name in x]


def _bn(x: Arrays, scale: str, offset: str) -> dict[str, Array]:
    return {"scale": x[scale], "offset": x[offset]}


def _linear(x: Arrays, weight: str, bias: str = "") -> dict[str, Array]:
    return {"kernel": x[weight]} | ({"bias": x[bias]} if bias in x else {})


def _reduced(values: Array, hyper: Hyper) -> Array:
    return jnp.sum(values) if hyper["reduction"] == "sum" else jnp.mean(values)


def _hint(x: Arrays, hyper: Hyper) -> Array:
    return jnp.mean(losses.mse(x["student"], x["teacher"]))


def _hint_conv_bn(x: Arrays, hyper: Hyper) -> Array:
    """RepDistiller's regressor chooses its convolution from the sizes."""
    weight, student, teacher = x["weight"], x["student"], x["teacher"]
    if weight.ndim == 2:
        conv = connectors.conv1x1(weight.shape[-1])
    elif student.shape[1] == 2 * teacher.shape[1]:
        conv = connectors.conv(weight.shape[-1], kernel=weight.shape[0], stride=2, padding=1)
    else:
        edge = (teacher.shape[1] - student.shape[1] + weight.shape[0] - 1) // 2
        conv = connectors.conv(weight.shape[-1], kernel=weight.shape[0], padding=edge)
    steps = [conv, connectors.batch_norm(eps=hyper["bn_eps"])]
    params = [_linear(x, "weight", "bias"), _bn(x, "bn_scale", "bn_offset")]
    if hyper["relu"]:
        steps, params = [*steps, _relu], [*params, {}]
    return jnp.mean(losses.mse(connectors.chain(*steps).apply(params, student), teacher))


def _feature_l2(x: Arrays, hyper: Hyper) -> Array:
    student, teacher = x["student"], x["teacher"]
    if hyper["normalize"]:
        unit = connectors.unit_norm()
        flat = (side.reshape(len(side), -1) for side in (student, teacher))
        student, teacher = (hyper["mult"] * unit.apply({}, side) for side in flat)
    values = losses.mse(student, teacher)  # means over the elements of an example
    if hyper["dist"]:
        return jnp.sqrt(jnp.sum(values) * (student.size // len(student)))
    return jnp.mean(values) * (1 if hyper["div_element"] else student.size // len(student))


def _code_map(x: Array, power: int) -> Array:
    """`attention_map` with RepDistiller's f^p where the paper has |f|^p: they differ at odd p."""
    if power % 2 == 0:
        return losses.attention_map(x, power=power)
    flat = jnp.mean(x**power, axis=-1).reshape(len(x), -1)
    return connectors.unit_norm().apply({}, flat)


def _at(x: Arrays, hyper: Hyper) -> Array:
    student, teacher = _smaller(x["student"], x["teacher"])
    if hyper["p"] % 2 == 0:
        return jnp.mean(losses.attention_transfer(student, teacher, power=hyper["p"]))
    maps = (_code_map(side, hyper["p"]) for side in (student, teacher))
    return jnp.mean(losses.mse(*maps))


def _at_paper(x: Arrays, hyper: Hyper) -> Array:
    return jnp.mean(losses.attention_transfer_paper(x["student"], x["teacher"]))


def _ft(x: Arrays, hyper: Hyper) -> Array:
    """RepDistiller's "factors" are attention maps; odd powers p2 > 1 keep the sign."""
    sides = _smaller(x["student"], x["teacher"])
    student, teacher = (_code_map(side, hyper["p1"]) for side in sides)
    if hyper["p2"] == 2:
        return jnp.mean(losses.mse(student, teacher))
    if hyper["p2"] == 1:
        return jnp.mean(losses.factor_transfer(student, teacher, p=1)) / student.shape[-1]
    return jnp.mean((student - teacher) ** hyper["p2"])


def _ft_factors(x: Arrays, hyper: Hyper) -> Array:
    """torchdistill: at p = 1 the mean or sum runs over all elements, otherwise over examples."""
    p = hyper["p"]
    values = losses.factor_transfer(x["student"], x["teacher"], p=p, q=hyper.get("q", 2))
    if p == 1 and hyper["reduction"] != "sum":
        values = values / (x["student"].size // len(x["student"]))
    return _reduced(values, hyper)


def _affinity(x: Arrays, hyper: Hyper) -> Array:
    return _reduced(losses.affinity(x["student"], x["teacher"]), hyper)


def _vid(x: Arrays, hyper: Hyper) -> Array:
    student, teacher = _smaller(x["student"], x["teacher"])
    weights = _layers(x, "weight")
    regressor = connectors.mlp([weight.shape[1] for weight in weights], bias=False)
    params: list[dict[str, Array]] = []
    for weight in weights:
        params += [{"kernel": weight}, {}]
    mean = regressor.apply(params[:-1], student)
    head = connectors.variance(eps=hyper["eps"])
    return jnp.mean(losses.vid(mean, teacher, head.apply({"raw": x["log_scale"]}, student)))


def _ab(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    students, teachers = _layers(x, "student"), _layers(x, "teacher")
    values = [
        jnp.mean(losses.activation_boundary(s, t, margin=hyper["margin"]))
        * 2.0 ** (i - len(students) + 1)
        * 3
        / 1000
        for i, (s, t) in enumerate(zip(students, teachers, strict=True))
    ]
    return {"value": jnp.sum(jnp.stack(values)), "layer_values": jnp.stack(values)}


def _partial_l2(x: Arrays, hyper: Hyper) -> Array:
    return jnp.mean(losses.partial_l2(x["student"], x["teacher"])) / hyper["mul_factor"]


def _fsp(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    def pairs(prefix: str) -> list[tuple[Array, Array]]:
        maps = _layers(x, prefix)
        return [_smaller(*pair) for pair in zip(maps, maps[1:], strict=False)]

    both = zip(pairs("student"), pairs("teacher"), strict=True)
    values = jnp.stack([jnp.mean(losses.fsp(s, t)) for s, t in both])
    return {"value": jnp.sum(values), "pair_values": values}


def _max_pooled(x: Array, size: tuple[int, int]) -> Array:
    for axis, out in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        cells = [
            jnp.max(jax.lax.slice_in_dim(x, k * n // out, -(-(k + 1) * n // out), axis=axis), axis)
            for k in range(out)
        ]
        x = jnp.stack(cells, axis=axis)
    return x


def _fsp_max(x: Arrays, hyper: Hyper) -> Array:
    """torchdistill pools by maxima and sums column norms, which are not squared."""

    def flow(prefix: str) -> Array:
        first, second = x[f"{prefix}_0"], x[f"{prefix}_1"]
        size = (min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2]))
        return losses.flow_matrix(_max_pooled(first, size), _max_pooled(second, size))

    norms = jnp.linalg.norm(flow("student") - flow("teacher"), axis=1)
    return hyper["weight"] * jnp.sum(norms) / len(norms)


def _nst(x: Arrays, hyper: Hyper) -> Array:
    return jnp.mean(losses.nst(*_smaller(x["student"], x["teacher"])))


def _kdsvd(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    students, teachers = _layers(x, "student"), _layers(x, "teacher")
    return {"value": jnp.mean(losses.kdsvd(students, teachers, k=hyper["k"]))}


def _catkd(x: Arrays, hyper: Hyper) -> Array:
    side = hyper["resolution"]
    if hyper["normalize"]:
        return jnp.mean(losses.catkd(x["student"], x["teacher"], resolution=side))
    return jnp.mean(losses.mse(_pooled(x["student"], side), _pooled(x["teacher"], side)))


def _cwd(x: Arrays, hyper: Hyper) -> Array:
    values = losses.cwd(x["student"], x["teacher"], temperature=hyper["temperature"])
    return hyper["loss_weight"] * jnp.mean(values)


def _pkd_pearson(x: Arrays, hyper: Hyper) -> Array:
    """mmrazor resizes one side when the heights differ; its variance divides by n - 1."""
    student, teacher = x["student"], x["teacher"]
    if student.shape[1:3] != teacher.shape[1:3]:
        if hyper["resize_student"]:
            student = connectors.resize_bilinear(teacher.shape[1:3]).apply({}, student)
        else:
            teacher = connectors.resize_bilinear(student.shape[1:3]).apply({}, teacher)
    return jnp.mean(losses.pkd_pearson(student, teacher, ddof=1))


def _pad_l2(x: Arrays, hyper: Hyper) -> Array:
    """Twice VID's likelihood, with the log variance itself where VID has log(eps + exp(.))."""
    variance = hyper["eps"] + jnp.exp(x["log_variance"])
    likelihood = 2 * losses.vid(x["student"], x["teacher"], variance)
    return _reduced(likelihood + jnp.mean(x["log_variance"] - jnp.log(variance), axis=-1), hyper)


def _wkd_feature(x: Arrays, hyper: Hyper) -> dict[str, Array]:
    def value(weight: float) -> Array:
        return jnp.mean(
            losses.wkd_feature(
                x["student"],
                x["teacher"],
                grid=hyper["grid"],
                mean_weight=weight,
                ddof=1,
                eps=hyper["eps"],
            )
        )

    deviations = value(0.0)
    return {
        "value": value(hyper["mean_cov_ratio"]),
        "mean_loss": value(1.0) - deviations,
        "cov_loss": deviations,
    }


METHODS: dict[str, Golden] = {
    "hint": _hint,
    "hint_conv_bn": _hint_conv_bn,
    "feature_l2": _feature_l2,
    "at": _at,
    "at_paper": _at_paper,
    "ft": _ft,
    "ft_factors": _ft_factors,
    "kta": _ft_factors,
    "affinity": _affinity,
    "vid": _vid,
    "ab": _ab,
    "partial_l2": _partial_l2,
    "fsp": _fsp,
    "fsp_max": _fsp_max,
    "nst": _nst,
    "kdsvd": _kdsvd,
    "catkd": _catkd,
    "cwd": _cwd,
    "pkd_pearson": _pkd_pearson,
    "pad_l2": _pad_l2,
    "wkd_feature": _wkd_feature,
}
