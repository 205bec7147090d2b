"""Hugging Face folders (config.json and safetensors) as Linen models, and back.

    source = huggingface.load("all-MiniLM-L6-v2")
    outputs, _ = source.model(source.params, source.model_state, {"tokens": ids, "mask": mask})

Supported are BERT-like encoders (MiniLM, DistilBERT, RoBERTa, CamemBERT, ELECTRA, MPNet,
ModernBERT, DeBERTa-v2) with heads for sequences, tokens and masked language modeling, T5's encoder,
ViT, DeiT, DINOv2 (also with registers), the towers of CLIP and SigLIP (alone, or one of a whole
folder), ResNet and ConvNeXt. Decoders are in `interop.decoders`. Every tensor is imported or named
in the report; every key of the config is read, known to be harmless, or refused by name. When a
folder is written, the config's sizes, layers, labels, heads, ties and dtype are derived from the
tensors.

Deliberately absent: tokenizers (the `tokenizers` package reads the folder's tokenizer.json), and
pickles.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from kdtl_jax import transforms, trees
from kdtl_jax._files import read_json
from kdtl_jax._types import ModelFn, Params, PyTree
from kdtl_jax.interop import (
    _hf_build,
    _hf_encoders,
    _hf_family,
    _hf_folder,
    _hf_towers,
    linen,
    naming,
    safetensors,
)
from kdtl_jax.interop._hf_build import FAMILIES, family_of
from kdtl_jax.interop._hf_config import Limits, read
from kdtl_jax.interop._hf_family import Contents, Equal, Family, HeadFamily
from kdtl_jax.interop._hf_family import set_dtype as set_dtype
from kdtl_jax.interop.naming import Rule
from kdtl_jax.transforms import Report, transfer


class Pretrained(NamedTuple):
    """A checkpoint as a model.

    `student` makes a shallower one; `linen.model(module, taps=[...])` adds taps.
    `rules` name every tensor; `config` is the parsed config.json.
    """

    model: ModelFn
    params: Params
    model_state: PyTree
    module: nn.Module
    rules: tuple[Rule, ...]
    config: dict[str, Any]
    report: Report


def load(
    source: str | Path,
    *,
    dtype: Any = None,
    taps: Sequence[str] = (),
    tower: Literal["vision", "text"] | None = None,
) -> Pretrained:
    """Imports a folder, or (with the `hub` extra) a repository such as `"org/name"`.

    Args:
      source: a local folder with config.json and `*.safetensors` (sharded or not); a name of the
        form `org/name` that is not a local folder is downloaded first.
      dtype: floating dtype of the parameters; None keeps the file's.
      taps: as in `linen.model`.
      tower: which tower of a whole CLIP or SigLIP folder to load, with its projection; the other
        tower's tensors are reported as `extra`.

    Returns:
      `Pretrained`. Its report lists the heads that this model does not have under `extra`, and
      buffers and tied copies under `unused`.

    Raises:
      FileNotFoundError: if there is no such folder, config.json or safetensors file.
      ValueError: if the family is unknown, the configuration is not supported, a tensor has no
        place or is missing, or a shape disagrees with config.json.
      ImportError: if a repository is named and `huggingface_hub` is not installed.
    """
    folder = _folder(source)
    config, tower_names = _hf_towers.one_tower(read_json(folder / "config.json"), tower)
    family = family_of(config)
    file_views = safetensors.views(safetensors.index(folder).tensors)
    views = {
        k: x for k, x in file_views.items() if tower_names is None or re.fullmatch(tower_names, k)
    }
    parts = _hf_build.build(family, config, views)
    tensors = {k: x for k, x in views.items() if k not in {*parts.unused, *parts.extra}}
    arrays = naming.from_torch(tensors, parts.rules)
    variables, report = transfer(arrays, _hf_family.with_dtypes(parts.variables, arrays, dtype))
    params = {k: v for k, v in variables.items() if k != "batch_stats"}
    state = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else None
    other_towers = tuple(name for name in file_views if name not in views)
    report = report._replace(extra=(*parts.extra, *other_towers), unused=parts.unused)
    run = linen.model(parts.module, taps=taps).apply
    return Pretrained(run, params, state, parts.module, parts.rules, config, report)


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json reads tokens; raises ValueError if its type is unknown."""
    return family_of(config).example is _hf_encoders.tokens


