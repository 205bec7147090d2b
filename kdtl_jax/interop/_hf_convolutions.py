"""Convolutional networks for images: ResNet, ConvNeXt."""

from typing import Any

from kdtl_jax import models
from kdtl_jax.interop import _hf_sizes
from kdtl_jax.interop._hf_config import (
    activation,
    choice,
    count,
    counts,
    epsilon,
    flag,
    number,
    share,
    sides,
)
from kdtl_jax.interop._hf_family import Contents, Family, dense, norm
from kdtl_jax.interop._hf_vision import image, image_head
from kdtl_jax.interop.naming import Rule, conv2d


def _conv_norm(torch: str, jax: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{torch}.convolution.weight", f"{jax}/conv/kernel", conv2d),
        *norm(f"{torch}.normalization", f"{jax}/norm"),
        Rule(f"{torch}.normalization.running_mean", f"batch_stats/{jax}/norm/mean"),
        Rule(f"{torch}.normalization.running_var", f"batch_stats/{jax}/norm/var"),
    )


def _check_stages(v: dict[str, Any]) -> None:
    if len(v["hidden_sizes"]) != len(v["depths"]):
        raise ValueError(
            f"config.json: hidden_sizes {list(v['hidden_sizes'])} and depths {list(v['depths'])} "
            "must have one entry per stage each."
        )


def _resnet(v: dict[str, Any], contents: Contents) -> models.ImageResNet:
    _check_stages(v)
    return models.ImageResNet(
        stem=v["embedding_size"],
        widths=v["hidden_sizes"],
        depths=v["depths"],
        is_bottleneck=v["layer_type"] == "bottleneck",
        downsample_first=v["downsample_in_first_stage"],
        downsample_in_first_conv=v["downsample_in_bottleneck"],
        classes=contents.classes("image"),
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
    image,
    heads=(image_head("ResNetForImageClassification", "classifier.1"),),
    # These select the feature maps that a backbone returns.
    harmless="out_features out_indices stage_names",
    buffers=(r".*\.num_batches_tracked",),
    other_heads=(r"classifier\..*",),
    by_layers=("out_features", "out_indices", "stage_names"),
    sizes=_hf_sizes.stages,
)


def _convnext(v: dict[str, Any], contents: Contents) -> models.ConvNext:
    _check_stages(v)
    return models.ConvNext(
        widths=v["hidden_sizes"],
        depths=v["depths"],
        patch=v["patch_size"],
        classes=contents.classes("image"),
        activation=v["hidden_act"],
        norm_epsilon=v["layer_norm_eps"],
        has_scale=v["layer_scale_init_value"] > 0,
        drop_path=v["drop_path_rate"],
    )


_stage = "encoder.stages.{s}"
convnext = Family(
    ("convnext",),
    "ConvNextModel",
    "convnext.",
    (
        counts("hidden_sizes"),
        counts("depths", of_layers=True),
        sides("patch_size", 4),
        sides("image_size", 224),
        count("num_channels", 3),
        activation("hidden_act", "gelu"),
        epsilon("layer_norm_eps", 1e-12),
        number("layer_scale_init_value", 1e-6, zero=True),
        share("drop_path_rate", 0.0),
    ),
    (
        *dense("embeddings.patch_embeddings", "stem", conv2d),
        *norm("embeddings.layernorm", "stem_norm"),
        *norm(f"{_stage}.downsampling_layer.0", "stage{s}_norm"),
        *dense(f"{_stage}.downsampling_layer.1", "stage{s}_down", conv2d),
        *dense(f"{_stage}.layers.{{i}}.dwconv", "stage{s}_block{i}/conv", conv2d),
        *norm(f"{_stage}.layers.{{i}}.layernorm", "stage{s}_block{i}/norm"),
        *dense(f"{_stage}.layers.{{i}}.pwconv1", "stage{s}_block{i}/mlp/up"),
        *dense(f"{_stage}.layers.{{i}}.pwconv2", "stage{s}_block{i}/mlp/down"),
        Rule(f"{_stage}.layers.{{i}}.layer_scale_parameter", "stage{s}_block{i}/scale"),
        *norm("layernorm", "norm"),
    ),
    _convnext,
    image,
    heads=(image_head("ConvNextForImageClassification"),),
    harmless="num_stages out_features out_indices stage_names",
    other_heads=(r"classifier\..*",),
    by_layers=("out_features", "out_indices", "stage_names"),
    sizes=_hf_sizes.stages,
)
