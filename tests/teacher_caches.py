"""A small teacher, its data and its outputs, for the tests of the teacher cache."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax.run import teacher_cache as tc

N, FEATURES, CLASSES = 50, 6, 300
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N, FEATURES)).astype(np.float32)
ARRAYS: dict[str, Any] = {"inputs": INPUTS}
PARAMS = {
    "hidden": RNG.normal(size=(FEATURES, 5)).astype(np.float32),
    "out": RNG.normal(size=(5, CLASSES)).astype(np.float32),
}
ROWS = np.array([3, 49, 20, 19, 3, 0, 40])
KEY = jax.random.key(7)


@jax.jit
def apply(params: Any, inputs: Any) -> dict[str, Any]:
    hidden = jnp.tanh(inputs.reshape(inputs.shape[0], -1)[:, :FEATURES] @ params["hidden"])
    logits = hidden @ params["out"]
    return {"logits": logits, "block/hidden": hidden, "mean": jnp.mean(hidden, axis=0)}


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, Any], Any]:
    return apply(params, inputs), model_state


LIVE = jax.tree.map(np.asarray, apply(PARAMS, INPUTS))


def write(folder: Path, *, arrays: Any = ARRAYS, params: Any = PARAMS, **options: Any) -> tc.Plan:
    options = {"batch_size": 8, "shard_rows": 20} | options
    return tc.write(folder, model, params, arrays, **options)


def expected(**options: Any) -> tc.Fingerprint:
    return tc.fingerprint(PARAMS, ARRAYS, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def other_weights() -> Any:
    """One parameter moved by a little."""
    return PARAMS | {"out": PARAMS["out"] + np.float32(1e-6)}
