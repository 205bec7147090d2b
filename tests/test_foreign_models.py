"""Models, recipes and results of others: whatever their files say, read or refused in one line."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from bounds import bounded, is_plain, values
from hypothesis import given, settings
from hypothesis import strategies as st
from params_checkpoints import BASE, A, B, flat
from test_foreign_files import changed, edited, edits, read_or_refused
from test_model_files import ABOUT, made

from kdtl_jax.cli.params import _recipes
from kdtl_jax.cli.params.merge import Settings
from kdtl_jax.datasets import Column, Preprocessing, Standardizer
from kdtl_jax.interop import model_files, safetensors, sources
from kdtl_jax.recipes import _inputs, _stored_results

# --- files of models -----------------------------------------------------------------------------

WIDE = Standardizer(np.zeros(4), np.ones(4))
FORM = Preprocessing(
    "classes", ("a", "b", "c"), 3, (4,), ("label",), tuple(Column(name) for name in "pqrs"),
    scaling=WIDE,
)  # fmt: skip
KNOWN = ("model", "classes", "class_names", "shape", "preprocessing", "input_mean", "input_scale",
         "kind", "precision", "method", "setup", "split", "data")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    more = {"method": "kd", "seed": "3", "split": json.dumps({"seed": 0, "test": 0.3})}
    about = ABOUT._replace(preprocessing=FORM)
    model_files.save(folder / "m.safetensors", made()[1], about, more)
    rows = "".join(f"{'abc'[i % 3]},{i},1,{-i},0\n" for i in range(30))
    (folder / "d.csv").write_text("label,p,q,r,s\n" + rows)
    return folder


def as_texts(value: Any) -> str:
    """As a file's metadata hold it: text, or JSON in a text."""
    return value if isinstance(value, str) else json.dumps(value)


@settings(max_examples=25)
@given(
    changes=st.dictionaries(
        st.sampled_from(KNOWN), values | st.just("vit:layers=2000") | st.just("mlp:" + "9," * 999),
        min_size=1, max_size=2,
    ),
    inner=st.none() | st.tuples(st.sampled_from(Preprocessing._fields), values),
)  # fmt: skip
def test_any_metadata_of_a_model(model: Path, changes: dict[str, Any], inner: Any) -> None:
    """What is loaded answers, in its own classes."""
    whole = model / "m.safetensors"
    known = dict(safetensors.index(whole).metadata)
    if inner is not None:
        form = json.loads(known["preprocessing"])
        known["preprocessing"] = json.dumps(changed(form, dict([inner])))
    known |= {name: as_texts(value) for name, value in changes.items()}
    with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate is in no file
        safetensors.save(model / "x.safetensors", safetensors.load(whole), metadata=known)
        with read_or_refused():
            actual = model_files.load(model / "x.safetensors")
            read = _inputs.read_examples(
                str(model / "d.csv"), actual, part=None, label=None, with_labels=True
            )
            assert actual.predict(read.inputs[:2]).shape == (2, actual.about.classes)
            assert len(_inputs.class_names(actual)) == actual.about.classes
            assert read.labels is not None and len(read.labels) == len(read.inputs)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("shape", "[100000, 100000]", "inputs of shape"),
        ("shape", "[-4]", "inputs of shape"),
        ("shape", "[1e400]", "infinity"),
        ("shape", "[" * 9000, "recursion|nested|Expecting"),
        ("classes", "0", "0 classes"),
        ("class_names", '["a"]', "1 names of 3 classes"),
        ("input_scale", "[1, 1, 1, 0]", "a scale that is 0"),
        ("input_mean", "[NaN, 1, 1, 1]", "not finite"),
        ("input_mean", "[1, 2]", r"a scale of shape \[2\]"),
        ("precision", "float13", "float13"),
        ("precision", "x" * 9000, "a precision of .x+…"),
        ("precision", "complex64", "a precision of .complex64"),
        ("model", "mlp:" + "9," * 9000 + "9", "9001 layers in 4 tensors"),
    ],
)
def test_sizes_that_no_model_has(tmp_path: Path, name: str, text: str, says: str) -> None:
    file = tmp_path / "m.safetensors"
    model_files.save(file, made()[1], ABOUT, {name: text})
    with bounded(), pytest.raises(ValueError, match=says) as refusal:
        model_files.load(file)
    assert str(file) in str(refusal.value) and is_plain(str(refusal.value))


