"""Reads a config.json by a table: each key is read, known to be harmless, or refused by name.

A family's table is a tuple of fields: a key, the values it may have, the default that transformers
gives it, and the field of the module that takes its value. Sizes are bounded by the tensors beside
the config, so a hostile or broken file ends in one clear ValueError before anything is built.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _text, models

Config = Mapping[str, Any]
REQUIRED = object()


class Limits(NamedTuple):
    """Bounds set by the file: the longest side of a tensor, and the number of tensors."""

    side: int
    tensors: int


class Field(NamedTuple):
    """A key; `check(value, limits)` returns its meaning, or raises ValueError("a positive …").

    `module` is the name of the module's field that takes this value as it is, if there is one.
    """

    key: str
    check: Callable[[Any, Limits], Any]
    default: Any = REQUIRED
    module: str = ""


# Keys that never change the outputs of the models here: the origin of a file, settings of trainers,
# tokenizers and `generate`, and additional return values of a forward pass.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path _commit_hash name license language
    dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss keys_to_ignore_at_inference
    attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal
    _flash_attn_2_enabled use_flash_attn gradient_checkpointing use_cache output_past
    initializer_range initializer_factor initializer_cutoff_factor init_std
    id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id tokenizer_class prefix tie_word_embeddings
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder cross_attention_hidden_size
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type
    tie_weights_ sentence_transformers sbert_ce_default_activation_function
    transformers.js_config unsloth_fixed unsloth_version
    is_llama_config max_sequence_length
    """.split()
)
# Parts of other models that some configs list as absent.
_OFF = ("is_decoder", "add_cross_attention")


def read(config: Config, fields: Sequence[Field], harmless: str, limits: Limits) -> dict[str, Any]:
    """`{key: value}` of a family's fields."""
    out = {}
    for key, check, default, _ in fields:
        if key not in config and default is REQUIRED:
            raise ValueError(f"config.json has no {key!r}, so its model is not known.")
        value = config.get(key, default)
        try:
            out[key] = check(value, limits)
        except ValueError as expected:
            raise ValueError(f"config.json: {key} = {_text.quoted(value)}; {expected}.") from None
    known_keys = HARMLESS | out.keys() | set(harmless.split())
    known_keys |= {key for key in _OFF if config.get(key) is False}
    empty = (None, {}, [])  # `pruned_heads` and `quantization_config` are empty in this way
    unknown = [k for k in config if k not in known_keys and not any(config[k] == e for e in empty)]
    if unknown:
        listed = ", ".join(
            f"{_text.quoted(key)} = {_text.quoted(config[key])}" for key in unknown[:8]
        )
        raise ValueError(
            f"config.json has keys that are not read here and not known to be harmless: {listed}. "
            "The outputs could be wrong; remove a key if it changes nothing."
        )
    return out


def into(**fields: Field) -> tuple[Field, ...]:
    """Fields whose values a module takes as they are, by the names it gives them."""
    return tuple(field._replace(module=name) for name, field in fields.items())


def check_tokens(config: Config, rows: int | None) -> None:
    """Raises ValueError if a reduced vocabulary has lost the row of a special token."""
    source_rows = config.get("vocab_size")
    if not isinstance(source_rows, int) or rows is None:
        return
    for key, value in config.items():
        ids = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and any(
            isinstance(i, int) and rows <= i < source_rows for i in ids
        ):
            raise ValueError(
                f"config.json: {key} = {_text.quoted(value)} has no row among the {rows} "
                "remaining tokens. Keep its row, and give the config with its new number."
            )


def count(key: str, default: Any = REQUIRED, *, least: int = 1, most: int | None = None) -> Field:
    """An integer of at most `most`, by default the longest side of the file's tensors."""
    return Field(key, lambda v, limits: _integer(v, least, most or limits.side), default)


