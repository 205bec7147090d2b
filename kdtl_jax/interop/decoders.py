"""Hugging Face folders of decoder-only language models, in and out.

    source = decoders.load("SmolLM2-135M")
    hidden, _ = source.model.apply(source.params, tokens)
    small = decoders.student(source, layers=range(0, 30, 3))
    decoders.save("small", small.params, small.rules, config=small.config)

Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and 3 (text), Phi-3, SmolLM3, OLMo 2 and GPT-2, sharded
or not, in any float dtype. The model is a `models.Decoder`, whose head is separate and whose `tap`
gives hidden states and attention. Encoders are in `interop.huggingface`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import _text, models, transforms
from kdtl_jax._files import atomic_file, read_json, write_atomic
from kdtl_jax._types import Params
from kdtl_jax.interop import _hf_decoders, naming, safetensors
from kdtl_jax.interop.naming import Rule
from kdtl_jax.models import Decoder
from kdtl_jax.transforms import Report


class PretrainedDecoder(NamedTuple):
    """A checkpoint as a decoder: its functions, its parameters, and what names its tensors."""

    model: Decoder
    params: Params
    rules: tuple[Rule, ...]
    config: dict[str, Any]
    report: Report


_HEAD = "lm_head.weight"
_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "n_embd", "n_inner", "n_head", "n_positions"),
)
_BUFFERS = (r"(.*\.)?rotary_emb\.inv_freq", r"(.*\.)?h\.\d+\.attn\.(masked_)?bias")
_OTHER_HEADS = r"(score|classifier|(transformer\.)?qa_outputs|multiple_choice_head)\..*"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def load(folder: str | Path, *, dtype: Any = None) -> PretrainedDecoder:
    """Imports a folder with config.json and `*.safetensors`.

    Args:
      folder: the folder.
      dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      The decoder. Its report lists heads for other tasks under `extra`, and a stored copy of the
      embedding under `unused`.

    Raises:
      FileNotFoundError: if there is no such folder, config.json or safetensors file.
      ValueError: for an unknown family, a key of the configuration that is not understood, a tensor
        without a place, a missing tensor, or a shape that disagrees with the configuration.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    tensors = safetensors.views(safetensors.index(folder).tensors)
    return from_tensors(config, tensors, dtype=dtype)


def from_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Any], *, dtype: Any = None
) -> PretrainedDecoder:
    """Builds a decoder from a folder's contents: the object in config.json and the tensors by name.

    Raises:
      ValueError: as for `load`.
    """
    config = dict(config)
    built, rules, unused = _built(config, tensors)
    model = models.decoder(built)
    extra = tuple(name for name in tensors if re.fullmatch(_OTHER_HEADS, name))
    kept = {name: array for name, array in tensors.items() if name not in {*unused, *extra}}
    arrays = naming.from_torch(kept, rules, ignore=_BUFFERS)
    target = jax.eval_shape(model.init, jax.random.key(0))
    stored = next(iter(arrays.values())).dtype
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or stored), target)
    params, report = transforms.transfer(arrays, target)
    report = report._replace(unused=tuple(sorted(unused)), extra=extra)
    return PretrainedDecoder(model, params, rules, config, report)


def initialized(config: Mapping[str, Any], key: jax.Array) -> PretrainedDecoder:
    """Builds a decoder with random weights from the content of a config.json.

    Raises:
      ValueError: for an unknown family or a key that is not understood.
    """
    built, rules = _hf_decoders.decoder(config)
    prefix = _hf_decoders.FAMILIES[config["model_type"]].prefix
    model = models.decoder(built)
    params = jax.jit(model.init)(key)
    _, report = transforms.transfer(params, params)
    return PretrainedDecoder(model, params, _prefixed(rules, prefix), dict(config), report)


