"""`kdtl params`: every action against the library on whole trees, and what it does to bad input."""

import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import cli, transforms
from kdtl_jax.cli import main
from kdtl_jax.cli.params import _rewrite, _ties
from kdtl_jax.cli.params._methods import METHODS, Members, Options
from kdtl_jax.interop import safetensors

Flat = dict[str, Any]


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


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with three models; tensors pass in pieces of five numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_rewrite, "BLOCK", 5)
    for seed, name in enumerate(("base", "a", "b")):
        safetensors.save(f"{name}.safetensors", flat(seed), metadata={"format": "np"})
    yield tmp_path


def params(*words: str) -> int:
    return main(["params", *words])


def written(path: str = "out.safetensors") -> Flat:
    return {name: np.array(x) for name, x in safetensors.load(path).items()}


def assert_same(got: Flat, want: Flat, rtol: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (np.shape(array), array.dtype), name
        if rtol:
            np.testing.assert_allclose(got[name], array, rtol=rtol, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], array, err_msg=name)


A, B, BASE = "a.safetensors", "b.safetensors", "base.safetensors"
OUT = ("--write", "out.safetensors")

# --- reading -------------------------------------------------------------------------------------


def test_inspect_lists_shapes_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "w": np.array([1, 2, 3, np.nan, -np.inf, 0], np.float32),
        "tied": np.full(7, 2, jnp.bfloat16),
        "embed": np.full(7, 2, jnp.bfloat16),
        **{f"block/{i}/w": np.zeros((2, 3), np.float16) for i in range(12)},
    }
    safetensors.save("w.safetensors", tensors)
    assert params("inspect", "w.safetensors") == 0
    text = capsys.readouterr().out
    assert "15 tensors, 92 numbers" in text and "block/{0..11}/w  F16   [2, 3]" in text
    assert params("inspect", "w.safetensors", "--values", "--except", "block/.*") == 0
    text = capsys.readouterr().out
    assert "mean 1.5, std 1.118, in [0, 3], 1 zeros, 2 NaN or infinite" in text
    assert "equal, perhaps tied: embed, tied" in text and "block" not in text


