"""Weights of models of one's own as frameworks keep them: `kdtl cache` gives their outputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiny import kdtl, write_data

from kdtl_jax import datasets
from kdtl_jax.interop import own, safetensors
from kdtl_jax.recipes import _imports
from kdtl_jax.run import teacher_cache

Captured = pytest.CaptureFixture[str]
MODELS = """
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
from flax import nnx

class Linen(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(nn.relu(nn.Dense(4)(x)))

class Statistics(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return {"hidden": x, "logits": nn.Dense(self.classes)(nn.relu(x))}

class NNX(nnx.Module):
    def __init__(self, din, classes, *, rngs):
        self.first = nnx.Linear(din, 4, rngs=rngs)
        self.last = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))

class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key, classes):
        one, two = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(5, 4, key=one), eqx.nn.Linear(4, classes, key=two)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)))

haiku = hk.transform(lambda x: hk.Linear(3)(jax.nn.relu(hk.Linear(4)(x))))
functions = (
    lambda key, x: {"w": jax.random.normal(key, (x.shape[-1], 3))},
    lambda params, x: x @ params["w"],
)
"""


def kept(name: str, variables: Any) -> Mapping[str, Any]:
    """What people save: what `init` gave them, or a module's parameters."""
    if name == "Statistics":
        return {"params": variables.params, **variables.model_state}
    if name == "Linen":
        return {"params": variables.params}
    if name == "NNX":
        return nnx.to_pure_dict(variables.params)
    return variables.params


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "safetensors") for name in ("Linen", "Statistics", "NNX", "Equinox", "haiku")),
        *((name, "orbax") for name in ("Linen", "Statistics", "functions")),
    ],
)
def test_weights_as_they_are_kept(name: str, form: str, tmp_path: Path, capsys: Captured) -> None:
    data, file = write_data(tmp_path / "small.npz", shift=1.0), tmp_path / "mine.py"
    file.write_text(MODELS)
    train = datasets.prepared(datasets.read_splits(str(data)))[0].train
    inputs, labels = train.inputs, train.labels
    net = own.network(_imports.imported(f"{file}:{name}"), classes=3, example=inputs[:1])
    variables = net.init(jax.random.key(7), inputs[:1])
    logits = net.apply(*variables, jnp.asarray(inputs))[0]["logits"]
    weights = tmp_path / "weights"
    if form == "safetensors":
        weights = tmp_path / "weights.safetensors"
        safetensors.save(weights, kept(name, variables))
    else:
        ocp.PyTreeCheckpointer().save(weights, kept(name, variables))
    words = ["cache", "--data", data, "--teacher", f"{file}:{name}", "--teacher-weights", weights]
    assert kdtl(*words, "--out", tmp_path / "cache") == 0
    actual = teacher_cache.load(teacher_cache.open_cache(tmp_path / "cache", expect=None))
    np.testing.assert_allclose(actual["logits"], logits, rtol=1e-5, atol=1e-5)
    right = 100 * np.mean(np.argmax(logits, axis=-1) == labels)
    assert f"teacher: {right:.1f}% of these examples right" in capsys.readouterr().out
