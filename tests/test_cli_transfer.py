"""`kdtl transfer`: the run folder, the surgery's report, every method, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from kdtl_jax import cli, transforms, trees
from kdtl_jax._types import Variables
from kdtl_jax.datasets import Dataset, Splits
from kdtl_jax.interop import networks, safetensors, sources
from kdtl_jax.models import mlp, resnet
from kdtl_jax.recipes import _choice, _targets, _training, transfer
from kdtl_jax.recipes import _transfer_methods as ways
from kdtl_jax.train import sweep

pytestmark = pytest.mark.usefixtures("standard_promotion")
WIDTH, CLASSES = 12, 3


def blobs(classes: int, count: int, seed: int) -> Dataset:
    """Gaussians around fixed centers: a task that a small network learns in no time."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes, dtype=np.int32), count)
    centers = np.random.default_rng(0).standard_normal((classes, 6)) * 2
    inputs = (centers[labels] + rng.standard_normal((len(labels), 6))).astype(np.float32)
    return Dataset("blobs", inputs, labels, classes)


def splits(classes: int = CLASSES) -> Splits:
    return Splits(*(blobs(classes, 20, seed) for seed in range(3)))


def network() -> networks.Network:
    return networks.network(mlp((WIDTH, 10), CLASSES), np.zeros((1, 6), np.float32))


def write_data(path: Path) -> Path:
    train, validation, test = splits(6)
    np.savez(
        path,
        x_train=train.inputs,
        y_train=train.labels,
        x_validation=validation.inputs,
        y_validation=validation.labels,
        x_test=test.inputs,
        y_test=test.labels,
    )
    return path


def write_source(path: Path, *, hidden: int = WIDTH, prefix: str = "", head: bool = True) -> Path:
    net = networks.network(mlp((hidden, 10), 4), np.zeros((1, 6), np.float32))
    params = net.init(jax.random.key(5), jnp.zeros((1, 6))).params
    flat = {f"{prefix}{k}": np.asarray(x) for k, x in trees.flatten(params).items()}
    kept = {name: x for name, x in flat.items() if head or "head" not in name}
    safetensors.save(path, kept)
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    fixed = f"transfer --data {data} --out {out} --model mlp:{WIDTH},10 --seeds 2 --epochs 2"
    return [*fixed.split(), "--labels-per-class", "4", "--learning-rates", "0.01", *more]