def layers(key: str, default: Any = REQUIRED) -> Field:
    """A number of layers: each has at least one tensor."""
    return Field(key, lambda value, limits: _integer(value, 1, limits.tensors), default)


def counts(key: str, *, of_layers: bool = False) -> Field:
    """A list of sizes, or of numbers of layers."""

    def check(value: Any, limits: Limits) -> tuple[int, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= limits.tensors:
            raise ValueError("expected a list of positive integers")
        most = limits.tensors if of_layers else limits.side
        return tuple(_integer(entry, 1, most) for entry in value)

    return Field(key, check)


def sides(key: str, default: Any = REQUIRED) -> Field:
    """A height and width: one integer, or a list of two."""

    def check(value: Any, limits: Limits) -> tuple[int, int]:
        pair = value if isinstance(value, list) and len(value) == 2 else [value, value]
        try:
            height, width = (_integer(side, 1, 1 << 16) for side in pair)
        except ValueError:
            raise ValueError("expected a positive integer, or two: height and width") from None
        return height, width

    return Field(key, check, default)


def number(key: str, default: Any, *, most: float = math.inf, zero: bool = False) -> Field:
    """A finite number above 0 (or from 0 on), at most `most`."""
    low = "at least 0" if zero else "above 0"
    high = f" and at most {most:g}" if most < math.inf else ""

    def is_valid(x: Any) -> bool:
        return is_number(x) and (x > 0 or (zero and x == 0)) and x <= most

    return _checked(key, default, is_valid, f"expected a number {low}{high}", float)


def epsilon(key: str, default: float) -> Field:
    """The epsilon that a norm adds to a variance."""
    return number(key, default, most=1.0)


def share(key: str, default: Any) -> Field:
    """A dropout rate."""
    expected = "expected a number from 0 to 1"
    return _checked(key, default, lambda x: is_number(x) and 0 <= x <= 1, expected, float)


def flag(key: str, default: bool) -> Field:
    """A boolean."""
    return _checked(key, default, lambda x: isinstance(x, bool), "expected true or false")


def choice(key: str, *values: Any) -> Field:
    """One of the supported values; the first is the default."""
    only = f"this is not supported (only {' or '.join(map(repr, values))})"
    return _checked(
        key,
        values[0],
        lambda x: any(type(x) is type(allowed) and x == allowed for allowed in values),
        f"{only}; the outputs would be wrong",
    )


def _checked(
    key: str,
    default: Any,
    is_valid: Callable[[Any], bool],
    problem: str,
    convert: Callable[[Any], Any] = lambda x: x,
) -> Field:
    def check(value: Any, limits: Limits) -> Any:
        if not is_valid(value):
            raise ValueError(problem)
        return convert(value)

    return Field(key, check, default)


def optional(field: Field) -> Field:
    """The field with null as another value, which is the default unless the field has one."""
    default = None if field.default is REQUIRED else field.default
    return field._replace(
        check=lambda v, limits: None if v is None else field.check(v, limits), default=default
    )


def as_given(key: str) -> Field:
    """A value, or None, that the family's `build` checks."""
    return Field(key, lambda value, limits: value, None)


def activation(key: str, default: Any = REQUIRED) -> Field:
    """The name of an activation, as a function."""
    return Field(key, lambda value, limits: activation_named(value), default)


def activation_named(name: Any) -> models.Activation:
    """The function with this name in transformers."""
    match name:
        case "gelu" | "gelu_python":
            return models.gelu
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate":
            return models.gelu_tanh
        case "quick_gelu":
            return models.quick_gelu
        case "relu":
            return jax.nn.relu
        case "silu" | "swish":
            return jax.nn.silu
        case "tanh":
            return jnp.tanh
        case "sigmoid":
            return jax.nn.sigmoid
        case _:
            raise ValueError(f"the activation {_text.quoted(name)} is not supported")


def _integer(value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"expected {kind}")
    if value > most:
        raise ValueError(f"the tensors of the file allow at most {most}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
