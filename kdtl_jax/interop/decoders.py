"""Hugging Face folders of decoder-only language models, in and out.

    source = decoders.load("SmolLM2-135M")
    hidden, _ = source.model.apply(source.params, tokens)
    small = decoders.student(source, layers=range(0, 30, 3))
    decoders.save("small", small.params, small.rules, config=small.config)

Supported are Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and 3 (text), Phi-3, SmolLM3, OLMo 2 and
GPT-2, sharded or not, in any float dtype. The model is a `models.Decoder`: its head is separate,
and its `tap` gives hidden states and attention. Encoders are in `interop.huggingface`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kdtl_jax import _checks, _text, models, transforms, trees
from kdtl_jax._files import write_atomic
from kdtl_jax._types import Params
from kdtl_jax.interop import _hf_decoders, _hf_family, _hf_folder, naming
from kdtl_jax.interop._hf_config import check_tokens
from kdtl_jax.interop._hf_family import Equal, equal_in
from kdtl_jax.interop.naming import Rule
from kdtl_jax.models import Decoder, DecoderConfig
from kdtl_jax.transforms import Report


class PretrainedDecoder(NamedTuple):
    """A checkpoint as a decoder: its functions, its parameters, and the names of its tensors."""

    model: Decoder
    params: Params
    rules: tuple[Rule, ...]
    config: dict[str, Any]
    report: Report


_HEAD = "lm_head.weight"
_KINDS = ("full_attention", "sliding_attention")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_inner",
    "n_head",
    "n_positions",
)
_BUFFERS = (r"(.*\.)?rotary_emb\.inv_freq", r"(.*\.)?h\.\d+\.attn\.(masked_)?bias")
_CLASSIFIERS = r"(score|classifier|(transformer\.)?qa_outputs)\..*"
_OTHER_HEADS = rf"({_CLASSIFIERS}|multiple_choice_head\..*)"
# Files of a folder that belong to its tokenizer, which `save` copies.
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
      dtype: floating dtype of the parameters; None keeps each tensor's. Computation uses that of
        the embedding.

    Returns:
      The decoder. Its report lists heads for other tasks under `extra`, and a stored copy of the
      embedding under `unused`.

    Raises:
      FileNotFoundError: if there is no such folder, config.json or safetensors file.
      ValueError: if the family or a key of the configuration is unknown, the model is a classifier
        without a language head, a tensor has no place or is missing, or a shape disagrees with the
        configuration.
    """
    return from_tensors(*_hf_folder.read(_checks.path(folder=folder)), dtype=dtype)


def from_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Any], *, dtype: Any = None
) -> PretrainedDecoder:
    """Builds a decoder from a folder's contents: the parsed config.json, and the tensors by name.

    Raises:
      ValueError: as in `load`.
    """
    _checks.mappings(config=config, tensors=tensors)
    config = dict(config)
    _check_language_head(tensors)
    decoder_config, rules, copies = _build_config(config, tensors)
    model = models.decoder(decoder_config)
    other_heads = tuple(name for name in tensors if re.fullmatch(_OTHER_HEADS, name))
    weights = {
        name: array for name, array in tensors.items() if name not in {*copies, *other_heads}
    }
    arrays = naming.from_torch(weights, rules, ignore=_BUFFERS)
    target = _hf_family.with_dtypes(jax.eval_shape(model.init, jax.random.key(0)), arrays, dtype)
    params, report = transforms.transfer(arrays, target)
    report = report._replace(unused=tuple(sorted(copies)), extra=other_heads)
    return PretrainedDecoder(model, params, rules, config, report)


def initialized(config: Mapping[str, Any], key: jax.Array) -> PretrainedDecoder:
    """Builds a decoder with random weights from the content of a config.json.

    Raises:
      ValueError: if the family or a key is unknown.
    """
    _checks.mappings(config=config)
    _checks.key(key=key)
    decoder_config, rules = _hf_decoders.decoder(config)
    prefix = _hf_decoders.FAMILIES[config["model_type"]].prefix
    model = models.decoder(decoder_config)
    params = jax.jit(model.init)(key)
    _, report = transforms.transfer(params, params)
    return PretrainedDecoder(model, params, _prefixed(rules, prefix), dict(config), report)


