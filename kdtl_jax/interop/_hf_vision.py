"""Vision transformers: ViT, DeiT, DINOv2, and the vision towers of CLIP and SigLIP."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import models
from kdtl_jax.interop import _hf_config as field
from kdtl_jax.interop import _hf_sizes
from kdtl_jax.interop._hf_family import (
    POOLER_PATHS,
    UNUSED_POOLER,
    Contents,
    Family,
    HeadFamily,
    Values,
    attention,
    dense,
    embedding,
    norm,
)
from kdtl_jax.interop.naming import Rule, conv2d, linear


def image(v: Values) -> Any:
    """An abstract batch of images."""
    height, width = v.get("image_size", (32, 32))
    return jax.ShapeDtypeStruct((1, height, width, v["num_channels"]), jnp.float32)


def _patches(v: Values) -> dict[str, Any]:
    """A patch, the number of patches in each direction, and the pixels that no patch covers."""
    (height, width), (rows, columns) = v["image_size"], v["patch_size"]
    if height < rows or width < columns:
        raise ValueError(
            f"config.json: image_size {[height, width]} is smaller than patch_size "
            f"{[rows, columns]}."
        )
    return {
        "patch": rows if rows == columns else (rows, columns),
        "grid": (height // rows, width // columns),
        "unseen": (height % rows, width % columns),
    }


_PATCH_FIELDS = (
    *field.into(
        width=field.count("hidden_size"),
        layers=field.layers("num_hidden_layers"),
        heads=field.count("num_attention_heads"),
        activation=field.activation("hidden_act", "gelu"),
        qkv_bias=field.flag("qkv_bias", True),
        dropout=field.share("hidden_dropout_prob", 0.0),
        attention_dropout=field.share("attention_probs_dropout_prob", 0.0),
    ),
    field.sides("image_size"),
    field.sides("patch_size"),
    field.count("num_channels", 3),
)
_vit_layer = "encoder.layer.{i}"
_vit_attention = attention(
    f"{_vit_layer}.attention", "attention.query", "attention.key", "attention.value", "output.dense"
)
_vit_embeddings = (
    Rule("embeddings.cls_token", "embeddings/cls"),
    Rule("embeddings.position_embeddings", "embeddings/positions"),
    *dense("embeddings.patch_embeddings.projection", "embeddings/patches", conv2d),
)


def _vit(fields: Values, v: Values, contents: Contents) -> models.ViT:
    classes, has_pooler = contents.classes("image"), contents.has_pooler()
    return models.ViT(**fields, **_patches(v), classes=classes, has_pooler=has_pooler)


def image_head(name: str, torch: str = "classifier") -> HeadFamily:
    """A classifier of images, which does not read a pooler."""
    rules, classes = dense(torch, "head"), f"{torch}.weight"
    return HeadFamily("image", (name,), rules, replaces=POOLER_PATHS, classes=classes)


vit = Family(
    ("vit",),
    "ViTModel",
    "vit.",
    (
        *_PATCH_FIELDS,
        *field.into(
            hidden=field.count("intermediate_size"),
            pooled_activation=field.activation("pooler_act", "tanh"),
            pooler_width=field.optional(field.count("pooler_output_size")),
            norm_epsilon=field.epsilon("layer_norm_eps", 1e-12),
        ),
    ),
    (
        *_vit_embeddings,
        *_vit_attention,
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
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
    sizes=_hf_sizes.patches,
)


def _deit(fields: Values, v: Values, contents: Contents) -> models.ViT:
    module, classes = _vit(fields, v, contents), contents.classes("distilled")
    return module.clone(
        classes=module.classes if classes is None else classes,
        has_distillation_token=True,
        has_distillation_head=classes is not None,
    )


deit = vit._replace(
    model_types=("deit",),
    base="DeiTModel",
    prefix="deit.",
    body=(Rule("embeddings.distillation_token", "embeddings/distillation"), *vit.body),
    build=_deit,
    heads=(
        HeadFamily(
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
    sizes=functools.partial(_hf_sizes.patches, tokens=2),  # distillation's has a position too
)


def _dinov2(fields: Values, v: Values, contents: Contents) -> models.Dinov2:
    if v["image_size"][0] != v["image_size"][1]:
        raise ValueError("config.json: image_size of a 'dinov2' model must be a square.")
    hidden = int(v["hidden_size"] * v["mlp_ratio"])
    if v["use_swiglu_ffn"]:
        hidden = _hf_sizes.gated_width(hidden)
    return models.Dinov2(**fields, **_patches(v), hidden=hidden, classes=contents.classes("image"))


dinov2 = Family(
    ("dinov2",),
    "Dinov2Model",
    "dinov2.",
    (
        *_PATCH_FIELDS,
        *field.into(
            norm_epsilon=field.epsilon("layer_norm_eps", 1e-6),
            is_gated=field.flag("use_swiglu_ffn", False),
            drop_path=field.share("drop_path_rate", 0.0),
        ),
        field.number("mlp_ratio", 4, most=64),
    ),
    (
        *_vit_embeddings,
        *_vit_attention,
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
    by_layers=("out_features", "out_indices", "stage_names"),
    presence={"use_mask_token": "embeddings.mask_token"},
    sizes=_hf_sizes.dinov2,
)

dinov2_registers = dinov2._replace(
    model_types=("dinov2_with_registers",),
    base="Dinov2WithRegistersModel",
    prefix="dinov2_with_registers.",
    fields=(*dinov2.fields, *field.into(registers=field.count("num_register_tokens", 4, least=0))),
    body=(*dinov2.body, Rule("embeddings.register_tokens", "registers")),
    heads=(image_head("Dinov2WithRegistersForImageClassification"),),
    sides={"num_register_tokens": ("registers", 1)},
    presence={},
)

_tower_layer = "encoder.layers.{i}"
tower_layers = (
    *attention(f"{_tower_layer}.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
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


def _tower_fields(patch: int, activation: str, epsilon: float) -> tuple[field.Field, ...]:
    """Sizes of an image tower; a nested config leaves out those of the base model."""
    return (
        *field.into(
            width=field.count("hidden_size", 768),
            layers=field.layers("num_hidden_layers", 12),
            heads=field.count("num_attention_heads", 12),
            hidden=field.count("intermediate_size", 3072),
            activation=field.activation("hidden_act", activation),
            norm_epsilon=field.epsilon("layer_norm_eps", epsilon),
            attention_dropout=field.share("attention_dropout", 0.0),
        ),
        field.sides("image_size", 224),
        field.sides("patch_size", patch),
        field.count("num_channels", 3),
    )


def projection_head(name: str, torch: str) -> HeadFamily:
    """CLIP's projection to the space that texts and images share."""
    rule = Rule(f"{torch}.weight", "projection/kernel", linear)
    return HeadFamily("projection", (name,), (rule,))


