"""The text towers of CLIP and SigLIP, and either tower of a folder that holds both."""

from collections.abc import Mapping
from typing import Any

from kdtl_jax import _text, models
from kdtl_jax.interop import _hf_config as field
from kdtl_jax.interop._hf_encoders import tokens
from kdtl_jax.interop._hf_family import Contents, Family, Values, dense, embedding, norm
from kdtl_jax.interop._hf_vision import projection_head, projection_of, tower_layers


def _fields(
    vocabulary: int, width: int, positions: int, activation: str, epsilon: float
) -> tuple[field.Field, ...]:
    """Sizes of a text tower; a nested config leaves out those of the base model."""
    return field.into(
        vocabulary=field.count("vocab_size", vocabulary),
        width=field.count("hidden_size", width),
        layers=field.layers("num_hidden_layers", 12),
        heads=field.count("num_attention_heads", width // 64),
        hidden=field.count("intermediate_size", 4 * width),
        positions=field.count("max_position_embeddings", positions),
        activation=field.activation("hidden_act", activation),
        norm_epsilon=field.epsilon("layer_norm_eps", epsilon),
        attention_dropout=field.share("attention_dropout", 0.0),
    )


_BODY = (
    *embedding("embeddings.token_embedding", "tokens"),
    *embedding("embeddings.position_embedding", "positions"),
    *tower_layers,
    *norm("final_layer_norm", "norm"),
)
_SIDES = {
    "vocab_size": ("tokens/embedding", 0),
    "max_position_embeddings": ("positions/embedding", 0),
    "intermediate_size": ("layers_0/mlp/up/kernel", 1),
}
_BUFFERS = (r"(.*\.)?embeddings\.position_ids",)


def _clip(fields: Values, v: Values, contents: Contents) -> models.ClipText:
    # Files from before the end token was recorded say 2 and mean the largest token.
    end = None if v["eos_token_id"] == 2 else v["eos_token_id"]
    projection = projection_of(contents, "text_projection")
    return models.ClipText(**fields, end=end, projection=projection)


clip_text = Family(
    ("clip_text_model",),
    "CLIPTextModel",
    "text_model.",
    (
        *_fields(49408, 512, 77, "quick_gelu", 1e-5),
        field.count("eos_token_id", 49407, least=0, most=2**31 - 1),
    ),
    _BODY,
    _clip,
    tokens,
    heads=(projection_head("CLIPTextModelWithProjection", "text_projection"),),
    harmless="projection_dim dropout",
    buffers=_BUFFERS,
    sides=_SIDES,
)


def _siglip(fields: Values, v: Values, contents: Contents) -> models.SiglipText:
    projection = v["hidden_size"] if v["projection_size"] is None else v["projection_size"]
    return models.SiglipText(**fields, projection=projection)


siglip_text = Family(
    ("siglip_text_model",),
    "SiglipTextModel",
    "text_model.",
    (
        *_fields(32000, 768, 64, "gelu_pytorch_tanh", 1e-6),
        field.optional(field.count("projection_size")),
    ),
    (*_BODY, *dense("head", "pooler")),
    _siglip,
    tokens,
    buffers=_BUFFERS,
    sides=_SIDES,
)


def one_tower(config: Mapping[str, Any], tower: str | None) -> tuple[dict[str, Any], str | None]:
    """The config of a tower and a pattern for its tensors; other configs unchanged, with None."""
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        if tower is not None:
            raise ValueError(f"a folder of model_type {str(kind)[:60]!r} has no {tower} tower.")
        return dict(config), None
    if tower not in ("vision", "text"):
        raise ValueError(
            f"a {kind!r} folder holds two towers; pass tower='vision' or tower='text', got "
            f"{tower!r}."
        )
    nested = config.get(f"{tower}_config")
    overrides = config.get(f"{tower}_config_dict") or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"config.json of a {kind!r} folder has no {tower}_config.")
    if not isinstance(overrides, Mapping):
        raise ValueError(
            f"config.json: {tower}_config_dict must be an object or null, got "
            f"{_text.quoted(overrides)}."
        )
    nested = {**nested, **overrides}
    # The class depends on whether there is a projection.
    nested = {key: value for key, value in nested.items() if key != "architectures"}
    nested |= {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    projection = {"vision": "visual_projection", "text": "text_projection"}[tower]
    return nested | {"model_type": f"{kind}_{tower}_model"}, rf"({tower}_model|{projection})\..*"
