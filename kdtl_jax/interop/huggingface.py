"""Hugging Face folders (config.json and safetensors) as Linen models, and back.

    source = huggingface.load("all-MiniLM-L6-v2")
    outputs, _ = source.model(source.params, source.model_state, {"tokens": ids, "mask": mask})

Encoders of the BERT kind (MiniLM, DistilBERT, RoBERTa), decoders of the GPT-2 and Llama kind
(Mistral, Qwen2), ViT and ResNet. Every tensor is imported, or named in the report. A configuration
that computes something not built here is refused rather than approximated.

Deliberately absent: tokenizers (the `tokenizers` package reads the folder's tokenizer.json), and
pickles.
"""

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from kdtl_jax import transforms, trees
from kdtl_jax._files import atomic_file
from kdtl_jax._types import ModelFn, Params, PyTree
from kdtl_jax.interop import _hf_configs, linen, naming, safetensors
from kdtl_jax.interop._hf_names import Names
from kdtl_jax.interop.naming import Rule
from kdtl_jax.transforms import Report, transfer


class Pretrained(NamedTuple):
    """A checkpoint as a model.

    `student` makes a shallower one, `linen.model(module, taps=[...])` adds taps.
    `rules` name every tensor; `config` is the parsed config.json.
    """

    model: ModelFn
    params: Params
    model_state: PyTree
    module: nn.Module
    rules: tuple[Rule, ...]
    config: dict[str, Any]
    report: Report


def load(source: str | Path, *, dtype: Any = None, taps: Sequence[str] = ()) -> Pretrained:
    """Imports a folder, or (with the `hub` extra) a repository such as `"org/name"`.

    Args:
      source: a local folder with config.json and `*.safetensors` (sharded or not); a name of the
        form `org/name` that is no local folder is fetched first.
      dtype: floating dtype of the parameters; None keeps the file's.
      taps: as in `linen.model`.

    Returns:
      `Pretrained`. Its report lists under `extra` the heads that this model does not have, and
      under `unused` buffers and tied copies.

    Raises:
      FileNotFoundError: if there is no such folder, config.json or safetensors file.
      ValueError: for an unknown family or configuration, a tensor without a place, a missing
        tensor, or a shape that disagrees with config.json.
      ImportError: if a repository is named and `huggingface_hub` is not installed.
    """
    folder = _folder(source)
    config = _read_config(folder / "config.json")
    checkpoint = safetensors.index(folder)
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    built = _hf_configs.architecture(config, stored)
    names = built.names
    rules = _rules(names, list(stored))
    unused = [name for name in stored if _matches(names.buffers, name)]
    unused += [name for name in stored if name == "lm_head.weight" and _is_copy(checkpoint, rules)]
    if "lm_head.weight" in unused:
        built = built._replace(module=built.module.clone(is_tied=True, has_head=True))
    runnable = linen.model(built.module, taps=taps)
    wanted = jax.eval_shape(linen.model(built.module).init, jax.random.key(0), built.example)
    target = {**wanted.params, **(wanted.model_state or {})}
    extra = [
        name
        for name in stored
        if name not in unused
        and (_matches(names.other_heads, name) or _head_of_another_task(name, rules, target, names))
    ]
    tensors = {n: t for n, t in checkpoint.tensors.items() if n not in unused and n not in extra}
    arrays = naming.from_torch(safetensors.views(tensors), rules)
    variables, report = transfer(arrays, _with_dtypes(target, arrays, dtype))
    params = {k: v for k, v in variables.items() if k != "batch_stats"}
    state = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else None
    report = report._replace(extra=tuple(extra), unused=tuple(unused))
    return Pretrained(runnable.apply, params, state, built.module, rules, config, report)


def student(
    source: Pretrained,
    *,
    layers: Sequence[int],
    classes: int | None = None,
    key: Array | None = None,
) -> Pretrained:
    """Some of a model's layers as a model of its own, with a new head if classes are given.

        small = student(load("all-MiniLM-L6-v2"), layers=(1, 3, 5), classes=2)
        save("small", small.params, small.rules, config=small.config)

    Args:
      source: an encoder or decoder with numbered layers.
      layers: positions among its layers; layer `j` of the student is layer `layers[j]`.
      classes: gives an encoder a new head (and the pooler below it, where the family has one and
        the source lacks it); None keeps the source's head, or its absence.
      key: of the new head; None is `jax.random.key(0)`.

    Returns:
      The student. Its config and rules are those of its own checkpoint; its report says what was
      copied, and under `kept` what is new.

    Raises:
      ValueError: if the model has no numbered layers, a position is out of range, or `classes` is
        given for what is no encoder.
    """
    depth = next(
        (k for k in ("num_hidden_layers", "n_layers", "n_layer") if k in source.config), ""
    )
    if not depth or not hasattr(source.module, "layers"):
        family = source.config.get("model_type")
        raise ValueError(f"a {family!r} model has no numbered layers to choose from.")
    if not layers or not all(0 <= i < source.config[depth] for i in layers):
        raise ValueError(f"layers must lie in 0..{source.config[depth] - 1}, got {list(layers)}.")
    module, rules = source.module.clone(layers=len(layers)), source.rules
    config = {**source.config, depth: len(layers)}
    rename = transforms.layer_map(r"layers_(\d+)/.*", layers)
    if classes is None:
        init = jax.eval_shape(linen.model(module).init, jax.random.key(0), _example(config))
        params, report = transforms.transfer(source.params, init.params, rename=rename)
    else:
        task = _hf_configs.classifier(config, classes)
        module = module.clone(classes=classes, has_pooler=task.has_pooler)
        config, rules = {**config, **task.changes}, _rules(task.names, [task.names.prefix])
        old = ("head",) if task.has_pooler else ("head", "pooler")
        body = {name: leaf for name, leaf in source.params.items() if name not in old}
        target = _with_fresh(module, config, set(body), key)
        new = [name for name in target if name in ("head", "pooler") and name not in body]
        params, report = transforms.replace_head(
            body, target, f"({'|'.join(new)})/.*", rename=rename
        )
    runnable = linen.model(module)
    return Pretrained(runnable.apply, params, None, module, rules, config, report)


