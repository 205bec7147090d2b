"""`kdtl params merge --recipe`: mergekit's YAML, by filter, by gradient, and by layers."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from params_checkpoints import OUT, assert_same, by_tensor, params, written

from kdtl_jax import transforms
from kdtl_jax.cli.params._formulas import Options
from kdtl_jax.cli.params._methods import METHODS
from kdtl_jax.interop import safetensors

DEPTH = 4


def model(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (5, 4), "model.norm.weight": (4,)}
    for i in range(DEPTH):
        shapes[f"model.layers.{i}.mlp.weight"] = (4, 4)
        shapes[f"model.layers.{i}.attn.bias"] = (4,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three model folders with a configuration and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "num_hidden_layers": DEPTH, "torch_dtype": "float32"}
    config["layer_types"] = [f"kind {i}" for i in range(DEPTH)]
    for seed, name in enumerate(("base", "a", "b")):
        Path(name).mkdir()
        safetensors.save(f"{name}/model.safetensors", model(seed))
        Path(name, "config.json").write_text(json.dumps(config))
        Path(name, "tokenizer.json").write_text(f"of {name}")
    return tmp_path


def run(recipe: dict[str, Any], *words: str) -> int:
    Path("recipe.yaml").write_text(json.dumps(recipe))  # which is YAML
    return params("merge", "--recipe", "recipe.yaml", *(words or OUT))


def models(**by_model: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": result} for name, result in by_model.items()]


GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any], Options]] = {
    "linear": ({"weight": 1}, {"normalize": False}, Options([1.0, 1.0], False)),
    "task_arithmetic": ({"weight": 0.5}, {"lambda": 0.7}, Options([0.5, 0.5], scale=0.7)),
    "ties": ({"weight": "5e-1", "density": 0.5}, {}, Options([0.5, 0.5], density=[0.5, 0.5])),
    "dare_ties": (
        {"weight": 1, "density": 0.4},
        {"rescale": False},
        Options([1.0, 1.0], density=[0.4, 0.4], rescale=False),
    ),
    "della": (
        {"weight": 1, "density": 0.4, "epsilon": 0.2},
        {"int8_mask": True},
        Options([1.0, 1.0], density=[0.4, 0.4], epsilon=[0.2, 0.2]),
    ),
    "sce": ({}, {"select_topk": 0.5}, Options(density=0.5)),
    "model_stock": ({}, {"filter_wise": True}, Options(axis=-1)),
    "nuslerp": ({"weight": 1}, {"nuslerp_flatten": False}, Options([1.0, 1.0], axis=-1)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_recipes_are_the_methods_of_that_name(name: str) -> None:
    own, shared, options = GIVEN[name]
    recipe = {"merge_method": name, "models": models(a=own, b=own), "parameters": shared}
    has_base = METHODS[name].base != "has no"
    assert run(recipe | ({"base_model": "base"} if has_base else {})) == 0
    method = METHODS[name]
    want = by_tensor(
        method.mergekit or method.merge, model(0) if has_base else {}, [model(1), model(2)], options
    )
    assert_same(written(), want)


def test_values_by_filter_and_by_layer() -> None:
    """The first filter that fits decides; a list is a gradient over the layers."""
    t = [{"filter": "mlp", "value": [0, 0.75]}, {"filter": "attn", "value": 1}, {"value": 0.5}]
    recipe = {
        "merge_method": "slerp",
        "base_model": "a",
        "models": models(a=None, b=None),
        "parameters": {"t": t},
    }
    assert run(recipe) == 0
    got, a, b = written(), model(1), model(2)
    for i in range(DEPTH):
        name = f"model.layers.{i}.mlp.weight"
        want = transforms.slerp({"x": a[name]}, {"x": b[name]}, 0.25 * i)["x"]
        np.testing.assert_allclose(got[name], want, rtol=1e-6)
        np.testing.assert_array_equal(
            got[f"model.layers.{i}.attn.bias"], b[f"model.layers.{i}.attn.bias"]
        )
    want = transforms.slerp(a, b, 0.5)
    np.testing.assert_allclose(got["model.norm.weight"], want["model.norm.weight"], rtol=1e-6)


@pytest.mark.parametrize("no", [False, 0, [{"filter": "mlp", "value": True}, {"value": 0}]])
def test_truth_may_be_written_as_a_number(no: Any) -> None:
    """`normalize: 0` is a sum."""
    given = models(a={"weight": 1}, b={"weight": 0.5})
    recipe = {"merge_method": "linear", "models": given, "parameters": {"normalize": no}}
    assert run(recipe) == 0
    got, a, b = written(), model(1), model(2)
    for name, x in got.items():
        total = 1.5 if isinstance(no, list) and "mlp" in name else 1
        np.testing.assert_allclose(x, (a[name] + 0.5 * b[name]) / total, rtol=1e-6)


def test_the_base_of_slices_that_begin_apart_is_named(capsys: Any) -> None:
    """Beside equal ranges it has the same layers; else nobody knows which."""
    ranges = {"a": [1, 3], "b": [0, 2]}
    sources: list[Any] = [{"model": name, "layer_range": there} for name, there in ranges.items()]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": sources, "parameters": {"weight": 0.5}}],
    }
    assert run(recipe) == 1
    assert "name it there with its layer_range" in capsys.readouterr().err
    sources.append({"model": "base", "layer_range": [2, 4]})
    assert run(recipe) == 0
    got, base, a, b = written(), model(0), model(1), model(2)
    for i in range(2):
        start, one, other = (
            tree[f"model.layers.{i + first}.mlp.weight"]
            for tree, first in ((base, 2), (a, 1), (b, 0))
        )
        want = start + 0.5 * (one - start) + 0.5 * (other - start)
        np.testing.assert_allclose(got[f"model.layers.{i}.mlp.weight"], want, rtol=1e-5, atol=1e-6)


def test_layers_of_several_models_make_a_folder_that_opens() -> None:
    recipe = {
        "merge_method": "passthrough",
        "dtype": "bfloat16",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
        ],
    }
    assert run(recipe, "--write", "out") == 0
    got, a, b = written("out"), model(1), model(2)
    origin = [(a, 0), (a, 1), (b, 1), (b, 2), (b, 3)]
    assert len(got) == 2 + 2 * len(origin)
    for i, (tree, j) in enumerate(origin):
        want = tree[f"model.layers.{j}.mlp.weight"].astype(got["model.norm.weight"].dtype)
        np.testing.assert_array_equal(got[f"model.layers.{i}.mlp.weight"], want)
    half = got["model.norm.weight"].dtype
    np.testing.assert_array_equal(got["model.norm.weight"], b["model.norm.weight"].astype(half))
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(got[embedding], a[embedding].astype(half))
    config = json.loads(Path("out/config.json").read_text())
    assert config["num_hidden_layers"] == 5 and config["torch_dtype"] == "bfloat16"
    assert config["layer_types"] == ["kind 0", "kind 1", "kind 1", "kind 2", "kind 3"]
    assert Path("out/tokenizer.json").read_text() == "of a"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"merge_method": "magic"}, "'magic' is not one of"),
        ({"tokenizer_source": "union"}, "'tokenizer_source' is not understood"),
        ({"parameters": {"normalise": True}}, "'normalise' is not understood"),
        ({"models": models(a={"weight": 1, "wait": 2})}, "'wait' is not understood"),
        ({"models": models(a={})}, "has no weight"),
        ({"models": models(nowhere={"weight": 1})}, "'nowhere' does not exist"),
        ({"models": [{"model": "a+lora"}]}, "merge its LoRA first"),
        ({"models": []}, "not empty"),
        ({"parameters": {"normalize": "often"}}, "must be true or false"),
        ({"chat_template": "auto"}, "'chat_template' is not understood"),
        ({"merge_method": "karcher", "parameters": {"tol": 1}}, "nothing is read here"),
        ({"slices": []}, "either models or slices"),
        ({"dtype": "float8"}, "'float8' is not one of"),
        ({"models": models(a={"weight": [1, "x"]})}, "list of numbers"),
    ],
)
def test_what_a_recipe_says_is_understood_or_refused(changes: Any, says: str, capsys: Any) -> None:
    recipe = {"merge_method": "linear", "models": models(a={"weight": 1}, b={"weight": 1})}
    assert run(recipe | changes) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert not Path("out.safetensors").exists()


def test_a_recipe_stands_alone(capsys: Any) -> None:
    recipe = {"merge_method": "linear", "models": models(a={"weight": 1})}
    assert run(recipe, *OUT, "--density", "0.5") == 2
    assert "leave out --density" in capsys.readouterr().err


def test_a_base_that_is_no_model_is_one_to_a_method_without_a_base(capsys: Any) -> None:
    """Where mergekit's `linear` has a base it is one of the models, its weight the recipe's."""
    recipe = {"merge_method": "linear", "base_model": "base", "models": models(a={"weight": 3})}
    assert run(recipe) == 1
    assert "has no weight in the recipe" in capsys.readouterr().err
    assert run(recipe | {"parameters": {"weight": 1}}) == 0
    got, base, a = written(), model(0), model(1)
    for name, x in got.items():
        np.testing.assert_allclose(x, (3 * a[name] + base[name]) / 4, rtol=1e-6, atol=1e-7)
    recipe = {"merge_method": "passthrough", "base_model": "base", "models": models(a=None)}
    assert run(recipe, *OUT, "--force") == 1
    assert "cannot merge 2 models" in capsys.readouterr().err


def test_common_parameters_are_the_results_and_not_a_models(capsys: Any) -> None:
    """Filters of common parameters read the name in the result, those of a model's its own."""
    source = {"model": "a", "layer_range": [2, 3]}
    source["parameters"] = {"weight": [{"filter": "layers.2.", "value": 0.5}, {"value": 1}]}
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": [source, {"model": "base", "layer_range": [2, 3]}]}],
        "parameters": {"lambda": [{"filter": "layers.0.", "value": 3}, {"value": 1}]},
    }
    assert run(recipe) == 0
    got, base, a = written(), model(0), model(1)
    start, end = base["model.layers.2.mlp.weight"], a["model.layers.2.mlp.weight"]
    want = start + 3 * 0.5 * (end - start)
    np.testing.assert_allclose(got["model.layers.0.mlp.weight"], want, rtol=1e-5, atol=1e-6)
    given = {"merge_method": "slerp", "base_model": "a", "models": models(a={"t": 1}, b=None)}
    assert run(given | {"parameters": {"t": 0.3}}) == 1
    assert "'t' is read for all models together" in capsys.readouterr().err