def student(source: PretrainedDecoder, *, layers: Sequence[int]) -> PretrainedDecoder:
    """Takes some layers of a decoder as a new one; layer `j` is the source's `layers[j]`.

    Raises:
      ValueError: if a position is out of range.
    """
    whole = source.model.config
    layers = tuple(layers)
    if not layers or not all(0 <= i < whole.layers for i in layers):
        raise ValueError(f"layers must lie in 0..{whole.layers - 1}, got {list(layers)}.")
    built = whole._replace(
        layers=len(layers),
        ropes=tuple(whole.ropes[i] for i in layers) if whole.ropes else (),
        windows=tuple(whole.windows[i] for i in layers) if whole.windows else (),
    )
    model = models.decoder(built)
    target = jax.eval_shape(model.init, jax.random.key(0))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, source.params["tokens"]["embedding"].dtype), target
    )
    rename = transforms.layer_map(r"layers_(\d+)/.*", layers)
    params, report = transforms.transfer(source.params, target, rename=rename)
    config = dict(source.config)
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = len(layers)
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(config.get(key), list):
            config[key] = [config[key][i] for i in layers]
    if _hf_decoders.decoder(config)[0]._replace(is_tied=built.is_tied) != built:
        raise ValueError(
            f"the layers {list(layers)} of a {config['model_type']!r} model have windows or "
            "rotary tables that its config.json cannot say; keep the pattern of its layers."
        )
    return PretrainedDecoder(model, params, source.rules, config, report)


def save(
    folder: str | Path,
    params: Params,
    rules: Sequence[Rule],
    *,
    config: Mapping[str, Any],
    tokenizer: str | Path | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` that transformers opens.

    The dtype, the vocabulary and whether the head is tied are written as the tensors have them, and
    the architecture's name is that of a language head: others are left out when a folder is read.

    Args:
      folder: created if needed; files are replaced atomically, the weights last.
      params: the parameters, layers apart (`transforms.unstack_layers` takes stacked ones apart).
      rules: a `PretrainedDecoder`'s rules.
      config: its config.
      tokenizer: a folder whose tokenizer files are copied.

    Raises:
      ValueError: if a parameter has no rule, or the parameters do not match the config.
    """
    tensors = naming.to_torch(params, rules)
    table = params["tokens"]["embedding"]
    config = {**config, "vocab_size": int(table.shape[0])}
    config["tie_word_embeddings"] = "kernel" not in params.get("head", {})
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(table.dtype)
    built, again, _ = _built(config, tensors)
    if config.get("architectures"):
        config["architectures"] = [_hf_decoders.ARCHITECTURES[config["model_type"]]]
    target = jax.eval_shape(models.decoder(built).init, jax.random.key(0))
    transforms.plan_transfer(naming.from_torch(tensors, again), target)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES if tokenizer is not None else ():
        file = Path(tokenizer or folder) / name
        if file.is_file() and file.parent.resolve() != folder.resolve():
            write_atomic(folder / name, file.read_bytes())
    with atomic_file(folder / "config.json") as out:
        out.write(json.dumps(config, indent=2, sort_keys=True).encode())
    safetensors.save(folder / "model.safetensors", tensors, metadata={"format": "pt"})


def _built(
    config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[models.DecoderConfig, tuple[Rule, ...], set[str]]:
    """The decoder of a config and its tensors, its rules, and the copies of tied tensors."""
    _check_sizes(config, tensors)
    built, rules = _hf_decoders.decoder(config)
    if built.layers > len(tensors):
        raise ValueError(
            f"config.json: {built.layers} layers; the file has {len(tensors)} tensors."
        )
    prefix = _hf_decoders.FAMILIES[config["model_type"]].prefix
    if not any(name.startswith(prefix) for name in tensors):
        prefix = ""
    rules = _prefixed(rules, prefix)
    embedding = next(rule.torch for rule in rules if rule.jax == "tokens/embedding")
    unused = set()
    if _HEAD in tensors and embedding in tensors:
        head, table = tensors[_HEAD], tensors[embedding]
        is_copy = head.shape == table.shape and bool(np.array_equal(head, table))
        built = built._replace(is_tied=is_copy and built.is_tied)
        unused = {_HEAD} if built.is_tied else set()
    elif not built.is_tied:
        raise ValueError(
            f"config.json says that the head is not the embedding, and there is no {_HEAD!r}."
        )
    return built, rules, unused


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuses sizes that no tensor has before a model of them is built."""
    longest = max((side for array in tensors.values() for side in array.shape), default=0)
    for key in _SIZES:
        if isinstance(config.get(key), int) and config[key] > longest:
            raise ValueError(
                f"config.json: {key} = {_text.shown(config[key])}; no tensor of the file has a "
                f"side longer than {longest}."
            )


def _prefixed(rules: Sequence[Rule], prefix: str) -> tuple[Rule, ...]:
    return tuple(
        rule if rule.torch.startswith("lm_head") else rule._replace(torch=prefix + rule.torch)
        for rule in rules
    )
