"""`kdtl cache`: what it writes, what it says, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses
from kdtl_jax._types import Variables
from kdtl_jax.cli import main
from kdtl_jax.datasets import Splits, digits, standardizer, stratified
from kdtl_jax.interop import model_files, networks, safetensors
from kdtl_jax.recipes import _caching, _models, _pair
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import teacher_cache

pytestmark = pytest.mark.usefixtures("standard_promotion")

TEACHER = "mlp:6"
TRAIN = stratified(digits(), validation=0.2, test=0.3).train
INPUTS = standardizer(TRAIN).apply(TRAIN).inputs
NET = networks.network(_models.module(TEACHER, 10), jnp.asarray(INPUTS[:1]))
MADE_OF: Any = {"model": TEACHER, "classes": tuple(map(str, range(10)))}
init = jax.jit(NET.init)
VARIABLES: Variables = init(jax.random.key(0), INPUTS[:1])
LIVE = jax.tree.map(np.asarray, jax.jit(NET.apply)(VARIABLES.params, None, INPUTS)[0])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return _saved(tmp_path / "teacher.safetensors", VARIABLES)


def _saved(path: Path, variables: Variables) -> Path:
    safetensors.save(path, jax.tree.map(np.asarray, model_files.tree(variables)))
    return path


def _cache(folder: Path, weights: Path, *more: str) -> int:
    named = ["--teacher", TEACHER, "--teacher-weights", str(weights), "--out", str(folder)]
    return main(["cache", *named, *more])


def test_the_cache_holds_what_the_teacher_gives(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --taps all, exactly what `kdtl distill --teacher-cache` asks for."""
    folder = tmp_path / "cache"
    assert _cache(folder, weights, "--taps", "all") == 0
    output = capsys.readouterr()
    right = 100 * np.mean(np.argmax(LIVE["logits"], axis=-1) == TRAIN.labels)
    assert f"teacher: {right:.1f}% of these examples right" in output.out
    assert f"{len(INPUTS):,} of {len(INPUTS):,} examples" in output.err
    taps = sorted(networks.output_shapes(NET, INPUTS[:1]))
    expect = teacher_cache.fingerprint(VARIABLES, {"inputs": INPUTS}, taps=taps, **MADE_OF)
    actual = teacher_cache.load(teacher_cache.open_cache(folder, expect=expect))
    assert set(actual) == set(LIVE) == {"logits", "hidden_0", "dense_0"}
    for tap, values in actual.items():
        np.testing.assert_allclose(values, LIVE[tap], atol=1e-5)

    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    assert _cache(folder, weights, "--taps", "all") == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


