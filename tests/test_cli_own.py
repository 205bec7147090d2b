"""`kdtl distill` with a model, a loss and a method of one's own, from files named by the user."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import SHORT, kdtl, results, write_data

from kdtl_jax import datasets
from kdtl_jax.interop import model_files
from kdtl_jax.recipes import _imports, _models, _user_code

Captured = pytest.CaptureFixture[str]
MODEL = """
import jax
from flax import nnx

class Net(nnx.Module):
    def __init__(self, din, classes, *, rngs):
        self.hidden = nnx.Linear(din, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        hidden = jax.nn.relu(self.hidden(x))
        return {"hidden": hidden, "logits": self.out(self.dropout(hidden))}
"""
SHARE = "SHARE = 0.5\n"
LOSS = """
import jax.numpy as jnp
from my_share import SHARE
from kdtl_jax import losses, methods

def squares(student_logits, teacher_logits):
    return jnp.mean((student_logits - teacher_logits) ** 2, axis=-1)

def halves(inputs):
    return {"half": SHARE * squares(inputs.student["logits"], inputs.teacher["logits"])}

def averaged(student_logits, teacher_logits):
    return squares(student_logits, teacher_logits).mean()

def wrong(inputs):
    return inputs.nothing

def twice(setup):
    def terms(inputs):
        return {"twice": 2 * squares(inputs.student["logits"], inputs.teacher["logits"])}
    return methods.method(setup, terms, {"task": 0.5, "twice": 0.25})

def kd(student_logits, teacher_logits):
    return squares(student_logits, teacher_logits)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_data(folder / "small.npz")
    (folder / "my_model.py").write_text(MODEL)
    (folder / "my_loss.py").write_text(LOSS)
    (folder / "my_share.py").write_text(SHARE)
    return folder


def words(room: Path, out: Path, *more: Any) -> list[Any]:
    few = [
        "--seeds",
        2,
        "--epochs",
        2,
        "--methods",
        "halves",
        "--student",
        f"{room}/my_model.py:Net",
    ]
    own = [f"--loss={room}/my_loss.py:{name}" for name in ("squares", "halves")]
    own += [f"--method={room}/my_loss.py:twice", "--loss-weights", "halves.half=0.25"]
    return ["distill", "--data", room / "small.npz", *SHORT, *few, *own, "--out", out, *more]


def test_a_model_a_loss_and_a_method_of_ones_own(room: Path, capsys: Captured) -> None:
    out = room / "run"
    assert kdtl(*words(room, out)) == 0
    rows = {row["method"]: row for row in results(out)["rows"]}
    assert set(rows) == {"teacher", "student_alone", "halves", "squares", "twice"}
    [programs] = [note for note in results(out)["notes"] if note.startswith("Programs: ")]
    assert "advance (5)" in programs and "<lambda>" not in programs
    assert rows["squares"]["settings"]["weights"] == {"task": 1.0, "squares": 1.0}
    assert rows["halves"]["settings"]["weights"] == {"task": 1.0, "half": 0.25}
    assert rows["twice"]["settings"]["weights"] == {"task": 0.5, "twice": 0.25}
    assert rows["squares"]["settings"]["paper"] == "my_loss.py"
    # Used by the command with its file named, and in Python with the class.
    student, row = out / "students" / "twice.safetensors", rows["twice"]
    scores = room / "scores.json"
    source = f"{room}/my_model.py:Net"
    assert kdtl("evaluate", student, room / "small.npz", "--model", source, "--out", scores) == 0
    expected = row["test_accuracy"]["values"][row["settings"]["file_seed"]]
    assert json.loads(scores.read_text())["accuracy"] == pytest.approx(expected)
    test = datasets.read_splits(str(room / "small.npz")).test
    model = model_files.load(student, model=_imports.imported(source))
    assert np.mean(model.predict(test.inputs).argmax(-1) == test.labels) == pytest.approx(expected)
    capsys.readouterr()
    assert kdtl("predict", student, room / "small.npz") == 1
    assert "a model of your own. Pass it: model= here, --model" in capsys.readouterr().err
    assert kdtl("predict", student, room / "small.npz", "--model", f"{room}/my_loss.py:kd") == 2
    # What the files hold is part of the run.
    (room / "my_loss.py").write_text(LOSS.replace("SHARE *", "0.6 *"))
    assert kdtl(*words(room, out, "--resume")) == 1
    errors = capsys.readouterr().err
    assert "other content of loss halves, loss squares, method twice" in errors
    (room / "my_loss.py").write_text(LOSS)
    (room / "my_share.py").write_text("SHARE = 0.6\n")
    assert kdtl(*words(room, out, "--resume")) == 1
    assert "other content of loss halves, loss squares" in capsys.readouterr().err
    (room / "my_share.py").write_text(SHARE)
    assert kdtl(*words(room, out, "--resume")) == 0


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--loss", "my_loss.py:averaged", "must be one value per example, [8], got []"),
        ("--loss", "my_loss.py:wrong", "my_loss.py, line 16: AttributeError: "),
        ("--loss", "my_loss.py:nothing", "has no 'nothing'. It has squares, halves"),
        ("--loss", "my_loss.py:kd", "there is already a method called 'kd'. Rename yours"),
        ("--loss", "other.py:kd", "other.py: no such file"),
        ("--loss", "broken.py:kd", "broken.py, line 2: NameError: name 'x' is not defined"),
        ("--loss", "syntax.py:kd", "syntax.py, line 1: SyntaxError"),
        ("--loss", "my_loss.py", "expected FILE.py:NAME"),
        ("--method", "my_loss.py:squares", "build(setup) -> methods.Method; it takes ['student_l"),
        ("--student", "my_loss.py:kd", "kd needs student_logits, teacher_logits"),
        ("--student", "my_model:Net", "is not a model"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    room: Path, flag: str, text: str, message: str, capsys: Captured
) -> None:
    (room / "broken.py").write_text("import math\nx + 1\n")
    (room / "syntax.py").write_text("def kd(:\n")
    given = [flag, f"{room}/{text}", "--out", room / "refused"]
    assert kdtl("distill", "--data", room / "small.npz", *SHORT, *given) in (1, 2)
    output = capsys.readouterr().err.strip()
    assert message in output.splitlines()[-1] and output.count("kdtl distill:") == 1
    assert not (room / "refused").exists()


MISTAKES = """
import jax, jax.numpy as jnp
from flax import nnx
from kdtl_jax import methods

def misspelled(student_logits, teacher_logits):
    return jnp.squared(student_logits - teacher_logits).mean(axis=-1)

def of_ten(student_logits, teacher_logits):
    return ((student_logits - teacher_logits) ** 2) @ jnp.ones(10)

def concrete(student_logits, teacher_logits):
    return student_logits[:, 0] if student_logits.max() > 0 else student_logits[:, 1]

def no_gradient(student_logits, teacher_logits):
    shape = jax.ShapeDtypeStruct(student_logits.shape[:1], jnp.float32)
    return jax.pure_callback(lambda x: x[:, 0], shape, student_logits)

def other_term(setup):
    def terms(inputs):
        return {"close": inputs.student["logits"][:, 0]}
    return methods.method(setup, terms, {"task": 1.0, "near": 1.0})

def no_feature(setup):
    def terms(inputs):
        return {"far": inputs.teacher["hidden_7"][:, 0]}
    return methods.method(setup, terms, {"task": 1.0, "far": 1.0})

class Training(nnx.Module):
    def __init__(self, din, classes, *, rngs):
        self.norm = nnx.BatchNorm(din, rngs=rngs)
        self.out = nnx.Linear(din, classes, rngs=rngs)

    def __call__(self, x):
        hidden = self.norm(x)
        return self.out(hidden if self.norm.use_running_average else self.nothing(hidden))

class Probabilities(nnx.Module):
    def __init__(self, din, classes, *, rngs):
        self.out = nnx.Linear(din, classes, rngs=rngs)

    def __call__(self, x):
        return jax.nn.softmax(self.out(x))

class Logarithms(Probabilities):
    def __call__(self, x):
        return jax.nn.log_softmax(self.out(x))
"""


@pytest.mark.parametrize(
    ("flag", "name", "message", "is_read"),
    [
        ("--loss", "misspelled", "line 7: AttributeError: module 'jax.numpy' has", False),
        ("--loss", "of_ten", "line 10: TypeError: ", True),
        ("--loss", "concrete", "line 13: TracerBoolConversionError", True),
        ("--loss", "no_gradient", "Pure callbacks do not support JVP", True),
        ("--method", "other_term", "'near'", True),
        ("--method", "no_feature", 'line 26: KeyError: "the terms read hidden_7', True),
        ("--method", "misspelled", "it takes ['student_logits', 'teacher_logits']", False),
        ("--student", "Training", "line 36: AttributeError", True),
        ("--teacher", "Training", "line 36: AttributeError", True),
        ("--layers", "hidden_0:dense_0,hidden_9:dense_0", "student has no tap 'hidden_9'", False),
        ("--layers", "hidden_0:dense_7", "teacher has no tap 'dense_7'. It has dense_0,", False),
    ],
)
def test_what_shapes_tell_is_known_before_training(
    tmp_path: Path, flag: str, name: str, message: str, is_read: bool, capsys: Captured
) -> None:
    """Without a teacher that was trained for nothing, and if possible before the data are read."""
    file, data = tmp_path / "mine.py", write_data(tmp_path / "small.npz")
    file.write_text(MISTAKES)
    named = name if flag == "--layers" else f"{file}:{name}"
    given = ["--data", data, *SHORT, flag, named, "--out", tmp_path / "run"]
    assert kdtl("distill", *given) in (1, 2)
    errors = capsys.readouterr().err
    assert message in errors.strip().splitlines()[-1], errors
    assert ("targets: " in errors) == is_read and "teacher: epoch" not in errors
    assert not (tmp_path / "run").exists()


def test_logits_that_are_probabilities_are_told(tmp_path: Path, capsys: Captured) -> None:
    """Before the training, which the loss prevents."""
    file, data = tmp_path / "mine.py", write_data(tmp_path / "small.npz")
    file.write_text(MISTAKES)
    given = ["--data", data, *SHORT, "--loss", f"{file}:of_ten", "--out", tmp_path / "run"]
    for flag, other in (("--teacher", "--student"), ("--student", "--teacher")):
        words = [flag, f"{file}:Probabilities", other, f"{file}:Logarithms"]
        assert kdtl("distill", *given, *words) == 1
        output = [x for x in capsys.readouterr().err.splitlines() if "are probabilities" in x]
        assert len(output) == 1 and output[0].startswith(f"note: {flag} {file}:Probabilities: ")


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ("jax.nn.softmax(self.out(x))", "classes", "every row sums to 1. .* a softmax"),
        ("1 / (1 + jax.numpy.exp(-self.out(x)))", "classes", "none is above 1. .* a softmax"),
        ("jax.nn.sigmoid(self.out(x))", "labels", "none is above 1. .* a sigmoid"),
        ("jax.nn.sigmoid(self.out(x))", "numbers", "outputs lie between 0 and 1. .* standardized"),
        ("self.out(x)", "labels", ""),
        ("self.out(x)", "numbers", ""),
        ("0 * self.out(x)", "labels", ""),
    ],
)
def test_what_a_last_layer_says(
    body: str, kind: Any, says: str, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MISTAKES.split("class Log")[0].replace("jax.nn.softmax(self.out(x))", body))
    inputs, text = (
        np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32),
        f"{file}:Probabilities",
    )
    net = _models.make_network(text, 2, jax.numpy.asarray(inputs[:1]))
    data = datasets.Dataset("x", inputs, inputs, 2, form=datasets.Preprocessing(kind))
    _user_code.check_logits("--teacher", text, net, data)
    errors = capsys.readouterr().err
    assert re.search(says, errors) and bool(errors) == bool(says)
    assert not says or errors.startswith(f"note: --teacher {text}: ")
