"""What a folder of weights needs to be loadable: a correct configuration and a tokenizer."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdtl_jax.interop import decoders, huggingface, safetensors

CONFIG = "config.json"
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
    "*processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
TABLE = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|shared)\.weight")
OUTPUT = re.compile(r"(.*\.)?(\w*lm_head|decoder|vocab_projector|embed_out)\.weight")
LARGEST = 500_000_000  # bytes of a copied file; a larger one is not a tokenizer


def home(checkpoint: safetensors.Checkpoint) -> Path | None:
    """The folder whose model a checkpoint is: one with a config.json and no second model."""
    folder = checkpoint.files[0].parent if checkpoint.files else None
    if folder is None or not (folder / CONFIG).is_file():
        return None
    names = {file.name for file in folder.glob("*.safetensors")}
    return folder if names <= {file.name for file in checkpoint.files} else None


def config_of(checkpoint: safetensors.Checkpoint) -> dict[str, Any] | None:
    """The configuration in a checkpoint's folder, or None."""
    folder = home(checkpoint)
    return None if folder is None else safetensors.json_file(folder / CONFIG)


def layer_pattern(names: Sequence[str], depth: int) -> re.Pattern[str] | None:
    """A pattern for names of numbered layers, with one group: the number, from 0 to depth-1.

    A depth of 0 means unknown: the longest such series of numbers is the layers.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(r"(?<=[./_])\d+(?=[./])|^\d+(?=[./])", name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[0]))
    counts = {prefix: len(n) for prefix, n in numbers.items() if n == set(range(len(n)))}
    depth = depth or max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == depth]
    if not prefixes:
        return None
    return re.compile(f"{re.escape(min(prefixes, key=len))}(\\d+)[./].*")


def companions(
    checkpoint: safetensors.Checkpoint, specs: Mapping[str, Any], layers: Sequence[int] | None
) -> Callable[[Path], Mapping[str, bytes]]:
    """The files that belong with weights of these specs, given the folder they are written to.

    The configuration is the checkpoint's with the changes: dtype, number of layers, entries by
    layer, broken ties and, for a supported model, its sizes. If none would be correct, it is left
    out with a warning.
    """
    folder = home(checkpoint)
    if folder is None:
        return lambda written: {}
    config = safetensors.json_file(folder / CONFIG)

    def files_of(written: Path) -> Mapping[str, bytes]:
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for pattern in COPIED
            for path in sorted(folder.glob(pattern))
            if path.is_file() and path.stat().st_size < LARGEST
        }
        try:
            with jax.enable_x64(False):  # builds models of the usual dtypes, for their shapes
                described = _written_config(config, checkpoint, specs, layers, written)
        except ValueError as error:
            print(f"warning: no {CONFIG} was written: {error}", file=sys.stderr)
            return files
        return files | {CONFIG: json.dumps(described, indent=2).encode()}

    return files_of


def _written_config(
    config: dict[str, Any],
    checkpoint: safetensors.Checkpoint,
    specs: Mapping[str, Any],
    layers: Sequence[int] | None,
    written: Path,
) -> dict[str, Any]:
    """The configuration of the written model."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    pattern = layer_pattern(list(shapes), depth(config))
    if (derive := _family(config, checkpoint)) is not None:
        changed = derive(config, specs, layers=layers, equal=_equal_in(safetensors.index(written)))
        other_names = {name for name in shapes if pattern is None or not pattern.fullmatch(name)}
        if other_names <= specs.keys() and "architectures" in config:
            # The class keeps its heads, which may be for an unsupported task.
            changed["architectures"] = config["architectures"]
        return changed
    if changed_names := _reshaped(shapes, specs, pattern, layers):
        raise ValueError(
            f"{changed_names[0]!r} has another shape than in {checkpoint.files[0].parent}; write "
            "one that says so."
        )
    changed = config | _layers(config, specs, pattern, layers)
    huggingface.set_dtype(changed, specs)
    return changed | _untied(changed, written, specs)


def _family(
    config: Mapping[str, Any], checkpoint: safetensors.Checkpoint
) -> Callable[..., dict[str, Any]] | None:
    """What derives the configurations of a supported model; None for any other."""
    try:
        huggingface.family_of(config)
        derive = huggingface.described
    except ValueError:
        derive = decoders.described
    try:
        derive(config, safetensors.abstract(checkpoint), equal=_equal_in(checkpoint))
    except ValueError:
        return None
    return derive