def test_int8_and_top_k_state_their_fidelity(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    more = ("--precision", "int8", "--top-k", "3", "--dtype", "float16", "--temperature", "2")
    assert _cache(folder, weights, *more) == 0
    output = capsys.readouterr().out
    assert f"int8 against float32 on {len(INPUTS)} examples: same class in 9" in output
    assert "logits as the 3 most likely classes at temperature 2.0" in output
    cache = teacher_cache.open_cache(folder, expect=None)
    assert cache.plan.fingerprint.preprocessing == {"precision": "int8"}
    assert cache.plan.fingerprint.teacher == teacher_cache.digest(VARIABLES)
    cut = teacher_cache.load(cache)["logits"]
    want = losses.top_k_targets(jnp.asarray(LIVE["logits"]), k=3, temperature=2.0)
    error = np.abs(cut.log_probs - np.asarray(want.log_probs))
    assert 0.001 < error.max() < 0.1, "int8 is close to the teacher, and was used"


def test_damage_is_found_and_mended(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    verify = ["cache", "--out", str(folder), "--verify"]
    assert main(verify) == 1 and "no teacher cache in" in capsys.readouterr().err
    assert _cache(folder, weights) == 0
    with_weights = [*verify, "--teacher", TEACHER, "--teacher-weights", str(weights)]
    assert main(with_weights) == 0
    assert "as it was written, made by these weights from these data" in capsys.readouterr().out
    (victim,) = folder.glob("*.bin")
    whole = victim.read_bytes()
    _damage(victim)
    assert main(verify) == 1
    assert f"damaged: {victim.name} was altered" in capsys.readouterr().err
    assert _cache(folder, weights) == 0 and main(verify) == 0
    assert victim.read_bytes() == whole


def test_what_does_not_fit_is_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    assert _cache(folder, weights) == 0
    other = _saved(tmp_path / "other.safetensors", init(jax.random.key(1), INPUTS[:1]))
    capsys.readouterr()
    refused = {
        "teacher weights differ": _cache(folder, other),
        "data differ": _cache(folder, weights, "--split-seed", "1"),
        "number of examples differs": _cache(folder, weights, "--validation", "0.3"),
        "logits differ: dense in the cache": _cache(folder, weights, "--top-k", "2"),
        "no output 'hidden_1'. Nearest: 'hidden_0'": _cache(
            tmp_path / "a", weights, "--taps", "hidden_1"
        ),
        "'dense_0/kernel' is [64, 6], expected [64, 7]": _cache(
            tmp_path / "b", weights, "--teacher", "mlp:7"
        ),
        "no such file": _cache(tmp_path / "c", tmp_path / "nowhere.safetensors"),
    }
    errors = capsys.readouterr().err
    for message, code in refused.items():
        assert code == 1 and message in errors, message
    assert main(["cache", "--out", str(tmp_path / "d")]) == 2
    assert "--teacher-weights: name the teacher's safetensors file" in capsys.readouterr().err
    assert _cache(tmp_path / "e", weights, "--batch-size", "0") == 2
    assert _cache(tmp_path / "e", weights, "--taps", ",") == 2
    assert _cache(tmp_path / "e", weights, "--temperature", "4") == 2
    assert "--temperature needs --top-k" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_distillation_reads_a_cache_of_any_precision_and_fills_an_empty_one(
    tmp_path: Path, weights: Path
) -> None:
    few = TRAIN._replace(inputs=INPUTS)
    arrays = {"inputs": INPUTS}
    pair: Any = SimpleNamespace(
        teacher=NET,
        teacher_text=TEACHER,
        arrays=arrays,
        splits=Splits(few, few, few),
        example=INPUTS[:1],
    )

    def outputs(folder: str, frozen: Variables = VARIABLES) -> Any:
        return _caching.outputs(tmp_path / folder, pair, frozen, "float32", sorted(LIVE))

    assert _cache(tmp_path / "half", weights, "--taps", "all", "--dtype", "bfloat16") == 0
    before = sorted(tmp_path.glob("half/*")), (tmp_path / "half/plan.json").read_bytes()
    half = outputs("half")
    assert before == (sorted(tmp_path.glob("half/*")), (tmp_path / "half/plan.json").read_bytes())
    full = outputs("full")
    assert set(half) == set(full) == set(LIVE)
    for tap, want in LIVE.items():
        np.testing.assert_allclose(full[tap], want, atol=1e-5)
        np.testing.assert_allclose(half[tap], want, rtol=2**-8, atol=1e-5)
        assert half[tap].dtype == np.float32 and np.any(half[tap] != full[tap])
    (victim,) = (tmp_path / "full").glob("*.bin")
    _damage(victim)
    mended = outputs("full")
    np.testing.assert_array_equal(mended["logits"], full["logits"])
    with pytest.raises(ValueError, match="holds another cache: teacher weights differ"):
        outputs("full", init(jax.random.key(1), INPUTS[:1]))
    # Another network of the same shapes.
    pair.teacher_text = "mlp: 6,"
    with pytest.raises(ValueError, match="model differs|holds another cache"):
        outputs("full")


def test_what_a_cache_cannot_serve_is_said_before_training(tmp_path: Path, weights: Path) -> None:
    few, entries = TRAIN._replace(inputs=INPUTS), _pair.entries()
    pair: Any = SimpleNamespace(
        teacher=NET, teacher_text=TEACHER, arrays={"inputs": INPUTS},
        splits=Splits(few, few, few), example=INPUTS[:1], teacher_variables=VARIABLES,
    )  # fmt: skip
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    kd, hint = [entries["kd"], entries["dkd"]], [entries["kd"], entries["hint"]]

    def said(folder: Path, chosen: Any, **instead: Any) -> str:
        asked: Any = SimpleNamespace(**{**vars(pair), **instead})
        with pytest.raises(UsageError) as error:
            _caching.check_folder(folder, has_teacher=asked.teacher_variables is not None)
            _caching.check(folder, asked, chosen)
        return str(error.value)

    _caching.check(plain, pair, hint)  # there is none: it will be written
    assert _cache(plain, weights) == 0 and _cache(cut, weights, "--top-k", "2") == 0
    # `kdtl cache` without --taps serves what reads logits alone, and nothing more is read.
    _caching.check(plain, pair, kd)
    assert _caching.taps(kd, pair) == ["logits"] and _caching.taps(hint, pair) == sorted(LIVE)
    actual = _caching.outputs(plain, pair, VARIABLES, "float32", ["logits"])
    assert set(actual) == {"logits"}
    np.testing.assert_allclose(actual["logits"], LIVE["logits"], atol=1e-5)
    # Otherwise the message names the flag.
    assert "holds logits, but hint read" in said(plain, hint)
    assert "kdtl cache --taps all" in said(plain, hint)
    assert "without --top-k" in said(cut, kd)
    assert "--teacher-weights" in said(plain, kd, teacher_variables=None)
    other = init(jax.random.key(1), INPUTS[:1])
    assert "teacher weights differ" in said(plain, kd, teacher_variables=other)
    # The same is known of one that is not finished, which is completed with its own outputs.
    more, half = tmp_path / "more", tmp_path / "half"
    assert _cache(more, weights, "--taps", "all") == 0
    assert _cache(half, weights, "--dtype", "float16") == 0
    for folder in (plain, more, half):
        (folder / "manifest.json").unlink()
    assert "holds logits, but hint read" in said(plain, hint)
    assert "teacher weights differ" in said(plain, kd, teacher_variables=other)
    assert "complete it with kdtl cache" in said(half, kd) and "float16" in said(half, kd)
    _caching.check(more, pair, kd)
    actual = _caching.outputs(more, pair, VARIABLES, "float32", ["logits"])
    np.testing.assert_allclose(actual["logits"], LIVE["logits"], atol=1e-5)
    plan = teacher_cache.open_cache(more, expect=None).plan
    assert set(plan.fingerprint.taps or ()) == set(LIVE)


def _damage(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--help"]) == 0
    assert (
        "kdtl cache --teacher-weights runs/distill/teacher.safetensors" in capsys.readouterr().out
    )
