"""`kdtl params` on one model, against the library on whole trees; usage and configuration."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from params_checkpoints import (
    BASE,
    EVERY,
    OUT,
    A,
    B,
    assert_same,
    flat,
    native,
    params,
    written,
)

from kdtl_jax import transforms
from kdtl_jax.interop import safetensors

pytestmark = pytest.mark.usefixtures("checkpoints")


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


# --- usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge"], "name MODELS, for example: kdtl params merge"),
        (["merge"], "--density 0.2 --write merged.safetensors\n"),
        (["merge", A, "--recipe", "r.yaml"], "--recipe says everything; leave out MODELS"),
        (["merge", A, B, "--write", ""], "--write: expected text, got ''"),
        (["scale", A, "--alpha", "-x"], "--alpha: expected one argument"),
        (["merge", A, "--method", "ties"], "needs --base"),
        (["merge", A, "--base", B], "has no --base"),
        (["merge", A, B, "--method", "slerp"], "needs --t"),
        (["merge", A, B, "--density", "0.5"], "does not read --density; it reads --weights"),
        (["merge", A, "--method", "slerp", "--t", "1"], "needs 2 models, got 1"),
        (["merge", A, B, "--weights", "1,2,3"], "expected 2, one per model, got 3"),
        (["average", A, B, "--weights", "1,-1"], "their sum, a divisor, is 0"),
        (["merge", A, B, "--method", "fisher"], "one --statistics per model"),
        (["scale", A, "--rule", "head"], "expected SELECTOR=VALUE"),
        (["scale", A, "--rule", "head/.*=x"], "'x' is not a value"),
        (["transfer", A, B, "--rename", "a"], "REGEX=>NAME"),
        (["scale"], "name SOURCE"),
        (["scale", A, "--alpa", "2"], "did you mean --alpha"),
        (["shrink"], "unknown command 'params shrink'"),
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], says: str, capsys: Any) -> None:
    assert params(*words) == 2
    assert says in capsys.readouterr().err


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
    assert f"kdtl params {name}" in text and "'glob:'" in text


def test_names_of_others_say_nothing_to_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a\x1b[2J\nb", "x" * 100_000, "c"]
    for file, value in (("a", 1), ("b", 2)):
        tensors = {name: np.full(2, value, np.float32) for name in names}
        metadata = {"k\x1b[2J": "v\x1b[2J" + "w" * 100_000}
        safetensors.save(f"{file}.safetensors", tensors, metadata=metadata)
    for words in (("inspect", A), ("inspect", A, "--values"), ("diff", A, B), ("average", A, B)):
        assert params(*words) == 0
        output = capsys.readouterr()
        for line in (output.out + output.err).split("\n"):
            assert line.isprintable() and len(line) < 12_000
        assert "a\\x1b[2J\\nb" in output.out


def test_names_that_print_alike_are_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["x" * 300 + "a", "x" * 300 + "b", "y\n", "y\\n"]
    for file, value in (("a", 1), ("b", 2)):
        safetensors.save(f"{file}.safetensors", {n: np.full(2, value, np.float32) for n in names})
    assert params("diff", A, B) == 0
    assert "4 of 4 tensors differ" in capsys.readouterr().out