def test_models_that_differ_in_their_tensors_are_told_apart(capsys: Any) -> None:
    """Layers of one that others lack, and tensors that not every layer has."""
    both = models(a={"weight": 1}, b={"weight": 1})
    longer = model(2) | {f"model.layers.{DEPTH}.mlp.weight": np.ones((4, 4), np.float32)}
    longer |= {f"model.layers.{DEPTH}.attn.bias": np.ones(4, np.float32)}
    safetensors.save("b/model.safetensors", longer)
    config = Path("b/config.json").read_text()
    deeper = json.loads(config) | {"num_hidden_layers": DEPTH + 1}
    Path("b/config.json").write_text(json.dumps(deeper))
    assert run({"merge_method": "linear", "models": both}) == 1
    assert "the models have {'a': 4, 'b': 5} layers" in capsys.readouterr().err
    there = {"model": "a", "layer_range": [2, 5]}
    assert run({"merge_method": "passthrough", "slices": [{"sources": [there]}]}) == 1
    assert "a has 4 layers, not 5" in capsys.readouterr().err
    Path("b/config.json").write_text(config)
    for seed, name in ((1, "a"), (2, "b")):  # as ModernBERT's, whose first layer lacks a norm
        norms = {f"model.layers.{i}.norm.weight": np.full(4, seed + i, "f4") for i in (1, 2, 3)}
        safetensors.save(f"{name}/model.safetensors", model(seed) | norms)
    assert run({"merge_method": "linear", "models": both}) == 0
    got = written()
    assert len(got) == 2 + 2 * DEPTH + 3
    np.testing.assert_array_equal(got["model.layers.3.norm.weight"], np.full(4, 4.5))
    safetensors.save("b/model.safetensors", model(2))
    assert run({"merge_method": "linear", "models": both}, *OUT, "--force") == 1
    assert "b has no tensor 'model.layers.1.norm.weight'" in capsys.readouterr().err