def test_what_cannot_be_loaded_is_listed_but_not_changed(capsys: Any) -> None:
    header = {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    Path("w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    assert params("inspect", "w.safetensors", "--values") == 0
    assert "8-bit float, not read" in capsys.readouterr().out
    assert params("scale", "w.safetensors") == 1
    assert "Dequantize it to BF16" in capsys.readouterr().err


def test_diff_names_every_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert params("diff", A, A, "--exit-code") == 0
    changed = flat(1)
    changed["head/kernel"] = np.zeros((4, 2), np.float32)
    changed["layer_0/bias"] = changed["layer_0/bias"].astype(np.float16)
    changed["layer_1/bias"][2] += 0.5
    changed["layer_2/bias"][:] = np.nan
    changed["new"] = changed.pop("layer_2/kernel")
    safetensors.save("c.safetensors", changed)
    capsys.readouterr()
    assert params("diff", A, "c.safetensors", "--exit-code") == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {(row[0], row[1]) for row in rows[:-1]} == {
        ("only", "in"),
        ("shape", "head/kernel"),
        ("dtype", "layer_0/bias"),
        ("values", "layer_1/bias"),
        ("values", "layer_2/bias"),
    }
    by_name = {row[1]: " ".join(row) for row in rows[:-1]}
    assert "1 of 4 entries, largest 0.5" in by_name["layer_1/bias"]
    assert "4 of 4 entries, largest nan" in by_name["layer_2/bias"]
    assert " ".join(rows[-1]) == "6 of 9 tensors differ"


# --- one model -----------------------------------------------------------------------------------


def test_scale_is_the_librarys() -> None:
    assert params("scale", A, "--alpha", "0.3", *OUT) == 0
    assert_same(written(), native(transforms.scale(flat(1), 0.3)))
    where = ("--where", "glob:**/kernel", "--except", "head/.*", "--rule", "layer_0/.*=2")
    assert params("scale", A, "--alpha", "0.3", *where, *OUT, "--force") == 0
    rules = [("layer_0/kernel", 2.0), ("layer_./kernel", 0.3)]
    assert_same(written(), native(transforms.scale(flat(1), rules)))


def native(tree: Flat) -> Flat:
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_and_names_are_kept(dtype: str) -> None:
    tensors = {"w/value": np.array([1 / 3, 2, -5], jnp.dtype(dtype)), "n": np.arange(3)}
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    safetensors.stream("w.safetensors", specs, tensors.__getitem__)
    assert params("scale", "w.safetensors", "--alpha", "3", *OUT) == 0
    wide = np.float64 if dtype == "float64" else np.float32
    tripled = (tensors["w/value"].astype(wide) * wide(3)).astype(tensors["w/value"].dtype)
    got = safetensors.index("out.safetensors").tensors
    assert set(got) == {"w/value", "n"}
    np.testing.assert_array_equal(safetensors.read(got["w/value"]), tripled)
    assert safetensors.read(got["w/value"]).dtype == jnp.dtype(dtype)


def test_transfer_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    source = {f"encoder/{name}": x for name, x in flat(1, width=6).items()}
    target = flat(5, layers=2, dtype="float16") | {"rngs/key": np.array([7, 9], np.uint32)}
    safetensors.save("source.safetensors", source)
    safetensors.save("target.safetensors", target)
    words = ["transfer", "source.safetensors", "target.safetensors", "--on-mismatch", "uniform"]
    words += ["--rename", r"encoder/(.*)=>\1", "--drop", "encoder/layer_2/.*", "--alpha", "0.5"]
    words += ["--policy", "head/.*=crop", "--rule", "layer_1/bias=2"]
    assert params(*words, *OUT) == 0
    want, report = transforms.transfer(
        source,
        target,
        rename=[("encoder/layer_2/.*", None), (r"encoder/(.*)", r"\1")],
        alpha=[("layer_1/bias", 2.0), (".*", 0.5)],
        on_mismatch=[("head/.*", transforms.crop), (".*", transforms.select_uniform)],
    )
    assert_same(written(), want)
    assert str(report) in capsys.readouterr().out
    assert written()["rngs/key"].tolist() == [7, 9]  # counters and keys stay the target's


BAD_TRANSFERS = {
    "missing": (
        ["--drop", "head/.*"],
        r"lacks 1 leaves .*\(--rename, or --on-missing keep to .*head/kernel .*nearest",
    ),
    "extra": (
        ["--rename", "head/.*=>hed"],
        r"has no place for 1 .*\(--rename, --drop, --where, or --on-extra ignore to ",
    ),
    "misshapen": (
        ["--rename", "head/kernel=>layer_0/bias", "--drop", "layer_0/bias"],
        r"does not fit .* Pass --on-mismatch keep, crop, ",
    ),
    "unused rule": (["--rename", "hed/(.*)=>x"], "matches no path"),
    "cycle": (
        ["--rename", r"layer_0/(.*)=>layer_1/\1", "--rename", r"layer_1/(.*)=>layer_0/\1"],
        "cycle",
    ),
    "two into one": (
        ["--rename", "layer_0/bias=>x", "--rename", "head/.*=>x"],
        "sends both .* or drop it with --drop",
    ),
    "misspelt": (
        ["--where", "glob:hed/*"],
        "selector 'glob:hed/.' matches .*Nearest paths: 'head/kernel'.* 'glob:",
    ),
    "unused policy": (["--policy", "hed/.*=crop"], "labels no leaf"),
}


@pytest.mark.parametrize("name", BAD_TRANSFERS)
def test_bad_transfers_fail_in_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, says = BAD_TRANSFERS[name]
    before = sorted(os.listdir())
    assert params("transfer", A, B, *words, *OUT) == 1
    error = capsys.readouterr().err
    assert error.startswith("kdtl params transfer: ") and "Traceback" not in error
    assert re.search(says, error.replace("\n", " ")), error
    assert sorted(os.listdir()) == before


def test_a_tied_head_that_the_source_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    tied = {name: x for name, x in flat(1).items() if name != "head/kernel"}
    safetensors.save("tied.safetensors", tied)
    assert params("transfer", "tied.safetensors", A) == 1
    assert "head/kernel" in capsys.readouterr().err
    assert params("transfer", "tied.safetensors", B, "--on-missing", "keep", *OUT) == 0
    np.testing.assert_array_equal(written()["head/kernel"], flat(2)["head/kernel"])
    assert "missing  head/kernel" in capsys.readouterr().out


def test_nan_is_reported_by_path(capsys: pytest.CaptureFixture[str]) -> None:
    broken = flat(1)
    broken["layer_1/kernel"][3, 3] = np.nan
    safetensors.save("nan.safetensors", broken)
    assert params("scale", "nan.safetensors", "--alpha", "2", *OUT) == 0
    assert capsys.readouterr().err == "warning: layer_1/kernel holds NaN or infinity\n"


def test_slice_takes_layers_units_and_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    layers = (r"--layers", r"layer_(\d+)/.*", "--keep", "2,0")
    takes = ("--take", "head/kernel@0=uniform:2", "--take", "head/kernel@-1=1..2")
    assert params("slice", A, *layers, *takes, *OUT) == 0
    model = flat(1)
    want = {f"layer_{new}/{x}": model[f"layer_{old}/{x}"] for new, old in [(0, 2), (1, 0)]
            for x in ("bias", "kernel")}  # fmt: skip
    want |= {"head/kernel": model["head/kernel"][[0, 2]][:, 1:3], "step": model["step"]}
    assert_same(written(), want)
    assert "adapted  head/kernel" in capsys.readouterr().out
    assert params("slice", A, "--where", "head/.*", "--write", "head.safetensors") == 0
    assert_same(written("head.safetensors"), {"head/kernel": model["head/kernel"]})


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "say what to keep"),
        (["--layers", "layer_.*"], 2, "belong together"),
        (["--layers", r"layer_(\d)/.*", "--keep", "1,3"], 1, r"\[3\]; there are \[0, 1, 2\]"),
        (["--take", "head/kernel@2=0"], 1, "has no axis 2"),
        (["--take", "head/kernel@0=uniform:9"], 1, r"1\.\.4"),
        (["--take", "head/kernel@0=3,4"], 1, r"indices 0\.\.3"),
        (["--take", "head/kernel=0"], 2, "SELECTOR@AXIS=WHICH"),
        (["--take", "head/kernel@0=last:2"], 2, "first or uniform"),
    ],
)
def test_bad_slices(words: list[str], code: int, says: str, capsys: Any) -> None:
    assert params("slice", A, *words, *OUT) == code
    assert re.search(says, capsys.readouterr().err)
    assert not Path("out.safetensors").exists()


