"""`kdtl params` writes whole files or none, and refuses what is not a checkpoint."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from params_checkpoints import (
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
from kdtl_jax.cli.params import _checkpoints
from kdtl_jax.cli.params._checkpoints import Rewrite, Writing
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import Report

pytestmark = pytest.mark.usefixtures("checkpoints")


# --- writing -------------------------------------------------------------------------------------


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


def test_a_whole_tensor_has_the_shape_that_was_announced() -> None:
    source = _checkpoints.opened(A, "a model", "")
    rewrite = Rewrite({"w": np.zeros((2, 3))}, lambda path: np.zeros((3, 2)), Report(), [source])
    with pytest.raises(ValueError, match=r"'w' was announced as .*\(2, 3\).*\(3, 2\)"):
        _checkpoints.finish(Writing(write="out.safetensors"), "scale", rewrite)
    assert not Path("out.safetensors").exists()


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


def test_nor_is_what_another_command_has_written_meanwhile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = safetensors.stream

    def meanwhile(path: Path, *args: Any, **named: Any) -> None:
        Path(path).write_text("theirs")
        stream(path, *args, **named)

    monkeypatch.setattr(safetensors, "stream", meanwhile)
    for words in (["scale", A], ["average", A, B], ["slice", A, "--where", "head/.*"]):
        before = sorted({*os.listdir(), "out.safetensors"})
        assert params(*words, *OUT) == 1 and Path("out.safetensors").read_text() == "theirs"
        assert "exists. Name another file, or pass --force" in capsys.readouterr().err
        assert sorted(os.listdir()) == before, "nothing unfinished is left"
        assert params(*words, *OUT, "--force") == 0 and written()
        Path("out.safetensors").unlink()


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


@pytest.mark.parametrize(("signal_", "code"), [(KeyboardInterrupt, 130), (SystemExit(143), 143)])
def test_an_interrupted_write_keeps_the_old_file(
    signal_: Any, code: int, monkeypatch: pytest.MonkeyPatch
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


# --- folders -------------------------------------------------------------------------------------


def model_folder(name: str, seed: int, **config: Any) -> None:
    """A model folder as transformers lays it out."""
    Path(name).mkdir()
    tensors = {k.replace("/", "."): x for k, x in flat(seed).items() if k != "step"}
    safetensors.save(f"{name}/model.safetensors", tensors)
    defaults = {"model_type": "x", "num_hidden_layers": 3, "torch_dtype": "float32"}
    defaults["layer_types"] = ["full", "sliding", "full"]
    Path(name, "config.json").write_text(json.dumps(defaults | config))
    Path(name, "tokenizer.json").write_text(name)
    Path(name, "generation_config.json").write_text("{}")
    Path(name, "README.md").write_text("of the original model")


def config_of(name: str) -> dict[str, Any]:
    return json.loads(Path(name, "config.json").read_text())


def test_a_folder_is_written_with_a_true_configuration_and_a_tokenizer() -> None:
    for seed, name in enumerate(("one", "two")):
        model_folder(name, seed)
    assert params("average", "one", "two", "--write", "out", "--dtype", "bfloat16") == 0
    names = set(os.listdir("out"))
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names
    assert "README.md" not in names and Path("out/tokenizer.json").read_text() == "one"
    assert config_of("out") == config_of("one") | {"torch_dtype": "bfloat16"}
    assert {x.dtype.name for x in written("out").values()} == {"bfloat16"}


def test_a_slice_of_layers_says_so() -> None:
    model_folder("one", 0, eos_token_id=[1, 2, 3])  # three ends, not one per layer
    layers = ("--layers", r"layer_(\d+)\..*", "--keep", "2,0")
    assert params("slice", "one", *layers, "--write", "out") == 0
    assert config_of("out")["eos_token_id"] == [1, 2, 3]
    assert config_of("out")["num_hidden_layers"] == 2
    assert config_of("out")["layer_types"] == ["full", "full"]


def test_another_width_is_no_longer_what_the_configuration_says(capsys: Any) -> None:
    model_folder("one", 0)
    take = ("--take", "head.kernel@1=first:2")
    assert params("slice", "one", *take, "--write", "out") == 0
    assert "no config.json was written" in capsys.readouterr().err
    assert not Path("out/config.json").exists() and Path("out/tokenizer.json").exists()


@pytest.mark.parametrize("where", [[], ["--where", "lm_head.weight"]])
def test_a_tie_that_comes_apart_is_said(where: list[str], capsys: Any) -> None:
    model_folder("one", 0, tie_word_embeddings=True)
    table = flat(0)["layer_0/kernel"]
    tied = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    safetensors.save("one/model.safetensors", tied)
    assert params("scale", "one", "--alpha", "2", *where, "--write", "out") == 0
    assert config_of("out")["tie_word_embeddings"] is not bool(where)
    assert ("no longer tied" in capsys.readouterr().err) == bool(where)


def test_a_tie_that_a_familys_default_says_comes_apart_too() -> None:
    """BERT's config without the key means tied, and its output layer has another name."""
    model_folder("one", 0)
    table = flat(0)["layer_0/kernel"]
    names = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    safetensors.save("one/model.safetensors", dict.fromkeys(names, table))
    assert params("scale", "one", "--alpha", "2", "--where", names[0], "--write", "out") == 0
    assert config_of("out")["tie_word_embeddings"] is False
    assert params("scale", "one", "--alpha", "2", "--write", "both") == 0
    assert "tie_word_embeddings" not in config_of("both")


def test_a_hostile_configuration_is_one_line(capsys: Any) -> None:
    model_folder("one", 0)
    for text in ("[]", "{", '{"a": NaN}', "{" + '"a":1,' * 40_000 + '"a":1}', '{"n_layer": 1e999}'):
        Path("one/config.json").write_text(text)
        code = params("scale", "one", "--write", "out")
        error = capsys.readouterr().err
        assert code == 0 or (len(error.splitlines()) == 1 and "config.json" in error)
        assert code == 1 or text.startswith('{"n')


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

for name, rows in (("small", 8000), ("large", 50_000)):
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
def test_a_checkpoint_passes_through_little_memory() -> None:
    """200 MB in one tensor; the peak of resident memory grows by less than half of it."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    grown = dict(
        line.split() for line in done.stdout.splitlines() if line[:5] in ("scale", "avera")
    )
    assert set(grown) == {"scale", "average"}
    assert all(int(value) < 100e6 for value in grown.values()), grown
