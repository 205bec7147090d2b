"""Vision transformers: ViT, DeiT, DINOv2, and the vision towers of CLIP and SigLIP."""

from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import models
from kdtl_jax.interop import _hf_sizes
from kdtl_jax.interop._hf_config import (
    Field,
    activation,
    count,
    epsilon,
    flag,
    layers,
    number,
    optional,
    share,
    sides,
)
from kdtl_jax.interop._hf_encoders import check_heads
from kdtl_jax.interop._hf_family import (
    POOLER_PATHS,
    UNUSED_POOLER,
    Contents,
    Family,
    Head,
    dense,
    embedding,
    norm,
)
from kdtl_jax.interop.naming import Rule, conv2d, linear


def image(v: dict[str, Any]) -> Any:
    """An abstract batch of images."""
    height, width = v.get("image_size", (32, 32))
    return jax.ShapeDtypeStruct((1, height, width, v["num_channels"]), jnp.float32)


def grid_of(v: dict[str, Any]) -> tuple[int, int]:
    """Patches per column and per row."""
    (height, width), (rows, columns) = v["image_size"], v["patch_size"]
    if height < rows or width < columns:
        raise ValueError(
            f"config.json: image_size {[height, width]} is smaller than patch_size "
            f"{[rows, columns]}."
        )
    return height // rows, width // columns


def unseen_of(v: dict[str, Any]) -> tuple[int, int]:
    """Pixels at the bottom and at the right that no patch covers."""
    (height, width), (rows, columns) = v["image_size"], v["patch_size"]
    return height % rows, width % columns


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


def _patch_sizes(v: dict[str, Any]) -> dict[str, Any]:
    """The fields shared by all vision transformers."""
    return {
        "width": v["hidden_size"],
        "layers": v["num_hidden_layers"],
        "heads": check_heads(v["hidden_size"], v["num_attention_heads"]),
        "patch": one_or_two(v["patch_size"]),
        "grid": grid_of(v),
        "unseen": unseen_of(v),
        "activation": v["hidden_act"],
        "norm_epsilon": v["layer_norm_eps"],
    }


def _vit(v: dict[str, Any], contents: Contents) -> models.ViT:
    return models.ViT(
        **_patch_sizes(v),
        hidden=v["intermediate_size"],
        classes=contents.classes("image"),
        has_pooler=contents.has_pooler(),
        pooled_activation=v["pooler_act"],
        pooler_width=v["pooler_output_size"],
        qkv_bias=v["qkv_bias"],
        dropout=v["hidden_dropout_prob"],
        attention_dropout=v["attention_probs_dropout_prob"],
    )


def image_head(name: str, torch: str = "classifier") -> Head:
    """A classifier of images, which does not read a pooler."""
    rules, classes = dense(torch, "head"), f"{torch}.weight"
    return Head("image", (name,), rules, replaces=POOLER_PATHS, classes=classes)


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
    image,
    heads=(image_head("ViTForImageClassification"),),
    harmless="encoder_stride",
    other_heads=(
        r"decoder\..*",
        r"(.*\.)?embeddings\.mask_token",
        r"classifier\..*",
        UNUSED_POOLER,
    ),
    depth="num_hidden_layers",
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
    sizes=_hf_sizes.patches,
)


def _deit(v: dict[str, Any], contents: Contents) -> models.ViT:
    classes = contents.classes("image")
    classes = contents.classes("distilled") if classes is None else classes
    return _vit(v, contents).clone(
        classes=classes,
        has_distillation_token=True,
        has_distillation_head=contents.classes("distilled") is not None,
    )


