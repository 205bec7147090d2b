"""llama.cpp's GGUF files of decoder-only language models, dequantized (package `gguf`, an extra).

    source = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    hidden, _ = source.model.apply(source.params, tokens)
    words = gguf.tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")
    gguf.write_folder("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")

Up to quantization, the result equals that of `decoders.load` for the Hugging Face folder that the
file was converted from: the changes of llama.cpp's converter are undone. Architectures: llama (with
Mistral and SmolLM2), smollm3, qwen2, qwen3, gemma, gemma2, gemma3, phi3, olmo2, gpt2.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _text
from kdtl_jax._files import write_json
from kdtl_jax.interop import _gguf_header, _gguf_names, _gguf_words, decoders
from kdtl_jax.interop._gguf_words import TokenizerData as TokenizerData
from kdtl_jax.interop.decoders import PretrainedDecoder


def load(path: str | Path, *, dtype: Any = None) -> PretrainedDecoder:
    """Imports a GGUF file, with its quantized tensors as floats.

    Args:
      path: the file.
      dtype: floating dtype of the parameters; None means float32.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package `gguf` is not installed.
      ValueError: if the file is not GGUF, its architecture is not supported, a hyperparameter is
        unknown, or a tensor has no place.
    """
    _, dequantize = _package()
    reader = _open(path)
    fields = _fields(reader, lambda key: not key.startswith("tokenizer."))
    stored_tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = str(fields.get("general.architecture"))
    if architecture not in _MODEL_TYPES:
        raise ValueError(
            f"architecture {_text.quoted(architecture)} is not supported "
            f"(only {', '.join(_MODEL_TYPES)})."
        )
    extra = {
        name: np.asarray(stored_tensors.pop(name).data, np.float32).ravel().tolist()
        for name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
        if name in stored_tensors
    }
    table = stored_tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ValueError(f"{path} has no tensor 'token_embd.weight' [tokens, width].")
    config = _config(architecture, fields, extra)
    config["vocab_size"] = int(table.shape[1])
    config["tie_word_embeddings"] = "output.weight" not in stored_tensors
    target_dtype = jnp.dtype(dtype or jnp.float32)
    tensors = {}
    for name, tensor in stored_tensors.items():
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:  # the package only lists this type
            raise ValueError(
                f"tensor {_text.quoted(name)} has the type {tensor.tensor_type.name}, which the "
                "package gguf does not dequantize."
            ) from None
        torch_name, undo = _gguf_names.place(architecture, name, config)
        tensors[torch_name] = undo(array).astype(target_dtype)
    return decoders.from_tensors(config, tensors)


def tokenizer(path: str | Path) -> TokenizerData:
    """Reads the tokenizer of a GGUF file.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package `gguf` is not installed.
      ValueError: if the file is not GGUF or has no tokenizer.
    """
    fields = _fields(_open(path), lambda key: key.startswith("tokenizer."))

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{key}", default)

    if get("model") is None or get("tokens") is None:
        raise ValueError(f"{path} has no tokenizer (tokenizer.ggml.model and tokens).")
    return TokenizerData(
        model=get("model"),
        pre=get("pre"),
        tokens=tuple(get("tokens")),
        scores=tuple(get("scores", ())),
        types=tuple(get("token_type", ())),
        merges=tuple(get("merges", ())),
        bos=get("bos_token_id"),
        eos=get("eos_token_id"),
        unknown=get("unknown_token_id"),
        pad=get("padding_token_id"),
        adds_bos=get("add_bos_token"),
        adds_eos=get("add_eos_token"),
        adds_space=get("add_space_prefix"),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def write_folder(folder: str | Path, path: str | Path) -> None:
    """Writes a GGUF file as a Hugging Face folder: weights in float32, config, tokenizer.

    Args:
      folder: created if needed; its files are replaced.
      path: the GGUF file.

    Raises:
      FileNotFoundError, ImportError, ValueError: as in `load` and `tokenizer`; ValueError also if
        the tokenizer is not byte-level BPE that splits as in GPT-2, Llama 3, Qwen2 or SmolLM.
    """
    words = tokenizer(path)
    files = {
        "tokenizer.json": _gguf_words.tokenizer_json(words),
        "tokenizer_config.json": _gguf_words.tokenizer_config(words),
    }
    source = load(path)
    ids = {"bos": words.bos, "eos": words.eos, "pad": words.pad}
    ids = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_json(Path(folder) / name, content)
    decoders.save(folder, source.params, source.rules, config={**source.config, **ids})


_ARCHITECTURES = "llama smollm3 qwen2 qwen3 gemma gemma2 gemma3 phi3 olmo2 gpt2".split()
_MODEL_TYPES = {name: name for name in _ARCHITECTURES} | {"gemma3": "gemma3_text"}

_HYPERPARAMETERS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Keys that repeat other keys or the tensors, or have no effect.
_READ_ELSEWHERE = frozenset(
    "vocab_size attention.value_length rope.dimension_count rope.scaling.type "
    "rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor "
    "rope.scaling.finetuned".split()
)


def _config(
    architecture: str, fields: Mapping[str, Any], factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The config.json of the model that the file was converted from."""
    prefix = architecture + "."
    hyperparameters = {
        key[len(prefix) :]: value for key, value in fields.items() if key.startswith(prefix)
    }
    names, elsewhere = _HYPERPARAMETERS, _READ_ELSEWHERE
    if architecture == "gpt2":
        names, elsewhere = _GPT2, frozenset(("vocab_size", "attention.head_count_kv"))
    if architecture == "gemma3":
        names = names | {"rope.freq_base_swa": "rope_local_base_freq"}
    unknown = sorted(hyperparameters.keys() - names.keys() - elsewhere)
    if unknown:
        raise ValueError(
            f"a {architecture!r} file has hyperparameters that are not understood here: "
            f"{_text.shown(', '.join(unknown), 200)}."
        )
    config: dict[str, Any] = {"model_type": _MODEL_TYPES[architecture]}
    config |= {names[key]: value for key, value in hyperparameters.items() if key in names}
    if architecture == "gpt2":
        return config
    width = _count(hyperparameters, "embedding_length")
    heads = _count(hyperparameters, "attention.head_count")
    head_width = _count(hyperparameters, "attention.key_length", width // heads)
    if _count(hyperparameters, "attention.value_length", head_width) != head_width:
        raise ValueError("keys and values of different widths are not supported.")
    rotary_width = _count(hyperparameters, "rope.dimension_count", head_width)
    if rotary_width != head_width:
        if architecture != "phi3":
            raise ValueError(
                f"rotation of {rotary_width} of {head_width} channels is not supported."
            )
        config["partial_rotary_factor"] = rotary_width / head_width
    if architecture in ("gemma2", "gemma3"):
        # llama.cpp recognizes the largest models, whose queries are scaled differently, by depth.
        largest = hyperparameters.get("block_count") == {"gemma2": 46, "gemma3": 62}[architecture]
        config["query_pre_attn_scalar"] = width // heads if largest else head_width
        # A missing cap means no cap, not transformers' default.
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            config.setdefault(key, None)
    window = config.get("sliding_window")
    if window == 0:  # the converter writes 0 for no window (Phi-4)
        config["sliding_window"] = None
    elif window is not None and architecture in ("qwen2", "qwen3"):
        # llama.cpp does not read their windows, and only some of a model's layers would have one.
        span = _count(hyperparameters, "attention.sliding_window")
        length = _count(hyperparameters, "context_length")
        if span < length:
            raise ValueError(
                f"a {architecture!r} file with a sliding window of {window} positions, below its "
                f"{length}, is not supported: it does not say which layers have it."
            )
        del config["sliding_window"]
    scaling = _scaling(hyperparameters, factors, config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _scaling(
    hyperparameters: Mapping[str, Any], factors: Mapping[str, list[float]], config: dict[str, Any]
) -> dict[str, Any] | None:
    """`rope_scaling`: divisors of the frequencies, stored as tensors, or a linear factor."""
    kind = hyperparameters.get("rope.scaling.type", "none")
    attention = hyperparameters.get("rope.scaling.attn_factor")
    factor_names = {key.removesuffix(".weight") for key in factors}
    if factor_names:
        if factor_names not in ({"rope_freqs"}, {"rope_factors_long", "rope_factors_short"}):
            raise ValueError(
                "a file has only rope_freqs, or rope_factors_long and rope_factors_short, got "
                f"{' and '.join(sorted(factor_names))}."
            )
        if kind not in ("none", "longrope"):
            raise ValueError(
                f"rope scaling {_text.quoted(kind)} beside {' and '.join(sorted(factor_names))} is "
                "not supported."
            )
        original = hyperparameters.get("rope.scaling.original_context_length")
        if original is None:
            original = _count(hyperparameters, "context_length", 2048)
        scaling: dict[str, Any] = {"rope_type": "longrope"}
        if "rope_freqs" in factor_names:  # Llama 3's blend, stored per frequency
            short = long = "rope_freqs.weight"
            scaling["attention_factor"] = 1.0
            scaling["original_max_position_embeddings"] = original
        else:
            short, long = "rope_factors_short.weight", "rope_factors_long.weight"
            config["original_max_position_embeddings"] = original
        scaling |= {"short_factor": factors[short], "long_factor": factors[long]}
        return scaling if attention is None else scaling | {"attention_factor": attention}
    if kind not in ("none", "linear"):
        raise ValueError(
            f"rope scaling {_text.quoted(kind)} of GGUF files is not supported (only linear)."
        )
    if attention not in (None, 1.0):
        raise ValueError(
            f"rope.scaling.attn_factor = {_text.quoted(attention)} beside rope scaling {kind!r} is "
            "not supported."
        )
    if kind == "none":
        return None
    return {"rope_type": "linear", "factor": hyperparameters.get("rope.scaling.factor", 1.0)}


def _count(hyperparameters: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number among the hyperparameters."""
    value = hyperparameters.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a positive whole number, got {_text.quoted(value)}.")
    return value


def _package() -> tuple[Callable[[Path], Any], Callable[..., np.ndarray]]:
    """The package's reader and its dequantization."""
    try:
        package = importlib.import_module("gguf")
        quants = importlib.import_module("gguf.quants")
    except ImportError:
        raise ImportError(
            "GGUF files need the package gguf: pip install 'kdtl_jax[gguf]'."
        ) from None
    return package.GGUFReader, quants.dequantize


def _open(path: str | Path) -> Any:
    path, (reader, _) = _checks.path(path=path), _package()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        _gguf_header.check(path)
        return reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        message = _text.shown(str(error), 200)
        raise ValueError(f"{path} cannot be read as GGUF ({message}).") from None


def _fields(reader: Any, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    contents = {}
    for name, field in reader.fields.items():
        if is_wanted(name):
            try:
                contents[name] = field.contents()
            except (ValueError, IndexError, TypeError) as error:
                raise ValueError(
                    f"{_text.quoted(name)} cannot be read ({_text.shown(str(error), 100)})."
                ) from None
    return contents