def test_names_of_other_outputs(tmp_path: Path) -> None:
    file, form = tmp_path / "m.safetensors", FORM._replace(names=("a",))
    model_files.save(file, made()[1], ABOUT._replace(preprocessing=form), {})
    with pytest.raises(ValueError, match="1 names of 3 outputs"):
        model_files.load(file)


# --- folders of Orbax ----------------------------------------------------------------------------

TREE = {"dense": {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "tree"
    ocp.PyTreeCheckpointer().save(folder, {"params": TREE, "opt": [np.ones(3)]})
    return folder


@settings(max_examples=25)
@given(number=st.integers(0, 100), edit=edits)
def test_any_bytes_of_an_orbax_folder(
    orbax: Path, number: int, edit: tuple[int, bytes, int]
) -> None:
    files = sorted(path for path in orbax.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[number % len(files)]
    whole = path.read_bytes()
    path.write_bytes(edited(whole, edit))
    try:
        with read_or_refused():
            actual = safetensors.fill(TREE, sources.from_orbax(str(orbax), TREE))
            assert actual["dense"]["kernel"].shape == (3, 2)
    finally:
        path.write_bytes(whole)


def test_arrays_of_an_orbax_folder_that_no_file_holds(
    orbax: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    monkeypatch.setattr(sources, "MOST_PACKED", 0)
    with pytest.raises(ValueError, match="its arrays have 11 numbers, its files"):
        sources.from_orbax(str(orbax), TREE)


# --- recipes of merges ---------------------------------------------------------------------------

RECIPES: list[dict[str, Any]] = [
    {"merge_method": "ties", "base_model": BASE, "dtype": "float32",
     "parameters": {"density": 0.5, "weight": [1, 0.5], "normalize": True},
     "models": [{"model": A, "parameters": {"weight": 2}}, {"model": B}]},
    {"merge_method": "slerp", "base_model": A, "models": [{"model": A}, {"model": B}],
     "parameters": {"t": [{"filter": "bias", "value": [0, 1]}, {"value": 0.5}]}},
    {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": A, "layer_range": [0, 2]}]},
        {"sources": [{"model": B, "layer_range": [1, 3], "parameters": {"scale": 2}}]}]},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    for key, inner in inside:
        yield (*at, key)
        yield from places(inner, (*at, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    out = dict(value) if isinstance(value, dict) else list(value)
    out[path[0]] = replaced(value[path[0]], path[1:], new)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate((BASE, A, B)):
        safetensors.save(folder / name, flat(seed))
    return folder


@settings(max_examples=40)
@given(
    recipe=st.sampled_from(RECIPES),
    number=st.integers(0, 100),
    value=values | st.sampled_from(
        [*_recipes.KNOWN, BASE, ["a"], [{"filter": "x"}], [0, 10**5], "gguf", "+",
         "/dev/zero"]),
    edit=st.none() | edits,
)  # fmt: skip
def test_any_recipe_of_a_merge(
    models: Path, recipe: dict[str, Any], number: int, value: Any, edit: Any
) -> None:
    """A recipe is understood, and makes every tensor of its result, or refused."""
    paths = list(places(recipe))
    recipe = replaced(recipe, paths[number % len(paths)], value)
    file = models / "recipe.yaml"
    text = yaml.safe_dump(recipe).encode(errors="surrogatepass")
    file.write_bytes(text if edit is None else edited(text, edit))
    with read_or_refused():
        rewrite = _recipes.merged(Settings(recipe=str(file)))
        for path, spec in list(rewrite.specs.items())[:2]:
            assert rewrite.report.shapes.get(path, spec.shape) == spec.shape


# --- results of finished methods -----------------------------------------------------------------


@settings(max_examples=40)
@given(edit=edits)
def test_any_result_of_a_finished_method(
    tmp_path_factory: pytest.TempPathFactory, edit: tuple[int, bytes, int]
) -> None:
    """It is the result, or the method runs again."""
    folder, expected = tmp_path_factory.mktemp("run"), (np.arange(20.0), {"a": [1, None, "x"]})
    kept = _stored_results.open_store(folder, "r", resume=True, kinds=())
    _stored_results.load_or_run(kept, "kd", lambda: expected)
    path = folder / "finished/kd.npz"
    path.write_bytes(edited(path.read_bytes(), edit))
    with bounded():
        (actual, more), _ = _stored_results.load_or_run(kept, "kd", lambda: expected)
    np.testing.assert_array_equal(actual, expected[0])
    assert more == expected[1]
