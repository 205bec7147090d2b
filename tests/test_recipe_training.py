"""Optimizers, schedules, tasks, averages and early stopping of the recipes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SHORT, kdtl, results, write_data

from kdtl_jax import train
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _choice, _measures, _optimizers, _training
from kdtl_jax.recipes._optimizers import TrainingSettings
from kdtl_jax.run import checkpoint, loop

pytestmark = pytest.mark.usefixtures("standard")
PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])}
GRADIENT = jax.tree.map(lambda x: 0.5 * x + 1, PARAMS)


@pytest.fixture
def standard() -> Iterator[None]:
    """Promotion as users have it: optax relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def after(tx: optax.GradientTransformation, steps: int = 3) -> Any:
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = tx.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_the_defaults_are_adam_along_a_cosine_to_the_bit() -> None:
    fall = optax.cosine_decay_schedule(1.0, 5)
    expected = after(optax.adam(lambda count: 0.01 * fall(count)))
    result = after(_optimizers.optimizer(TrainingSettings(), 5, rate=0.01))
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize("name", list(_optimizers.RATES))
def test_every_optimizer_is_optaxs_with_weight_decay_and_clipping(name: str) -> None:
    constant: Any = replace(TrainingSettings(), optimizer=name, schedule="constant")
    plain = after(_optimizers.optimizer(constant, 5, rate=0.01))
    decayed = after(_optimizers.optimizer(constant, 5, rate=0.01, weight_decay=0.1))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(plain))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (plain, decayed)), strict=True))
    same = {"lion": optax.lion, "lamb": optax.lamb, "adamw": optax.adamw, "nadamw": optax.nadamw}
    if name in same:
        expected = after(same[name](0.01, weight_decay=0.1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), decayed, expected)
    # A clipped gradient is one of norm 1 / 100.
    if name == "sgd":
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(GRADIENT)))
        clipped = after(_optimizers.optimizer(replace(constant, clip=0.01), 5, rate=1.0), 1)
        moved = jax.tree.map(lambda a, b: (a - b) / 1.9, PARAMS, clipped)  # Nesterov: g + 0.9 g
        small = jax.tree.map(lambda g: 0.01 * g / norm, GRADIENT)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, small)


