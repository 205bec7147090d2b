"""Small checkpoints for the tests of `kdtl params`, and what its commands wrote."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax.cli import main
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._formulas import Members
from kdtl_jax.interop import safetensors

Flat = dict[str, Any]
A, B, BASE = "a.safetensors", "b.safetensors", "base.safetensors"
OUT = ("--write", "out.safetensors")


def flat(seed: int, *, width: int = 4, layers: int = 3, dtype: str = "float32") -> Flat:
    """A network's tensors, its weights on a coarse grid so that many magnitudes are equal."""
    rng = np.random.default_rng(seed)

    def grid(*shape: int) -> np.ndarray:
        return (rng.integers(-6, 7, shape) / 4).astype(jnp.dtype(dtype))

    body = {}
    for i in range(layers):
        body[f"layer_{i}/bias"] = grid(width)
        body[f"layer_{i}/kernel"] = grid(width, width)
    return {**body, "head/kernel": grid(width, 3), "step": np.array(seed, np.int32)}


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models in a working folder; tensors pass in pieces of five numbers."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_checkpoints, "BLOCK", 5)
    for seed, name in enumerate(("base", "a", "b")):
        safetensors.save(f"{name}.safetensors", flat(seed), metadata={"format": "np"})


def params(*words: str) -> int:
    return main(["params", *words])


def written(path: str = "out.safetensors") -> Flat:
    return {name: np.array(x) for name, x in safetensors.load(path).items()}


def drop_step(tree: Flat) -> Flat:
    return {name: leaf for name, leaf in tree.items() if name != "step"}


def native(tree: Flat) -> Flat:
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def by_tensor(merge: Any, base: Flat, models: list[Flat], options: Any, data: Any = ()) -> Flat:
    """A method's merge of every tensor of the first, one at a time; `{}` for no base."""
    out = {}
    for path, leaf in (base or models[0]).items():
        one = [{path: tree[path]} for tree in models]
        known = [{path: x[path]} if path in x else {} for x in data]
        members = Members({path: base[path]} if base else {}, one, known)
        rows = options if np.ndim(leaf) > 1 else options._replace(axis=None)
        out |= merge.whole(members, rows)
    return native(out)


def assert_same(got: Flat, want: Flat, rtol: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (np.shape(array), array.dtype), name
        if rtol:
            np.testing.assert_allclose(got[name], array, rtol=rtol, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], array, err_msg=name)


EVERY = {
    "scale": ["scale", A, "--alpha", "2"],
    "transfer": ["transfer", A, B],
    "slice": ["slice", A, "--where", "head/.*"],
    "average": ["average", A, B],
    "merge": ["merge", A, B, "--method", "ties", "--base", BASE],
    "inspect": ["inspect", A, "--values"],
    "diff": ["diff", A, B],
}
