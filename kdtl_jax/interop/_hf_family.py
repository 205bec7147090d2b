"""Families of checkpoints: names, heads, a table of config keys, and how a model is built.

Tables are data. Names are those of the bare model; `rules_of` adds the prefix of the file at hand
(`bert.`, `model.`, …) to every name except those of heads.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from kdtl_jax import _text, trees
from kdtl_jax._types import PyTree
from kdtl_jax.interop import naming
from kdtl_jax.interop._hf_config import Config, Field, check_tokens
from kdtl_jax.interop.naming import Axes, Rule, linear

Shapes = Mapping[str, tuple[int, ...]]  # of the checkpoint's tensors, by torch name
Shaped = Mapping[str, Any]  # arrays by canonical path
Values = dict[str, Any]  # of a config's keys, or of a module's fields
Equal = Callable[[str, str], bool]  # whether two tensors of a checkpoint hold the same numbers
POOLER, POOLER_PATHS = "pooler.dense.weight", "pooler/.*"
OWN_BIAS = "language/decoder/bias"  # of an output layer that is not the embedding
UNUSED_POOLER = r"(.*\.)?pooler\.dense\..*"  # below a head that does not read it
# Files converted from TensorFlow use these names for a norm's tensors.
_OLD_NORMS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


class HeadFamily(NamedTuple):
    """A supported head.

    `architectures` are the classes that have it, beginning with the one to write. A head without an
    entry in `architectures` is recognized by its tensors, and by whether there is a pooler below it
    (`has_pooler`; None means either). `replaces` are JAX paths for which the body has no tensor
    under this head. `optional` rules are for tensors that it may have. `classes` is the torch name
    of the tensor whose first side is the number of classes.
    """

    task: str
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    has_pooler: bool | None = None
    replaces: str = ""
    classes: str | None = None
    optional: tuple[Rule, ...] = ()


class Contents(NamedTuple):
    """The contents of a file besides the body."""

    head: HeadFamily | None
    shapes: Shapes  # without the file's prefix
    is_tied: bool  # whether the output layer is the embedding

    def has_pooler(self) -> bool:
        """Whether the body has a pooler, and its head, if there is one, does not leave it out."""
        replaced = self.head is not None and bool(self.head.replaces)
        return POOLER in self.shapes and not replaced

    def classes(self, task: str) -> int | None:
        """The number of classes of a head for this task; None if the file has another or none."""
        if self.head is None or self.head.task != task or self.head.classes is None:
            return None
        return self.shapes[self.head.classes][0]

    def has_own_bias(self) -> bool:
        """Whether the language head has an output layer of its own, with its own bias."""
        return not self.is_tied and any(name in self.shapes for name in own_biases(self.head))

    def text_heads(self) -> dict[str, Any]:
        """The heads of a text encoder, as fields of its module."""
        return {
            "classes": self.classes("sequence"),
            "token_classes": self.classes("token"),
            "has_language_head": self.head is not None and self.head.task == "language",
            "is_tied": self.is_tied,
        }


class Family(NamedTuple):
    """A family of checkpoints.

    `copies` are output layers that may be stored although they equal the embedding:
    `{torch name: the JAX path they are tied to}`. `buffers` are regular expressions for tensors
    that are not weights, `other_heads` for heads that are not supported; both are reported, not
    imported. `sides` says which config key is which side of which parameter, and `depth` which key
    counts the layers. Keys in `per_layer` hold a list with an entry per layer (`layer_kinds` gives
    `layer_types` if a config leaves it to a pattern); keys in `by_layers` only describe existing
    layers; a key in `presence` says that a tensor exists. `sizes` derives the other values.
    `build(fields, values, contents)` gets the module's `fields` that are values of the config, and
    all values by key.
    """

    model_types: tuple[str, ...]
    base: str
    prefix: str
    fields: tuple[Field, ...]
    body: tuple[Rule, ...]
    build: Callable[[Values, Values, Contents], nn.Module]
    example: Callable[[Values], Any]
    heads: tuple[HeadFamily, ...] = ()
    copies: Mapping[str, str] = {}
    harmless: str = ""
    buffers: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    depth: str | None = "num_hidden_layers"
    sides: Mapping[str, tuple[str, int]] = {}
    per_layer: tuple[str, ...] = ()
    layer_kinds: Callable[[Values], list[str]] | None = None
    by_layers: tuple[str, ...] = ()
    presence: Mapping[str, str] = {}
    sizes: Callable[[Shaped, Config], dict[str, Any]] | None = None


def own_biases(head: HeadFamily | None) -> list[str]:
    """The torch name of the bias of a head's own output layer, if its class has one."""
    return [] if head is None else [r.torch for r in head.optional if r.jax == OWN_BIAS]


def dense(torch: str, jax: str, axes: Axes = linear) -> tuple[Rule, Rule]:
    """The rules of a layer's weight and bias."""
    return Rule(f"{torch}.weight", f"{jax}/kernel", axes), Rule(f"{torch}.bias", f"{jax}/bias")