@pytest.mark.parametrize("apart", ["a", "b"])
def test_a_tied_head_meets_one_that_is_not(apart: str) -> None:
    """The head of a model whose words are tied is their table; the last slice has the head."""
    head = {"lm_head.weight": np.full((5, 4), 7, np.float32)}
    safetensors.save(f"{apart}/model.safetensors", model(1 + (apart == "b")) | head)
    heads = {"a": model(1)["model.embed_tokens.weight"], "b": model(2)["model.embed_tokens.weight"]}
    heads[apart] = head["lm_head.weight"]
    recipe = {"merge_method": "linear", "models": models(a={"weight": 1}, b={"weight": 1})}
    assert run(recipe, "--write", "mean") == 0
    mean = written("mean")["lm_head.weight"]
    np.testing.assert_allclose(mean, (heads["a"] + heads["b"]) / 2, rtol=1e-6)
    assert json.loads(Path("mean/config.json").read_text())["tie_word_embeddings"] is False
    ends = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("a", "b")]
    assert run({"merge_method": "passthrough", "slices": ends}, *OUT) == 0
    np.testing.assert_array_equal(written()["lm_head.weight"], heads["b"])


def test_an_output_embedding_is_the_last_slices() -> None:
    """As GPT-NeoX's `embed_out`."""
    for seed, name in ((1, "a"), (2, "b")):
        head = {"embed_out.weight": np.full((5, 4), seed, np.float32)}
        safetensors.save(f"{name}/model.safetensors", model(seed) | head)
    ends = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("a", "b")]
    assert run({"merge_method": "passthrough", "slices": ends}) == 0
    np.testing.assert_array_equal(written()["embed_out.weight"], np.full((5, 4), 2))


