"""`kdtl` as a whole: help, suggestions, exit codes, configuration files, and the demo twice.

Each command's own behavior is tested in test_cli_<command>.py.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

import kdtl_jax
from kdtl_jax import cli
from kdtl_jax.cli import _config, _output, env, main, params

Captured = pytest.CaptureFixture[str]
ALL = [[c.name] for c in cli.COMMANDS if c.name != "params"]
ALL += [["params", c.name] for c in params.COMMANDS]
NAMES = [" ".join(words) for words in ALL]


def examples(text: str) -> list[list[str]]:
    """The command lines in a help text, lines that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.removeprefix("Example:").strip() for line in joined.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("kdtl ")]


def helped(words: list[str], capsys: Captured) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: Captured) -> None:
    text = helped([], capsys)
    for command in cli.COMMANDS:
        assert re.search(rf"^ +{command.name} +{re.escape(command.summary[:40])}", text, re.M)
    assert "Start with: kdtl demo" in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kdtl_jax {kdtl_jax.__version__}\n"


@pytest.mark.parametrize("words", ALL, ids=NAMES)
def test_every_command_has_examples_that_parse(words: list[str], capsys: Captured) -> None:
    text = helped(words, capsys)
    flags = re.findall(r"^  (--[a-z0-9-]+)(?: [^\n]*?)?(?:  +|\n +)(\S.*)", text, re.M)
    assert {"--config", "--print-config"} <= {flag for flag, _ in flags}, "and say what flags do"
    found = examples(text)
    assert found, "an example"
    for argv in found:
        assert argv[: len(words)] == words
        if "--config" not in argv:  # its file is made up
            args = cli.parse(argv)
            assert args.command == words[0]


def test_the_help_of_all_actions_has_an_example(capsys: Captured) -> None:
    (argv,) = examples(helped(["params"], capsys))
    assert cli.parse(argv).command == "params"


