"""Settings from the command line and from YAML files: who wins, what is refused, how fast."""

import dataclasses
import importlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml
from bounds import HOSTILE, bounded, is_plain
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import cli
from kdtl_jax.cli import _parser, main, params
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.recipes.yaml_files import as_yaml

Captured = pytest.CaptureFixture[str]


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("out: from-file\nquick: true\n")
    actual = cli.parse(["demo", "--config", str(file), "--out", "from-flag"])
    assert (actual.out, actual.quick, actual.force) == ("from-flag", True, False)


@pytest.mark.parametrize("command", ["distill", "sweep", "transfer"])
def test_quick_changes_only_what_is_not_said(command: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seeds: 7\n")
    words = [command, "--quick", "--epochs", "1", "--config", str(file)]
    plain, quick = cli.parse([command]), cli.parse(words)
    assert (quick.seeds, quick.epochs) == (7, 1)
    later = "source_epochs" if command == "transfer" else "teacher_epochs"
    assert getattr(quick, later) < getattr(plain, later)
    # What is written is what is done, and in a file --quick says the same.
    assert yaml.safe_load(as_yaml(quick, command))[later] == getattr(quick, later)
    file.write_text("quick: true\n")
    assert cli.parse([command, "--config", str(file)]).seeds == 2


BOMB = "a: &a [x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quik: true", r"unknown key 'quik'; did you mean quick"),
        ("config: b.yaml", "unknown key 'config'"),
        (
            "quik: 1\nseeds: 2\nepochz: 3\nzz: 1",
            r"unknown keys 'quik' \(did .*\), 'epochz' \(.* epochs\?\), 'zz'$",
        ),
        ("quick: 3", "quick: expected true or false, got 3"),
        ("out: {a: 1}", "out: expected text, got"),
        ("out: true", "out: expected text, got"),
        ("out: null", "out: expected a value, got null"),
        ("seeds: null", "seeds: expected a value, got null"),
        ("seeds: 0", "seeds: expected 1 or more"),
        ("seeds: 2.5", "seeds: expected a whole number, got 2.5"),
        ("seeds: 2\nseeds: 8", "key 'seeds' is given twice"),
        ("seeds: !!int abc", "not plain YAML data"),
        (f"seeds: {'9' * 5000}", "an integer of 5000 digits"),
        ("seeds: 100000000000", "at most 1000"),
        ("- a\n- b", "expected 'flag: value' lines"),
        ("", "expected 'flag: value' lines, got None"),
        ("a: [", "not plain YAML data"),
        ("alphas: " + "[" * 3000, "nested more than 20 deep"),
        (BOMB, r"aliases \(\*name\) are not read"),
        ("out: !!python/object/apply:os.mkdir [made]", "not plain YAML data"),
        ("command: distill", "written by kdtl distill, not kdtl demo"),
        ("\0", "not plain YAML data"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_configuration_is_wrong_usage(
    text: str, words: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    importlib.import_module("kdtl_jax.recipes.demo")  # its time says nothing
    began = time.process_time()
    assert main(["demo", "--config", "a.yaml"]) == 2
    assert time.process_time() - began < 2
    error = capsys.readouterr().err
    assert re.search(words, error) and "--config a.yaml" in error and error.count("\n") == 1
    assert not Path("made").exists(), "data only: nothing in the file is called"


COMMANDS = [[one.name] for one in cli.COMMANDS if one.name not in ("params", "env")]
COMMANDS += [["params", one.name] for one in params.COMMANDS]
TEXTS = ["x" * 5000, "a\0b", "\udce9", "", "/dev/null:x", "x" * 300 + ".py:f", "=,:|;", "1-2,3=4:5"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_whatever_a_setting_is_given_its_parser_refuses_it_or_not(words: list[str]) -> None:
    actual = cli.find(words)
    assert actual is not None
    for field in dataclasses.fields(actual[2].Settings):
        for value in (*TEXTS, *HOSTILE):
            with bounded():
                try:
                    _parser._value(field, value, "a.yaml: ")
                except UsageError as error:
                    assert is_plain(str(error)), (field.name, str(error)[:500])


def test_an_own_loss_that_is_no_text_is_refused_by_its_form(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("loss: 3\n")
    with pytest.raises(UsageError, match="loss: expected FILE.py:NAME, .* got 3$"):
        cli.parse(["distill", "--config", str(tmp_path / "a.yaml")])


def test_dates_and_words_of_yaml_are_text_where_text_is_meant(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("label: 2024-13-45\nout: 2024-01-01\n")
    actual = cli.parse(["distill", "--config", str(tmp_path / "a.yaml")])
    assert (actual.label, actual.out) == ("2024-13-45", "2024-01-01")


def test_files_too_large_or_missing_are_told(tmp_path: Path, capsys: Captured) -> None:
    assert main(["demo", "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml: No such file or directory" in capsys.readouterr().err
    (tmp_path / "a.yaml").write_bytes(b"#" * 2**17 + b"\n")
    assert main(["demo", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "larger than" in capsys.readouterr().err


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "a.yaml"


# What YAML gives a meaning, between pieces of text.
marks = st.sampled_from(
    ["\n", "  ", "- ", ": ", "? ", "{", "}", "[", "]", ", ", "&a ", "*a", "!!", "!!int ", "!!set ",
     "!!binary ", "!!timestamp ", "!!omap ", "|", ">", "'", '"', "#", "%", "---", "...", "<<", "~",
     "0x", "1:30", "1_0", "9" * 50, ".inf", ".nan", "2024-01-01", "yes", "seeds", "out", "a", "\0",
     "\ufeff", "\t", "\x85"]
)  # fmt: skip


@given(st.text(max_size=60) | st.lists(marks, max_size=25).map("".join))
def test_any_text_is_settings_or_one_line(config: Path, text: str) -> None:
    config.write_bytes(text.encode())
    fields = {"out": None, "seeds": None}
    try:
        with bounded():
            actual = _parser.load(config, fields, "demo")
    except UsageError as error:
        assert is_plain(str(error)) and len(str(error)) < 1000
    else:
        assert actual.keys() <= fields.keys()


def test_a_long_file_takes_no_long_time(config: Path) -> None:
    config.write_text("".join(f"k{i}: 1\n" for i in range(9000)) + "k8999: 2\n")
    with bounded(6), pytest.raises(UsageError, match="the key 'k8999' is given twice"):
        _parser.load(config, {}, "demo")


@dataclass(frozen=True)
class Every:
    """Every kind of field."""

    files: tuple[str, ...] = setting((), "several", positional="*")
    rule: tuple[str, ...] = setting((), "given several times", repeat=True)
    as_: Literal["a", "b"] = setting("a", "a Python keyword")
    share: float = setting(0.5, "a share", least=0, below=1, short="-s")
    count: int | None = setting(None, "none at first", above=0)
    names: tuple[str, ...] = setting(("x",), "names", parse=types.names)
    words: dict[str, float] = setting({}, "many", parse=types.term_weights, many=True)


def every(*argv: str) -> Every:
    module = SimpleNamespace(Settings=Every, EXAMPLES="")
    return _parser.parse("every", "every kind", module, list(argv))[0]


def test_every_kind_of_field_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    assert every() == Every()
    said = every(
        *"f g --rule a=1 --rule b=2 --as b -s 0.25 --count 3 --names a,b".split(),
        *("--words", "kd=1", "task=2"),
    )
    expected = Every(("f", "g"), ("a=1", "b=2"), "b", 0.25, 3, ("a", "b"), {"kd": 1.0, "task": 2.0})
    assert said == expected
    file = tmp_path / "a.yaml"
    file.write_text(as_yaml(expected, "every"))
    assert "as: b" in file.read_text()
    assert every("--config", str(file)) == expected
    assert every("--config", str(file), "--rule", "c=3").rule == ("c=3",), "a flag replaces"
    assert every("--as", "B").as_ == "b"
    mixed = every("f", "--debug", "g", "--share", "0.25", "h")
    assert mixed == Every(("f", "g", "h"), share=0.25), "files stand between flags"
    assert every("--debug", "--", "-f").files == ("-f",)
    dashes = every("f", "--share", "0.25", "g", "--", "-h", "--share")
    assert dashes == Every(("f", "g", "-h", "--share"), share=0.25)
    file.write_text("as: B")
    assert every("--config", str(file)).as_ == "b"
    file.write_text("rule: 3")
    with pytest.raises(UsageError, match="rule: expected text, got 3"):
        every("--config", str(file))
    with pytest.raises(UsageError, match="unknown argument --quick"):  # it has no such setting
        cli.parse(["env", "--quick"])
    file.write_text("teacher_weights: 3")
    with pytest.raises(UsageError, match="teacher_weights: expected text, got 3"):
        cli.parse(["distill", "--config", str(file)])
    for argv, message in (
        (["--share", "1"], "--share: expected 0 or more, below 1, got 1"),
        (["--share", "nan"], "--share/-s: expected a finite number, got 'nan'"),
        (["--share", "half"], "--share/-s: expected a number, got 'half'"),
        (["--count", "0"], "--count: expected above 0, got 0"),
        (["--as", "c"], "--as: expected one of a, b, got 'c'"),
        (["--names", ","], "--names: expected at least one name"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            every(*argv)


@pytest.mark.parametrize(
    ("parse", "value", "found"),
    [
        (types.method_names, "KD,Rkd-Angle", ("kd", "rkd_angle")),
        (types.names, ["a", "b", "a"], ("a", "b")),
        (types.numbers, 3, (3.0,)),
        (types.numbers, "1,2e-3", (1.0, 2e-3)),
        (types.term_weights, {"kd": {"kd": 0.5}, "task": 0.2}, {"kd.kd": 0.5, "task": 0.2}),
        (types.layer_pairs, "a:b,c=d", (("a", "b"), ("c", "d"))),
        (types.layer_pairs, {"a": "b"}, (("a", "b"),)),
        (types.layer_pairs, [["a", "b"]], (("a", "b"),)),
        (types.mesh_sizes, {"data": 2}, {"data": 2}),
        (types.augmentations, "crop=1,flip", ("crop=1", "flip")),
        (types.byte_size, "2GB", 2 * 10**9),
        (types.byte_size, "500 MiB", 500 * 10**6),
        (types.class_range, "0-4", "0-4"),
    ],
)
def test_texts_and_yaml_values_become_settings(parse: Any, value: Any, found: Any) -> None:
    assert parse(value) == found and parse(found) == found


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        (types.names, 3),
        (types.names, ""),
        (types.names, [1]),
        (types.number, "inf"),
        (types.number, True),
        (types.positive_numbers, "0,1"),
        (types.term_weights, "kd=-1"),
        (types.term_weights, "kd=much"),
        (types.term_weights, "kd=1,kd=2"),
        (types.layer_pairs, "hidden_0"),
        (types.mesh_sizes, "data=x"),
        (types.mesh_sizes, "rows=2"),
        (types.augmentations, "blur"),
        (types.augmentations, "flip=2"),
        (types.byte_size, "much"),
        (types.byte_size, True),
        (types.class_range, "x"),
    ],
)
def test_what_makes_no_sense_says_what_is_expected(parse: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|is not|given twice"):
        parse(value)