def test_half_precision_is_not_rounded_before_it_is_widened() -> None:
    """What is written as float32 was computed so, and mixed models take the wider dtype."""
    wide = {"a": model(1), "b": model(2)}
    for name, tree in wide.items():
        half = {k: x.astype(jnp.bfloat16) for k, x in tree.items()}
        safetensors.save(f"{name}/model.safetensors", half)
        wide[name] = {k: x.astype(np.float32) for k, x in half.items()}
    recipe = {"merge_method": "linear", "models": models(a={"weight": 1}, b={"weight": 2})}
    assert run(recipe | {"dtype": "float32"}) == 0
    for name, x in written().items():
        want = (wide["a"][name] + 2 * wide["b"][name]) / 3
        np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-7)
    for words in (("scale", "a", "--alpha", "0.3"), ("average", "a", "a", "--weights", "1,2")):
        assert params(*words, "--dtype", "float32", *OUT, "--force") == 0
        factor = 0.3 if words[0] == "scale" else 1
        for name, x in written().items():
            np.testing.assert_allclose(x, factor * wide["a"][name], rtol=1e-6)
    safetensors.save("b/model.safetensors", model(2))
    assert run(recipe, *OUT, "--force") == 0
    assert {x.dtype.name for x in written().values()} == {"float32"}


def test_a_list_of_truths_is_no_gradient() -> None:
    recipe = {"merge_method": "linear", "models": models(a={"weight": 1}, b={"weight": 0.5})}
    assert run(recipe | {"parameters": {"normalize": [True, False]}}) == 0
    got, a, b = written(), model(1), model(2)
    for i in range(DEPTH):
        name = f"model.layers.{i}.mlp.weight"
        total = 1.5 if i < DEPTH - 1 else 1
        np.testing.assert_allclose(got[name], (a[name] + 0.5 * b[name]) / total, rtol=1e-5)