def norm(torch: str, jax: str) -> tuple[Rule, Rule]:
    """The rules of a norm's scale and bias."""
    return Rule(f"{torch}.weight", f"{jax}/scale"), Rule(f"{torch}.bias", f"{jax}/bias")


def attention(torch: str, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """The rules of the four projections of a layer's attention."""
    names = {"query": query, "key": key, "value": value, "out": out}
    pairs = (
        dense(f"{torch}.{name}", f"layers_{{i}}/attention/{part}") for part, name in names.items()
    )
    return tuple(rule for pair in pairs for rule in pair)


def embedding(torch: str, jax: str) -> tuple[Rule]:
    """The rule of an embedding table."""
    return (Rule(f"{torch}.weight", f"{jax}/embedding"),)


def module_of(family: Family, values: Values, contents: Contents) -> nn.Module:
    """The module of a config's values and a file's contents."""
    keys = {field.module: field.key for field in family.fields if field.module}
    fields = {name: values[key] for name, key in keys.items()}
    if "head_width" not in keys and fields.get("width", 0) % fields.get("heads", 1):
        raise ValueError(
            f"config.json: {keys['heads']} = {fields['heads']} does not divide the width "
            f"{fields['width']}."
        )
    return family.build(fields, values, contents)


def is_config_tied(family: Family, config: Config) -> bool:
    """Whether config.json ties the output layer to the embedding."""
    defaults = [field.default for field in family.fields if field.key == "tie_word_embeddings"]
    return bool(defaults) and config.get("tie_word_embeddings", defaults[0]) is True


def prefix_of(family: Family, names: Iterable[str]) -> str:
    """The family's prefix if the file uses it."""
    return family.prefix if any(name.startswith(family.prefix) for name in names) else ""


def rules_of(
    family: Family,
    head: HeadFamily | None,
    stored_names: Iterable[str],
    *,
    is_tied: bool,
    prefix: str,
) -> tuple[Rule, ...]:
    """The rules of a file, with the prefix and the norm names that it uses."""
    body = [rule for rule in family.body if head is None or not _is_replaced(rule, head)]
    rules = [rule._replace(torch=prefix + rule.torch) for rule in body]
    rules += () if head is None else (*head.rules, *head.optional)
    if is_tied:
        rules = [rule for rule in rules if rule.torch not in family.copies]
    # A tied table may be stored only under the name of its copy.
    names, rule_names = set(stored_names), {rule.torch for rule in rules}
    stored_copies = {
        path: name for name, path in family.copies.items() if name in names - rule_names
    }
    rules = [
        rule._replace(torch=stored_copies[rule.jax])
        if rule.jax in stored_copies and rule.torch not in names
        else rule
        for rule in rules
    ]
    # If a parameter has more than one name, keep the one that the file uses.
    paths = [rule.jax for rule in rules]
    rules = [
        rule
        for rule in rules
        if paths.count(rule.jax) == 1 or any(naming.covers([rule], name) for name in stored_names)
    ]
    if any(name.endswith("LayerNorm.gamma") for name in stored_names):
        for new_name, old_name in _OLD_NORMS.items():
            rules = [r._replace(torch=r.torch.replace(new_name, old_name)) for r in rules]
    return tuple(rules)


def head_of(
    family: Family, config: Config, stored_names: Iterable[str], prefix: str
) -> HeadFamily | None:
    """The head to build: the one that config.json names, or else the one found by the tensors.

    None if there is none, or its task is not supported.
    """
    names = set(stored_names)
    for new_name, old_name in _OLD_NORMS.items():
        names |= {name.replace(old_name, new_name) for name in names}
    pooler = prefix + POOLER in names
    optional = set(family.copies) if is_config_tied(family, config) else set()
    present = [
        head
        for head in family.heads
        if all(r.torch in names or r.torch in optional for r in head.rules)
        # Without its pooler, a head would get another input.
        and (pooler or head.has_pooler is not True)
    ]
    architectures = config.get("architectures")
    architectures = [] if architectures is None else architectures
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) for name in architectures
    ):
        raise ValueError(
            f"config.json: architectures = {_text.shown(architectures)}; expected names in a list."
        )
    for head in present:
        if set(head.architectures) & set(architectures):
            return head
    if any("For" in name for name in architectures):
        return None
    candidates = [head for head in present if head.has_pooler in (None, pooler)]
    return max(candidates, key=lambda head: len(head.rules), default=None)


def equal_in(tensors: Mapping[str, Any]) -> Equal:
    """Makes a function that compares two tensors by name."""

    def equal(name: str, other: str) -> bool:
        a, b = tensors[name], tensors[other]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and bool(np.array_equal(a, b))

    return equal


def split_copies(
    family: Family, rules: Iterable[Rule], tensors: Mapping[str, Any], equal: Equal
) -> tuple[list[str], list[str]]:
    """Splits the stored tensors among the family's `copies` into copies and separate weights.

    `rules` are those of an untied output layer.
    """
    names_by_path = {rule.jax: rule.torch for rule in rules}
    sources = {
        name: names_by_path.get(path) for name, path in family.copies.items() if name in tensors
    }
    copies = [
        name
        for name, source in sources.items()
        if source not in tensors or equal(name, str(source))
    ]
    return copies, [name for name in sources if name not in copies]


