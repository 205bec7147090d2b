"""Copies of the Hugging Face folders in tests/data with something changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from kdtl_jax.interop import safetensors


def edited(source: Path, to: Path, **changes: Any) -> Path:
    """A copy in `to` with other values in config.json (`...` removes a key)."""
    folder = to / source.name
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def retensored(folder: Path, change: Any) -> Path:
    """The folder with its tensors as `change` makes them."""
    tensors = {name: np.array(x) for name, x in safetensors.load(folder).items()}
    safetensors.save(folder / "model.safetensors", change(tensors))
    return folder
