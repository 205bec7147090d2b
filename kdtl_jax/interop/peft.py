"""Adapters as PEFT saves them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    adapter = peft.load("adapter/")        # every key and tensor is understood, or refused
    params = peft.merge(tensors, adapter)  # {torch name: array}, as merge_and_unload gives them
    peft.save("copy/", adapter)

Supported are LoRA (rank and alpha patterns, rsLoRA, DoRA, `lora_bias`, embeddings, convolutions),
IA3, VeRA with its projections saved, OFT, trained biases, and `modules_to_save`. PiSSA, OLoRA,
CorDA, LoftQ and LoRA-GA move part of the base into the adapter when training begins, and the saved
files do not hold that part: they are refused, as is everything unknown. Names are torch's, and
kernels are `[out, in]`; `naming.to_torch` and `naming.from_torch` translate whole trees.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _files, transforms
from kdtl_jax.interop import safetensors
from kdtl_jax.interop._peft_files import Adapter as Adapter
from kdtl_jax.interop._peft_files import check_config as check_config
from kdtl_jax.interop._peft_files import sort_tensors
from kdtl_jax.interop._peft_merge import edits as edits
from kdtl_jax.interop._peft_merge import scale_of

# The two files of an adapter's folder, and the prefix of its tensors' names.
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def load(folder: str | Path) -> Adapter:
    """Reads an adapter's configuration and weights (mapped, not copied).

    Args:
      folder: PEFT's folder, or its safetensors file with `adapter_config.json` beside it.

    Raises:
      ValueError: naming the first key or tensor that is not understood.
      FileNotFoundError: if either file is missing.
    """
    path = _checks.path(folder=folder)
    checkpoint = safetensors.index(path)
    home = path if path.is_dir() else path.parent
    config = check_config(safetensors.json_file(home / CONFIG))
    return sort_tensors(safetensors.views(checkpoint.tensors), config)


def merge(
    tensors: Mapping[str, Any], adapter: Adapter, base_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Merges the adapter into the base's tensors: PEFT's `merge_and_unload`.

    Arguments and errors are those of `edits`; each tensor keeps its dtype.
    """
    edits_by_name = edits(adapter, tensors, base_config)
    return {
        name: edits_by_name[name](x).astype(x.dtype) if name in edits_by_name else x
        for name, x in tensors.items()
    }


def save(folder: str | Path, adapter: Adapter) -> None:
    """Writes a new folder that PEFT reads.

    Raises:
      FileExistsError: if the folder exists and is not empty.
    """
    tensors = {
        f"{PREFIX}{module}.{_stored_name(part)}": value
        for module, parts in adapter.weights.items()
        for part, value in parts.items()
    }
    for name, value in adapter.replaced.items():
        module, _, last = name.rpartition(".")
        inside = ".base_layer" if module in adapter.weights else ""
        tensors[f"{PREFIX}{module}{inside}.{last}"] = value
    tensors |= {f"base_model.{name}": value for name, value in adapter.shared.items()}
    with _files.new_folder(Path(folder)) as part:
        _files.write_atomic(part / CONFIG, json.dumps(adapter.config, indent=2).encode())
        safetensors.save(part / WEIGHTS, tensors, metadata={"format": "pt"})


def to_lora(adapter: Adapter) -> dict[str, Any]:
    """`{kernel's torch name: transforms.LoraWeights or DoraWeights}`, for kernels of two axes.

    Scales are multiplied into `b`: use them with an alpha of 1 and `scaling=lambda alpha, rank: 1`.

    Raises:
      ValueError: if the adapter holds anything else.
    """
    if adapter.kind != "LORA" or adapter.replaced:
        raise ValueError(
            f"a {adapter.kind} adapter with {sorted(adapter.replaced)} is not a plain LoRA."
        )
    out: dict[str, Any] = {}
    for module, parts in adapter.weights.items():
        if {"lora_embedding_A", "lora_B.bias"} & parts.keys() or np.ndim(parts["lora_A"]) != 2:
            raise ValueError(f"{module!r} has {sorted(parts)}, not the pair of a kernel.")
        a, b = (jnp.asarray(parts[part]).T for part in ("lora_A", "lora_B"))
        b = b * jnp.asarray(scale_of(adapter.config, module, a.shape[-1]), b.dtype)
        magnitude = parts.get("lora_magnitude_vector")
        out[f"{module}.weight"] = (
            transforms.LoraWeights(a, b)
            if magnitude is None
            else transforms.DoraWeights(a, b, jnp.ravel(jnp.asarray(magnitude)))
        )
    return out


def from_lora(
    weights: Mapping[str, Any], *, alpha: float, is_root_rank: bool = False, **config: Any
) -> Adapter:
    """Makes a PEFT adapter from `{kernel's torch name: transforms.LoraWeights or DoraWeights}`.

    Args:
      weights: weights for kernels of two axes; `a [in, r]`, `b [r, out]`.
      alpha: as given to `transforms.lora`.
      is_root_rank: true for `transforms.scale_by_root_rank` (rsLoRA).
      **config: further keys of the configuration, such as `base_model_name_or_path`.

    Raises:
      ValueError: if a name is not a kernel's, or a key is not understood.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, pair in weights.items():
        if not name.endswith(".weight"):
            raise ValueError(f"{name!r} must be a kernel's torch name, 'module.weight'.")
        module = name.removesuffix(".weight")
        parts[module] = {"lora_A": pair.a.T, "lora_B": pair.b.T}
        if isinstance(pair, transforms.DoraWeights):
            parts[module]["lora_magnitude_vector"] = pair.magnitude
    ranks = {module: int(tensors["lora_A"].shape[0]) for module, tensors in parts.items()}
    rank = next(iter(ranks.values()), 1)
    required = {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "use_rslora": is_root_rank,
        "use_dora": any("lora_magnitude_vector" in tensors for tensors in parts.values()),
        "target_modules": sorted(parts),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return Adapter(check_config(required | config), parts, {}, {})


def _stored_name(part: str) -> str:
    """A part's name in a file."""
    parameters = ("lora_embedding", "lora_magnitude", "ia3", "vera")  # not modules with a weight
    return part if part.startswith(parameters) or part.endswith(".bias") else f"{part}.weight"