def test_schedules_rise_and_fall() -> None:
    def values(name: str, warmup: float) -> list[float]:
        made = _optimizers.schedule_shape(name, warmup, 10)
        return [float(np.asarray(made(jnp.int32(i)))) for i in range(11)]

    np.testing.assert_allclose(values("constant", 0.3), [1 / 3, 2 / 3, *[1] * 9], rtol=1e-6)
    np.testing.assert_allclose(values("linear", 0.0), 1 - np.arange(11) / 10, rtol=1e-6)
    actual = values("linear", 0.5)
    np.testing.assert_allclose(actual, [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)
    halves = values("cosine", 0.5)
    np.testing.assert_allclose(halves[5:], (1 + np.cos(np.pi * np.arange(6) / 5)) / 2, atol=1e-6)
    assert values("cosine", 0.05)[0] == 1  # less than a step is no rise
    assert len(values("cosine", 0.99)) == 11


def test_labels_are_smoothed_and_classes_weighted() -> None:
    labels = np.array([0, 0, 0, 1], np.int32)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    inputs = Inputs({"logits": logits}, {}, {"labels": jnp.asarray(labels)})
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert _measures.cross_entropy_of(TrainingSettings(), labels, 3) is _measures.cross_entropy
    smooth: Any = replace(TrainingSettings(), label_smoothing=0.3)
    targets = 0.7 * np.eye(3)[labels] + 0.1
    actual = _measures.cross_entropy_of(smooth, labels, 3)(inputs)
    assert isinstance(actual, dict)
    np.testing.assert_allclose(actual["task"], -(targets * log_p).sum(-1), rtol=1e-5)
    even: Any = replace(TrainingSettings(), class_weights="balanced")
    actual = _measures.cross_entropy_of(even, labels, 3)(inputs)
    assert isinstance(actual, dict)
    weights = np.array([4 / (2 * 3), 4 / 2])[labels]
    np.testing.assert_allclose(actual["task"], -weights * log_p[np.arange(4), labels], rtol=1e-5)
    np.testing.assert_allclose(_measures.balanced_weights(labels, 3), [2 / 3, 2, 0])


def test_an_average_of_the_weights_is_kept_beside_the_optimizer() -> None:
    tx = _optimizers.keep_average(optax.sgd(0.1), 0.3)
    state = train.init_state(PARAMS, tx, key=jax.random.key(0))
    mean, params, opt_state = PARAMS, PARAMS, state.opt_state
    for n in range(3):
        updates, opt_state = tx.update(GRADIENT, opt_state, params)
        params = optax.apply_updates(params, updates)
        d = min(0.3, (1 + n) / (10 + n))
        mean = jax.tree.map(lambda m, p, d=d: d * m + (1 - d) * p, mean, params)
    result = _optimizers.with_averages(state._replace(params=params, opt_state=opt_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result.params, mean)
    plain = train.init_state(PARAMS, optax.sgd(0.1), key=jax.random.key(0))
    assert _optimizers.with_averages(plain) is plain


def test_early_stopping_gives_back_the_best_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an average, a clipped rate and hint's connector: resumed, it is the same run."""
    data, out = write_data(tmp_path / "data.npz"), tmp_path / "run"
    flags = [*SHORT, "--methods", "hint", "--epochs", 30, "--lr", 0.05, "--early-stopping", 2]
    flags += ["--ema", 0.5, "--warmup", 0.1, "--clip", 1, "--label-smoothing", 0.1]
    words = ["distill", "--data", data, *flags, "--class-weights", "balanced", "--out", out]
    assert kdtl(*words) == 0
    errors = capsys.readouterr().err
    rows = {row["method"]: row for row in results(out)["rows"]}
    for name in ("student_alone", "hint"):
        curve = results(out)["curves"]["learning"][name]
        values, kept = curve["validation_accuracy"], rows[name]["settings"]["epoch_kept"]
        assert curve["epoch"] == list(range(1, len(values) + 1)) and len(values) < 30
        assert kept == 1 + int(np.argmax(values)) == len(values) - 2
        after = f"{name}: stopped after epoch {len(values)}, the weights of {kept} are kept"
        assert after in errors
        assert rows[name]["validation_accuracy"]["mean"] == pytest.approx(max(values))
        saved = checkpoint.steps(out / "checkpoints" / name)
        assert saved == [5 * kept, 5 * len(values)]
    before = (out / "students" / "hint.safetensors").read_bytes(), results(out)["rows"]
    shutil.rmtree(out / "checkpoints" / "student_alone")  # which costs the others nothing
    assert kdtl(*words, "--resume") == 0
    assert (out / "students" / "hint.safetensors").read_bytes() == before[0]
    for row, old in zip(results(out)["rows"], before[1], strict=True):
        assert row["test_accuracy"] == old["test_accuracy"]
    lines = loop.read_metrics(out / "metrics.jsonl")
    assert len([x for x in lines if x["method"] == "hint" and "loss" in x]) == len(values)
    assert json.loads((out / "results.json").read_text())["data"]["recommended"]


def test_a_chosen_setting_is_reported_however_small() -> None:
    points = _choice.columns(2, learning_rate=(3e-8, 1e-3), strength=(0.1,))
    scores = jnp.asarray([0.9, 0.8, 0.5, 0.5])
    fitted = _training.Fitted(None, scores[:, None], scores, scores, scores, scores[:, None])
    assert _choice.best(fitted, points).setting == {"learning_rate": 3e-8, "strength": 0.1}
    assert _choice.setting_curve(fitted, points, "learning_rate")["best"] == 3e-8