def described(
    family: Family | None, config: Config, tensors: Mapping[str, Any], equal: Equal
) -> dict[str, Any]:
    """The config that describes the tensors: sizes, layers, labels, heads, ties, dtype.

    Arguments are those of `huggingface.described`; only the dtype is derived without a family.
    """
    out = {key: value for key, value in config.items()}
    set_dtype(out, tensors)
    if family is None:
        return out
    prefix = prefix_of(family, tensors)
    head = head_of(family, config, tensors, prefix)
    rules = rules_of(family, head, tensors, is_tied=False, prefix=prefix)
    copies, separate = split_copies(family, rules, tensors, equal)
    is_tied = not set(separate).difference(own_biases(head))
    rules = rules_of(family, head, tensors, is_tied=is_tied, prefix=prefix)
    weights = {k: x for k, x in tensors.items() if k not in copies and naming.covers(rules, k)}
    flat = naming.from_torch(weights, rules)
    _set_architecture(out, family, head, tensors)
    if not is_tied and is_config_tied(family, config):
        out["tie_word_embeddings"] = False
    for key, (path, axis) in family.sides.items():
        if path in flat:
            out[key] = int(flat[path].shape[axis])
    if family.sizes is not None:
        out |= family.sizes(flat, config)
        if len(out.get("depths", ())) != len(config.get("depths", ())):
            out = {key: value for key, value in out.items() if key not in family.by_layers}
    check_tokens(config, out.get("vocab_size"))
    for key, name in family.presence.items():
        if prefix + name not in tensors:
            out[key] = False
    if head is not None and head.classes is not None:
        set_labels(out, int(tensors[head.classes].shape[0]))
    if family.depth is not None:
        _set_depth(out, family, flat)
    return out


def depth_of(flat: Iterable[str]) -> int:
    """The number of layers among canonical paths."""
    numbers = {int(m[1]) for path in flat if (m := re.match(r"layers_(\d{1,9})/", path))}
    return max(numbers, default=-1) + 1


def with_dtypes(target: PyTree, arrays: Shaped, dtype: Any) -> PyTree:
    """Gives the target the arrays' dtypes, which may differ, or the dtype `dtype`."""

    def typed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        stored_dtype = arrays[path].dtype if path in arrays else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, stored_dtype if dtype is None else dtype)

    return trees.map_with_path(typed, target)


def _is_replaced(rule: Rule, head: HeadFamily) -> bool:
    return bool(head.replaces) and re.fullmatch(head.replaces, rule.jax) is not None


def set_dtype(out: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    """Sets the dtype that most numbers have, under the key that the config uses."""
    counts: dict[str, int] = {}
    for array in tensors.values():
        if trees.is_inexact(array):
            name = str(array.dtype)
            counts[name] = counts.get(name, 0) + math.prod(array.shape)
    if counts:
        keys = [key for key in ("dtype", "torch_dtype") if key in out] or ["dtype"]
        out |= dict.fromkeys(keys, max(counts, key=lambda name: counts[name]))


def _set_architecture(
    out: dict[str, Any], family: Family, head: HeadFamily | None, tensors: Mapping[str, Any]
) -> None:
    """Sets the architecture to the class of a body with this head and nothing else.

    For a class with more parts (a second head, a decoder), transformers would initialize them at
    random.
    """
    if head is not None and any(rule.torch in tensors for rule in head.rules):
        out["architectures"] = [head.architectures[0]]
    elif out.get("architectures"):
        is_tied = head is not None and not set(head.architectures).isdisjoint(out["architectures"])
        out["architectures"] = [head.architectures[0] if head and is_tied else family.base]


def set_labels(out: dict[str, Any], classes: int) -> None:
    """Names the classes by number, unless there are as many names as classes."""
    labels = out.get("id2label")
    if not isinstance(labels, dict) or len(labels) != classes:
        if labels is None and classes == 2:
            return  # the default
        out |= numbered_labels(classes)
        out.pop("num_labels", None)


def numbered_labels(classes: int) -> dict[str, Any]:
    """The keys of a config that names its classes by number."""
    names = {str(i): f"LABEL_{i}" for i in range(classes)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def _set_depth(out: dict[str, Any], family: Family, flat: Mapping[str, Any]) -> None:
    assert family.depth is not None
    layers = depth_of(flat)
    if layers != out.get(family.depth):
        for key in family.by_layers:
            out.pop(key, None)
    out[family.depth] = layers
    for key in family.per_layer:
        entries = out.get(key)
        if not isinstance(entries, list) or len(entries) == layers:
            continue
        if any(entry != entries[0] for entry in entries) or not entries:
            raise ValueError(
                f"config.json: {key} has {len(entries)} entries that differ, for {layers} layers. "
                "Give the config of the layers that were kept."
            )
        out[key] = entries[:1] * layers
