"""LoRA and DoRA weights from a file: this library's names, or PEFT's and its configuration."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import trees
from kdtl_jax.cli.params._inputs import Opened
from kdtl_jax.interop import safetensors
from kdtl_jax.interop.safetensors import Tensor

# PEFT: base_model.model.<module>.lora_A[.<adapter>].weight, [r, in]; lora_B, [out, r].
_PEFT = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.*)\.lora_(?P<part>A|B|magnitude_vector)(?:\.\w+)*?(?:\.weight)?"
)
_OWN = re.compile(r"(?:adapter/)?(?P<module>.*)/(?P<part>a|b|magnitude)")
_PARTS = {"A": "a", "B": "b", "magnitude_vector": "magnitude"}


class Pair(NamedTuple):
    """The parts of one kernel's adapter as they lie in the file."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


class LoraFile(NamedTuple):
    """Adapters by the base's path, and how to apply them; `is_torch`: kernels `[out, in]`."""

    pairs: dict[str, Pair]
    is_torch: bool
    has_flipped_kernels: bool  # PEFT's fan_in_fan_out: kernels [in, out] after all
    alpha: float | None
    has_root_rank: bool


def lora_file(adapter: Opened, base: Mapping[str, Any]) -> LoraFile:
    """Sorts an adapter's tensors by the base kernel they adapt.

    Raises:
      ValueError: if a tensor is no part of a LoRA, a part is missing, or the base lacks a kernel.
    """
    is_torch = any(".lora_" in name for name in adapter.tensors)
    pattern = _PEFT if is_torch else _OWN
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            if not is_torch and name.startswith("base/"):
                continue  # saved with the parameters it adapts
            raise ValueError(
                f"lora-merge: {name!r} in {adapter.name} is no part of a LoRA or DoRA: expected "
                "'kernel/a' and 'kernel/b', or PEFT's '….lora_A.weight' and '….lora_B.weight'."
            )
        path = match["module"] + (".weight" if is_torch else "")
        parts.setdefault(path, {})[_PARTS.get(match["part"], match["part"])] = tensor
    for path, found in parts.items():
        if not {"a", "b"} <= found.keys():
            raise ValueError(
                f"lora-merge: the adapter of {path!r} has {sorted(found)}, not a and b."
            )
        if path not in base:
            raise ValueError(
                f"lora-merge: the adapter's {path!r} is not in the base; nearest: "
                f"{trees.nearest(path, list(base))}. Adapters belong to one architecture."
            )
    config = _peft_config(adapter) if is_torch else {}
    return LoraFile(
        {p: Pair(found["a"], found["b"], found.get("magnitude")) for p, found in parts.items()},
        is_torch,
        bool(config.get("fan_in_fan_out")),
        config.get("lora_alpha"),
        bool(config.get("use_rslora")),
    )


def loaded(pair: Pair, is_torch: bool) -> dict[str, jax.Array]:
    """`a [in, r]`, `b [r, out]` and, of DoRA, `magnitude [out]`."""
    a, b = safetensors.read(pair.a), safetensors.read(pair.b)
    out = {"a": a.T, "b": b.T} if is_torch else {"a": a, "b": b}
    if pair.magnitude is not None:
        magnitude = safetensors.read(pair.magnitude)
        out["magnitude"] = np.ravel(magnitude) if is_torch else magnitude
    return {name: jnp.asarray(array) for name, array in out.items()}


def _peft_config(adapter: Opened) -> dict[str, Any]:
    path = adapter.checkpoint.files[0].parent / "adapter_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"lora-merge: {path} is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"lora-merge: {path} must hold a JSON object.")
    for key in ("alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(
                f"lora-merge: {path} has {key} = {config[key]}, which is not understood here. "
                "Merge with PEFT's merge_and_unload."
            )
    return config
