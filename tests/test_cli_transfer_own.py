"""`kdtl transfer` and `kdtl sweep` on several labels and numbers, and how targets are trained."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from data_files import N, Y, columns, image_folder, table
from test_cli_own_data import HOT, PRICE, scored
from tiny import kdtl, results

from kdtl_jax import datasets, models, train, trees
from kdtl_jax.interop import model_files, networks, safetensors, sources
from kdtl_jax.recipes import _measures, _targets, _training, transfer
from kdtl_jax.recipes import _transfer_methods as ways
from kdtl_jax.train import sweep

Captured = pytest.CaptureFixture[str]
KINDS = {"labels": "mean_average_precision", "numbers": "r2"}
FEW = ["--seeds", "2", "--epochs", "2", "--lr", "0.01", "--batch-size", "12"]


def source(folder: Path) -> Path:
    """A perceptron of three inputs and four classes, of nobody's data."""
    net = networks.network(models.mlp((6,), 4), np.zeros((1, 3), np.float32))
    params = net.init(_training.keys(5).model, jnp.zeros((1, 3))).params
    file = folder / "source.safetensors"
    safetensors.save(file, safetensors_leaves(params))
    return file


def safetensors_leaves(params: Any) -> dict[str, np.ndarray]:
    return {f"{a}/{b}": np.asarray(x) for a, part in params.items() for b, x in part.items()}