# --- several models ------------------------------------------------------------------------------

NEEDED = {
    "interpolate": ["--t", "0.3"],
    "slerp": ["--t", "0.3", "--axis", "-2"],
    "near_swap": ["--t", "0.4"],
    **dict.fromkeys(["dare", "dare_ties", "breadcrumbs", "sce"], ["--density", "0.5"]),
    "della": ["--density", "0.5", "--epsilon", "0.2", "--seed", "3"],
    "task_arithmetic": ["--weights", "0.5,2", "--scale", "0.7"],
    "linear": ["--weights", "1,3"],
}


def statistics(seed: int, *, grams: bool) -> Flat:
    rng = np.random.default_rng(10 + seed)
    if grams:
        x = rng.normal(size=(9, 4)).astype(np.float32)
        return {"layer_1/kernel": x.T @ x}
    return {
        n: rng.uniform(size=x.shape).astype(np.float32)
        for n, x in flat(seed).items()
        if n != "step"
    }


@pytest.mark.parametrize("name", METHODS)
def test_merging_tensor_by_tensor_is_merging_whole_models(name: str) -> None:
    method, extra = METHODS[name], list(NEEDED.get(name, []))
    files = [A, B][: method.most or 2]
    options = Options(
        weights={"task_arithmetic": [0.5, 2.0], "linear": [1.0, 3.0]}.get(name),
        scale=0.7 if name == "task_arithmetic" else 1.0,
        density=0.5 if "--density" in extra else 0.2,
        epsilon=0.2 if name == "della" else 0.15,
        t=0.4 if name == "near_swap" else 0.3,
        axis=-2 if name == "slerp" else None,
        seed=3 if name == "della" else 0,
    )
    data: list[Flat] = []
    for i in range(len(files) if method.has_statistics else 0):
        data.append(statistics(i, grams=name == "regmean"))
        safetensors.save(f"s{i}.safetensors", data[-1])
        extra += ["--statistics", f"s{i}.safetensors"]
    base = ["--base", BASE] if method.has_base else []
    if name == "ties":
        extra += ["--scope", "tensor"]
    assert params("merge", *files, "--method", name, *base, *extra, *OUT) == 0
    trees = [flat(seed + 1) for seed in range(len(files))]
    if name == "fisher":
        trees = [drop_step(tree) for tree in trees]
    first = flat(0) if method.has_base else flat(1)
    want = method.merge(Members(first, trees, data), options)
    assert_same(drop_step(written()), drop_step(native(want)), rtol=1e-5)
    assert written()["step"] == first["step"]