deit = vit._replace(
    model_types=("deit",),
    base="DeiTModel",
    prefix="deit.",
    body=(Rule("embeddings.distillation_token", "embeddings/distillation"), *vit.body),
    build=_deit,
    heads=(
        Head(
            "distilled",
            ("DeiTForImageClassificationWithTeacher",),
            (
                *dense("cls_classifier", "head"),
                *dense("distillation_classifier", "distillation_head"),
            ),
            replaces=POOLER_PATHS,
            classes="cls_classifier.weight",
        ),
        image_head("DeiTForImageClassification"),
    ),
    other_heads=(*vit.other_heads, r"(cls|distillation)_classifier\..*"),
    sizes=_hf_sizes.two_class_tokens,
)


def _dinov2(v: dict[str, Any], contents: Contents) -> models.Dinov2:
    if v["image_size"][0] != v["image_size"][1]:
        raise ValueError("config.json: image_size of a 'dinov2' model must be a square.")
    hidden = int(v["hidden_size"] * v["mlp_ratio"])
    if v["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return models.Dinov2(
        **_patch_sizes(v),
        hidden=hidden,
        classes=contents.classes("image"),
        is_gated=v["use_swiglu_ffn"],
        qkv_bias=v["qkv_bias"],
        dropout=v["hidden_dropout_prob"],
        attention_dropout=v["attention_probs_dropout_prob"],
        registers=v.get("num_register_tokens", 0),
        drop_path=v["drop_path_rate"],
    )


dinov2 = Family(
    ("dinov2",),
    "Dinov2Model",
    "dinov2.",
    (
        *PATCH_FIELDS,
        number("mlp_ratio", 4, most=64),
        activation("hidden_act", "gelu"),
        epsilon("layer_norm_eps", 1e-6),
        flag("qkv_bias", True),
        flag("use_swiglu_ffn", False),
        share("hidden_dropout_prob", 0.0),
        share("drop_path_rate", 0.0),
    ),
    (
        *vit_embeddings,
        *vit_layer,
        *norm(f"{_vit_layer}.norm1", "layers_{i}/attention_norm"),
        Rule(f"{_vit_layer}.layer_scale1.lambda1", "layers_{i}/attention_scale"),
        *norm(f"{_vit_layer}.norm2", "layers_{i}/mlp_norm"),
        Rule(f"{_vit_layer}.layer_scale2.lambda1", "layers_{i}/mlp_scale"),
        *dense(f"{_vit_layer}.mlp.fc1", "layers_{i}/mlp/up"),
        *dense(f"{_vit_layer}.mlp.fc2", "layers_{i}/mlp/down"),
        *dense(f"{_vit_layer}.mlp.weights_in", "layers_{i}/gated_mlp/gate_up"),
        *dense(f"{_vit_layer}.mlp.weights_out", "layers_{i}/gated_mlp/down"),
        *norm("layernorm", "norm"),
    ),
    _dinov2,
    image,
    heads=(image_head("Dinov2ForImageClassification"),),
    # For initialization, masking in pretraining, resizing positions for other images (refused
    # here), or the choice of feature maps that a backbone returns.
    harmless="layerscale_value use_mask_token apply_layernorm reshape_hidden_states "
    "interpolate_antialias interpolate_offset out_features out_indices stage_names",
    other_heads=(r"(.*\.)?embeddings\.mask_token", r"classifier\..*"),
    depth="num_hidden_layers",
    by_layers=("out_features", "out_indices", "stage_names"),
    presence={"use_mask_token": "embeddings.mask_token"},
    sizes=_hf_sizes.dinov2,
)

dinov2_registers = dinov2._replace(
    model_types=("dinov2_with_registers",),
    base="Dinov2WithRegistersModel",
    prefix="dinov2_with_registers.",
    fields=(*dinov2.fields, count("num_register_tokens", 4, least=0)),
    body=(*dinov2.body, Rule("embeddings.register_tokens", "registers")),
    heads=(image_head("Dinov2WithRegistersForImageClassification"),),
    sides={"num_register_tokens": ("registers", 1)},
    presence={},
)

