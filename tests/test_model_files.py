"""Files of trained models: `load` gives the model, and any other file is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from kdtl_jax import methods, models
from kdtl_jax._types import Variables
from kdtl_jax.datasets import Preprocessing, Standardizer
from kdtl_jax.interop import model_files, networks, safetensors
from kdtl_jax.interop import nnx as from_nnx
from kdtl_jax.interop.model_files import About, Connected

RNG = np.random.default_rng(0)
X = RNG.normal(5, 2, (21, 4)).astype(np.float32)
SCALING = Standardizer(np.full(4, 5, np.float32), np.arange(1, 5, dtype=np.float32))
ABOUT = About("mlp:6", 3, SCALING, ("a", "b", "c"), (4,))


def made(text: str = "mlp:6", shape: tuple[int, ...] = (4,)) -> tuple[networks.Network, Variables]:
    example = jnp.zeros((1, *shape))
    net = networks.network(models.named(text, 3), example)
    return net, jax.jit(lambda: net.init(jax.random.key(0), example))()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model_files.save(tmp_path / "kd.safetensors", made()[1], ABOUT, {"method": "kd", "seed": "3"})
    return tmp_path / "kd.safetensors"


def test_a_loaded_model_scales_its_inputs(file: Path) -> None:
    model, (net, variables) = model_files.load(file), made()
    assert model.about._replace(scaling=None) == ABOUT._replace(scaling=None)
    assert model.metadata["method"] == "kd" and model.metadata["seed"] == "3"
    expected = net.apply(*variables, (X - SCALING.mean) / SCALING.scale)[0]["logits"]
    actual = model.predict(X)
    assert actual.shape == (21, 3) and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(model.outputs)(X), expected, rtol=1e-5, atol=1e-6)
    # Neither the number of rows nor their neighbors change a row.
    for rows in (X[:1], X[:7], X[:0]):
        np.testing.assert_allclose(model.predict(rows), actual[: len(rows)], rtol=1e-6, atol=1e-6)
    whole = networks.in_batches(lambda x: jnp.asarray(x[:, :3]), X, 3, batch=8)
    np.testing.assert_array_equal(whole, X[:, :3])


def test_inputs_of_float64_are_scaled_in_it(tmp_path: Path) -> None:
    """Seconds since 1970: float32 has steps of 128 there, as large as the spread."""
    offset = 1.7e9 + 37
    wide = Standardizer(np.full(4, offset), np.full(4, 100.0))
    form = Preprocessing("classes", ("a", "b", "c"), 3, (4,), scaling=wide)
    about = ABOUT._replace(scaling=wide, preprocessing=form)
    model_files.save(tmp_path / "x.safetensors", made()[1], about, {})
    net, variables = made()
    expected = net.apply(*variables, X)[0]["logits"]
    actual = model_files.load(tmp_path / "x.safetensors").predict(
        X.astype(np.float64) * 100 + offset
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_other_inputs_are_refused(file: Path) -> None:
    model = model_files.load(file)
    with pytest.raises(ValueError, match=r"inputs must be \[N, 4\], got \[N, 5\]"):
        model.predict(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="must be numbers"):
        model.predict(np.array(["a"]))


def test_a_file_of_an_earlier_version_learns_its_shape_from_the_first_batch(
    tmp_path: Path, file: Path
) -> None:
    stored, known = safetensors.load_tree(file), dict(safetensors.index(file).metadata)
    old = {name: known[name] for name in ("model", "classes", "input_mean", "input_scale")}
    safetensors.save(tmp_path / "old.safetensors", stored, metadata=old)
    model = model_files.load(tmp_path / "old.safetensors")
    np.testing.assert_array_equal(model.predict(X), model_files.load(file).predict(X))
    with pytest.raises(ValueError, match="expected"):
        model.predict(np.zeros((2, 5)))


def test_simkd_predicts_through_its_connectors(tmp_path: Path) -> None:
    (student, own), (teacher, large) = made("cnn:4", (6, 6, 1)), made("cnn:6", (6, 6, 1))
    x = RNG.normal(size=(5, 6, 6, 1)).astype(np.float32)
    setup = methods.setup(
        student.apply, teacher.apply, student_variables=own, teacher_variables=large,
        inputs=x, examples=5, steps=1, student_layout=student.layout, teacher_layout=teacher.layout,
    )  # fmt: skip
    method = methods.simkd(setup)
    assert method.predict is not None and setup.teacher_head is not None
    connectors = jax.jit(method.connectors)(jax.random.key(1))
    memory = jax.tree.map(
        lambda v: v + jnp.asarray(0.25, v.dtype), method.memory(jax.random.key(2))
    )
    expected = method.predict(connectors, memory, student.apply(*own, x)[0])
    parts = Connected("simkd", setup, connectors, memory)
    path = tmp_path / "simkd.safetensors"
    about = About("cnn:4", 3, None, (), (6, 6, 1))
    model_files.save(path, own, about, {}, parts)
    loaded = model_files.load(path)
    np.testing.assert_allclose(loaded.predict(x), expected, rtol=1e-5, atol=1e-6)
    # It can be exported for batches of any size.
    (rows,) = jax.export.symbolic_shape("n")
    actual = jax.eval_shape(loaded.outputs, jax.ShapeDtypeStruct((rows, 6, 6, 1), jnp.float32))
    assert actual.shape == (rows, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder. Name a model's file"),
        (lambda p: (p / "0").mkdir(parents=True), "is a folder of checkpoints"),
        (lambda p: (p.mkdir(), (p / "plan.json").touch()), "is a teacher cache"),
        (lambda p: (p.mkdir(), (p / "config.json").touch()), "is a Hugging Face folder"),
        (
            lambda p: (
                (p / "students").mkdir(parents=True),
                (p / "students" / "kd.safetensors").touch(),
            ),
            r"is a run folder, with students/kd\.safetensors",
        ),
        (
            lambda p: safetensors.save(p, {"w": np.ones(2)}),
            "does not say which model they belong to",
        ),
        (
            lambda p: safetensors.save(p, {"w": np.ones(2)}, metadata={"classes": "many"}),
            "metadata are damaged",
        ),
        (lambda p: p.write_bytes(b"\x80\x04K\x01."), "safetensors"),
    ],
)
def test_what_is_no_models_file_says_what_it_is(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=message) as caught:
        model_files.load(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model_files.save(tmp_path / "x.safetensors", made("mlp:7")[1], ABOUT, {})
    with pytest.raises(ValueError, match=r"x\.safetensors: .*dense_0/kernel.* this model"):
        model_files.load(tmp_path / "x.safetensors")


class Module(nnx.Module):
    """With parameters, batch statistics and a random stream."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs, drops: bool = True) -> None:
        self.norm = nnx.BatchNorm(3, rngs=rngs) if drops else None
        self.drop = nnx.Dropout(0.5, rngs=rngs) if drops else None
        self.head = nnx.Linear(3, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        if self.norm is not None and self.drop is not None:
            x = self.drop(self.norm(x))
        return self.head(x)


@pytest.mark.parametrize("drops", [True, False], ids=["with state", "without"])
def test_what_the_adapter_of_nnx_returns_is_written_and_read(drops: bool, tmp_path: Path) -> None:
    def build(classes: int, *, rngs: nnx.Rngs) -> Module:
        return Module(classes, rngs=rngs, drops=drops)

    model, params, state = from_nnx.model(build(2, rngs=nnx.Rngs(0)))
    inputs = np.arange(12, dtype=np.float32).reshape(4, 3)
    about = About(model="mine.py:build", classes=2, shape=(3,))
    model_files.save(tmp_path / "a.safetensors", Variables(params, state), about, {})
    predicted = model_files.load(tmp_path / "a.safetensors", model=build).predict(inputs)
    expected = model(params, state, jnp.asarray(inputs))[0]["logits"]
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)