def drop_step(tree: Flat) -> Flat:
    return {name: x for name, x in tree.items() if name != "step"}


@pytest.mark.parametrize("density", [0.0, 0.3, 0.77, 1.0])
def test_ties_of_whole_models_is_the_librarys(density: float) -> None:
    """Thresholds by histogram keep what sorting keeps, equal magnitudes in the same order."""
    words = ["--method", "ties", "--base", BASE, "--density", str(density), "--weights", "1,0.5"]
    assert params("merge", A, B, *words, *OUT) == 0
    base = flat(0)
    taus = [transforms.task_vector(flat(seed), base) for seed in (1, 2)]
    merged = transforms.ties(taus, [1.0, 0.5], density=density)
    assert_same(written(), native(transforms.apply_task_vectors(base, [merged])), rtol=1e-6)


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 2e-45, math.inf, -math.inf, math.nan])
        | st.floats(width=32),
        min_size=1,
        max_size=40,
    ),
    density=st.floats(0, 1),
    cuts=st.lists(st.integers(0, 40), max_size=3),
)
def test_any_entries_are_trimmed_as_by_a_stable_sort(
    values: list[float], density: float, cuts: list[int]
) -> None:
    whole = np.array(values, np.float32)
    bounds = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    tensors = {f"t{i}": whole[a:b] for i, (a, b) in enumerate(pairwise(bounds))}

    def taus(path: str) -> Iterator[list[np.ndarray]]:
        for start in range(0, len(tensors[path]), 3):
            yield [tensors[path][start : start + 3]]

    trim = _ties.measure(list(tensors)[::-1], taus, 1, len(values), density)
    got = []
    for path in tensors:
        seen = trim.before[path].copy()
        got += [_ties.trimmed(trim, piece[0], 0, seen) for piece in taus(path)]
    want = np.zeros_like(whole)
    kept = np.argsort(-np.abs(whole), kind="stable")[: math.floor(density * len(values))]
    want[kept] = whole[kept]
    np.testing.assert_array_equal(np.concatenate(got), want)
    signs = np.sign(want)
    assert trim.majority == (1 if (signs > 0).sum() >= (signs < 0).sum() else -1)


def test_average_weighs_and_leaves_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert params("average", A, B, "--weights", "3,1", "--where", "layer_./kernel", *OUT) == 0
    a, b, got = flat(1), flat(2), written()
    for name, array in a.items():
        want = (3 * array + b[name]) / 4 if "layer" in name and "kernel" in name else array
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    text = capsys.readouterr().out
    assert "merged  layer_{0..2}/kernel" in text and "kept    head/kernel" in text


