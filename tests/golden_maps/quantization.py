"""Fake quantization and quantization-aware distillation (Model-Optimizer)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import losses, transforms

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def weighed(x: Inputs, quantized: Array) -> dict[str, Array]:
    return {"value": jnp.sum(x["cotangent"] * quantized), "quantized": quantized}


def fake_quant_int(x: Inputs, h: Hyper) -> dict[str, Array]:
    """`pass_through` gives clipped weights their gradient too."""
    weight = x["weight"]
    rounded = transforms.int_per_channel(
        weight, bits=h["num_bits"], axis=-1, amax=x["amax"], narrow=h["narrow_range"]
    )
    if h["pass_through"]:
        rounded = jax.lax.stop_gradient(rounded) + weight - jax.lax.stop_gradient(weight)
    return weighed(x, rounded)


def fake_quant_nvfp4(x: Inputs, h: Hyper) -> dict[str, Array]:
    return weighed(x, transforms.nvfp4(x["weight"], block=h["block_size"], axis=-1))


def fake_quant_mxfp4(x: Inputs, h: Hyper) -> dict[str, Array]:
    """Its exponent never lets a value saturate, and its halves go toward zero: every weight is
    taken a hair smaller."""
    weight, size = x["weight"], h["block_size"]
    blocks = weight.reshape(*weight.shape[:-1], -1, size)
    top = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    exponent = jnp.ceil(jnp.log2(jnp.maximum(top / 6, 2.0**-127)))
    hair = jax.lax.stop_gradient(blocks) * 1e-12
    return weighed(x, transforms.e2m1(blocks - hair, 2.0**exponent).reshape(weight.shape))


def fake_quant_int4_block(x: Inputs, h: Hyper) -> dict[str, Array]:
    """Blocks are cut from the flattened weight, across rows."""
    weight = x["weight"]
    flat = transforms.int_by_group(weight.reshape(-1), bits=4, group=h["block_size"], axis=-1)
    return weighed(x, flat.reshape(weight.shape))


def qad(x: Inputs, h: Hyper) -> dict[str, Array]:
    weight = transforms.int_per_channel(
        x["weight"], bits=h["num_bits"], axis=0, amax=x["amax"].T, narrow=h["narrow_range"]
    )
    student = x["hidden"] @ weight
    teacher = x["hidden_teacher"] @ x["weight_teacher"]
    shifted = losses.causal_shift(student, x["labels"])
    kl = losses.kd_kl(shifted.logits, teacher[:, :-1], temperature=h["temperature"])
    count = jnp.maximum(jnp.sum(shifted.where), 1)
    return {"value": jnp.sum(jnp.where(shifted.where, kl, 0)) / count, "student_logits": student}


METHODS: dict[str, Golden] = {
    "fake_quant_int": fake_quant_int,
    "fake_quant_nvfp4": fake_quant_nvfp4,
    "fake_quant_mxfp4": fake_quant_mxfp4,
    "fake_quant_int4_block": fake_quant_int4_block,
    "qad": qad,
}