def save(
    folder: str | Path,
    params: Params,
    rules: Sequence[Rule],
    *,
    config: Mapping[str, Any],
    model_state: PyTree = None,
) -> None:
    """Writes `model.safetensors` and `config.json` that PyTorch libraries read.

    Args:
      folder: made if need be; the two files are replaced atomically, the weights last.
      params: the model's parameters, in the names of `rules`.
      rules: a `Pretrained`'s rules; they also name the layers of a shallower student.
      config: a `Pretrained`'s config with what changed, e.g. `{**config, "num_hidden_layers": 3}`.
      model_state: batch statistics, if the model has them.

    Raises:
      ValueError: if a parameter has no rule.
    """
    tensors = naming.to_torch({**params, **(model_state or {})}, rules)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "config.json") as file:
        file.write(json.dumps(dict(config), indent=2, sort_keys=True).encode())
    safetensors.save(folder / "model.safetensors", tensors, metadata={"format": "pt"})


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
            f"{source} is no local folder. To fetch it from the hub install the "
            "extra: pip install 'kdtl_jax[hub]'."
        ) from None
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*"]
    return Path(hub.snapshot_download(str(source), allow_patterns=wanted))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return config


def _with_fresh(
    module: nn.Module, config: Mapping[str, Any], present: set[str], key: Array | None
) -> dict[str, Any]:
    """The module's parameters: initialized where its head is new, abstract elsewhere."""
    inputs = _example(config)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), inputs)
    init = linen.model(module).init
    shapes = jax.eval_shape(init, jax.random.key(0), inputs).params
    new = [name for name in shapes if name in ("head", "pooler") and name not in present]
    fresh = jax.jit(lambda key: {name: init(key, zeros).params[name] for name in new})
    return {**shapes, **fresh(jax.random.key(0) if key is None else key)}


def _example(config: Mapping[str, Any]) -> Any:
    return _hf_configs.architecture(config, {}).example


def _rules(names: Names, stored: Sequence[str]) -> tuple[Rule, ...]:
    """The family's rules, with the prefix and the norm names that this file uses."""
    prefix = names.prefix if any(name.startswith(names.prefix) for name in stored) else ""
    rules = [rule._replace(torch=prefix + rule.torch) for rule in names.body] + list(names.heads)
    if any(name.endswith("LayerNorm.gamma") for name in stored):  # converted from TensorFlow
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new_name, old_name in old.items():
            rules = [r._replace(torch=r.torch.replace(new_name, old_name)) for r in rules]
    return tuple(rules)


def _is_copy(checkpoint: safetensors.Checkpoint, rules: Sequence[Rule]) -> bool:
    """Whether the language-model head is the token embedding, stored twice."""
    embedding = next((r.torch for r in rules if r.jax == "tokens/embedding"), None)
    head, table = (checkpoint.tensors.get(name or "") for name in ("lm_head.weight", embedding))
    if head is None or table is None or (head.shape, head.dtype) != (table.shape, table.dtype):
        return False
    return bool(np.array_equal(safetensors.view(head), safetensors.view(table)))


def _head_of_another_task(name: str, rules: Sequence[Rule], target: PyTree, names: Names) -> bool:
    """A head that exists in the file but was not built (for tokens, for questions)."""
    heads = {rule.torch for rule in names.heads}
    if name not in heads:
        return False
    (path,) = naming.from_torch({name: jax.ShapeDtypeStruct((), np.float32)}, _unpermuted(rules))
    return path not in trees.flatten(target)


def _unpermuted(rules: Sequence[Rule]) -> list[Rule]:
    return [rule._replace(axes=naming.same) for rule in rules]


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _with_dtypes(target: PyTree, arrays: Mapping[str, Any], dtype: Any) -> PyTree:
    """The target with the file's dtypes, or the one that was asked for."""

    def typed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        stored = arrays[path].dtype if path in arrays else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, stored if dtype is None else dtype)

    return trees.map_with_path(typed, target)
