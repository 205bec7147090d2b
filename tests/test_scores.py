"""What is not finite scores NaN, ranks last, never wins; what a run was made from is compared."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import Variables, datasets
from kdtl_jax.run import record, report, scores

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        ([1.0, 3.0, 2.0], 1),
        ([NAN, NAN, NAN], -1),
        ([5.0, NAN, 0.0], -1),
        ([0.0, INF, 0.0], -1),
        ([-INF, -INF, -INF], -1),
        ([-INF, 2.0, -INF], 1),  # masked classes
    ],
)
def test_logits_that_are_not_finite_are_no_class(logits: list[float], wanted: int) -> None:
    actual = jax.jit(scores.predicted)(jnp.asarray([logits, [0.0, 0.0, 9.0]]))
    assert actual.dtype == jnp.int32 and actual.tolist() == [wanted, 2]
    assert scores.predicted(jnp.asarray(logits, jnp.bfloat16)).tolist() == wanted


def test_one_logit_has_no_largest() -> None:
    with pytest.raises(ValueError, match=r"softmax over one class.*\[z, 0\]"):
        scores.predicted(jnp.asarray([[3.0], [-3.0]]))


def test_accuracy_of_a_diverged_run_is_nan() -> None:
    labels = np.array([0, 0, 0, 1])
    classes = np.array([[0, 0, 1, 1], [0, -1, 0, 1], [0, 0, 0, 1]])
    np.testing.assert_array_equal(scores.accuracy(classes, labels), [0.75, NAN, 1.0])
    assert float(scores.accuracy(classes[0], labels)) == 0.75
    broken = scores.predicted(jnp.full((4, 2), jnp.nan))
    assert math.isnan(scores.accuracy(broken, labels)), "not class 0's share"


@pytest.mark.parametrize(
    ("values", "minimize", "wanted"),
    [
        ([0.5, NAN, 0.9, 0.9], False, [2, 3, 0, 1]),
        ([0.5, NAN, 0.9, INF, 0.7], False, [2, 4, 0, 1, 3]),
        ([0.5, 0.5], False, [0, 1]),
        ([0.5, NAN, 0.9, -INF], True, [0, 2, 1, 3]),
        ([NAN, NAN], False, [0, 1]),
        ([None, 0.1], False, [1, 0]),
        ([[0.9, NAN], [0.1, 0.2], [0.3, 0.4]], False, [2, 1, 0]),
        ([], False, []),
    ],
)
def test_ranking_puts_what_is_not_finite_last(
    values: list[Any], minimize: bool, wanted: list[int]
) -> None:
    assert scores.ranked(values, minimize=minimize) == wanted
    finite = [v for v in values if v is not None and np.all(np.isfinite(v))]
    assert scores.best(values, minimize=minimize) == (wanted[0] if finite else None)


def test_weights_that_are_not_finite_are_named() -> None:
    fine = {"a": np.ones(3), "b": np.arange(3), "c": jnp.ones(2, jnp.bfloat16)}
    record.check_finite("fine.safetensors", Variables(fine, None))
    spoilt = fine | {"a": np.array([1, NAN, INF]), "c": jnp.asarray([NAN, 1], jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"t\.safetensors: .* 'a' \(2 of 3\), 'c' \(1 of 2\)"):
        record.check_finite("t.safetensors", spoilt)
    many = {f"l{i}": np.full(1, NAN) for i in range(9)}
    with pytest.raises(ValueError, match="and 5 more"):
        record.check_finite("t", many)


def test_a_run_is_resumed_on_the_same_content_alone(tmp_path: Path) -> None:
    data, weights, run = tmp_path / "d.npz", tmp_path / "weights", tmp_path / "run"
    run.mkdir()
    weights.mkdir()
    data.write_bytes(b"labels")
    (weights / "a").write_bytes(b"1")

    def now() -> record.FileRecord:
        return record.made_from({"data": data, "weights": weights, "set": "digits"})

    assert "is missing" in record.compare(run, now())[0]
    record.keep(run, now())
    assert record.compare(run, now()) == []
    data.write_bytes(b"sleba1")
    (weights / "b").write_bytes(b"")
    with pytest.raises(ValueError, match="other content of data, weights: the SHA-256 differs"):
        record.compare(run, now())
    with pytest.raises(ValueError, match="other content of set, weights"):
        data.write_bytes(b"labels")
        record.compare(run, record.made_from({"data": data, "weights": weights, "set": "others"}))


def test_what_a_folder_links_to_is_its_content(tmp_path: Path) -> None:
    """Images in `photos/cat`, a link: reading follows it, so its files count."""
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
    (elsewhere / "1.png").write_bytes(b"a cat")
    (folder / "cat").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)  # and no end of it

    def now() -> dict[str, str]:
        return record.made_from({"data": folder}).files

    before = now()
    assert before == now()
    (elsewhere / "1.png").write_bytes(b"a dog")
    assert now() != before


def test_arrays_beside_the_one_that_is_named_are_its_content(tmp_path: Path) -> None:
    """`--data x_train.npy`: its labels lie in `y_train.npy`, and other arrays are not read."""
    for name in ("x_train", "y_train", "x_test", "y_test", "notes"):
        np.save(tmp_path / f"{name}.npy", np.arange(4))
    named = str(tmp_path / "x_train.npy")
    actual = datasets.files_of(named)
    assert [path.stem for path in actual] == ["x_test", "x_train", "y_test", "y_train"]
    before = record.made_from({"data": actual}).files
    np.save(tmp_path / "y_train.npy", np.arange(4)[::-1])
    assert record.made_from({"data": actual}).files != before
    # Any other data are what they are called.
    for other in ("digits", str(tmp_path), str(tmp_path / "data.csv"), str(tmp_path / "no.npy")):
        assert datasets.files_of(other) == (Path(other),)
        paths = (Path(other),)
        assert record.made_from({"data": paths}).files == record.made_from({"data": other}).files


def test_other_versions_are_told(tmp_path: Path) -> None:
    made = record.made_from({})
    record.keep(tmp_path, made)
    newer = made._replace(versions=made.versions | {"jax": "9.9", "extra": "1"})
    actual = record.compare(tmp_path, newer)
    assert [line.split(":")[0] for line in actual] == [
        "extra was absent, is 1",
        f"jax was {made.versions['jax']}, is 9.9",
    ]


@pytest.mark.parametrize("content", ["{}", "[]", '{"digest": ""}', "no JSON"])
def test_a_damaged_record_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "made_from.json").write_text(content)
    with pytest.raises(ValueError, match=r"made_from\.json"):
        record.compare(tmp_path, record.made_from({}))


def test_scores_are_written_in_their_units() -> None:
    r2 = report.Score("r2", "R²", is_share=False)
    assert (report.ACCURACY.shown(0.9061), r2.shown(0.8731)) == ("accuracy 90.6%", "R² 0.873")
    assert (report.ACCURACY.number(0.05, sign=True), r2.number(-0.5, sign=True)) == (
        "+5.0",
        "-0.500",
    )
    assert (
        report.percent(report.interval([0.5]), r2) == "0.500" and r2.number(float("nan")) == "nan"
    )
    assert (report.ACCURACY.axis, r2.axis, r2.unit) == ("accuracy, %", "R²", "")
