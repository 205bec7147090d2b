"""Hugging Face folders of decoders that classify texts or tokens, in and out.

    source = classifiers.load("reward-model")
    outputs, _ = source.model(source.params, None, {"tokens": ids, "mask": mask})
    small = classifiers.student(source, layers=range(0, 28, 4))
    classifiers.save("small", small.params, small.rules, config=small.config)

These are the classes `…ForSequenceClassification` and `…ForTokenClassification` of the families of
`interop.decoders`; encoders that classify are in `interop.huggingface`. A text is classified by its
last token that is not the config's `pad_token_id`. Heads that mark answers in a text are refused.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _text, models, transforms
from kdtl_jax._types import ModelFn, Params
from kdtl_jax.interop import _hf_family, _hf_folder, decoders, naming
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.interop.naming import Rule, linear
from kdtl_jax.transforms import Report

_CLASS = re.compile(r"(\w+)For(Sequence|Token)Classification")
_SCORE = re.compile(r"(score|classifier)\.(weight|bias)")
# The padding tokens that transformers assumes if a config has none.
_PADDING = {"gemma": 0, "gemma2": 0, "gemma3_text": 0, "phi3": 32000, "smollm3": 128004, "olmo2": 1}


class Classifier(NamedTuple):
    """A checkpoint as a model of `{"tokens": …, "mask": …}`, with the decoder below it.

    `params` are the decoder's with `score`: `kernel` `[width, classes]` and maybe `bias`.
    """

    model: ModelFn
    params: Params
    decoder: PretrainedDecoder
    rules: tuple[Rule, ...]
    config: dict[str, Any]
    report: Report


def load(folder: str | Path, *, dtype: Any = None) -> Classifier:
    """Imports a folder with config.json and `*.safetensors`.

    Args:
      folder: the folder.
      dtype: floating dtype of the parameters; None keeps each tensor's.

    Returns:
      The classifier. Its report lists a language head under `extra`.

    Raises:
      FileNotFoundError: if there is no such folder, config.json or safetensors file.
      ValueError: if `architectures` does not name a class that classifies texts or tokens, its
        tensors are missing or of another shape, or the decoder is refused (see `decoders.load`).
    """
    folder = _checks.path(folder=folder)
    config, tensors = _hf_folder.read(folder)
    _task(config)
    score_tensors = {name: x for name, x in tensors.items() if _SCORE.fullmatch(name)}
    language_heads = ["lm_head.weight"] if "lm_head.weight" in tensors else []
    body_tensors = {
        name: x for name, x in tensors.items() if name not in {*score_tensors, *language_heads}
    }
    body = decoders.from_tensors(_decoder_config(config), body_tensors, dtype=dtype)
    rules = _rules(score_tensors)
    score_arrays = naming.from_torch(score_tensors, rules)
    if "score/kernel" not in score_arrays:
        raise ValueError(
            f"{folder} has neither score.weight nor classifier.weight, a classifier's."
        )
    classes = score_arrays["score/kernel"].shape[-1]
    shapes = {"score/kernel": (body.model.config.width, classes), "score/bias": (classes,)}
    score = {path: jax.ShapeDtypeStruct(shapes[path], jnp.float32) for path in score_arrays}
    head, head_report = transforms.transfer(
        score_arrays, _hf_family.with_dtypes(score, score_arrays, dtype)
    )
    report = body.report
    report = report._replace(
        copied=(*report.copied, *head_report.copied),
        extra=(*report.extra, *language_heads),
        cast=(*report.cast, *head_report.cast),
        shapes={**report.shapes, **head_report.shapes},
        sizes={**report.sizes, **head_report.sizes},
    )
    score = {path.removeprefix("score/"): leaf for path, leaf in head.items()}
    return _build(body, score, rules, config, report)


def student(source: Classifier, *, layers: Sequence[int]) -> Classifier:
    """Makes a new classifier from some layers of another, with its head.

    Raises:
      ValueError: as `decoders.student`.
    """
    decoder = decoders.student(source.decoder, layers=layers)
    rules = [rule for rule in source.rules if rule.jax.startswith("score/")]
    config = _with_head_keys(source.config, decoder.config)
    return _build(decoder, source.params["score"], rules, config, decoder.report)


def save(
    folder: str | Path, params: Params, rules: Sequence[Rule], *, config: Mapping[str, Any]
) -> None:
    """Writes `model.safetensors` and `config.json` that transformers can open.

    Sizes, layers, labels and the dtype of the config are those of the parameters.

    Args:
      folder: created if needed; the two files are replaced atomically, the weights last.
      params: the parameters, with separate layers.
      rules: the rules of a `Classifier`.
      config: its config.

    Raises:
      ValueError: if a parameter has no rule, or the parameters do not match the config.
    """
    _task(config)
    tensors = naming.to_torch(params, rules)
    out = _with_head_keys(config, decoders.described(_decoder_config(config), tensors))
    _hf_family.set_labels(out, int(params["score"]["kernel"].shape[1]))
    _hf_folder.write(Path(folder), out, tensors)


def _build(
    decoder: PretrainedDecoder,
    score: Params,
    rules: Sequence[Rule],
    config: dict[str, Any],
    report: Report,
) -> Classifier:
    if _task(config) == "Token":
        model = models.token_classifier(decoder.model)
    else:
        padding = config.get("pad_token_id", _PADDING.get(config["model_type"]))
        if padding is not None and type(padding) is not int:
            raise ValueError(
                f"config.json: pad_token_id = {_text.shown(padding)}; expected an integer or null."
            )
        model = models.text_classifier(decoder.model, padding=padding)
    params = {**decoder.params, "score": score}
    return Classifier(model, params, decoder, (*decoder.rules, *rules), config, report)


def _task(config: Mapping[str, Any]) -> str:
    """`"Sequence"` or `"Token"`, as the class is named."""
    architectures = config.get("architectures") or []
    names = architectures if isinstance(architectures, list) else []
    match = _CLASS.fullmatch(str(names[0])) if names else None
    if match is None:
        raise ValueError(
            f"config.json: architectures = {_text.shown(architectures)}; expected one class named "
            "…ForSequenceClassification or …ForTokenClassification. decoders.load reads language "
            "models."
        )
    return match[2]


def _decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the decoder alone, which has no head of its own."""
    config = {k: x for k, x in config.items() if k != "token_classification_bias"}
    return {**config, "tie_word_embeddings": True}


def _with_head_keys(config: Mapping[str, Any], decoder_config: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the head's keys from a classifier's config, and all others from its decoder's."""
    head_keys = ("architectures", "tie_word_embeddings", "token_classification_bias")
    merged = {key: value for key, value in decoder_config.items() if key not in head_keys}
    return merged | {key: config[key] for key in head_keys if key in config}


def _rules(names: Mapping[str, Any]) -> tuple[Rule, ...]:
    return tuple(
        Rule(name, "score/kernel", linear) if name.endswith("weight") else Rule(name, "score/bias")
        for name in names
    )
