"""A tiny data set and a tiny pair, for tests of whole commands."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdtl_jax.cli import main

ROOM = ["--teacher", "mlp:8", "--student", "mlp:4", "--batch-size", "8", "--lr", "0.01"]
SHORT = [*ROOM, "--seeds", "2", "--epochs", "4", "--teacher-epochs", "2", "--methods", "kd"]


def kdtl(*words: Any) -> int:
    """`kdtl` in this process, without the suite's strictness: optax and models promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return main([str(word) for word in words])


def write_data(path: Path, *, shift: float = 0.0) -> Path:
    """Three separable classes in five dimensions: 45 examples to train on, 18, 27."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 5)) + 2 * np.eye(3, 5)[y] + shift
    np.savez(path, x=x.astype(np.float32), y=y)
    return path


def results(folder: Path) -> dict[str, Any]:
    """A run's results.json."""
    return json.loads((folder / "results.json").read_text())