def projection_of(contents: Contents, torch: str) -> int | None:
    """The width of CLIP's projection; None if the file has none."""
    shape = contents.shapes.get(f"{torch}.weight")
    return shape[0] if shape else None


def _clip_vision(fields: Values, v: Values, contents: Contents) -> models.ClipVision:
    projection = projection_of(contents, "visual_projection")
    return models.ClipVision(**fields, **_patches(v), projection=projection)


clip_vision = Family(
    ("clip_vision_model",),
    "CLIPVisionModel",
    "vision_model.",
    _tower_fields(32, "quick_gelu", 1e-5),
    (
        Rule("embeddings.class_embedding", "embeddings/cls"),
        *_tower_body,
        *norm("pre_layrnorm", "first_norm"),
    ),
    _clip_vision,
    image,
    heads=(projection_head("CLIPVisionModelWithProjection", "visual_projection"),),
    harmless="projection_dim dropout",  # nothing reads them
    buffers=(r"(.*\.)?embeddings\.position_ids",),
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
    sizes=_hf_sizes.patches,
)


def _siglip_vision(fields: Values, v: Values, contents: Contents) -> models.SiglipVision:
    return models.SiglipVision(**fields, **_patches(v))


siglip_vision = Family(
    ("siglip_vision_model",),
    "SiglipVisionModel",
    "vision_model.",
    (
        *_tower_fields(16, "gelu_pytorch_tanh", 1e-6),
        *field.into(has_pooler=field.flag("vision_use_head", True)),
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
    sides={"intermediate_size": ("layers_0/mlp/up/kernel", 1)},
    sizes=functools.partial(_hf_sizes.patches, tokens=0),
)