def student(
    source: Pretrained,
    *,
    layers: Sequence[int],
    classes: int | None = None,
    key: Array | None = None,
) -> Pretrained:
    """Makes a new model from some of a model's layers, with a new head if `classes` is given.

        small = student(load("all-MiniLM-L6-v2"), layers=(1, 3, 5), classes=2)
        save("small", small.params, small.rules, config=small.config)

    Args:
      source: an encoder with numbered layers.
      layers: positions among its layers; layer `j` of the student is layer `layers[j]`.
      classes: number of classes of a new head for an encoder (with the pooler below it, if the
        family has one and the source lacks it); None keeps the source's head, if it has one.
      key: the PRNG key of the new head; None means `jax.random.key(0)`.

    Returns:
      The student. Its config and rules are those of its own checkpoint; its report lists what was
      copied, and what is new under `kept`.

    Raises:
      ValueError: if the model has no numbered layers, a position is out of range, or `classes` is
        given for a model that is not an encoder.
    """
    family = family_of(source.config)
    if family.depth is None or not hasattr(source.module, "layers"):
        raise ValueError(
            f"a {family.model_types[0]!r} model has no numbered layers to choose from."
        )
    depth = source.config[family.depth]
    if not layers or not all(0 <= i < depth for i in layers):
        raise ValueError(f"layers must lie in 0..{depth - 1}, got {list(layers)}.")
    config, rules = _config_of_layers(family, source.config, layers), source.rules
    rename = transforms.layer_map(r"layers_(\d+)/.*", layers)
    flat = trees.flatten(source.params)
    selected = {new: leaf for path, leaf in flat.items() for new in rename(path)}
    if classes is None:
        # Rebuilt: the config's per-layer values must be those of the chosen layers.
        parts = _hf_build.build(family, config, naming.to_torch(selected, rules))
        target, module = _hf_family.with_dtypes(parts.variables, selected, None), parts.module
        _check_layers(source.config["model_type"], layers, selected, target)
        params, report = transforms.transfer(source.params, target, rename=rename)
    else:
        head = _classifier(family)
        config |= {"architectures": [head.architectures[0]], **_hf_family.numbered_labels(classes)}
        for name in ("num_labels", "problem_type", "finetuning_task"):  # of the source's head
            config.pop(name, None)
        values = _values(family, config)
        shapes: dict[str, tuple[int, ...]] = {head.classes or "": (classes,)}
        shapes |= {_hf_family.POOLER: ()} if head.has_pooler else {}
        module = _hf_family.module_of(family, values, Contents(head, shapes, is_tied=True))
        rules = _hf_family.rules_of(family, head, (), is_tied=True, prefix=family.prefix)
        heads = ("head", "distillation_head", "language")
        body = {name: leaf for name, leaf in source.params.items() if name not in heads}
        head_names = {rule.jax.split("/")[0] for rule in (*head.rules, *head.optional)}
        fresh_names = (head_names | {"pooler"}) - body.keys()
        target = _init_new(module, family.example(values), selected, fresh_names, key)
        _check_layers(source.config["model_type"], layers, selected, target)
        new_names = [name for name in target if name in fresh_names]
        # A pooler that the new model does not have is dropped.
        body = {name: x for name, x in body.items() if name != "pooler" or name in target}
        params, report = transforms.replace_head(
            body, target, f"({'|'.join(new_names)})/.*", rename=rename
        )
    run = linen.model(module).apply
    return Pretrained(run, params, None, module, rules, config, report)


def save(
    folder: str | Path,
    params: Params,
    rules: Sequence[Rule],
    *,
    config: Mapping[str, Any],
    model_state: PyTree = None,
) -> None:
    """Writes `model.safetensors` and `config.json` that PyTorch libraries read.

    The config describes what is written (see `described`) and is checked before anything is stored.
    Some classes of transformers draw a pooler at random if the file has none: let them open a body
    without one with add_pooling_layer=False.

    Args:
      folder: created if needed; the two files are replaced atomically, the weights last.
      params: the model's parameters, with the names of `rules`.
      rules: the rules of a `Pretrained`; they also name the layers of a shallower student.
      config: the config of a `Pretrained`.
      model_state: batch statistics, if the model has them.

    Raises:
      ValueError: if a parameter has no rule, or the parameters are not those of a model that the
        config describes.
    """
    tensors = naming.to_torch({**params, **(model_state or {})}, rules)
    family_of(config)
    config = described(config, tensors)
    # PyTorch's batch norms count batches; nothing reads the count here, but they expect the key.
    norms = [name for name in tensors if name.endswith(".running_mean")]
    counts = [name.replace("running_mean", "num_batches_tracked") for name in norms]
    tensors |= {name: np.zeros((), np.int64) for name in counts}
    _hf_folder.write(Path(folder), config, tensors)