def test_models_that_differ_stop_the_merge_or_keep_the_base(capsys: Any) -> None:
    other = flat(2) | {"head/kernel": np.ones((4, 5), np.float32), "extra": np.ones(1)}
    del other["layer_0/bias"]
    safetensors.save("other.safetensors", other)
    assert params("average", A, "other.safetensors", *OUT) == 1
    error = capsys.readouterr().err
    for part in ("lacks 'layer_0/bias'", "'extra'", "[4, 3]", "--on-mismatch keep"):
        assert part in error
    assert params("average", A, "other.safetensors", "--on-mismatch", "keep", *OUT) == 0
    text = capsys.readouterr().out
    for part in ("missing  layer_0/bias", "extra    extra", "is [4, 5] elsewhere"):
        assert part in text
    np.testing.assert_array_equal(written()["layer_0/bias"], flat(1)["layer_0/bias"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge"], "name MODELS, for example: kdtl params merge"),
        (["merge", A, "--method", "ties"], "needs --base"),
        (["merge", A, "--base", B], "has no --base"),
        (["merge", A, B, "--method", "slerp"], "needs --t"),
        (["merge", A, B, "--density", "0.5"], "does not read --density; it reads --weights"),
        (["merge", A, "--method", "slerp", "--t", "1"], "needs 2 models, got 1"),
        (["merge", A, B, "--weights", "1,2,3"], "expected 2, one per model, got 3"),
        (["average", A, B, "--weights", "1,-1"], "their sum, a divisor, is 0"),
        (["merge", A, B, "--method", "fisher"], "one --statistics per model"),
        (["scale", A, "--rule", "head"], "expected SELECTOR=VALUE"),
        (["scale", A, "--rule", "head/.*=x"], "'x' is no value"),
        (["transfer", A, B, "--rename", "a"], "REGEX=>REPLACEMENT"),
        (["scale"], "name SOURCE"),
        (["scale", A, "--alpa", "2"], "did you mean --alpha"),
        (["shrink"], "invalid choice: 'shrink'"),
        ([], "ACTION"),
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], says: str, capsys: Any) -> None:
    assert params(*words) == 2
    assert says in capsys.readouterr().err


# --- adapters ------------------------------------------------------------------------------------


def pair(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)


def test_lora_weights_of_the_library_are_merged() -> None:
    a, b = pair()
    safetensors.save("lora.safetensors", {"head/kernel": {"a": a, "b": b}})
    words = ("lora-merge", A, "lora.safetensors", "--alpha", "6", "--weight", "0.5")
    assert params(*words, *OUT) == 0
    want = flat(1)
    want["head/kernel"] = want["head/kernel"] + np.float32(0.5 * 6 / 2) * (a @ b)
    assert_same(written(), want, rtol=1e-5)
    assert params(*words, "--scaling", "root-rank", *OUT, "--force") == 0
    want["head/kernel"] = flat(1)["head/kernel"] + np.float32(0.5 * 6 / math.sqrt(2)) * (a @ b)
    assert_same(written(), want, rtol=1e-5)


@pytest.mark.parametrize("is_dora", [False, True])
def test_peft_folders_are_merged_as_they_say(is_dora: bool) -> None:
    a, b = pair()
    kernel = flat(1)["head/kernel"].T.copy()  # torch: [out, in]
    safetensors.save("torch.safetensors", {"model.head.weight": kernel})
    Path("adapter").mkdir()
    prefix = "base_model.model.model.head.lora_"
    tensors = {f"{prefix}A.weight": a.T.copy(), f"{prefix}B.weight": b.T.copy()}
    length = np.array([1.0, 2.0, 3.0], np.float32)
    if is_dora:
        tensors[f"{prefix}magnitude_vector"] = length
    safetensors.save("adapter/adapter_model.safetensors", tensors)
    config = {"lora_alpha": 8, "r": 2, "use_rslora": True, "alpha_pattern": {}}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    assert params("lora-merge", "torch.safetensors", "adapter", *OUT) == 0
    want = kernel + np.float32(8 / math.sqrt(2)) * (a @ b).T
    if is_dora:
        want = length[:, None] * want / np.linalg.norm(want, axis=1, keepdims=True)
    assert_same(written(), {"model.head.weight": want}, rtol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"head/kernel/a": (4, 2), "head/kernel/b": (2, 3)}, None, "pass --alpha"),
        ({"head/kernel/a": (4, 2)}, None, "has ['a'], not a and b"),
        ({"hed/kernel/a": (4, 2), "hed/kernel/b": (2, 3)}, None, "nearest: ['head/kernel'"),
        ({"head/kernel/a": (5, 2), "head/kernel/b": (2, 3)}, {}, "does not fit: kernel [4, 3]"),
        ({"head/kernel/c": (4, 2)}, None, "is no part of a LoRA"),
    ],
)
def test_bad_adapters(tensors: Any, config: Any, says: str, capsys: Any) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    safetensors.save("lora.safetensors", arrays)
    alpha = [] if config is None else ["--alpha", "1"]
    assert params("lora-merge", A, "lora.safetensors", *alpha, *OUT) in (1, 2)
    assert says in capsys.readouterr().err