def student(source: PretrainedDecoder, *, layers: Sequence[int]) -> PretrainedDecoder:
    """Makes a new decoder from some layers of another; layer `j` is the source's `layers[j]`.

    Raises:
      ValueError: if a position is out of range, or a config.json of this family cannot express the
        windows or rotary tables of these layers.
    """
    _checks.instance(PretrainedDecoder, source=source)
    source_config = source.model.config
    layers = tuple(layers)
    if not layers or not all(0 <= i < source_config.layers for i in layers):
        raise ValueError(f"layers must lie in 0..{source_config.layers - 1}, got {list(layers)}.")
    config, student_config = _select_layers(source.config, source_config, layers)
    model = models.decoder(student_config)
    rename = transforms.layer_map(r"layers_(\d+)/.*", layers)
    flat = trees.flatten(source.params)
    selected = {new: leaf for path, leaf in flat.items() for new in rename(path)}
    target = _hf_family.with_dtypes(jax.eval_shape(model.init, jax.random.key(0)), selected, None)
    params, report = transforms.transfer(source.params, target, rename=rename)
    return PretrainedDecoder(model, params, source.rules, config, report)


def save(
    folder: str | Path,
    params: Params,
    rules: Sequence[Rule],
    *,
    config: Mapping[str, Any],
    tokenizer: str | Path | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` that transformers can open.

    The config describes what is written (see `described`) and is checked before anything is stored.

    Args:
      folder: created if needed; files are replaced atomically, the weights last.
      params: the parameters, with separate layers (`transforms.unstack_layers` separates stacked
        ones).
      rules: the rules of a `PretrainedDecoder`.
      config: its config.
      tokenizer: a folder from which the tokenizer's files are copied.

    Raises:
      ValueError: if a parameter has no rule, or the parameters do not match the config.
    """
    is_tied = "kernel" not in params.get("head", {})
    tensors = naming.to_torch(params, rules)
    config = described({**config, "tie_word_embeddings": is_tied}, tensors)
    folder = _checks.path(folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer and Path(tokenizer).resolve() != folder.resolve():
        for file in (Path(tokenizer) / name for name in TOKENIZER_FILES):
            if file.is_file():
                write_atomic(folder / file.name, file.read_bytes())
    _hf_folder.write(folder, config, tensors)


def described(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    equal: Equal | None = None,
) -> dict[str, Any]:
    """The config.json of a folder that holds these tensors, derived from their source's config.

    The numbers of layers and tokens, the width of the feed-forward layers, whether the head is tied
    and the dtype are those of the tensors. The architecture's name is that of a language model,
    because heads for other tasks are left out when a folder is read.

    The arguments are those of `huggingface.described`; `layers` is needed if layers differ in their
    windows or rotary tables and the number changed.

    Raises:
      ValueError: if no config of this family describes the tensors, or a special token has no row.
    """
    source_config = _hf_decoders.decoder(config)[0]
    _hf_decoders.check_heads(config)
    flat = naming.from_torch(tensors, _rules(config, tensors), ignore=(*_BUFFERS, _OTHER_HEADS))
    embedding, down = (flat.get(n) for n in ("tokens/embedding", "layers_0/mlp/down/kernel"))
    if embedding is None or down is None:
        raise ValueError("the tensors lack the embedding or the first layer.")
    out = dict(config)
    count = _hf_family.depth_of(flat)
    if layers is not None or count != source_config.layers:
        patterns = (source_config.windows, source_config.ropes)
        if layers is None and any(len(set(pattern)) > 1 for pattern in patterns):
            raise ValueError(
                f"{count} layers are written, and the {source_config.layers} of config.json differ "
                "in their windows or rotary tables. Give the config of the layers that were kept, "
                "as `student` makes it."
            )
        out, _ = _select_layers(config, source_config, [0] * count if layers is None else layers)
    rows = int(embedding.shape[0])
    check_tokens(config, rows)
    out["vocab_size"] = rows
    if down.shape[0] != source_config.hidden:
        out["n_inner" if "n_embd" in out else "intermediate_size"] = int(down.shape[0])
    out["tie_word_embeddings"] = source_config.is_tied and (
        _HEAD not in tensors or (equal or equal_in(tensors))(_HEAD, _embedding(config, tensors))
    )
    _hf_family.set_dtype(out, tensors)
    if out.get("architectures"):
        out["architectures"] = [_hf_decoders.ARCHITECTURES[out["model_type"]]]
    decoder_config, _, copies = _build_config(out, tensors, equal)
    target = jax.eval_shape(models.decoder(decoder_config).init, jax.random.key(0))
    if copies:
        flat.pop("head/kernel")
    transforms.plan_transfer(flat, target)
    return out


def _select_layers(
    config: Mapping[str, Any], source_config: DecoderConfig, layers: Sequence[int]
) -> tuple[dict[str, Any], DecoderConfig]:
    """The config of some layers, with its per-layer values, and the decoder it must describe."""
    decoder_config = source_config._replace(
        layers=len(layers),
        ropes=tuple(source_config.ropes[i] for i in layers) if source_config.ropes else (),
        windows=tuple(source_config.windows[i] for i in layers) if source_config.windows else (),
    )
    out = {**config, "n_layer" if "n_layer" in config else "num_hidden_layers": len(layers)}
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(out.get(key), list):
            out[key] = [out[key][i] for i in layers]
    expected = (decoder_config.windows, decoder_config.ropes)
    known_keys = _hf_decoders.FAMILIES[config["model_type"]].reads
    if _patterns(out) != expected and "layer_types" in known_keys and decoder_config.windows:
        out["layer_types"] = [_KINDS[window is not None] for window in decoder_config.windows]
    if _patterns(out) != expected and "no_rope_layers" in known_keys:
        out["no_rope_layers"] = [int(any(rope.frequencies)) for rope in decoder_config.ropes]
    if _patterns(out) != expected:
        raise ValueError(
            f"the layers {list(layers)} of a {config['model_type']!r} model have windows or "
            "rotary tables that its config.json cannot express; keep the pattern of its layers."
        )
    return out, decoder_config


def _patterns(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The windows and rotary tables that a config gives to each layer."""
    decoder_config = _hf_decoders.decoder(config)[0]
    return decoder_config.windows, decoder_config.ropes


def _build_config(
    config: Mapping[str, Any], tensors: Mapping[str, Any], equal: Equal | None = None
) -> tuple[DecoderConfig, tuple[Rule, ...], set[str]]:
    """The decoder of a config and its tensors, its rules, and the copies of tied tensors."""
    _check_sizes(config, tensors)
    decoder_config, _ = _hf_decoders.decoder(config)
    if decoder_config.layers > len(tensors):
        raise ValueError(
            f"config.json: {decoder_config.layers} layers; the file has {len(tensors)} tensors."
        )
    rules = _rules(config, tensors)
    embedding, copies = _embedding(config, tensors), set()
    if _HEAD in tensors and embedding in tensors:
        is_copy = (equal or equal_in(tensors))(_HEAD, embedding)
        decoder_config = decoder_config._replace(is_tied=is_copy and decoder_config.is_tied)
        copies = {_HEAD} if decoder_config.is_tied else set()
    elif not decoder_config.is_tied:
        raise ValueError(
            f"config.json says that the head is not the embedding, and there is no {_HEAD!r}."
        )
    return decoder_config, rules, copies


def _check_language_head(tensors: Mapping[str, Any]) -> None:
    """Refuses a classifier: its embedding was not trained as the head of a language model."""
    heads = [name for name in tensors if re.fullmatch(_CLASSIFIERS, name)]
    if heads and _HEAD not in tensors:
        raise ValueError(
            f"the head of this decoder is {_text.listed(sorted(heads))}: it classifies texts or "
            "tokens and has no language head. classifiers.load reads classifiers of texts and of "
            "tokens. For hidden states alone pass from_tensors the tensors without these, and its "
            "config with tie_word_embeddings = true."
        )


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuses sizes that no tensor has, before a model of those sizes is built."""
    longest = max((side for array in tensors.values() for side in array.shape), default=0)
    for key in _SIZES:
        if isinstance(config.get(key), int) and config[key] > longest:
            raise ValueError(
                f"config.json: {key} = {_text.shown(config[key])}; no tensor of the file has a "
                f"side longer than {longest}."
            )


def _embedding(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """The embedding's torch name."""
    return next(r.torch for r in _rules(config, tensors) if r.jax == "tokens/embedding")


def _rules(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of a family with the prefix that the tensors have."""
    family = _hf_decoders.FAMILIES[config["model_type"]]
    has_prefix = any(name.startswith(family.prefix) for name in tensors)
    return _prefixed(family.rules, family.prefix if has_prefix else "")


def _prefixed(rules: Sequence[Rule], prefix: str) -> tuple[Rule, ...]:
    return tuple(
        rule if rule.torch.startswith("lm_head") else rule._replace(torch=prefix + rule.torch)
        for rule in rules
    )
