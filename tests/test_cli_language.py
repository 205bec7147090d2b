"""`kdtl language`: from a text to students in folders of their own; what it refuses; resuming."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kdtl_jax import cli, language, trees
from kdtl_jax.interop import decoders, pruning
from kdtl_jax.recipes import _language_models, _language_text, _language_training
from kdtl_jax.run import loop

pytestmark = pytest.mark.usefixtures("standard_promotion")
TINY = [
    "--teacher-shape", "layers=2,width=8,heads=2", "--teacher-steps", "3", "--steps", "4",
    "--batch-size", "4", "--length", "12", "--prompt", "4", "--samples", "1", "--checks", "1",
    "--held-out", "0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    return file


@pytest.mark.slow
def test_a_run_writes_students_that_open_and_what_was_measured(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    narrow, pieces = pruning.narrow, []

    def spied(source: Any, *, tokens: Any, **sizes: Any) -> Any:
        pieces.append(tokens)
        return narrow(source, tokens=tokens, **sizes)

    monkeypatch.setattr(pruning, "narrow", spied)
    words = ["language", *TINY, "--data", str(text), "--method", "opd,qad", "--out", str(out)]
    words += ["--teacher-cache", str(tmp_path / "cache"), "--cached", "top_k=8"]  # for qad
    words += ["--pruned", "--shape", "layers=1,width=8,heads=1"]
    assert cli.main([*words, "--log", "csv"]) == 0
    table = (out / "metrics.csv").read_text()
    assert "eval/forward_kl" in table and {"teacher", "opd", "qad"} <= {
        line.split(",")[0] for line in table.splitlines()
    }
    actual = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in actual["rows"]}
    assert list(rows) == ["teacher", "start", "opd", "qad"]
    assert rows["teacher"]["measures"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    bits = {name: row["measures"]["bits_per_byte"] for name, row in rows.items()}
    assert bits["opd"] < bits["start"] + 0.5 and bits["qad"] < bits["start"] + 0.5, bits
    assert list(actual["samples"][0]["continuations"])[0] == "Teacher"
    assert "Side by side" in (out / "report.html").read_text()
    opened = decoders.load(out / "opd").model.config
    assert (opened.layers, opened.heads, opened.head_width) == (1, 1, 4)
    # First whether it can be done, by weights; then by what matters on the text.
    assert pieces[0] is None and bytes(pieces[1][0].tolist()) == b"the quick br"
    assert (out / "opd" / "tokenizer.json").is_file()
    # The quantized student is written as it computes: whole multiples of a scale per column.
    kernel = np.asarray(decoders.load(out / "qad").params["layers_0"]["mlp"]["up"]["kernel"])
    steps = 7 * kernel / np.abs(kernel).max(axis=0)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert cli.main(words) == 1  # the folder is taken


def test_a_lora_is_trained_beside_the_weights_it_starts_from() -> None:
    source = _language_models.initialize(
        {"layers": 1, "width": 8, "heads": 2}, 260, 256, jax.random.key(0)
    )
    result = _language_models.make_student(
        source, dtype=None, lora=2, quantize=None, key=jax.random.key(1)
    )
    trained = trees.mask(result.start, result.trainable)
    assert jax.tree.leaves(trained.adapter) and all(jax.tree.leaves(trained.adapter))
    assert not any(jax.tree.leaves(trained.base))
    for ours, theirs in zip(
        jax.tree.leaves(result.weights(result.start)), jax.tree.leaves(source.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_cache_serves_students_whose_tables_have_padding(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = _language_models.initialize(
        {"layers": 1, "width": 8, "heads": 2}, 260, 256, jax.random.key(0)
    )
    _language_models.write_folder(tmp_path / "teacher", teacher.params, teacher, None)
    words = ["language", *TINY, "--data", str(text), "--teacher", str(tmp_path / "teacher")]
    words += ["--method", "kd,sft", "--teacher-cache", str(tmp_path / "cache")]
    words += ["--cached", "dense"]
    words += ["--steps", "1", "--samples", "0", "--out", str(tmp_path / "out")]
    wide = ["--pruned", "--shape", "layers=1,width=16,heads=2"]
    assert cli.main([*words, *wide]) == 2
    assert not (tmp_path / "cache").exists()  # refused before the teacher answers all rows
    # A student that diverges at once does not cost the others' results.
    whole = _language_training.train_model

    def diverging(name: str, learner: Any, state: Any, *rest: Any, **options: Any) -> Any:
        if name == "sft":
            state = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
        return whole(name, learner, state, *rest, **options)

    monkeypatch.setattr(_language_training, "train_model", diverging)
    assert cli.main(words) == 0
    actual = json.loads((tmp_path / "out" / "results.json").read_text())
    kd, sft = actual["rows"][-2:]
    assert kd["title"] == "Distillation on the data" and sft["title"] == "Fine-tuning (diverged)"
    assert "step 0 gave values that are not finite" in sft["trained"]["diverged"]
    assert sft["measures"]["bits_per_byte"] is None and "sft diverged" in actual["notes"][-1]
    assert decoders.load(tmp_path / "out" / "kd").model.config.vocabulary == 260


def test_a_prompt_of_the_report_is_of_one_text() -> None:
    inputs = {"tokens": [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]], "segments": [[1, 1, 2, 2, 3], [0] * 5]}
    rows = _language_text.Rows({name: np.asarray(x) for name, x in inputs.items()})
    tokens, is_read = _language_training.prompts(rows, 2, 4)
    assert tokens[0][is_read[0]].tolist() == [7, 8] and not is_read[1].any()


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["language", *TINY, "--data", str(text), "--method", "gkd", "--lora", "2", "--out"]
    assert cli.main([*words, str(tmp_path / "straight")]) == 0
    whole = _language_training.loop.run

    out = str(tmp_path / "stopped")
    for stopped in (3, 4):  # steps of the teacher's training, and of the student's

        def short(*args: Any, stopped: int = stopped, **options: Any) -> Any:
            if options["steps"] != stopped:
                return whole(*args, **options)
            whole(*args, **{**options, "steps": 2})
            raise SystemExit(143)

        with monkeypatch.context() as patched:
            patched.setattr(_language_training.loop, "run", short)
            again = ["--resume"] if stopped == 4 else []
            assert cli.main([*words, out, *again]) == 143
    assert cli.main([*words, out, "--resume"]) == 0
    one, two = (decoders.load(tmp_path / name / "gkd").params for name in ("straight", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # What the teacher's part of the run leaves alone: the student's lines before it was stopped.
    one, two = (
        [x for x in loop.read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in x]
        for name in ("straight", "stopped")
    )
    assert one == two and len(one) == 3 + 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "12"], "--prompt must be below --length"),
        (["--layers", "2"], "--layers 2: the teacher has 2 layers, 0 to 1"),
        (["--method", "gdk"], "gdk"),
        (["--layers", "0", "--shape", "layers=1,width=8,heads=2"], "one of --student"),
        (["--shape", "layers=1"], "expected layers=N"),
        (["--batch-size", "4000"], "rows to learn from"),
        (["--microbatches", "3"], "must divide"),
        (["--method", "sft", "--teacher-cache", "x"], "--teacher-cache serves kd and qad"),
        (["--pruned"], "--pruned needs the --shape"),
        (["--pruned", "--shape", "layers=3,width=8,heads=2"], "the teacher has 2"),
        (["--cached", "top_k"], "expected dense, top_k=N or draws=N"),
    ],
)
def test_settings_that_make_no_sense_are_told_in_one_line(
    words: list[str], says: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["language", *TINY, "--data", str(text), "--out", str(tmp_path / "out"), *words]
    assert cli.main(given) == 2
    output = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in output and output.startswith("kdtl language: ")


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257,
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "factor", "says"),
    [
        (100, 1.0, "the teacher has 100 rows of tokens, its tokenizer 257 tokens"),
        (257, np.nan, "gives the held-out text nan bits per byte"),
    ],
)
def test_a_teacher_that_cannot_answer_is_refused_before_anything_is_trained(
    rows: int,
    factor: float,
    says: str,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
):
    sizes = {"vocab_size": rows, "max_position_embeddings": 8}
    made = decoders.initialized({**LLAMA, **sizes}, jax.random.key(0))
    params = jax.tree.map(lambda x: factor * x, made.params)
    decoders.save(tmp_path / "teacher", params, made.rules, config=made.config)
    language.write_byte_tokenizer(tmp_path / "teacher")
    words = ["--data", str(text), "--teacher", str(tmp_path / "teacher")]
    out = tmp_path / "out"
    assert cli.main(["language", *TINY, *words, "--out", str(out)]) == 2
    *lines, message = capsys.readouterr().err.strip().splitlines()
    assert says in message and message.startswith("kdtl language: ")
    if rows == 257:
        assert (
            "the teacher was made for 8 positions (its config.json), but rows have 12" in lines[-1]
        )
    assert not (out / "kd").exists()


def test_positions_that_a_model_was_made_for() -> None:
    known = _language_models.trained_length
    assert known({}) == known({"max_position_embeddings": None, "rope_scaling": None}) == np.inf
    assert known({"max_position_embeddings": 64}) == 64
    for scaling, whole in (({"type": "linear"}, 128), ({"rope_type": "llama3"}, 64)):
        scaling = {**scaling, "factor": 2.0}
        assert known({"max_position_embeddings": 64, "rope_scaling": scaling}) == whole


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("layers=2,width=8", r"expected layers=N.*got 'layers=2,width=8'"),
        ("layers=0,width=8,heads=2", "whole numbers above 0, got 'layers=0"),
        ("layers=2,width=7,heads=2", "even multiple of the heads, got 'layers=2,width=7"),
        ("layers=2,width=16,heads=4,key_heads=3", "a multiple of the key_heads, got .*heads=3'"),
    ],
)
def test_a_wrong_shape_is_shown_as_given(shape: str, message: str):
    with pytest.raises(ValueError, match=message):
        _language_models.parse_shape(shape)