@pytest.mark.parametrize("words", ALL, ids=NAMES)
def test_printed_settings_read_back(words: list[str], tmp_path: Path, capsys: Captured) -> None:
    argv = next(a for a in examples(helped(words, capsys)) if "--config" not in a)
    assert main([*argv, "--print-config"]) == 0
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    assert settings["command"] == words[0]
    (tmp_path / "a.yaml").write_text(text)
    assert main([*words, "--config", str(tmp_path / "a.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    # Every flag is a key.
    keys = {flag.replace("-", "_") for flag in re.findall(r"^  --([a-z0-9-]+)", text, re.M)}
    assert keys <= settings.keys() | {"help", "config", "print_config"}


def test_flags_win_over_the_file_and_the_file_over_defaults(
    tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("out: from-file\nquick: true\n")
    args = cli.parse(["demo", "--config", str(file), "--out", "from-flag"])
    assert (args.out, args.quick, args.force) == ("from-flag", True, False)


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
    assert yaml.safe_load(_config.dump(quick))[later] == getattr(quick, later)
    file.write_text("quick: true\n")
    assert cli.parse([command, "--config", str(file)]).seeds == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quik: true", r"unknown key 'quik'; did you mean quick"),
        ("config: b.yaml", "unknown key 'config'"),
        ("quick: 3", "quick: expected true or false, got 3"),
        ("out: {a: 1}", "out: expected one value"),
        ("out: true", "out: expected one value"),
        ("- a\n- b", "expected 'flag: value' lines"),
        ("", "expected 'flag: value' lines, got None"),
        ("a: [", "not YAML data"),
        ("out: !!python/object/apply:os.mkdir [made]", "not YAML data"),
        ("\0", "not YAML data"),
    ],
)
def test_bad_configuration_is_wrong_usage(
    text: str, words: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    assert main(["demo", "--config", "a.yaml"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and "--config a.yaml" in error
    assert not Path("made").exists(), "data only: nothing in the file is called"


def test_a_missing_configuration_is_wrong_usage(capsys: Captured) -> None:
    assert main(["demo", "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name a command: demo, distill"),
        (["dmeo"], r"invalid choice: 'dmeo'"),
        (["demo", "--quik"], r"unknown argument --quik; did you mean --quick\?"),
        (["demo", "--qui"], "unknown argument --qui"),  # no abbreviations: they break later
        (["demo", "--out"], "expected one argument"),
        (["demo", "extra"], "unknown argument extra"),
        (["params", "sclae"], "invalid choice: 'sclae'"),
        (["params"], "ACTION"),
    ],
)
def test_wrong_usage_exits_2_and_suggests(argv: list[str], words: str, capsys: Captured) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert re.search(words, printed.err) and not printed.out


def raising(error: BaseException) -> Callable[[Any], int]:
    def run(args: Any) -> int:
        raise error

    return run


def sending(number: signal.Signals) -> Callable[[Any], int]:
    def run(args: Any) -> int:
        os.kill(os.getpid(), number)
        signal.pause()  # a second signal would be needed to get past this
        return 0

    return run


@pytest.mark.parametrize(
    ("run", "code", "message"),
    [
        (lambda args: 0, 0, ""),
        (raising(ValueError("no such thing")), 1, "kdtl env: no such thing\n"),
        (raising(TypeError("int, got str")), 1, "kdtl env: int, got str\n"),
        (raising(RuntimeError()), 1, "kdtl env: RuntimeError\n"),
        (raising(ImportError("pip install x")), 1, "kdtl env: pip install x\n"),
        (raising(FileNotFoundError(2, "No such file", "a.npz")), 1, "kdtl env: a.npz: No such"),
        (raising(_config.UsageError("--x and --y exclude each other")), 2, "kdtl env: --x and"),
        (raising(KeyboardInterrupt()), 130, "kdtl env: interrupted\n"),
        (sending(signal.SIGINT), 130, "kdtl env: interrupted\n"),
        (sending(signal.SIGTERM), 143, "kdtl env: terminated\n"),
    ],
)
def test_exit_codes(
    run: Any, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(message) and "Traceback" not in printed
    assert signal.getsignal(signal.SIGTERM) is before


def test_messages_name_the_flags_that_the_command_has() -> None:
    args = cli.parse(["transfer"])
    said = _config.spoken("where=, on_missing='keep', epochs=3, Glob(pattern='*/a')", args)
    assert said == "--where, on_missing='keep', epochs=3, 'glob:*/a'"


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "run", raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        main(["env"])


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdtl_jax.cli", "env", "--nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "unknown argument --nonsense" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-m", "kdtl_jax.cli", "distill", "--list"]
    done = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_env_names_versions_and_devices(capsys: Captured) -> None:
    assert main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "kdtl_jax", "jax", "flax", "optax", "devices", "cpus"} <= lines.keys()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/results.json").write_text("precious")
    assert main(["demo", "--quick", "--out", str(tmp_path / "full")]) == 1
    assert "is not empty, and nothing in it is overwritten" in capsys.readouterr().err
    assert (tmp_path / "full/results.json").read_text() == "precious"
    assert main(["demo", "--quick", "--out", str(tmp_path / "full/results.json")]) == 1
    assert "is a file. Name a folder" in capsys.readouterr().err
    args = cli.parse(["demo", "--out", str(tmp_path / "full"), "--force"])
    assert _output.run_folder(args) == tmp_path / "full"


def test_settings_alone_are_no_run_and_a_config_of_ones_own_is_kept(tmp_path: Path) -> None:
    args = cli.parse(["demo", "--out", str(tmp_path)])
    _output.write_settings(tmp_path, args)
    (tmp_path / ".lock").touch()
    assert _output.run_folder(args) == tmp_path
    (tmp_path / "env.json").unlink()
    with pytest.raises(ValueError, match="is not empty"):
        _output.run_folder(args)


def numbers(folder: Path) -> dict[str, Any]:
    """`results.json` without wall times."""
    found = json.loads((folder / "results.json").read_text())
    for row in found["rows"]:
        assert row.pop("seconds") > 0
    return found


@pytest.mark.slow
def test_the_demo_gives_the_same_numbers_twice(tmp_path: Path) -> None:
    """As its own process each time, as users run it; bit for bit in every number and weight."""
    runs = [tmp_path / name for name in ("a", "b")]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for run in runs:
        command = [sys.executable, "-m", "kdtl_jax.cli", "demo", "--quick", "--out", str(run)]
        done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "test" in done.stdout and f"report: {run / 'report.html'}" in done.stdout
    a, b = map(numbers, runs)
    assert a == b
    assert {row["method"] for row in a["rows"]} >= {"student_alone", "kd", "scratch"}
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    assert {path.name for path in runs[0].iterdir()} == {
        "config.yaml", "env.json", "metrics.jsonl", "results.json", "report.html",
        "student.safetensors", "checkpoints",
    }  # fmt: skip
