"""Models by their text, as networks that methods know, and their files."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import models
from kdtl_jax._types import Variables
from kdtl_jax.datasets import Dataset, Splits, Standardizer
from kdtl_jax.interop import model_files, networks, safetensors, sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.interop.networks import Network
from kdtl_jax.interop.sources import Source
from kdtl_jax.recipes import _data, _models
from kdtl_jax.recipes.settings import Data, UsageError

EXAMPLE = jnp.zeros((1, 8, 8, 1), jnp.float32)


@pytest.fixture(autouse=True)
def relaxed(standard_promotion: None) -> None:
    """Models add biases by rank promotion."""


def described(text: str) -> Network:
    return networks.network(_models.module(text, 3), EXAMPLE)


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("mlp:128,64", models.mlp((128, 64), 10)),
        ("mlp:", models.mlp((), 10)),
        ("cnn:16,32", models.cnn((16, 32), 10)),
        ("resnet20", models.resnet(20, 10)),
        ("resnet8x4", models.resnet_x4(8, 10)),
        ("resnet32x4", models.resnet_x4(32, 10)),
        ("wrn-16-2", models.wide_resnet(16, 2, 10)),
        ("vit:patch=2,heads=2", models.ViT(64, 4, 2, 128, 2, classes=10)),
        ("vit", models.ViT(64, 4, 4, 128, 4, classes=10)),
    ],
)
def test_model_forms(text: str, module: nn.Module) -> None:
    assert _models.module(text, 10) == module
    assert _models.text_of(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mlp:a,b", "whole numbers"),
        ("mlp:0", "at least 1"),
        ("cnn:", "at least one layer"),
        ("resnet9", "6 n + 2"),
        ("wrn-16", "not known"),
        ("vit:width=65", "does not divide"),
        ("vit:depth=3", "patch, width"),
        ("lenet", "not known"),
        ("resnet20:3", "after a colon"),
        ("mlp:100000000000", "above 1,000,000"),
        ("vit:width=" + 5000 * "9", "above 1,000,000"),
        ("resnet999998", "deeper than 2,000"),
        ("vit:layers=100000", "deeper than 2,000"),
    ],
)
def test_anything_else_lists_the_forms(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match="wrn-16-2") as error:
        _models.module(text, 10)
    assert reason in str(error.value)
    with pytest.raises(UsageError, match="wrn-16-2"):
        _models.text_of(text)


@pytest.mark.parametrize(
    ("text", "features", "last"),
    [
        ("mlp:6,5", ["hidden_0", "hidden_1"], "hidden_1"),
        ("mlp:", [], "logits"),
        ("cnn:4,6", ["block_0", "block_1"], "pooled"),
        ("resnet8", ["stem", "stage1", "stage2", "stage3"], "pooled"),
        ("wrn-10-1", ["stem", "stage1", "stage2", "stage3"], "pooled"),
        ("vit:layers=2,width=8,heads=2,hidden=8", ["layers_0", "layers_1"], "pooled"),
    ],
)
def test_every_named_tap_exists(text: str, features: list[str], last: str) -> None:
    net = described(text)
    actual = networks.output_shapes(net, jnp.zeros((2, 8, 8, 1)))
    assert list(net.layout.features) == features and net.layout.last == last
    named = [*features, last, *net.layout.before_activation, *net.layout.before_activation.values()]
    named += [f"{path}/probs" for path in net.layout.attention]
    assert set(named) <= actual.keys()
    assert actual["logits"].shape == (2, 3)
    if last != "logits":
        assert len(actual[last].shape) == 2
    for after, before in net.layout.before_activation.items():
        assert actual[after].shape == actual[before].shape


@pytest.mark.parametrize("text", ["mlp:6,5", "cnn:4,6"])
def test_before_activation_is_what_relu_reads(text: str) -> None:
    net = described(text)
    inputs = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = net.init(jax.random.key(0), inputs)
    outputs, _ = net.apply(*variables, inputs)
    for after, before in net.layout.before_activation.items():
        np.testing.assert_allclose(jax.nn.relu(outputs[before]), outputs[after], rtol=1e-6)
        assert (outputs[before] < 0).any()


class Foreign(nn.Module):
    """A module that the library does not know."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> dict[str, jax.Array]:
        x = inputs.reshape(inputs.shape[0], -1)
        first = nn.Dense(4, name="one")(x)
        return {"deep": first * 2, "stem": first, "logits": nn.Dense(3, name="head")(first)}