def described(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    equal: Equal | None = None,
) -> dict[str, Any]:
    """The config.json of a folder that holds these tensors, derived from their source's config.

    The numbers of layers, tokens, positions and classes, the width of the feed-forward layers, the
    architecture's name, whether the output layer is tied, and the dtype are those of the tensors.
    For an unknown `model_type`, only the dtype is changed.

    Args:
      config: the config of the model that the tensors were made from.
      tensors: `{torch name: array}`, concrete or abstract (`shape` and `dtype` are read).
      layers: which of that model's layers they are, if not all of them.
      equal: whether two tensors are equal, by name; None compares the arrays, which must then be
        concrete if an output layer is stored beside the embedding it may be tied to.

    Raises:
      ValueError: if no config of this family describes the tensors, or the config lists something
        per layer that cannot be derived.
    """
    equal = _hf_family.equal_in(tensors) if equal is None else equal
    family = next((f for f in FAMILIES if config.get("model_type") in f.model_types), None)
    if layers is not None and family is not None and family.depth is not None:
        config = _config_of_layers(family, config, layers)
    out = _hf_family.described(family, config, tensors, equal)
    if family is not None:
        parts = _hf_build.build(family, out, tensors, equal)
        weights = {k: x for k, x in tensors.items() if k not in {*parts.unused, *parts.extra}}
        transforms.plan_transfer(naming.from_torch(weights, parts.rules), parts.variables)
    return out


def _config_of_layers(
    family: Family, config: Mapping[str, Any], layers: Sequence[int]
) -> dict[str, Any]:
    assert family.depth is not None
    depth, out = config[family.depth], {**config, family.depth: len(layers)}
    if family.layer_kinds is not None and out.get("layer_types") is None:
        out["layer_types"] = family.layer_kinds(_values(family, config))
    for key in family.per_layer:
        if isinstance(out.get(key), list) and len(out[key]) == depth:
            out[key] = [out[key][i] for i in layers]
    if depth != len(layers):
        out = {key: value for key, value in out.items() if key not in family.by_layers}
    return out


def _check_layers(
    kind: str, layers: Sequence[int], selected: Mapping[str, Any], target: PyTree
) -> None:
    """Raises ValueError if a layer's parameters are not those of a layer at its new position."""
    for path in sorted(selected.keys() ^ trees.flatten(target).keys(), key=trees.natural_key):
        match = re.match(r"layers_(\d+)/(.*)", path)
        if match is None:
            continue
        source_layer, target_layer = layers[int(match[1])], match[1]
        at_source, at_target = ("has", "has none") if path in selected else ("has no", "has it")
        raise ValueError(
            f"layer {source_layer} of this {kind!r} model {at_source} {match[2]!r}; layer "
            f"{target_layer} of such a model {at_target}. Layer 0 differs from the others: "
            "keep it first, and only once."
        )


def _classifier(family: Family) -> HeadFamily:
    for head in family.heads:
        if head.task in ("sequence", "image"):
            return head
    supported = [f.model_types[0] for f in FAMILIES if any(h.classes is not None for h in f.heads)]
    raise ValueError(
        f"a {family.model_types[0]!r} model cannot take a new head; those of "
        f"{', '.join(supported)} can."
    )


def _values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    return read(config, family.fields, family.harmless, Limits(1 << 31, 1 << 20))


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(f"{folder} is not a folder.")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ImportError(
            f"{source} is not a local folder. To fetch it from the hub install the "
            "extra: pip install 'kdtl_jax[hub]'."
        ) from None
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*"]
    return Path(hub.snapshot_download(str(source), allow_patterns=patterns))


def _init_new(
    module: nn.Module, inputs: Any, arrays: Mapping[str, Any], names: set[str], key: Array | None
) -> dict[str, Any]:
    """Initializes a module's parameters under `names`; the others are abstract, with dtypes."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), inputs)
    init = linen.model(module).init
    shapes = jax.eval_shape(init, jax.random.key(0), inputs).params
    new_names = [name for name in shapes if name in names]
    init_new = jax.jit(lambda key: {name: init(key, zeros).params[name] for name in new_names})
    old_shapes = {name: leaf for name, leaf in shapes.items() if name not in names}
    old_params = _hf_family.with_dtypes(old_shapes, arrays, None)
    return {**old_params, **init_new(jax.random.key(0) if key is None else key)}
