"""`kdtl` as a whole: help, suggestions, exit codes, the compilation cache, and the demo twice.

Configuration files are tested in test_cli_config.py, each command in test_cli_<command>.py.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

import kdtl_jax
from kdtl_jax import cli
from kdtl_jax.cli import main, params
from kdtl_jax.recipes import _folders, env
from kdtl_jax.recipes.settings import UsageError

jax.devices()  # the back end is up, as in any test that ran before
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
    actual = examples(text)
    assert actual, "an example"
    for argv in actual:
        assert argv[: len(words)] == words
        if "--config" not in argv:  # its file is made up
            assert main([*argv, "--print-config"]) == 0


@pytest.mark.parametrize("words", ALL, ids=NAMES)
def test_printed_settings_read_back(words: list[str], tmp_path: Path, capsys: Captured) -> None:
    help_text = helped(words, capsys)
    argv = next(a for a in examples(help_text) if "--config" not in a)
    assert main([*argv, "--print-config"]) == 0
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    assert settings["command"].split()[0] == words[0]
    (tmp_path / "a.yaml").write_text(text)
    assert main([*words, "--config", str(tmp_path / "a.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    # Every flag is a key.
    keys = {flag.replace("-", "_") for flag in re.findall(r"^  --([a-z0-9-]+)", help_text, re.M)}
    own = {"help", "config", "print_config", "debug", "no_compilation_cache"}
    assert keys <= settings.keys() | own


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name a command: demo, distill"),
        (["dmeo"], "unknown command 'dmeo'; did you mean demo"),
        (["demo", "--quik"], r"unknown argument --quik; did you mean --quick"),
        (
            ["demo", "--quik", "--oot=x"],
            r"unknown arguments --quik \(did you mean --quick\?\), --oot=x \(.* --out\?\)$",
        ),
        (["bench", "--lr", "3"], "unknown argument --lr$"),
        (["sentences", "--rate", "3"], "unknown argument --rate; did you mean --learning-rate"),
        (["transfer", "--learning-rate", "3"], "did you mean --learning-rates"),
        (["distill", "--weights", "kd=1"], "did you mean .*--loss-weights"),
        (
            ["distill", "--model", "mlp:4"],
            "did you mean --(student|teacher), --(student|teacher)[?]$",
        ),
        (["distill", "--gpu"], "--gpu; JAX chooses the device: set JAX_PLATFORMS to cpu, cuda"),
        (["params", "merge", "a", "--out", "b"], "--out; did you mean --write[?]"),
        (["export", "a", "--to", "onnx"], "--to; did you mean --format[?]"),
        (["sweep", "--temperature", "1,4"], "--temperature; did you mean --grid[?]"),
        (["language", "--seq-len", "64"], "--seq-len; did you mean --length[?]"),
        (["predict", "--student", "a"], "--student; STUDENT is given without a flag"),
        (["evaluate", "a", "--data", "b"], "--data; DATA is given without a flag"),
        (["predict", "--weights=a", "b"], "--weights=a; STUDENT is given without a flag"),
        (["distill", "--seeds", "3.5"], "--seeds: expected a whole number, got '3.5'$"),
        (["distill", "--per-class", "few"], "--per-class: expected a whole number, got 'few'$"),
        (["demo", "--qui"], "unknown argument --qui"),  # no abbreviations: they break later
        (["demo", "--out"], "--out: expected one argument"),
        (["demo", "--quick=true"], "--quick: takes no value, got 'true'$"),
        (["demo", "--learning-rates", "-1e-3,1"], "expected numbers above 0 .*, got '-1e-3,1'$"),
        (["distill", "--lr", "-1e-3"], "--learning-rate: expected above 0, got -0.001$"),
        (["distill", "--out="], "--out: expected text, got ''$"),
        (["predict", "", "digits"], "student: expected text, got ''$"),
        (["predict", "a", "--", "--b", "--c"], "unrecognized arguments: --c$"),
        (["export", "a", "--out", "a.onnx"], "--out a.onnx: for ONNX, pass --format onnx$"),
        (["demo", "extra"], "unrecognized arguments: extra"),
        (["params", "sclae"], "unknown command 'params sclae'; did you mean scale"),
        (["bench", "--preset", "lenet"], "--preset: expected one of mlp, resnet, .*, got 'lenet'"),
        (["bench", "--devices", "99"], "there are 8 devices"),
        (["distill", "--seeds", "100000000000"], "--seeds: expected .* at most 10000"),
        (["distill", "--epochs", "1" + 5000 * "0"], "--epochs"),
        (["distill", "--student", "mlp:100000000000"], "above 1,000,000"),
        (["transfer", "--canvas", "100000000000"], "--canvas: expected .* at most 4096"),
        (["sweep", "--sample", "100000000000", "--range", "kd=0..1"], "--sample: expected"),
        (["distill", "--methods", "a\nb\x1b[2J"], "Nearest"),
    ],
)
def test_wrong_usage_exits_2_in_one_line(argv: list[str], words: str, capsys: Captured) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert re.search(words, printed.err) and not printed.out
    assert printed.err.count("\n") == 1


def test_actions_are_listed_with_their_command(capsys: Captured) -> None:
    assert main(["params"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{c.name} +\S", text, re.M) for c in params.COMMANDS)
    assert "kdtl params ACTION" in text


def raising(error: BaseException) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        raise error

    return run


def sending(number: signal.Signals) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        os.kill(os.getpid(), number)
        signal.alarm(20)  # where the signal is lost, the test ends all the same
        signal.pause()
        return 0

    return run


@pytest.mark.parametrize(
    ("run", "code", "message"),
    [
        (lambda settings: 0, 0, ""),
        (lambda settings: None, 0, ""),
        (raising(ValueError("no such thing")), 1, "kdtl env: no such thing\n"),
        (raising(TypeError("int, got str")), 1, "kdtl env: int, got str\n"),
        (raising(RuntimeError()), 1, "kdtl env: RuntimeError\n"),
        (raising(ValueError("two:\n  a\n  b\x1b[2J")), 1, "kdtl env: two: a; b\\x1b[2J\n"),
        (raising(OSError(2, "No such file", "a\nb")), 1, "kdtl env: a\\nb: No such file\n"),
        (raising(ValueError("no\n" * 10**6)), 1, "kdtl env: no; no; no"),
        (raising(ImportError("pip install x")), 1, "kdtl env: pip install x\n"),
        (raising(FileNotFoundError(2, "No such file", "a.npz")), 1, "kdtl env: a.npz: No such"),
        (raising(UsageError("--x and --y exclude each other")), 2, "kdtl env: --x and"),
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
    assert len(printed.splitlines()) == (code != 0) and len(printed) < 5000
    assert signal.getsignal(signal.SIGTERM) is before


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(env, "run", raising(ValueError("no such thing")))
    with pytest.raises(ValueError, match="no such thing"):
        main(["env", "--debug"])
    with pytest.raises(UsageError, match="unknown argument --nonsense"):
        main(["env", "--debug", "--nonsense"])


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "run", raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        main(["env"])


def test_a_warning_of_the_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def warned() -> int:
        for place in (cli.__file__, "elsewhere.py"):
            print(warnings.formatwarning("x is lost.", UserWarning, place, 3, "x()"), end="")
        return 0

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    monkeypatch.setattr(cli, "main", warned)
    with pytest.raises(SystemExit):
        cli.command()
    own, other = "note: x is lost.", "elsewhere.py:3: UserWarning: x is lost."
    assert capsys.readouterr().out.splitlines() == [own, other, "  x()"]


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend")])
def test_a_missing_device_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(env, "run", raising(error))
    assert main(["env"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("kdtl env: there is no cuda device") and errors.count("\n") == 1


def test_the_module_runs_as_a_program() -> None:
    for module in ("kdtl_jax", "kdtl_jax.cli"):
        run = [sys.executable, "-m", module, "env", "--nonsense"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 2 and "unknown argument --nonsense" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-m", "kdtl_jax", "distill", "--list"]
    done = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_env_names_versions_and_devices(capsys: Captured) -> None:
    assert main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "kdtl_jax", "jax", "flax", "optax", "devices", "cpus"} <= lines.keys()


PROGRAM = """
import sys
from kdtl_jax import cli
from kdtl_jax.recipes import _output, env