@pytest.mark.slow
def test_a_run_writes_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    data, out = write_data(tmp_path / "data.npz"), tmp_path / "run"
    more = ("--methods", "scratch,copied_finetuned", "--source-epochs", "3", "--llrd", "0.75")
    assert cli.main(arguments(data, out, *more)) == 0
    printed = capsys.readouterr().out
    assert "copied  dense_0/kernel  [6, 12]" in printed
    assert "kept    head/kernel     [10, 3]" in printed
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["scratch", "copied_finetuned"]
    row = results["rows"][1]
    assert row["seeds"] == 2 and len(row["test_accuracy"]["values"]) == 2
    assert row["versus"]["baseline"] == "scratch"
    assert row["settings"]["trained_parameters"] == row["parameters"] == 84 + 130 + 33
    assert results["data"]["target_train"] == 12
    scores = results["data"]["transferability"]
    assert set(scores) == {"logme", "h_score", "leep", "nce"} and scores["nce"] <= 0
    assert "logme" in " ".join(results["notes"])
    names = {"config.yaml", "metrics.jsonl", "results.json", "checkpoints", "students"}
    names |= {"report.html", "env.json", "made_from.json", ".lock", "finished"}
    assert names == {entry.name for entry in out.iterdir()}
    page = (out / "report.html").read_text()
    assert "Transfer: loss" in page and "<h2>Confusion</h2>" in page
    losses = results["curves"]["learning"]["scratch"]["loss"]
    assert len(losses) == row["settings"]["epochs"] and losses[-1] < losses[0]
    # The config is a --config file, and the student is this model.
    config = yaml.safe_load((out / "config.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config | {"out": str(tmp_path / "two")}))
    assert cli.main(["transfer", "--config", str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["methods"] == [
        "scratch",
        "copied_finetuned",
    ]
    student = sources.variables(
        sources.opened(str(out / "students" / "copied_finetuned.safetensors")),
        networks.abstract(network(), jnp.zeros((1, 6))),
    )
    assert student.params["head"]["kernel"].shape == (10, 3)
    capsys.readouterr()
    file = str(out / "students" / "copied_finetuned.safetensors")
    assert cli.main(["predict", file, str(data)]) == 0
    named = {line.split(",")[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert named and named <= {"3", "4", "5"}  # the target's classes, by their own names
    assert cli.main(arguments(data, out)) == 1  # never overwritten
    assert "is not empty" in capsys.readouterr().err
    assert cli.main([*arguments(data, tmp_path / "none", *more), "--resume"]) == 2
    assert f"--resume: there is no run in {tmp_path / 'none'}" in capsys.readouterr().err
    # As if it had been stopped in its second method: nothing else is trained again.
    (out / "finished" / "copied_finetuned.npz").unlink()
    before = (out / "students" / "copied_finetuned.safetensors").read_bytes()
    monkeypatch.setattr(_targets, "train_sources", None)
    assert cli.main([*arguments(data, out, *more), "--resume"]) == 0
    again = json.loads((out / "results.json").read_text())
    for rows in (results["rows"], again["rows"]):
        assert rows[1].pop("seconds") > 0
    assert again["rows"] == results["rows"] and again["curves"] == results["curves"]
    assert (out / "students" / "copied_finetuned.safetensors").read_bytes() == before


@pytest.mark.slow
def test_weights_of_ones_own_under_other_names_and_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_data(tmp_path / "data.npz")
    source = write_source(tmp_path / "source.safetensors", hidden=WIDTH + 4, prefix="backbone/")
    more = ("--methods", "copied_head_only", "--target-classes", "3-5")
    more += ("--source-weights", str(source))
    assert cli.main(arguments(data, tmp_path / "a", *more)) == 1
    error = capsys.readouterr().err
    assert "dense_0/kernel" in error and "backbone/dense_0/kernel" in error
    more += ("--rename", "backbone/(.*)=>\\1")
    assert cli.main(arguments(data, tmp_path / "b", *more)) == 1
    assert "[6, 16]" in capsys.readouterr().err
    assert cli.main(arguments(data, tmp_path / "c", *more, "--on-mismatch", "crop")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "adapted dense_0/kernel [6, 16] -> [6, 12] by crop" in printed
    # The head alone was trained: the body is the source's, cropped, bit for bit.
    stored = safetensors.load(source)
    student = safetensors.load(tmp_path / "c" / "students" / "copied_head_only.safetensors")
    np.testing.assert_array_equal(
        student["dense_0/kernel"], stored["backbone/dense_0/kernel"][:, :WIDTH]
    )
    assert student["head/kernel"].shape == (10, 3)


def test_bad_usage_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_data(tmp_path / "data.npz")
    for more, says in (
        (("--methods", "scratch,magic"), "'magic' is not a method"),
        (("--llrd", "1.5"), "above 0, at most 1"),
        (("--target-classes", "4-9"), "the data has classes 0-5, got 4-9"),
        (("--target-classes", "x"), "expected A-B"),
        (("--canvas", "3"), "needs images"),
        (("--rename", "nothing"), "expected 'REGEX=>NAME'"),
        (("--on-mismatch", "stretch"), "expected one of error, keep, "),
    ):
        assert cli.main(arguments(data, tmp_path / "run", *more)) == 2, more
        assert says in capsys.readouterr().err
    source = write_source(tmp_path / "headless.safetensors", head=False)
    more = ("--source-weights", str(source), "--methods", "copied_finetuned,co_tuning")
    assert cli.main(arguments(data, tmp_path / "other", *more)) == 1
    assert "co_tuning train the source's head too" in capsys.readouterr().err
    assert cli.main(["transfer", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ways.METHODS)


def test_what_no_source_fits_is_told_before_one_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data.npz")
    for more, says in (
        (("--where", "nothing.*"), "'nothing.*' matches no leaf"),
        (("--rename", "nothing=>x"), "'nothing'"),
    ):
        assert cli.main(arguments(data, tmp_path / "run", *more)) == 1, more
        errors = capsys.readouterr().err
        assert says in errors.splitlines()[-1] and not (tmp_path / "run").exists(), errors


def shared(net: networks.Network, seeds: int = 2) -> tuple[Any, Any, Any]:
    """What points read, and the held-out splits."""
    parts = splits()
    keys = jax.random.split(jax.random.key(1), seeds)
    fresh = jax.vmap(lambda key: net.init(key, jnp.zeros((1, 6))))(keys)
    copied = jax.tree.map(lambda x: x + 1, fresh)
    heads = {"kernel": jnp.ones((seeds, 10, 4)), "bias": jnp.zeros((seeds, 4))}
    data = _choice.stacked([parts.train] * seeds)
    both = _choice.on_device(parts.validation), _choice.on_device(parts.test)
    return {"data": data, "begin": copied, "copied": copied, "heads": heads}, *both


def fit_of(
    method: ways.TransferMethod,
    net: networks.Network,
    *,
    epochs: int,
    batch_size: int = 25,
    llrd: float = 1.0,
) -> Any:
    """One point's training, as `_targets.compare` makes it."""
    learner = _targets.make_experiment(method, net, CLASSES, 4, transfer.Settings(llrd=llrd))
    how = _training.FitOptions(
        epochs,
        batch_size,
        checks=_training.even_checks(epochs),
        keep=lambda state: Variables(method.finish(state.params), state.model_state),
    )
    return _training.fit(learner, how)


def point_of(method: ways.TransferMethod) -> dict[str, Any]:
    point = {"seed": jnp.zeros((), jnp.int32), "learning_rate": jnp.float32(0.1)}
    return point | ({method.term: jnp.float32(0.1)} if method.term else {})


@pytest.mark.parametrize("method", ways.METHODS, ids=lambda method: method.name)
def test_every_method_is_a_program_with_a_plain_model_at_its_end(method: ways.TransferMethod):
    net, (read, validation, test) = network(), shared(network())
    fit = fit_of(method, net, epochs=4, llrd=0.8)
    fitted = jax.eval_shape(fit, point_of(method), read, validation, test)
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), read["begin"].params
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fitted.variables.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    assert fitted.curve.shape == (4,)
    learner = _targets.make_experiment(method, net, CLASSES, 4, transfer.Settings())
    state = jax.eval_shape(learner.start, point_of(method), read)
    count = trees.count(state.params, method.trainable) + trees.count(state.connectors)
    whole = trees.count(expected)
    if method.name in ("copied_head_only", "bitfit"):
        assert count < whole / 2
    elif method.needs_source_head:
        assert count == whole + 44
    elif method.name != "lora":
        assert count == whole


@pytest.mark.parametrize("name", ["copied_finetuned", "lora", "delta", "mixout"])
def test_a_network_with_batch_statistics_carries_them(name: str):
    net = networks.network(resnet(8, CLASSES), jnp.zeros((1, 8, 8, 1)))
    fresh = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), fresh)
    images = jax.ShapeDtypeStruct((2, 20, 8, 8, 1), jnp.float32)
    data = {"inputs": images, "labels": jax.ShapeDtypeStruct((2, 20), jnp.int32)}
    held = {"inputs": jnp.zeros((5, 8, 8, 1)), "labels": jnp.zeros((5,), jnp.int32)}
    method = ways.BY_NAME[name]
    fit = fit_of(method, net, epochs=2, llrd=0.9)
    read = {"data": data, "begin": stack, "copied": stack, "heads": None}
    fitted = jax.eval_shape(fit, point_of(method), read, held, held)
    assert jax.tree.structure(fitted.variables.model_state) == jax.tree.structure(fresh.model_state)
    assert jax.tree.structure(fitted.variables.params) == jax.tree.structure(fresh.params)


@pytest.mark.slow
def test_what_is_frozen_stays_and_what_is_low_rank_is(tmp_path: Path):
    net, held = network(), shared(network())
    points = {"seed": jnp.arange(2, dtype=jnp.int32), "learning_rate": jnp.full((2,), 0.01)}
    for name in ("copied_head_only", "lora"):
        fit = fit_of(ways.BY_NAME[name], net, epochs=2, batch_size=20)
        fitted = sweep.vmap(fit)(points, *held)
        after, before = (
            trees.flatten(x) for x in (fitted.variables.params, held[0]["copied"].params)
        )
        changed = {path for path in after if not np.array_equal(after[path], before[path])}
        heads = {"head/kernel", "head/bias"}
        assert changed == heads | (
            {"dense_0/kernel", "dense_1/kernel"} if name == "lora" else set()
        )
    rank = np.linalg.matrix_rank(after["dense_1/kernel"] - before["dense_1/kernel"], tol=1e-5)
    assert np.all(rank <= 8)


def test_depths_of_the_modules_of_every_model():
    deep = {"head": 0, "stem": 0, "stage2_block0": 0, "stage1_block10": 0, "stage1_block9": 0}
    assert ways.modules_by_depth(deep | {"final_norm": 0}) == [
        "stem",
        "stage1_block9",
        "stage1_block10",
        "stage2_block0",
        "final_norm",
        "head",
    ]
    params = {"dense_0": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    adapter = {"dense_0/kernel": transforms.LoraWeights(jnp.ones(2), jnp.ones(2))}
    trained = {
        "params": {"base": params, "adapter": adapter},
        "connectors": {"source_head": {"kernel": jnp.ones(2)}},
    }
    tx = ways.by_depth(params, trained, 0.5)
    updates, _ = tx.update(trained, tx.init(trained), trained)
    actual = {path: float(leaf[0]) for path, leaf in trees.flatten(updates).items()}
    assert actual == {
        "params/adapter/dense_0/kernel/a": 0.5,
        "params/adapter/dense_0/kernel/b": 0.5,
        "params/base/dense_0/kernel": 0.5,
        "params/base/head/kernel": 1.0,
        "connectors/source_head/kernel": 1.0,
    }


def test_modules_with_batch_statistics_are_copied_with_them():
    source = {
        "params": {"dense": {"kernel": np.ones((2, 2))}, "head": {"kernel": np.ones((2, 5))}},
        "batch_stats": {"norm": {"mean": np.full(2, 3.0)}},
    }
    target = Variables(
        {"dense": {"kernel": jnp.zeros((2, 2))}, "head": {"kernel": jnp.zeros((2, 3))}},
        {"batch_stats": {"norm": {"mean": jnp.zeros(2)}}},
    )
    copied, report = _targets.copy_source(source, target, _targets.Surgery())
    assert float(copied.model_state["batch_stats"]["norm"]["mean"][0]) == 3
    assert {kept.path for kept in report.kept} == {"params/head/kernel"}
    assert _targets.source_head(source) is None
