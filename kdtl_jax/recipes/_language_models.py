"""The models of `kdtl language`: loaded from folders, cut from a teacher, or initialized."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import language, models, transforms
from kdtl_jax._types import Params
from kdtl_jax.interop import decoders, gguf, pruning
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.models import Decoder
from kdtl_jax.recipes import _progress
from kdtl_jax.recipes.settings import UsageError, pairs
from kdtl_jax.run import processes

KERNELS = r"layers_\d+/(attention|mlp)/[^/]+/kernel"
SHAPE = ("layers", "width", "heads", "key_heads", "hidden")


class LanguageStudent(NamedTuple):
    """A student: what is trained, and how that becomes the decoder's parameters."""

    decoder: Decoder
    start: Params
    weights: Callable[[Params], Params]
    trainable: Any


def parse_shape(value: Any) -> dict[str, int] | None:
    """`layers=4,width=128,heads=4`, or a mapping; key_heads and hidden have defaults."""
    if value is None:
        return None
    texts = {name: str(size) for name, size in pairs(value, "=").items()}
    if not set(texts) <= set(SHAPE) or not {"layers", "width", "heads"} <= set(texts):
        raise ValueError(
            f"expected {','.join(f'{n}=N' for n in SHAPE)} (the last two if you like), "
            f"got {value!r}"
        )
    if not all(size.isdecimal() and 0 < int(size) < 10**7 for size in texts.values()):
        raise ValueError(f"expected whole numbers above 0, got {value!r}")
    sizes = {name: int(size) for name, size in texts.items()}
    if sizes["width"] % (2 * sizes["heads"]):
        raise ValueError(f"the width must be an even multiple of the heads, got {value!r}")
    if sizes["heads"] % sizes.get("key_heads", 1):
        raise ValueError(f"the heads must be a multiple of the key_heads, got {value!r}")
    return sizes


def initialize(
    shape: Mapping[str, int], vocabulary: int, eos: int | None, key: Array
) -> PretrainedDecoder:
    """A Llama of the given shape with random weights and tied embeddings."""
    width = shape["width"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape.get("hidden", -(-8 * width // 3 // 16) * 16),
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape.get("key_heads", shape["heads"]),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    return decoders.initialized(config, key)


def load(folder: str) -> PretrainedDecoder:
    """Loads a folder's decoder, with its weights in float32."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    return decoders.load(folder, dtype=jnp.float32)


def is_gguf(path: str) -> bool:
    """Whether the path is a GGUF file, as written by llama.cpp."""
    return path.endswith(".gguf") and Path(path).is_file()


def to_folder(path: str | None, folder: Path) -> str | None:
    """A model's folder: the path itself, or the given folder with a GGUF file converted into it."""
    if path is None or not is_gguf(path):
        return path
    processes.decide(lambda: gguf.write_folder(folder, path))
    return str(folder)


def prune(
    teacher: PretrainedDecoder,
    shape: Mapping[str, int],
    say: _progress.Say,
    text: np.ndarray | None = None,
) -> PretrainedDecoder:
    """Prunes the teacher to a shape: evenly spaced layers, and the most important units in them.

    Importance is measured on a text `[B, L]`, or on the weights if there is none. Without `hidden`,
    the teacher's ratio of hidden units to width is kept.
    """
    config = teacher.model.config
    if not 0 < shape["layers"] <= config.layers:
        raise UsageError(f"--shape layers={shape['layers']}: the teacher has {config.layers}.")
    layers = transforms.uniform_indices(config.layers, shape["layers"])
    hidden = shape.get("hidden", max(1, round(config.hidden * shape["width"] / config.width)))
    try:
        model, report = pruning.narrow(
            decoders.student(teacher, layers=[int(i) for i in layers]), width=shape["width"],
            heads=shape["heads"], key_heads=shape.get("key_heads"), hidden=hidden,
            tokens=None if text is None else jnp.asarray(text),
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"--shape with --pruned: {error}") from None
    say(f"pruned to layers {', '.join(map(str, layers))}; {report} of the importance")
    return model


def check_fits(config: models.DecoderConfig, tokens: int, length: int, role: str) -> None:
    """Raises UsageError if a decoder has too few token embeddings or learned positions."""
    if tokens > config.vocabulary:
        raise UsageError(
            f"{role} has {config.vocabulary} rows of tokens, its tokenizer {tokens} tokens. Resize "
            "the table, or give the tokenizer that belongs to it."
        )
    if 0 < config.learned_positions < length:
        raise UsageError(
            f"--length {length}: {role} has learned {config.learned_positions} positions."
        )


def trained_length(config: Mapping[str, Any]) -> float:
    """The text length that the model was trained for; infinite if its config.json does not say.

    Rotary positions continue beyond it, to angles that were never trained.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type"))
    # Other kinds record the length that they stretch to.
    factor = scaling.get("factor") if rope_type in ("linear", "dynamic", "yarn") else None
    return (factor or 1) * (config.get("max_position_embeddings") or math.inf)


def write_folder(
    folder: Path, params: Params, model: PretrainedDecoder, source: str | None
) -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer."""
    decoders.save(folder, params, model.rules, config=model.config, tokenizer=source)
    if source is None:
        language.write_byte_tokenizer(folder)


def make_student(
    source: PretrainedDecoder,
    *,
    dtype: Any,
    lora: int | None,
    quantize: Callable[[Params], Params] | None,
    key: Array,
) -> LanguageStudent:
    """The trainable student of a decoder: all weights or a LoRA, fake-quantized if requested."""
    decoder = models.decoder(source.model.config, dtype=dtype)
    if lora is None:
        return LanguageStudent(decoder, source.params, quantize or language.as_they_are, r".*")
    adapter = transforms.lora(rank=lora, alpha=2.0 * lora)
    start = adapter.init(key, source.params, where=KERNELS)

    def weights(params: Any) -> Params:
        params_ = adapter.apply(*params)
        return params_ if quantize is None else quantize(params_)

    return LanguageStudent(decoder, start, weights, r"adapter/.*")


def int_rounding(bits: int) -> Callable[[Params], Params]:
    """Fake quantization of the layers' kernels: `bits` per weight, a scale per 32 inputs."""
    quantizer = partial(transforms.int_by_group, bits=bits, group=32)
    return partial(transforms.fake_quantize, quantizer=quantizer, where=KERNELS)
