"""Sentence encoders distilled on plain text: fidelity by hand, and a whole run on a tiny folder."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import cli, language, models, train
from kdtl_jax.interop import _hf_encoders, huggingface, linen, naming, safetensors
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _sentence_training as training
from kdtl_jax.recipes import sentences
from kdtl_jax.run import checkpoint

WORDS = ("cat", "dog", "sun", "moon", "runs", "sees", "loves", "quickly", "house", "river")
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 3,
}


def write_encoder(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="the hub extra is not installed")
    module = models.Bert(20, 8, 3, 2, 12, 16)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(linen.model(module).init)(jax.random.key(0), tokens).params
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {
        name: np.asarray(x) for name, x in naming.to_torch(params, _hf_encoders.bert.body).items()
    }
    safetensors.save(folder / "model.safetensors", tensors)
    vocabulary = {word: i for i, word in enumerate(("[UNK]", "[CLS]", "[SEP]", "[PAD]", *WORDS))}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    whole.save(str(folder / "tokenizer.json"))
    return folder


def write_text(path: Path, count: int = 200) -> Path:
    rng = np.random.default_rng(0)
    lines = (" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(count))
    path.write_text("\n".join(lines) + "\n\nshort\n", encoding="utf-8")
    return path


def test_lines_are_distinct_and_not_tiny(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("  a line of some words \n\nshort\na line of some words\nanother line of it\n")
    assert sentences.read_lines(path) == ["a line of some words", "another line of it"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        sentences.read_lines(path)


def test_parts_are_disjoint_padded_and_reproducible():
    ids = [[1, 10 + i, 2][: 2 + i % 2] for i in range(40)]
    sizes = {"validation": 8, "test": 12, "batch_size": 16, "padding": 7}
    parts = sentences.split(ids, **sizes)
    assert [len(part["tokens"]) for part in parts] == [20, 8, 12]
    seen = sorted(int(row[1]) for part in parts for row in part["tokens"])
    assert seen == list(range(10, 50))
    for part in parts:
        np.testing.assert_array_equal(part["tokens"][~part["mask"]], 7)
        assert part["mask"].sum() == sum(2 + int(row[1]) % 2 for row in part["tokens"])
    again = sentences.split(ids, **sizes)
    np.testing.assert_array_equal(again.test["tokens"], parts.test["tokens"])
    with pytest.raises(ValueError, match="40 distinct lines, but 20 are held out.*needs 21"):
        sentences.split(ids, **{**sizes, "batch_size": 21})


def test_fidelity_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sentences, "NEIGHBORS", 1)
    angles = np.array([0.0, 0.2, 1.0, 1.3])  # nearest: 0-1, 2-3
    teacher = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    same = sentences.fidelity(teacher, teacher)
    np.testing.assert_allclose(same.cosine, 1)
    np.testing.assert_array_equal(same.agreement, 1)
    moved = angles + np.array([0.0, 0.0, -0.65, 0.0])  # line 2 comes to 0.35: 0-1, 1-2, 3-2
    student = np.stack([np.cos(moved), np.sin(moved)], axis=1)
    actual = sentences.fidelity(student, teacher)
    np.testing.assert_allclose(actual.cosine, np.cos([0, 0, 0.65, 0]), atol=1e-12)
    np.testing.assert_array_equal(actual.agreement, [1, 0, 0, 1])
    student[1] = np.nan
    assert np.isnan(sentences.fidelity(student, teacher).agreement).all()


def test_embeddings_do_not_depend_on_the_chunks():
    rng = np.random.default_rng(0)
    part = {"tokens": rng.integers(0, 9, (7, 3)), "mask": np.ones((7, 3), np.bool_)}

    def embed(params: float, inputs: dict[str, np.ndarray]) -> jax.Array:
        return params * jnp.asarray(inputs["tokens"], jnp.float32)

    whole = sentences.embeddings(embed, 2.0, part, chunk=7)
    np.testing.assert_array_equal(whole, 2 * part["tokens"])
    np.testing.assert_array_equal(sentences.embeddings(embed, 2.0, part, chunk=3), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_from_a_folder_and_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    encoder = write_encoder(tmp_path / "encoder")
    text, out = write_text(tmp_path / "lines.txt"), tmp_path / "run"
    more = ["--layers", "0,2", "--steps", "60", "--held-out", "40", "--max-length", "12"]
    command = ["sentences", "--encoder", str(encoder), "--text", str(text)]
    assert cli.main([*command, "--out", str(out), "--log", "csv", *more]) == 0
    assert "copied_distilled" in (out / "metrics.csv").read_text()
    printed = capsys.readouterr().out
    assert "layers_{0,1}/attention/query/kernel" in printed and "sentences/s" in printed
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["teacher", "copied_untrained", "copied_distilled", "random_distilled"]
    cosine = {name: row["settings"]["mean_cosine"] for name, row in rows.items()}
    assert cosine["teacher"] == 1 and rows["teacher"]["test_accuracy"]["mean"] == 1
    assert cosine["copied_distilled"] > cosine["copied_untrained"]
    assert cosine["copied_distilled"] > cosine["random_distilled"]
    assert rows["copied_distilled"]["parameters"] < rows["teacher"]["parameters"]
    assert all(row["settings"]["sentences_per_second"] > 0 for row in rows.values())
    assert results["data"]["test"] == 40 and results["data"]["tokens_per_line"] <= 12
    assert {"report.html", "config.yaml", "env.json", "metrics.jsonl"} <= {
        entry.name for entry in out.iterdir()
    }
    # The student is a folder that the importer, and PyTorch's libraries, read.
    student = huggingface.load(out / "student")
    assert student.module == huggingface.load(encoder).module.clone(layers=2)
    words = language.tokenizer(out / "student")
    assert words.framed("cat sees dog", 4) == [1, 4, 9, 2]
    assert words.encode("cat sees dog") == [4, 9, 5] and words.framed("cat", 4) == [1, 4, 2]

    # Students that diverge are shown as such, and what was finished is written all the same.
    def diverged(step: Any, start: Any, *rest: Any) -> Any:
        curve = {"epoch": [], "validation_accuracy": []}
        return training.Distilled(start, curve, 1.0, "step 3 gave values that are not finite")

    monkeypatch.setattr(training, "distill_student", diverged)
    assert cli.main([*command, "--out", str(out), *more, "--resume"]) == 1
    assert "every seed diverged" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    measured = {row["method"]: row["test_accuracy"]["mean"] for row in results["rows"]}
    assert measured["teacher"] == 1 and measured["copied_untrained"] is not None
    assert measured["copied_distilled"] is measured["random_distilled"] is None
    assert any("copied_distilled, seed 0 diverged" in note for note in results["notes"])


@pytest.mark.usefixtures("standard_promotion")
def test_a_stopped_student_is_resumed_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokens = np.random.default_rng(0).integers(0, 9, (20, 3)).astype(np.int32)
    lines = {"tokens": tokens}
    settings = sentences.Settings(steps=8, batch_size=4, checks=2, save_every=2)

    def model(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> Any:
        return {"x": params["w"][inputs["tokens"]]}, model_state

    def terms(x: Inputs) -> dict[str, Any]:
        return {"mse": jnp.square(x.student["x"] - x.teacher["x"]).mean(axis=1)}

    step = train.make_step(model, terms, {"mse": 1.0}, training.optimizer(settings), teacher=model)

    def distilled(folder: str, *, resume: bool = False, start: float = 0.0) -> Any:
        messages: list[str] = []
        where = tmp_path / folder
        own = dataclasses.replace(settings, resume=resume)
        return training.distill_student(
            step, {"w": jnp.full(9, start)}, {"w": jnp.arange(9.0)}, lines, jax.random.key(0),
            lambda params: float(params["w"].sum()),
            training.StudentRun(
                where, "run", "kind_0", own, messages.append, lambda done, total: None
            ),
        )  # fmt: skip

    params, curve, _, how = distilled("whole")
    assert not how
    lost = distilled("lost", start=1e30)
    assert lost.diverged == "step 0 gave values that are not finite in 'loss'"
    np.testing.assert_array_equal(lost.params["w"], np.full(9, np.float32(1e30)))
    saved: list[int] = []
    save = checkpoint.save

    def stopping(checkpoints: Any, step: int, *rest: Any) -> None:
        save(checkpoints, step, *rest)
        saved.append(step)
        if len(saved) == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(checkpoint, "save", stopping)
        distilled("run")
    assert saved[:2] == [2, 4] and 8 not in saved
    again, actual, *_ = distilled("run", resume=True)
    np.testing.assert_array_equal(again["w"], params["w"])
    assert actual == curve and curve["epoch"] == [4.0, 8.0]
    assert curve["validation_accuracy"][0] != curve["validation_accuracy"][1]


def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["sentences", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert "name --encoder and --text" in capsys.readouterr().err
    named = ["--encoder", str(tmp_path), "--text", str(tmp_path)]
    assert cli.main([*command, *named, "--resume"]) == 2
    assert "--resume: there is no run in" in capsys.readouterr().err
    assert cli.main([*command, "--layers", "first"]) == 2
    assert "expected layers as in 1,3,5" in capsys.readouterr().err
    text = write_text(tmp_path / "lines.txt", 3)
    named = [*command, "--encoder", str(tmp_path), "--text", str(text)]
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert cli.main(named) == 1
    assert "pip install 'kdtl_jax[hub]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("tokenizers", reason="the hub extra is not installed")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        language.tokenizer(tmp_path)
