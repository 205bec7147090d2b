"""Networks of images: ViT, ResNet."""

from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import models
from kdtl_jax.interop._hf_config import (
    activation,
    choice,
    count,
    counts,
    epsilon,
    flag,
    layers,
    optional,
    share,
    sides,
)
from kdtl_jax.interop._hf_encoders import check_heads
from kdtl_jax.interop._hf_family import Family, Found, Head, dense, norm
from kdtl_jax.interop.naming import Rule, conv2d


def _image(v: dict[str, Any]) -> Any:
    """An abstract batch of images."""
    height, width = v.get("image_size", (32, 32))
    return jax.ShapeDtypeStruct((1, height, width, v["num_channels"]), jnp.float32)


def grid_of(v: dict[str, Any]) -> tuple[int, int]:
    """Patches per column and per row."""
    (height, width), (high, wide) = v["image_size"], v["patch_size"]
    if height % high or width % wide:
        raise ValueError(
            f"config.json: image_size {height} x {width} is not a multiple of patch_size "
            f"{high} x {wide}."
        )
    return height // high, width // wide


def one_or_two(sizes: tuple[int, int]) -> int | tuple[int, int]:
    """A square's side, or height and width."""
    return sizes[0] if sizes[0] == sizes[1] else sizes


PATCH_FIELDS = (
    count("hidden_size"),
    layers("num_hidden_layers"),
    count("num_attention_heads"),
    sides("image_size"),
    sides("patch_size"),
    count("num_channels", 3),
    share("attention_probs_dropout_prob", 0.0),
)
_vit_layer = "encoder.layer.{i}"
vit_layer = (
    *dense(f"{_vit_layer}.attention.attention.query", "layers_{i}/attention/query"),
    *dense(f"{_vit_layer}.attention.attention.key", "layers_{i}/attention/key"),
    *dense(f"{_vit_layer}.attention.attention.value", "layers_{i}/attention/value"),
    *dense(f"{_vit_layer}.attention.output.dense", "layers_{i}/attention/out"),
)
vit_embeddings = (
    Rule("embeddings.cls_token", "embeddings/cls"),
    Rule("embeddings.position_embeddings", "embeddings/positions"),
    *dense("embeddings.patch_embeddings.projection", "embeddings/patches", conv2d),
)


def _vit(v: dict[str, Any], found: Found) -> models.ViT:
    return models.ViT(
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=check_heads(v["hidden_size"], v["num_attention_heads"]),
        hidden=v["intermediate_size"],
        patch=one_or_two(v["patch_size"]),
        grid=grid_of(v),
        classes=found.classes("image"),
        has_pooler=found.has("pooler.dense.weight"),
        pooled_activation=v["pooler_act"],
        pooler_width=v["pooler_output_size"],
        activation=v["hidden_act"],
        norm_epsilon=v["layer_norm_eps"],
        qkv_bias=v["qkv_bias"],
        dropout=v["hidden_dropout_prob"],
        attention_dropout=v["attention_probs_dropout_prob"],
    )


def image_head(name: str, torch: str = "classifier") -> Head:
    """A classifier of images."""
    return Head("image", (name,), dense(torch, "head"), classes=f"{torch}.weight")


vit = Family(
    ("vit",),
    "ViTModel",
    "vit.",
    (
        *PATCH_FIELDS,
        count("intermediate_size"),
        activation("hidden_act", "gelu"),
        activation("pooler_act", "tanh"),
        optional(count("pooler_output_size")),
        epsilon("layer_norm_eps", 1e-12),
        flag("qkv_bias", True),
        share("hidden_dropout_prob", 0.0),
    ),
    (
        *vit_embeddings,
        *vit_layer,
        *norm(f"{_vit_layer}.layernorm_before", "layers_{i}/attention_norm"),
        *dense(f"{_vit_layer}.intermediate.dense", "layers_{i}/mlp/up"),
        *dense(f"{_vit_layer}.output.dense", "layers_{i}/mlp/down"),
        *norm(f"{_vit_layer}.layernorm_after", "layers_{i}/mlp_norm"),
        *norm("layernorm", "norm"),
        *dense("pooler.dense", "pooler"),
    ),
    _vit,
    _image,
    heads=(image_head("ViTForImageClassification"),),
    harmless="encoder_stride",
    other_heads=(r"decoder\..*", r"(.*\.)?embeddings\.mask_token", r"classifier\..*"),
    depth="num_hidden_layers",
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
)


def _conv_norm(torch: str, jax: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{torch}.convolution.weight", f"{jax}/conv/kernel", conv2d),
        *norm(f"{torch}.normalization", f"{jax}/norm"),
        Rule(f"{torch}.normalization.running_mean", f"batch_stats/{jax}/norm/mean"),
        Rule(f"{torch}.normalization.running_var", f"batch_stats/{jax}/norm/var"),
    )


def _resnet(v: dict[str, Any], found: Found) -> models.ImageResNet:
    if len(v["hidden_sizes"]) != len(v["depths"]):
        raise ValueError(
            f"config.json: hidden_sizes {list(v['hidden_sizes'])} and depths {list(v['depths'])} "
            "must have one entry per stage each."
        )
    return models.ImageResNet(
        stem=v["embedding_size"],
        widths=v["hidden_sizes"],
        depths=v["depths"],
        is_bottleneck=v["layer_type"] == "bottleneck",
        downsample_first=v["downsample_in_first_stage"],
        downsample_in_first_conv=v["downsample_in_bottleneck"],
        classes=found.classes("image"),
        activation=v["hidden_act"],
    )


_resnet_block = "encoder.stages.{s}.layers.{i}"
resnet = Family(
    ("resnet",),
    "ResNetModel",
    "resnet.",
    (
        count("embedding_size"),
        counts("hidden_sizes"),
        counts("depths", of_layers=True),
        count("num_channels", 3),
        choice("layer_type", "bottleneck", "basic"),
        flag("downsample_in_first_stage", False),
        flag("downsample_in_bottleneck", False),
        activation("hidden_act", "relu"),
    ),
    (
        *_conv_norm("embedder.embedder", "stem"),
        *_conv_norm(f"{_resnet_block}.shortcut", "stage{s}_block{i}/shortcut"),
        *_conv_norm(f"{_resnet_block}.layer.{{j}}", "stage{s}_block{i}/conv{j}"),
    ),
    _resnet,
    _image,
    heads=(image_head("ResNetForImageClassification", "classifier.1"),),
    # These say which feature maps a backbone returns.
    harmless="out_features out_indices stage_names",
    buffers=(r".*\.num_batches_tracked",),
    other_heads=(r"classifier\..*",),
)