# --- writing -------------------------------------------------------------------------------------

EVERY = {
    "scale": ["scale", A, "--alpha", "2"],
    "transfer": ["transfer", A, B],
    "slice": ["slice", A, "--where", "head/.*"],
    "average": ["average", A, B],
    "merge": ["merge", A, B, "--method", "ties", "--base", BASE],
    "inspect": ["inspect", A, "--values"],
    "diff": ["diff", A, B],
}


@pytest.mark.parametrize("name", EVERY)
def test_a_dry_run_writes_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: Path(path).read_bytes() for path in os.listdir()}
    assert params(*EVERY[name]) == 0
    assert {path: Path(path).read_bytes() for path in os.listdir()} == before
    assert ("dry run" in capsys.readouterr().out) == (name not in ("inspect", "diff"))


def test_the_recipe_is_in_the_metadata() -> None:
    assert params("scale", A, "--alpha", "2", "--where", "head/.*", *OUT) == 0
    assert params("average", "out.safetensors", B, "--write", "c.safetensors") == 0
    metadata = safetensors.index("c.safetensors").metadata
    assert metadata["format"] == "np"
    recipe = json.loads(metadata["kdtl_recipe"])
    assert recipe["command"] == "kdtl params average"
    assert recipe["options"]["models"] == ["out.safetensors", B]
    assert [x["file"] for x in recipe["inputs"]] == ["out.safetensors", B]
    assert all(len(x["sha256"]) == 64 and x["bytes"] > 0 for x in recipe["inputs"])
    before = recipe["before"]
    assert before["options"] == {"source": A, "alpha": 2.0, "where": ["head/.*"]}


def test_a_foreign_recipe_is_kept_as_text() -> None:
    safetensors.save("f.safetensors", {"w": np.ones(1, np.float32)}, metadata={"kdtl_recipe": "{"})
    assert params("scale", "f.safetensors", "--skip-sha256", *OUT) == 0
    recipe = json.loads(safetensors.index("out.safetensors").metadata["kdtl_recipe"])
    assert recipe["before"] == "{" and set(recipe["inputs"][0]) == {"file", "bytes"}


def test_shards_in_and_out() -> None:
    assert params("scale", A, "--alpha", "2", "--write", "shards", "--shard-bytes", "100") == 0
    assert len(safetensors.index("shards").files) > 3
    assert params("scale", "shards", "--alpha", "0.5", *OUT) == 0
    assert_same(written(), flat(1))
    assert params("diff", "shards/model.safetensors.index.json", "shards", "--exit-code") == 0


def test_nothing_is_overwritten_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(A).read_bytes()
    assert params("scale", A, "--alpha", "2", "--write", A) == 1
    assert "pass --force" in capsys.readouterr().err and Path(A).read_bytes() == before
    assert params("scale", A, "--alpha", "2", "--write", A, "--force") == 0  # in place
    assert_same(written(A), native(transforms.scale(flat(1), 2.0)))
    Path("full").mkdir()
    Path("full/x").touch()
    for out in ("full", "nowhere/out.safetensors"):
        assert params("scale", A, "--write", out) == 1
        assert out in capsys.readouterr().err