def test_foreign_modules_are_read_by_their_outputs() -> None:
    net = networks.network(Foreign(), EXAMPLE)
    assert net.layout.features == ("stem", "deep") and net.layout.last == "deep"


def test_half_precision_gives_float32_outputs() -> None:
    net = networks.network(_models.module("mlp:6", 3), EXAMPLE, dtype=jnp.bfloat16)
    actual = networks.output_shapes(net, jnp.zeros((2, 8, 8, 1)))
    assert {x.dtype for x in actual.values()} == {jnp.dtype(jnp.float32)}


def loaded(path: str, net: Network) -> Variables:
    return sources.variables(sources.opened(path), networks.abstract(net, EXAMPLE))


def test_variables_go_through_a_file(tmp_path: object) -> None:
    path = f"{tmp_path}/weights.safetensors"
    for text in ("mlp:6", "resnet8"):
        net = described(text)
        variables = jax.jit(lambda net=net: net.init(jax.random.key(0), EXAMPLE))()
        safetensors.save(path, model_files.tree(variables))
        jax.tree.map(np.testing.assert_array_equal, loaded(path, net), variables)
    with pytest.raises(ValueError, match=r"weights.safetensors: .*missing 'head/bias'"):
        loaded(path, described("mlp:6"))


@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        ("mlp:8, 4", "mlp:8,4", "mlp:8"),
        ("vit:heads=2", "vit:heads=2,patch=4", "vit:heads=1"),
        ("resnet8", "resnet8", "resnet14"),
    ],
)
def test_one_network_has_one_text(text: str, same: str, other: str) -> None:
    assert (
        models.canonical_name(text) == models.canonical_name(same) != models.canonical_name(other)
    )


def test_a_cache_knows_a_model_by_its_code_and_configuration(tmp_path: Path) -> None:
    """Weights of the same shapes under other code, or another number of heads, are another's."""
    for name, text in (("net.py", f"{tmp_path / 'net.py'}:Net"),
                       ("config.json", f"huggingface:{tmp_path}")):  # fmt: skip
        (tmp_path / name).write_text("heads = 8")
        before = _models.identity(text)
        assert _models.identity(text) == before
        (tmp_path / name).write_text("heads = 1")
        assert _models.identity(text) != before
    assert _models.identity("vit:heads=2") == models.canonical_name("vit:heads=2")


