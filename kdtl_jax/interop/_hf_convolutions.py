"""Convolutional networks for images: ResNet, ConvNeXt."""

from kdtl_jax import models
from kdtl_jax.interop import _hf_config as field
from kdtl_jax.interop import _hf_sizes
from kdtl_jax.interop._hf_family import Contents, Family, Values, dense, norm
from kdtl_jax.interop._hf_vision import image, image_head
from kdtl_jax.interop.naming import Rule, conv2d


def _conv_norm(torch: str, jax: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{torch}.convolution.weight", f"{jax}/conv/kernel", conv2d),
        *norm(f"{torch}.normalization", f"{jax}/norm"),
        Rule(f"{torch}.normalization.running_mean", f"batch_stats/{jax}/norm/mean"),
        Rule(f"{torch}.normalization.running_var", f"batch_stats/{jax}/norm/var"),
    )


def _check_stages(v: Values) -> None:
    if len(v["hidden_sizes"]) != len(v["depths"]):
        raise ValueError(
            f"config.json: hidden_sizes {list(v['hidden_sizes'])} and depths {list(v['depths'])} "
            "must have one entry per stage each."
        )


def _resnet(fields: Values, v: Values, contents: Contents) -> models.ImageResNet:
    _check_stages(v)
    is_bottleneck = v["layer_type"] == "bottleneck"
    classes = contents.classes("image")
    return models.ImageResNet(**fields, is_bottleneck=is_bottleneck, classes=classes)


_resnet_block = "encoder.stages.{s}.layers.{i}"
resnet = Family(
    ("resnet",),
    "ResNetModel",
    "resnet.",
    (
        *field.into(
            stem=field.count("embedding_size"),
            widths=field.counts("hidden_sizes"),
            depths=field.counts("depths", of_layers=True),
            downsample_first=field.flag("downsample_in_first_stage", False),
            downsample_in_first_conv=field.flag("downsample_in_bottleneck", False),
            activation=field.activation("hidden_act", "relu"),
        ),
        field.count("num_channels", 3),
        field.choice("layer_type", "bottleneck", "basic"),
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
    depth=None,
    by_layers=("out_features", "out_indices", "stage_names"),
    sizes=_hf_sizes.stages,
)


def _convnext(fields: Values, v: Values, contents: Contents) -> models.ConvNext:
    _check_stages(v)
    has_scale = v["layer_scale_init_value"] > 0
    return models.ConvNext(**fields, has_scale=has_scale, classes=contents.classes("image"))


_stage = "encoder.stages.{s}"
convnext = Family(
    ("convnext",),
    "ConvNextModel",
    "convnext.",
    (
        *field.into(
            widths=field.counts("hidden_sizes"),
            depths=field.counts("depths", of_layers=True),
            patch=field.sides("patch_size", 4),
            activation=field.activation("hidden_act", "gelu"),
            norm_epsilon=field.epsilon("layer_norm_eps", 1e-12),
            drop_path=field.share("drop_path_rate", 0.0),
        ),
        field.sides("image_size", 224),
        field.count("num_channels", 3),
        field.number("layer_scale_init_value", 1e-6, zero=True),
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
    depth=None,
    by_layers=("out_features", "out_indices", "stage_names"),
    sizes=_hf_sizes.stages,
)
