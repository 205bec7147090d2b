"""The files that make a folder a Hugging Face model: config.json and safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtl_jax._files import read_json, write_atomic
from kdtl_jax.interop import safetensors


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parsed config.json, and the tensors by name as memory maps."""
    config = read_json(folder / "config.json")
    return config, safetensors.views(safetensors.index(folder).tensors)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Writes config.json and model.safetensors, each whole, the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(config, indent=2, sort_keys=True).encode()
    write_atomic(folder / "config.json", content)
    safetensors.save(folder / "model.safetensors", tensors, metadata={"format": "pt"})
