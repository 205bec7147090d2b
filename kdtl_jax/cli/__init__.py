"""`kdtl`: the library's recipes as commands.

Arguments become a recipe's `Settings`, the recipe runs, and its errors become one line. A command
is a module with `Settings`, `EXAMPLES` and `run(settings)`, imported when it is called. Exit
codes: 0 success, 1 failure (a message; `--debug` shows the traceback), 2 wrong usage, 130
interrupted, 141 nobody reads the output, 143 terminated.
"""

import hashlib
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kdtl_jax import _text
from kdtl_jax.cli import _parser
from kdtl_jax.recipes.settings import UsageError, suggest
from kdtl_jax.recipes.yaml_files import as_yaml


class Command(NamedTuple):
    """A line of `kdtl --help` and its module, which may have a table of actions of its own."""

    name: str
    summary: str
    module: str


_recipes, _params = "kdtl_jax.recipes", "kdtl_jax.cli.params"
COMMANDS = (
    Command("demo", "compare the basic methods on the built-in digits", f"{_recipes}.demo"),
    Command("distill", "teach a small model with a large one", f"{_recipes}.distill"),
    Command("language", "teach a small language model with a large one", f"{_recipes}.language"),
    Command("transfer", "reuse a trained model's weights on a new task", f"{_recipes}.transfer"),
    Command("predict", "predict a class for every example of a file", f"{_recipes}.predict"),
    Command("evaluate", "score a student on labeled data", f"{_recipes}.evaluate"),
    Command("export", "write a student for other runtimes: StableHLO, ONNX", f"{_recipes}.export"),
    Command("sentences", "distill a sentence encoder into fewer layers", f"{_recipes}.sentences"),
    Command("cache", "compute a teacher's outputs once and keep them on disk", f"{_recipes}.cache"),
    Command("params", "edit checkpoints: safetensors in, safetensors out", _params),
    Command("sweep", "run many settings and seeds as one program", f"{_recipes}.sweep"),
    Command("bench", "measure train steps against the machine's limits", f"{_recipes}.bench"),
    Command("env", "print versions and devices for a bug report", f"{_recipes}.env"),
)
LONGEST = 4000  # characters of a message
FAILURES = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `kdtl` and returns its exit code."""
    for stream in ("stdout", "stderr"):  # a program may be started without them
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "kdtl"
    debug = "--debug" in argv
    try:
        match = find(argv)
        if match is None:
            return 0
        words, summary, module, arguments = match
        name = f"kdtl {words}"
        settings, common = _parser.parse(words, summary, module, arguments)
        if common.print_config:
            print(as_yaml(settings, words), end="")
            return 0
        if not common.no_compilation_cache:
            keep_programs()
        from kdtl_jax.run import processes  # jax is needed from here on

        with processes.signals():
            code = module.run(settings)
            sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # `kdtl ... | head`
        _discard_output()
        return 141
    except (KeyboardInterrupt, SystemExit) as stop:  # also after --help
        code = 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
        outcome = {130: "interrupted", 143: "terminated"}.get(code)
        if outcome:
            print(f"{name}: {outcome}", file=sys.stderr)
        return code
    except FAILURES as error:
        if debug:
            raise
        print(f"{name}: {_plain(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except AssertionError as error:  # how JAX reports a known platform without a device
        platforms = os.environ.get("JAX_PLATFORMS", "cpu")
        if debug or "cpu" in platforms or str(error):
            raise
        print(f"{name}: {_no_device(platforms)}", file=sys.stderr)
        return 1


def command() -> NoReturn:
    """`kdtl` as a program: runs `main`, and ends the process.

    After a signal nothing is torn down: an XLA computation still in flight would read what Python
    has freed, and the process would end with signal 11. What must be kept is already on disk.
    """
    warnings.formatwarning = _note
    code = main()
    if code in (130, 143) and not _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
    usual: Callable[..., str] = warnings.formatwarning,
) -> str:
    """The package's own warnings in one line, without the place in its source."""
    if Path(filename).is_relative_to(Path(_text.__file__).parent):
        return f"note: {_text.shown(str(message), LONGEST)}\n"
    return usual(message, category, filename, lineno, line)


def _is_one_of_several() -> bool:
    """Whether other processes wait for this one to shut down."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def parse(argv: Sequence[str]) -> Any:
    """The settings of a command line.

    Raises:
      UsageError: in one line.
    """
    match = find(argv)
    if match is None:
        raise UsageError("no command")
    return _parser.parse(*match)[0]


def find(argv: Sequence[str]) -> tuple[str, str, Any, list[str]] | None:
    """A command's name, summary, module and arguments; None after printing help."""
    table, words, arguments = COMMANDS, "", list(argv)
    while True:
        first = arguments[0] if arguments else "--help" if words else ""
        if first in ("-h", "--help"):
            print(_overview(table, words))
            return None
        if first == "--version":
            from kdtl_jax import __version__

            print(f"kdtl_jax {__version__}")
            return None
        commands = {command.name: command for command in table}
        if first not in commands:
            names = ", ".join(commands)
            if not first:
                raise UsageError(f"name a command: {names}")
            hint = suggest(first, commands) or f"the commands are {names}"
            raise UsageError(f"unknown command {f'{words} {first}'.strip()!r}; {hint}")
        command, arguments = commands[first], arguments[1:]
        words = f"{words} {first}".strip()
        module = importlib.import_module(command.module)
        if not hasattr(module, "COMMANDS"):
            return words, command.summary, module, arguments
        table = module.COMMANDS


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX already has one.

    One folder per jaxlib and kind of processor: a program is machine code.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = next((line for line in lines if "flags" in line.lower()), platform.processor())
    processor = hashlib.sha256(features.encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (
        cache
        / "kdtl_jax"
        / f"programs-{metadata.version('jaxlib')}-{platform.machine()}-{processor}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # home is not writable: compile every time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _overview(table: Sequence[Command], words: str) -> str:
    width = max(len(command.name) for command in table)
    lines = [f"  {command.name:{width}}  {command.summary}" for command in table]
    start = "Start with: kdtl demo" if not words else f"More: kdtl {words} ACTION --help"
    title = "Knowledge distillation and transfer learning for JAX." if not words else ""
    usage = f"usage: kdtl {f'{words} ACTION' if words else 'COMMAND'} [flags]"
    return "\n".join([usage, "", *([title, ""] if title else []), *lines, "", start])


def _discard_output() -> None:
    """Discards buffered output, which Python would fail to write at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def _no_device(platforms: str) -> str:
    return (
        f"there is no {platforms} device that JAX can use here (JAX_PLATFORMS={platforms}). "
        "Install JAX for it (pip install 'jax[cuda13]' or 'jax[tpu]'), or unset JAX_PLATFORMS."
    )


def _plain(error: BaseException) -> str:
    """An OSError as "file: reason", a missing device in one sentence, else the error's text.

    One line, escaped and bounded.
    """
    text = str(error)
    if text.startswith("Unable to initialize backend"):
        text = _no_device(os.environ.get("JAX_PLATFORMS") or "accelerator")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{_text.shown(error.filename, LONGEST)}: {error.strerror}"
    line = ""
    for part in text[: 2 * LONGEST].split("\n"):
        separator = "" if not line else " " if line[-1] in ".:;," else "; "
        line += separator + part.strip() if part.strip() else ""
    return _text.shown(line, LONGEST) or type(error).__name__