def run(settings):
    import jax, jax.numpy as jnp
    assert "matplotlib" not in sys.modules, "only what draws waits for its import"
    with _output.count_programs() as summary:
        jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
        print(summary())

env.run = run
sys.exit(cli.main(sys.argv[1:]))
"""


def test_programs_are_kept_in_the_users_cache_folder_unless_told_otherwise(tmp_path: Path) -> None:
    plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def programs(*more: str) -> tuple[int, int]:
        """How many were compiled, and how many taken from the cache."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "env", *more],
            env=plain | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            cwd=Path(kdtl_jax.__file__).parent.parent,
        )
        assert done.returncode == 0, done.stderr
        match = re.search(r"(\d+) compiled, (\d+) from the compilation cache", done.stdout)
        assert match, done.stdout
        return int(match[1]), int(match[2])

    compiled, cached = programs("--no-compilation-cache")
    assert compiled >= 2 and not cached and not (tmp_path / "kdtl_jax").exists()
    assert programs() == (compiled, 0)
    assert list((tmp_path / "kdtl_jax").glob("programs-*/*"))
    assert programs() == (0, compiled)


def numbers(folder: Path) -> dict[str, Any]:
    """`results.json` without wall times and what was compiled."""
    result = json.loads((folder / "results.json").read_text())
    for row in result["rows"]:
        assert row.pop("seconds") >= 0
    compiled = [note for note in result["notes"] if note.startswith("Programs: ")]
    result["notes"].remove(*compiled)
    run = result.pop("run")
    assert run["begun"] <= run["ended"] and run["seeds"] == 2 and "--quick" in run["command"]
    return result


@pytest.mark.slow
def test_the_demo_gives_the_same_numbers_twice(tmp_path: Path) -> None:
    """As its own process each time, as users run it; bit for bit in every number and weight."""
    runs = [tmp_path / name for name in ("a", "b")]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for run in runs:
        command = [sys.executable, "-m", "kdtl_jax", "demo", "--quick", "--out", str(run)]
        done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "test" in done.stdout and f"report: {run / 'report.html'}" in done.stdout
    a, b = map(numbers, runs)
    assert a == b
    assert {row["method"] for row in a["rows"]} >= {"student_alone", "kd", "scratch"}
    for name in ("students/kd.safetensors", "metrics.jsonl"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    student = str(runs[0] / "students/kd.safetensors")
    assert main(["evaluate", student, "digits", "--part", "test"]) == 0  # knows what was held out
    assert {path.name for path in runs[0].iterdir()} == {
        *_folders.SETTINGS, ".lock", "metrics.jsonl", "results.json", "report.html",
        "students", "checkpoints", "finished",
    }  # fmt: skip