_tower_layer = "encoder.layers.{i}"
tower_layers = (
    *dense(f"{_tower_layer}.self_attn.q_proj", "layers_{i}/attention/query"),
    *dense(f"{_tower_layer}.self_attn.k_proj", "layers_{i}/attention/key"),
    *dense(f"{_tower_layer}.self_attn.v_proj", "layers_{i}/attention/value"),
    *dense(f"{_tower_layer}.self_attn.out_proj", "layers_{i}/attention/out"),
    *norm(f"{_tower_layer}.layer_norm1", "layers_{i}/attention_norm"),
    *dense(f"{_tower_layer}.mlp.fc1", "layers_{i}/mlp/up"),
    *dense(f"{_tower_layer}.mlp.fc2", "layers_{i}/mlp/down"),
    *norm(f"{_tower_layer}.layer_norm2", "layers_{i}/mlp_norm"),
)
_tower_body = (
    *embedding("embeddings.position_embedding", "embeddings/positions"),
    *dense("embeddings.patch_embedding", "embeddings/patches", conv2d),
    *tower_layers,
    *norm("post_layernorm", "norm"),
)


def _tower_fields(patch: int) -> tuple[Field, ...]:
    """Sizes of an image tower; a nested config leaves out those of the base model."""
    return (
        count("hidden_size", 768),
        layers("num_hidden_layers", 12),
        count("num_attention_heads", 12),
        sides("image_size", 224),
        sides("patch_size", patch),
        count("num_channels", 3),
        count("intermediate_size", 3072),
        share("attention_dropout", 0.0),
    )


def _tower_sizes(v: dict[str, Any]) -> dict[str, Any]:
    return {
        **_patch_sizes(v),
        "hidden": v["intermediate_size"],
        "attention_dropout": v["attention_dropout"],
    }


def _clip_vision(v: dict[str, Any], contents: Contents) -> models.ClipVision:
    projection = contents.shapes.get("visual_projection.weight")
    return models.ClipVision(**_tower_sizes(v), projection=projection[0] if projection else None)


clip_vision = Family(
    ("clip_vision_model",),
    "CLIPVisionModel",
    "vision_model.",
    (*_tower_fields(32), activation("hidden_act", "quick_gelu"), epsilon("layer_norm_eps", 1e-5)),
    (
        Rule("embeddings.class_embedding", "embeddings/cls"),
        *_tower_body,
        *norm("pre_layrnorm", "first_norm"),
    ),
    _clip_vision,
    image,
    heads=(
        Head(
            "projection",
            ("CLIPVisionModelWithProjection",),
            (Rule("visual_projection.weight", "projection/kernel", linear),),
        ),
    ),
    harmless="projection_dim dropout",  # nothing reads them
    buffers=(r"(.*\.)?embeddings\.position_ids",),
    depth="num_hidden_layers",
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
    sizes=_hf_sizes.patches,
)


def _siglip_vision(v: dict[str, Any], contents: Contents) -> models.SiglipVision:
    return models.SiglipVision(**_tower_sizes(v), has_pooler=v["vision_use_head"])


siglip_vision = Family(
    ("siglip_vision_model",),
    "SiglipVisionModel",
    "vision_model.",
    (
        *_tower_fields(16),
        activation("hidden_act", "gelu_pytorch_tanh"),
        epsilon("layer_norm_eps", 1e-6),
        flag("vision_use_head", True),
    ),
    (
        *_tower_body,
        Rule("head.probe", "pooler/probe"),
        Rule("head.attention.in_proj_weight", "pooler/qkv/kernel", linear),
        Rule("head.attention.in_proj_bias", "pooler/qkv/bias"),
        *dense("head.attention.out_proj", "pooler/out"),
        *norm("head.layernorm", "pooler/norm"),
        *dense("head.mlp.fc1", "pooler/mlp/up"),
        *dense("head.mlp.fc2", "pooler/mlp/down"),
    ),
    _siglip_vision,
    image,
    buffers=(r"(.*\.)?embeddings\.position_ids",),
    depth="num_hidden_layers",
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
    sizes=_hf_sizes.no_class_token,
)
