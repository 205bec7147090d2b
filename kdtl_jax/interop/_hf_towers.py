"""The text towers of CLIP and SigLIP, and either tower of a folder that holds both."""

from collections.abc import Mapping
from typing import Any

from kdtl_jax import _text, models
from kdtl_jax.interop._hf_config import (
    Field,
    activation,
    count,
    epsilon,
    layers,
    optional,
    share,
)
from kdtl_jax.interop._hf_encoders import check_heads, tokens
from kdtl_jax.interop._hf_family import Contents, Family, Head, dense, embedding, norm
from kdtl_jax.interop._hf_vision import tower_layers
from kdtl_jax.interop.naming import Rule, linear


def _fields(vocabulary: int, width: int, positions: int) -> tuple[Field, ...]:
    """Sizes of a text tower; a nested config leaves out those of the base model."""
    return (
        count("vocab_size", vocabulary),
        count("hidden_size", width),
        layers("num_hidden_layers", 12),
        count("num_attention_heads", width // 64),
        count("intermediate_size", 4 * width),
        count("max_position_embeddings", positions),
        share("attention_dropout", 0.0),
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


def _shared(v: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocabulary": v["vocab_size"],
        "width": v["hidden_size"],
        "layers": v["num_hidden_layers"],
        "heads": check_heads(v["hidden_size"], v["num_attention_heads"]),
        "hidden": v["intermediate_size"],
        "positions": v["max_position_embeddings"],
        "activation": v["hidden_act"],
        "norm_epsilon": v["layer_norm_eps"],
        "attention_dropout": v["attention_dropout"],
    }


def _clip(v: dict[str, Any], contents: Contents) -> models.ClipText:
    projection = contents.shapes.get("text_projection.weight")
    # Files from before the end token was recorded say 2 and mean the largest token.
    end = None if v["eos_token_id"] == 2 else v["eos_token_id"]
    return models.ClipText(**_shared(v), end=end, projection=projection[0] if projection else None)


clip_text = Family(
    ("clip_text_model",),
    "CLIPTextModel",
    "text_model.",
    (
        *_fields(49408, 512, 77),
        activation("hidden_act", "quick_gelu"),
        epsilon("layer_norm_eps", 1e-5),
        count("eos_token_id", 49407, least=0, most=2**31 - 1),
    ),
    _BODY,
    _clip,
    tokens,
    heads=(
        Head(
            "projection",
            ("CLIPTextModelWithProjection",),
            (Rule("text_projection.weight", "projection/kernel", linear),),
        ),
    ),
    harmless="projection_dim dropout",
    buffers=_BUFFERS,
    depth="num_hidden_layers",
    sides=_SIDES,
)


def _siglip(v: dict[str, Any], contents: Contents) -> models.SiglipText:
    projection = v["hidden_size"] if v["projection_size"] is None else v["projection_size"]
    return models.SiglipText(**_shared(v), projection=projection)


siglip_text = Family(
    ("siglip_text_model",),
    "SiglipTextModel",
    "text_model.",
    (
        *_fields(32000, 768, 64),
        activation("hidden_act", "gelu_pytorch_tanh"),
        epsilon("layer_norm_eps", 1e-6),
        optional(count("projection_size")),
    ),
    (*_BODY, *dense("head", "pooler")),
    _siglip,
    tokens,
    buffers=_BUFFERS,
    depth="num_hidden_layers",
    sides=_SIDES,
)


def one_tower(config: Mapping[str, Any], tower: str | None) -> tuple[dict[str, Any], str | None]:
    """The config of a tower and a pattern for its tensors; other configs unchanged, with None.

    Raises:
      ValueError: if no tower is given for a folder of two, or one is given for a folder of none.
    """
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
