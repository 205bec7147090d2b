"""From a `config.json` to a Linen module of `kdtl_jax.models`, or an error that names what differs.

The tensors decide what the configuration leaves open: a pooler or head is built if the file has
one.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdtl_jax import models
from kdtl_jax.interop import _hf_names
from kdtl_jax.interop._hf_names import Names

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # of the checkpoint's tensors, by torch name

families = "bert, roberta, distilbert, gpt2, llama, mistral, qwen2, vit, resnet"


class Architecture(NamedTuple):
    """A module, its names, and an abstract input to initialize it with."""

    module: nn.Module
    names: Names
    example: Any


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """The module that a checkpoint belongs to.

    Raises:
      ValueError: for an unknown family, or a configuration whose computation is not built here.
    """
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    family = required(config, "model_type")
    match family:
        case "bert":
            return Architecture(_bert(config, shapes), _hf_names.bert, tokens)
        case "roberta" | "xlm-roberta":
            return Architecture(_roberta(config, shapes), _hf_names.roberta, tokens)
        case "distilbert":
            return Architecture(_distilbert(config, shapes), _hf_names.distilbert, tokens)
        case "gpt2":
            return Architecture(_gpt2(config, shapes), _hf_names.gpt2, tokens)
        case "llama" | "mistral" | "qwen2":
            return Architecture(_llama(config, shapes), _hf_names.llama, tokens)
        case "vit":
            side, channels = required(config, "image_size"), config.get("num_channels", 3)
            image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
            return Architecture(_vit(config, shapes), _hf_names.vit, image)
        case "resnet":
            image = jax.ShapeDtypeStruct((1, 32, 32, config.get("num_channels", 3)), jnp.float32)
            return Architecture(_resnet(config, shapes), _hf_names.resnet, image)
        case _:
            raise ValueError(
                f"model_type {family!r} is not built here; known are {families}. "
                "Load its tensors with safetensors.load and name them with your own rules."
            )


class Classifier(NamedTuple):
    """What a classification head changes: names, `config.json`, and whether it has a pooler."""

    names: Names
    changes: dict[str, Any]
    has_pooler: bool


def classifier(config: Config, classes: int) -> Classifier:
    """An encoder's checkpoint with a head for so many classes, as PyTorch libraries read it.

    Raises:
      ValueError: for what is no encoder.
    """
    family = required(config, "model_type")
    tasks = {
        "bert": ("BertForSequenceClassification", _hf_names.bert),
        "distilbert": ("DistilBertForSequenceClassification", _hf_names.distilbert),
        "roberta": ("RobertaForSequenceClassification", _hf_names.roberta_classifier),
        "vit": ("ViTForImageClassification", _hf_names.vit),
    }
    if family not in tasks:
        raise ValueError(
            f"a {family!r} model takes no new head here; those of {', '.join(tasks)} do."
        )
    name, names = tasks[family]
    changes = {
        "architectures": [name],
        "id2label": {str(i): f"LABEL_{i}" for i in range(classes)},
        "label2id": {f"LABEL_{i}": i for i in range(classes)},
    }
    return Classifier(names, changes, family != "vit")


def required(config: Config, key: str) -> Any:
    """`config[key]`, or an error that names the key."""
    if key not in config:
        raise ValueError(f"config.json has no {key!r}; it is of no known model.")
    return config[key]


def _refuse(config: Config, **unsupported: tuple[Any, ...]) -> None:
    """Raises if a key has a value outside the given ones: another computation would be wrong."""
    for key, allowed in unsupported.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"{key} = {config[key]!r} is not built here (only "
                f"{' or '.join(map(repr, allowed))}); the outputs would be wrong."
            )


def _activation(name: str) -> models.Activation:
    match name:
        case "gelu":
            return models.gelu
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
            return models.gelu_tanh
        case "quick_gelu":
            return models.quick_gelu
        case "relu":
            return jax.nn.relu
        case "silu" | "swish":
            return jax.nn.silu
        case _:
            raise ValueError(f"the activation {name!r} is not built here.")


def _has(shapes: Shapes, suffix: str) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for name in shapes)


def _classes(config: Config, shapes: Shapes, name: str) -> int | None:
    """Classes of a sequence or image classifier; heads for other tasks are not imported."""
    tasks = [a for a in config.get("architectures") or [] if "For" in a]
    right = all(a.endswith(("SequenceClassification", "ImageClassification")) for a in tasks)
    return shapes[name][0] if right and name in shapes else None


def _bert(config: Config, shapes: Shapes) -> models.Bert:
    _refuse(
        config,
        position_embedding_type=("absolute",),
        is_decoder=(False,),
        add_cross_attention=(False,),
    )
    return models.Bert(
        vocabulary=required(config, "vocab_size"),
        width=required(config, "hidden_size"),
        layers=required(config, "num_hidden_layers"),
        heads=required(config, "num_attention_heads"),
        hidden=required(config, "intermediate_size"),
        positions=required(config, "max_position_embeddings"),
        types=required(config, "type_vocab_size"),
        classes=_classes(config, shapes, "classifier.weight"),
        has_pooler=_has(shapes, "pooler.dense.weight"),
        activation=_activation(config.get("hidden_act", "gelu")),
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
        dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
    )


def _roberta(config: Config, shapes: Shapes) -> models.Bert:
    classes = _classes(config, shapes, "classifier.out_proj.weight")
    return _bert(config, shapes).clone(
        classes=classes,
        has_pooler=classes is not None or _has(shapes, "pooler.dense.weight"),
        norm_epsilon=config.get("layer_norm_eps", 1e-5),
        first_position=config.get("pad_token_id", 1) + 1,
    )


def _distilbert(config: Config, shapes: Shapes) -> models.Bert:
    classes = _classes(config, shapes, "classifier.weight")
    return models.Bert(
        vocabulary=required(config, "vocab_size"),
        width=required(config, "dim"),
        layers=required(config, "n_layers"),
        heads=required(config, "n_heads"),
        hidden=required(config, "hidden_dim"),
        positions=required(config, "max_position_embeddings"),
        types=0,
        classes=classes,
        has_pooler=classes is not None,
        activation=_activation(config.get("activation", "gelu")),
        pooled_activation=jax.nn.relu,
        dropout=config.get("dropout", 0.1),
        attention_dropout=config.get("attention_dropout", 0.1),
    )


def _gpt2(config: Config, shapes: Shapes) -> models.GPT2:
    _refuse(
        config,
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    width = required(config, "n_embd")
    tied = config.get("tie_word_embeddings", True) and "lm_head.weight" not in shapes
    return models.GPT2(
        vocabulary=required(config, "vocab_size"),
        width=width,
        layers=required(config, "n_layer"),
        heads=required(config, "n_head"),
        hidden=config.get("n_inner") or 4 * width,
        positions=required(config, "n_positions"),
        activation=_activation(config.get("activation_function", "gelu_new")),
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        dropout=config.get("resid_pdrop", 0.1),
        attention_dropout=config.get("attn_pdrop", 0.1),
        has_head=tied or "lm_head.weight" in shapes,
        is_tied=tied,
    )


def _llama(config: Config, shapes: Shapes) -> models.Llama:
    width, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    head_width = config.get("head_dim") or width // heads
    is_qwen = config["model_type"] == "qwen2"
    if is_qwen and config.get("use_sliding_window"):
        _refuse(config, use_sliding_window=(False,))
    bias = bool(config.get("attention_bias", False))
    tied = config.get("tie_word_embeddings", False) and "lm_head.weight" not in shapes
    return models.Llama(
        vocabulary=required(config, "vocab_size"),
        width=width,
        layers=required(config, "num_hidden_layers"),
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        hidden=required(config, "intermediate_size"),
        rope_frequencies=rope_frequencies(config, head_width),
        head_width=head_width,
        activation=_activation(config.get("hidden_act", "silu")),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        qkv_bias=is_qwen or bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        window=None if is_qwen else config.get("sliding_window"),
        has_head=tied or "lm_head.weight" in shapes,
        is_tied=tied,
    )


def rope_frequencies(config: Config, head_width: int) -> tuple[float, ...]:
    """Radians per position of each channel pair: plain, linearly scaled, or Llama 3's blend.

    Llama 3 divides the frequency of long waves by `factor`, leaves short waves alone, and blends
    between `original / low_freq_factor` and `original / high_freq_factor` positions per turn.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    plain = [theta ** (-2 * i / head_width) for i in range(head_width // 2)]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(f / rope["factor"] for f in plain)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original, factor = rope["original_max_position_embeddings"], rope["factor"]

        def blended(frequency: float) -> float:
            turns = original * frequency / (2 * math.pi)
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            return share * frequency + (1 - share) * frequency / factor

        return tuple(blended(f) for f in plain)
    raise ValueError(f"rope type {kind!r} is not built here (only default, linear and llama3).")


def _vit(config: Config, shapes: Shapes) -> models.ViT:
    return models.ViT(
        width=required(config, "hidden_size"),
        layers=required(config, "num_hidden_layers"),
        heads=required(config, "num_attention_heads"),
        hidden=required(config, "intermediate_size"),
        patch=required(config, "patch_size"),
        classes=_classes(config, shapes, "classifier.weight"),
        has_pooler=_has(shapes, "pooler.dense.weight"),
        activation=_activation(config.get("hidden_act", "gelu")),
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
        qkv_bias=config.get("qkv_bias", True),
        dropout=config.get("hidden_dropout_prob", 0.0),
    )


def _resnet(config: Config, shapes: Shapes) -> models.ImageResNet:
    return models.ImageResNet(
        stem=required(config, "embedding_size"),
        widths=tuple(required(config, "hidden_sizes")),
        depths=tuple(required(config, "depths")),
        is_bottleneck=config.get("layer_type", "bottleneck") == "bottleneck",
        downsample_first=config.get("downsample_in_first_stage", False),
        downsample_in_first_conv=config.get("downsample_in_bottleneck", False),
        classes=_classes(config, shapes, "classifier.1.weight"),
        activation=_activation(config.get("hidden_act", "relu")),
    )