def _equal_in(checkpoint: safetensors.Checkpoint) -> Callable[[str, str], bool]:
    return lambda a, b: equal(checkpoint.tensors[a], checkpoint.tensors[b])


def depth(config: Mapping[str, Any]) -> int:
    """The number of layers a configuration names; 0 if it names none."""
    depths = [config[key] for key in DEPTHS if isinstance(config.get(key), int)]
    return depths[0] if depths else 0


def _reshaped(
    before: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, Any],
    pattern: re.Pattern[str] | None,
    layers: Sequence[int] | None,
) -> list[str]:
    """Names whose shapes differ from those of the tensors they come from."""

    def origin(name: str) -> str:
        match = pattern.fullmatch(name) if pattern and layers is not None else None
        if match is None or int(match[1]) >= len(layers or ()):
            return name
        return f"{name[: match.start(1)]}{(layers or ())[int(match[1])]}{name[match.end(1) :]}"

    return [
        name
        for name, spec in specs.items()
        if origin(name) in before and tuple(spec.shape) != before[origin(name)]
    ]


def _layers(
    config: Mapping[str, Any],
    specs: Mapping[str, Any],
    pattern: re.Pattern[str] | None,
    layers: Sequence[int] | None,
) -> dict[str, Any]:
    """The number of layers written, and the kept items of every list with one item per layer."""
    count = depth(config)
    if pattern is None:
        return {}
    numbers = {int(match[1]) for name in specs if (match := pattern.fullmatch(name))}
    kept = list(range(count)) if layers is None else list(layers)
    if len(numbers) != len(kept):
        kept = [i for i in kept if i in numbers]
    if kept == list(range(count)):
        return {}
    lists = {
        key: [value[i] for i in kept]
        for key, value in config.items()
        if isinstance(value, list)
        and len(value) == count
        and key != "architectures"
        and not key.endswith("_token_id")  # a list of end tokens, not one item per layer
    }
    counts = {key: len(kept) for key in DEPTHS if config.get(key) == count}
    if isinstance(config.get("max_window_layers"), int):
        counts["max_window_layers"] = sum(i < config["max_window_layers"] for i in kept)
    return lists | counts


def _untied(config: Mapping[str, Any], written: Path, specs: Mapping[str, Any]) -> dict[str, Any]:
    """A head stored beside the embedding it is tied to must be equal to it.

    Without the key, the family's default applies, which may be either.
    """
    is_tied = config.get("tie_word_embeddings", None)
    heads = [name for name in specs if OUTPUT.fullmatch(name)]
    tables = [name for name in specs if TABLE.fullmatch(name)]
    if is_tied is False or len(heads) != 1 or not tables:
        return {}
    tensors = safetensors.index(written).tensors
    different = [name for name in tables if not equal(tensors[heads[0]], tensors[name])]
    if not different:
        return {}
    if is_tied:
        print(f"warning: {heads[0]} is no longer tied to {different[0]}", file=sys.stderr)
    return {"tie_word_embeddings": False}


def tied(tensors: Sequence[Mapping[str, safetensors.Tensor]]) -> dict[str, str]:
    """Maps paths whose tensors are equal in every model to the first of them.

    Only tensors with the same shape, dtype and first bytes are read in full.
    """
    groups: dict[Any, list[str]] = {}
    for path in sorted(tensors[0]):
        if all(path in each for each in tensors) and tensors[0][path].shape:
            key = tuple(_beginning(each[path]) for each in tensors)
            groups.setdefault(key, []).append(path)
    first: dict[str, str] = {}
    for paths in groups.values():
        for i, path in enumerate(paths):
            earlier = (
                p
                for p in paths[:i]
                if p not in first and all(equal(each[p], each[path]) for each in tensors)
            )
            if (same := next(earlier, None)) is not None:
                first[path] = same
    return first


def _beginning(tensor: safetensors.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    head = next(safetensors.blocks(tensor, 256), np.zeros(0, np.uint8))
    return tensor.dtype, tensor.shape, head.tobytes()


def equal(a: safetensors.Tensor, b: safetensors.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    pairs = zip(safetensors.blocks(a, 1 << 20), safetensors.blocks(b, 1 << 20), strict=False)
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and all(x.tobytes() == y.tobytes() for x, y in pairs)
