"""Builds a module, its names, and abstract variables from a config and the tensors beside it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from kdtl_jax import _text
from kdtl_jax.interop import (
    _hf_convolutions,
    _hf_decoders,
    _hf_encoders,
    _hf_family,
    _hf_text,
    _hf_towers,
    _hf_vision,
    linen,
    naming,
)
from kdtl_jax.interop._hf_config import Limits, read
from kdtl_jax.interop._hf_family import Contents, Equal, Family
from kdtl_jax.interop.naming import Rule

FAMILIES: tuple[Family, ...] = (
    _hf_encoders.bert,
    _hf_encoders.roberta,
    _hf_encoders.xlm_roberta,
    _hf_encoders.camembert,
    _hf_encoders.distilbert,
    _hf_encoders.electra,
    _hf_encoders.mpnet,
    _hf_text.modernbert,
    _hf_text.deberta,
    _hf_text.t5,
    _hf_vision.vit,
    _hf_vision.deit,
    _hf_vision.dinov2,
    _hf_vision.dinov2_registers,
    _hf_vision.clip_vision,
    _hf_vision.siglip_vision,
    _hf_towers.clip_text,
    _hf_towers.siglip_text,
    _hf_convolutions.resnet,
    _hf_convolutions.convnext,
)


class Built(NamedTuple):
    """The module of a config and its tensors, the rules that name them, and abstract variables."""

    module: nn.Module
    rules: tuple[Rule, ...]
    variables: dict[str, Any]
    unused: tuple[str, ...]
    extra: tuple[str, ...]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config; raises ValueError if its `model_type` is unknown."""
    if "model_type" not in config:
        raise ValueError("config.json has no 'model_type', so its model is not known.")
    name = str(config["model_type"])
    for family in FAMILIES:
        if name in family.model_types:
            return family
    if name in _hf_decoders.FAMILIES:
        raise ValueError(
            f"model_type {_text.quoted(name)} is a decoder: interop.decoders.load reads it."
        )
    supported = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise ValueError(
        f"model_type {_text.quoted(name)} is not supported; expected one of {supported}. "
        "Load its tensors with safetensors.load and name them with your own rules."
    )


def build(
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    equal: Equal | None = None,
) -> Built:
    """Builds the model of a config and its tensors; `equal` compares two of the tensors."""
    sides = [int(side) for array in tensors.values() for side in array.shape]
    limits = Limits(max(sides, default=1), len(tensors))
    values = read(config, family.fields, family.harmless, limits)
    prefix = _hf_family.prefix_of(family, tensors)
    head = _hf_family.head_of(family, config, tensors, prefix)

    def rules_of(is_tied: bool) -> tuple[Rule, ...]:
        return _hf_family.rules_of(family, head, tensors, is_tied=is_tied, prefix=prefix)

    untied_rules = rules_of(False)
    names_by_path = {rule.jax: rule.torch for rule in untied_rules}
    equal = _hf_family.equal_in(tensors) if equal is None else equal
    copies, separate = _hf_family.split_copies(family, untied_rules, tensors, equal)
    biases = _hf_family.own_biases(head)
    is_tied = _hf_family.is_config_tied(family, config) and not (
        set(separate).difference(biases) & set(names_by_path.values())
    )
    rules = rules_of(is_tied)
    for name in biases:
        # Versions of transformers disagree on which bias is then used.
        if name in separate if is_tied else name not in tensors:
            kind = head.architectures[0] if head is not None else ""
            raise ValueError(
                f"the output layer of {kind} is tied to the embedding, but its bias {name!r} is "
                "not the head's."
                if is_tied
                else f"the output layer of {kind} is not tied to the embedding "
                f"(tie_word_embeddings), and the file lacks its bias {name!r}."
            )
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in tensors.items()}
    module = _hf_family.module_of(family, values, Contents(head, shapes, is_tied))
    unused = [name for name in tensors if _matches(family.buffers, name)]
    unused += [name for name in copies if not naming.covers(rules, name)]
    extra = [
        name
        for name in tensors
        if name not in unused
        and _matches(family.other_heads, name)
        and not naming.covers(rules, name)
    ]
    init = jax.eval_shape(linen.model(module).init, jax.random.key(0), family.example(values))
    variables = {**init.params, **(init.model_state or {})}
    return Built(module, rules, variables, tuple(unused), tuple(extra))


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