def test_a_write_error_keeps_the_old_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert params("scale", A, *OUT) == 0
    before, listing = Path("out.safetensors").read_bytes(), sorted(os.listdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the system refuses every byte beyond the limit, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 50, hard))
        code = params("scale", B, *OUT, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert code == 1 and "out.safetensors: File too large" in capsys.readouterr().err
    assert Path("out.safetensors").read_bytes() == before and sorted(os.listdir()) == listing


@pytest.mark.parametrize(("signal_", "code"), [(KeyboardInterrupt, 130), (cli.Terminated, 143)])
def test_an_interrupted_write_keeps_the_old_file(
    signal_: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert params("scale", A, *OUT) == 0
    before, listing = Path("out.safetensors").read_bytes(), sorted(os.listdir())
    blocks = safetensors.blocks

    def interrupted(tensor: safetensors.Tensor, size: int) -> Iterator[np.ndarray]:
        if tensor.start > 200:
            raise signal_
        return blocks(tensor, size)

    monkeypatch.setattr(safetensors, "blocks", interrupted)
    assert params("scale", B, *OUT, "--force") == code
    assert Path("out.safetensors").read_bytes() == before and sorted(os.listdir()) == listing


BAD_FILES = {
    "pickle": (pickle.dumps({"a": 1}), "a pickle"),
    "truncated": (b"\x40\0\0\0\0\0\0\0{", "truncated"),
    "empty": (b"", "empty or truncated"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("command", EVERY)
def test_bad_files_are_refused_by_every_action(name: str, command: str, capsys: Any) -> None:
    content, says = BAD_FILES[name]
    Path(A).write_bytes(content)
    out = [] if command in ("inspect", "diff") else [*OUT]
    assert params(*EVERY[command], *out) == 1
    assert says in capsys.readouterr().err and not Path("out.safetensors").exists()


def test_an_index_that_escapes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    index = {"weight_map": {"step": "../a.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    assert params("scale", "model", *OUT) == 1
    assert "may only name files beside it" in capsys.readouterr().err


# --- configuration -------------------------------------------------------------------------------


def test_a_configuration_file_is_the_same_as_flags(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", A, B, "--method", "ties", "--base", BASE, "--weights", "1,2"]
    words += ["--except", "head/.*", "--except", "layer_0/bias", *OUT]
    assert params(*words, "--print-config") == 0
    text = capsys.readouterr().out
    assert not Path("out.safetensors").exists()
    Path("c.yaml").write_text(text)
    assert params("merge", "--config", "c.yaml", "--print-config") == 0
    assert capsys.readouterr().out == text
    assert params("merge", "--config", "c.yaml") == 0
    by_file = written()
    assert params(*words, "--force") == 0
    assert_same(written(), by_file)
    capsys.readouterr()
    # A flag replaces the file's list.
    assert params("merge", "--config", "c.yaml", "--except", "step", "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["except"] == ["step"]


def test_unknown_keys_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("alpa: 2\n")
    assert params("scale", A, "--config", "c.yaml") == 2
    assert "did you mean alpha" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*EVERY, "lora-merge"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert params(name, "--help") == 0
    text = capsys.readouterr().out
    assert f"Example: kdtl params {name}" in text and "'glob:'" in text


# --- memory --------------------------------------------------------------------------------------

GROWTH = """
import sys
import jax
import numpy as np
from kdtl_jax.cli import main
from kdtl_jax.interop import safetensors

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

def checkpoint(name, rows):
    specs = {"w": jax.ShapeDtypeStruct((rows, 1000), np.float32)}
    block = np.ones(1_000_000, np.float32)
    safetensors.stream(name, specs, lambda _: iter([block] * (rows // 1000)))

for name, rows in (("small", 1000), ("large", 50_000)):
    checkpoint(f"{name}.safetensors", rows)
for words in (["scale", "{}.safetensors"], ["average", "{}.safetensors", "{}.safetensors"]):
    before = None
    for name in ("small", "large"):
        call = [word.format(name) for word in words]
        write = ["--write", "out.safetensors", "--force", "--skip-sha256"]
        assert main(["params", *call, *write]) == 0
        before = before or peak()
    print(words[0], peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_checkpoint_passes_through_little_memory(folder: Path) -> None:
    """200 MB in one tensor; the peak of resident memory grows by less than half of it."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    grown = dict(
        line.split() for line in done.stdout.splitlines() if line[:5] in ("scale", "avera")
    )
    assert set(grown) == {"scale", "average"}
    assert all(int(value) < 100e6 for value in grown.values()), grown