def data(classes: int = 3, names: tuple[str, ...] = ()) -> Splits:
    rng = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % classes
    part = Dataset("blobs", rng.normal(5, 2, (60, 4)).astype(np.float32), labels, classes, names)
    return Splits(part, part, part)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A file of a ViT that says what it is of."""
    net = networks.network(_models.module("mlp:6", 3), jnp.zeros((1, 4)))
    scaling = Standardizer(np.full(4, 5, np.float32), np.full(4, 2, np.float32))
    path = tmp_path / "teacher.safetensors"
    variables = net.init(jax.random.key(0), jnp.zeros((1, 4)))
    model_files.save(path, variables, About("mlp:6", 3, scaling, ("a", "b", "c")), {"seed": "0"})
    return str(path)


def read(path: str, splits: Splits, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    monkeypatch.setattr(_data, "read_splits", lambda *args, **kwargs: splits)
    source = _models.open_source(path, given.get("text"), "mlp:1")
    result, form = _data.read_data(Data(), source)
    return source.about.model, result, form.scaling


def test_a_file_says_what_its_model_is(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, splits, scaling = read(teacher, data(3, ("a", "b", "c")), monkeypatch)
    assert text == "mlp:6" and safetensors.index(teacher).metadata["seed"] == "0"
    np.testing.assert_array_equal(scaling.mean, np.full(4, 5))
    np.testing.assert_allclose(splits.test.inputs, (data().test.inputs - 5) / 2, rtol=1e-6)
    assert _models.open_source(None, None, "mlp:1")[:2] == (None, About("mlp:1"))


def test_a_file_of_something_else_is_refused(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="holds the model mlp:6, not mlp:7"):
        read(teacher, data(), monkeypatch, text="mlp:7")
    with pytest.raises(ValueError, match="has 3 classes, but the data has 4"):
        read(teacher, data(4), monkeypatch)
    with pytest.raises(
        ValueError, match="was trained on the classes a, b, c, but the data has a, b, d"
    ):
        read(teacher, data(3, ("a", "b", "d")), monkeypatch)
    with pytest.raises(ValueError, match="trained on the classes a, b, c, but the data has 0..2"):
        read(teacher, data(), monkeypatch)

    def changed(change: Any) -> Splits:
        own = data(3, ("a", "b", "c"))
        return Splits(*(part._replace(inputs=change(part.inputs)) for part in own))

    for change in (lambda x: x[:, :3], lambda x: x[:, :1]):  # of one feature: none is repeated
        with pytest.raises(ValueError, match=r"scales inputs of shape \[4\]"):
            read(teacher, changed(change), monkeypatch)
    for factor in (255, 1 / 255):
        with pytest.raises(ValueError, match="Are the data in other units"):
            read(teacher, changed(lambda x, f=factor: x * f), monkeypatch)
    inputs = np.random.default_rng(0).normal(size=(_data.FEW_ROWS, 4)) * [1, 1, 1e-3, 1]
    assert _data.other_units(inputs) is None  # without names, as pixels: some may be dark
    assert "the column 'c' has a scaled dev" in str(_data.other_units(inputs, ["a", "b", "c", "d"]))
    inputs[:, 2] = np.arange(_data.FEW_ROWS) == 3  # rare
    inputs[:, 2] *= 1e-3
    assert _data.other_units(inputs, ["a", "b", "c", "d"]) is None
    with pytest.raises(ValueError, match="no such file"):
        _models.open_source(str(tmp_path / "nowhere"), None, "mlp:1")
    broken = tmp_path / "broken.safetensors"
    safetensors.save(broken, {"a": np.ones(1)}, metadata={"classes": "many"})
    with pytest.raises(ValueError, match="metadata are damaged"):
        _models.open_source(str(broken), None, "mlp:1")


def test_images_of_another_size_are_refused_and_unknown_scaling_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A convolution with pooling would run on them."""
    part = Dataset("x", np.random.default_rng(0).random((6, 4, 4, 1), np.float32),
                   np.arange(6, dtype=np.int32) % 2, 2)  # fmt: skip
    monkeypatch.setattr(_data, "read_splits", lambda *args, **kwargs: Splits(part, part, part))
    with pytest.raises(ValueError, match=r"takes inputs \[8, 8, 1\], .* are \[4, 4, 1\]"):
        _data.read_data(Data(), Source("teacher", About("cnn:2", 2, None, (), (8, 8, 1))))
    _data.read_data(Data(), Source("teacher", About("cnn:2", 2)))
    assert "teacher does not say how its inputs were scaled" in capsys.readouterr().err


def test_a_table_s_classes_are_numbered_as_its_teacher_s(tmp_path: Path) -> None:
    """Numbers as classes were refused on the teacher's own data; another order is renumbered."""
    for name, classes in (("numbers", "012"), ("words", "cab"), ("order", "bca")):
        lines = (f"{i}.5,{i % 7},{classes[i % 3]}" for i in range(30))
        (tmp_path / f"{name}.csv").write_text("x,y,label\n" + "\n".join(lines))

    def read_csv(name: str, about: About, path: str | None) -> Any:
        return _data.read_data(Data(data=str(tmp_path / f"{name}.csv")), Source(path, about))

    for taught, given in (("numbers", "numbers"), ("words", "order")):
        splits, form = read_csv(taught, About(), None)
        about = About("mlp:2", 3, form.scaling, splits.train.names, (2,), form)
        again, _ = read_csv(given, about, "teacher")
        assert again.train.names == splits.train.names and len(again.train.labels) == 15
    with pytest.raises(ValueError, match="on the classes a, b, c, but the data has 0..2"):
        read_csv("numbers", about, "teacher")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = described("mlp:6")
    variables = jax.jit(lambda: net.init(jax.random.key(0), EXAMPLE))()
    bad = jax.tree.map(lambda x: x * jnp.float32(jnp.nan), variables)
    model_files.save(tmp_path / "bad.safetensors", bad, About("mlp:6", 3), {})
    with pytest.raises(ValueError, match="not finite"):
        loaded(str(tmp_path / "bad.safetensors"), net)