def data_of(kind: str, folder: Path) -> tuple[Path, str]:
    if kind == "labels":
        cells = columns(cough=HOT[:, 0], fever=HOT[:, 1])
        return table(folder / "a.csv", cells), "cough,fever"
    return table(folder / "a.csv", columns(price=PRICE)), "price"


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_are_no_classes(kind: str, tmp_path: Path, capsys: Captured) -> None:
    (data, label), score, run = data_of(kind, tmp_path), KINDS[kind], tmp_path / "run"
    words: list[Any] = ["transfer", "--data", data, "--label", label, "--model", "mlp:6", *FEW]
    words += ["--source-weights", source(tmp_path), "--methods", "scratch,copied_finetuned"]
    assert kdtl(*words, "--log", "csv", "--out", run) == 0
    row = results(run)["rows"][1]
    student = run / row["settings"]["file"]
    model = model_files.load(student)
    known = model.about.preprocessing
    assert known is not None and known.kind == kind
    parts = datasets.read_splits(str(data), preprocessing=known)
    logits = model.predict(parts.test.inputs)
    actual = scored(logits, parts.test.labels, score)
    assert row[f"test_{score}"]["values"][row["settings"]["file_seed"]] == pytest.approx(
        actual, abs=1e-5
    )
    assert set(results(run)["data"]["transferability"]) == {"logme"}
    assert f"validation_{score}" in results(run)["curves"]["learning"]["scratch"]
    assert f"eval/validation_{score}" in (run / "metrics.csv").read_text().splitlines()[0]
    assert kdtl("evaluate", student, data, "--out", tmp_path / "scores.json") == 0
    assert json.loads((tmp_path / "scores.json").read_text())[score] == pytest.approx(actual, 1e-5)
    capsys.readouterr()
    for more, says in (
        (["--methods", "co_tuning"], f"co_tuning need classes, but the targets are {kind}"),
        (["--labels-per-class", "3"], f"the targets are {kind}, not classes"),
        (["--label-smoothing", "0.1"], f"are for classes, but the targets are {kind}"),
    ):
        assert kdtl(*words, *more, "--out", tmp_path / "refused") == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert says in last


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_no_classifier(kind: str, tmp_path: Path, capsys: Captured) -> None:
    """Its head gives no probabilities: what reads them is refused, left out or not scored."""
    data, label = data_of(kind, tmp_path)
    words: list[Any] = ["transfer", *FEW, "--source-weights"]
    first = [source(tmp_path), "--model", "mlp:6", "--methods", "scratch", "--out", tmp_path / "a"]
    assert kdtl(*words, *first, "--data", data, "--label", label) == 0
    file = tmp_path / "a" / "students" / "scratch.safetensors"
    words += [file, "--data", table(tmp_path / "b.csv", columns(kind=Y)), "--label", "kind"]
    for asked, named in (("lwf", "lwf"), ("scratch,co_tuning,lwf", "co_tuning, lwf")):
        assert kdtl(*words, "--methods", asked, "--out", tmp_path / "refused") == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{named} need a source that is a classifier, but {file} learned {kind}." in last
    assert not (tmp_path / "refused").exists()
    chosen = ["--methods", "copied_finetuned", "--out", tmp_path / "run"]
    assert kdtl(*words, *chosen) == 0
    assert set(results(tmp_path / "run")["data"]["transferability"]) == {"logme", "h_score"}
    # What is learned now is in the student's file, however its columns were named.
    again = ["--data", data, "--label", ", ".join(label.split(",")), *chosen[:2]]
    assert kdtl(*words, *again, "--out", tmp_path / "again") == 0
    for run, expected in (("run", ("kind",)), ("again", tuple(label.split(",")))):
        student = tmp_path / run / "students" / "copied_finetuned.safetensors"
        known = model_files.about(str(student)).preprocessing
        assert known is not None and known.targets == expected
    of_default = [ways.BY_NAME[name] for name in ways.DEFAULT]
    left = transfer.select_methods(of_default, transfer.Settings(), _measures.CLASSES, kind)  # pyright: ignore[reportArgumentType]  # a key of KINDS
    assert [m.name for m in of_default if m not in left] == ["co_tuning", "lwf"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_of_targets_that_are_no_classes(kind: str, tmp_path: Path) -> None:
    """One setting is the run of `kdtl distill`, shuffled alike, seeds at once or one by one."""
    (data, label), score = data_of(kind, tmp_path), KINDS[kind]
    words = ["--data", data, "--label", label, "--teacher", "mlp:6", "--student", "mlp:3"]
    method, term = ("binary_kd", "kd") if kind == "labels" else ("bounded_regression", "bounded")
    words += [*FEW, "--teacher-epochs", "1", "--methods", method]
    sweep_words = ["--grid", f"{term}=0.75", "--path", "together"]
    assert kdtl("sweep", *words, *sweep_words, "--out", tmp_path / "sweep") == 0
    words += ["--loss-weights", f"{term}=0.75"]
    words += ["--one-by-one"] if kind == "labels" else []
    assert kdtl("distill", *words, "--out", tmp_path / "distill") == 0
    (actual,) = results(tmp_path / "sweep")["rows"]
    expected = next(row for row in results(tmp_path / "distill")["rows"] if row["method"] == method)
    for part in ("validation", "test"):
        assert actual[f"{part}_{score}"]["values"] == pytest.approx(
            expected[f"{part}_{score}"]["values"], abs=1e-5
        )
    assert (
        f"validation {'R²' if kind == 'numbers' else 'mean average precision'}"
        in (tmp_path / "sweep" / "report.html").read_text()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_scores_within_a_program_are_those_of_numpy(kind: str) -> None:
    rng = np.random.default_rng(0)
    targets = HOT if kind == "labels" else rng.normal(size=(N, 2))
    measure = _measures.measure_of(datasets.Preprocessing(kind=kind))  # pyright: ignore[reportArgumentType]  # a key of KINDS
    logits = np.round(rng.normal(size=(N, 2)), 1).astype(np.float32)  # with ties
    for each in (logits, np.full_like(logits, np.nan)):
        answers, actual = measure.judge(jnp.asarray(each), jnp.asarray(targets, jnp.float32))
        np.testing.assert_array_equal(answers, each)
        np.testing.assert_allclose(actual, measure.score(each, targets), rtol=1e-5)


def test_an_error_in_small_units_is_not_rounded_to_0() -> None:
    scaling = datasets.Standardizer(np.zeros(1), np.full(1, 1e-9))
    measure = _measures.measure_of(datasets.Preprocessing(kind="numbers", target_scaling=scaling))
    score, answers = jnp.asarray([0.5]), jnp.asarray([[[2.0], [0.0]]])
    result = _training.Fitted(None, score[:, None], score, score, answers, score[:, None])
    row = _measures.row(
        measure, "kd", "", "", {}, result, 0.0, {}, targets=np.array([[1.0], [0.0]])
    )  # fmt: skip
    assert row.settings["mean_absolute_error"] == pytest.approx(5e-10)


def test_training_flags_are_those_of_distill(tmp_path: Path, capsys: Captured) -> None:
    data, run = table(tmp_path / "a.csv", columns(kind=Y)), tmp_path / "run"
    words: list[Any] = ["transfer", "--data", data, "--label", "kind", "--model", "mlp:6", *FEW]
    words += ["--source-weights", source(tmp_path), "--methods", "copied_head_only,lora,lp_ft"]
    flags = "--optimizer adamw --schedule cosine --warmup 0.2 --clip 1 --weight-decay 0.01"
    flags += " --ema 0.9 --early-stopping 1 --label-smoothing 0.1 --class-weights balanced"
    assert kdtl(*words, *flags.split(), "--log", "csv,tensorboard", "--out", run) == 0
    rows = {row["method"]: row for row in results(run)["rows"]}
    assert set(rows["lora"]["settings"]["epochs_kept"]) <= {1, 2}
    head = safetensors.load(run / "students" / "copied_head_only.safetensors")
    np.testing.assert_array_equal(
        head["dense_0/kernel"], safetensors.load(tmp_path / "source.safetensors")["dense_0/kernel"]
    )
    assert list((run / "tensorboard" / "lora").glob("events*"))
    # Interrupted in its second method, it ends with the same bits.
    (run / "finished" / "lora.npz").unlink()
    before = (run / "students" / "lora.safetensors").read_bytes()
    assert kdtl(*words, *flags.split(), "--log", "csv,tensorboard", "--out", run, "--resume") == 0
    assert (run / "students" / "lora.safetensors").read_bytes() == before
    capsys.readouterr()
    more = ["--class-weights", "balanced", "--labels-per-class", "3"]
    assert kdtl(*words, *more, "--out", tmp_path / "x") == 2
    assert "every class has 3 labels already" in capsys.readouterr().err


def test_the_best_check_is_given_back() -> None:
    """A student whose score falls from the second epoch on stops, and the first is kept."""
    tx = optax.sgd(1.0)

    def start(point: Any, shared: Any) -> Any:
        return train.init_state({"w": jnp.zeros(())}, tx, key=_training.keys(point["seed"]).steps)

    def step(state: Any, batch: Any, point: Any, shared: Any) -> Any:
        def apply(params: Any, model_state: Any, inputs: Any, **_: Any) -> Any:
            return {"logits": params["w"] * jnp.ones((len(inputs), 1))}, model_state

        def terms(inputs: Any) -> Any:
            return {"task": -inputs.student["logits"][:, 0]}  # w grows by 1 a step

        return train.make_step(apply, terms, {"task": 1.0}, tx)(state, batch)

    scores = jnp.asarray([0.0, 0.3, 0.9, 0.5, 0.4, 1.0])  # by w: 0.3 after one epoch

    learner = _training.Experiment(
        start, step, lambda state, x, shared: state.params["w"],
        judge=lambda w, labels: (w[None], scores[w.astype(int)]),
    )  # fmt: skip
    data = {"inputs": jnp.zeros((4, 1)), "labels": jnp.zeros((4,), jnp.int32)}
    how = _training.FitOptions(5, 4, checks=5, patience=2, keep=lambda state: state.params["w"])
    actual = sweep.vmap(_training.fit(learner, how))({"seed": jnp.arange(2)}, data, data, data)
    assert actual.variables.tolist() == [2, 2] and actual.epoch is not None
    assert actual.epoch.tolist() == [2, 2] and actual.test.tolist() == pytest.approx([0.9, 0.9])
    assert actual.curve[0].tolist() == pytest.approx([0.3, 0.9, 0.5, 0.4, 0.9])


def test_a_source_of_one_class_is_refused(tmp_path: Path, capsys: Captured) -> None:
    data = image_folder(tmp_path / "images")
    assert kdtl("transfer", "--data", data, "--model", "mlp:6", "--out", tmp_path / "x") == 2
    assert "a source of one class learns nothing" in capsys.readouterr().err


def test_a_head_of_another_name_is_told_before_the_training() -> None:
    """What trains the head in a way of its own would train none, or stop at the end."""
    example = jnp.zeros((1, 5))
    named = networks.network(models.mlp((4,), 3), example)
    other = networks.network(nn.Sequential([nn.Dense(4), nn.Dense(3)]), example)
    apart = [method for method in ways.METHODS if method.needs_head]
    names = {"copied_head_only", "lp_ft", "bitfit", "lora", "mixout", "bi_tuning"}
    assert names == {m.name for m in apart}
    for net in (named, other):
        source, surgery = model_files.tree(networks.abstract(net, example)), _targets.Surgery()
        _targets.check(net, example, source, [ways.BY_NAME["copied_finetuned"]], surgery)
        if net is named:
            _targets.check(net, example, source, apart, surgery)
            continue
        with pytest.raises(ValueError, match="copied_head_only, .*no parameters under head/"):
            _targets.check(net, example, source, apart, surgery)


@pytest.mark.parametrize(
    ("features", "lacking"),
    [
        (("hidden",), ()),
        (("map",), ("bss", "co_tuning", "lwf", "bi_tuning")),
        ((), ("behavioral", "delta", "bss", "co_tuning", "lwf", "bi_tuning")),
    ],
)
def test_methods_that_read_features_need_them(
    features: tuple[str, ...], lacking: tuple[str, ...]
) -> None:
    """A penalty on the features of a model that returns none would stop while it is traced."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            hidden = nn.Dense(4)(x)
            shapes = {"hidden": hidden, "map": hidden[:, None]}
            return {"logits": nn.Dense(3, name="head")(hidden)} | {k: shapes[k] for k in features}

    example = jnp.zeros((1, 5))
    net = networks.network(Net(), example)
    source, surgery = model_files.tree(networks.abstract(net, example)), _targets.Surgery()
    fitting = [method for method in ways.METHODS if method.name not in lacking]
    assert fitting == [method for method in ways.METHODS if _targets.has_features(net, method)]
    _targets.check(net, example, source, fitting, surgery)
    if lacking:
        with pytest.raises(ValueError, match=rf"^{', '.join(lacking)} read features, but the mod"):
            _targets.check(net, example, source, ways.METHODS, surgery)


def test_sources_from_orbax_folders(tmp_path: Path) -> None:
    """Parameters beside an optimizer's state, and with batch statistics."""
    stored = safetensors.load(source(tmp_path))
    params: dict[str, Any] = {}
    for path, leaf in stored.items():
        params.setdefault(path.split("/")[0], {})[path.split("/")[1]] = leaf
    writer = ocp.PyTreeCheckpointer()
    writer.save(tmp_path / "a", {"params": params, "opt": {"count": np.zeros(())}})
    actual = trees.flatten(sources.opened(str(tmp_path / "a")).tree(None))
    assert actual.keys() == stored.keys()
    np.testing.assert_array_equal(actual["head/kernel"], stored["head/kernel"])
    writer.save(tmp_path / "b", {"params": params, "batch_stats": {"norm": {"mean": np.ones(2)}}})
    whole = trees.flatten(sources.opened(str(tmp_path / "b")).tree(None))
    assert whole.keys() == {"batch_stats/norm/mean", *(f"params/{path}" for path in stored)}
