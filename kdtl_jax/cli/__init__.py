"""`kdtl`: the library's jobs as commands.

One command is one module with `add_arguments(parser)` and `run(args)`, named in `COMMANDS`, or a
package with a table `COMMANDS` of its own. Modules are imported when their command is asked for.
Exit codes: 0 done, 1 failed (a message, no traceback), 2 wrong usage, 130 interrupted, 141 nobody
reads the output any more, 143 terminated.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from kdtl_jax.cli import _config


class Command(NamedTuple):
    """A line of `kdtl --help`, and the module behind it; an example, if that has none itself."""

    name: str
    summary: str
    module: str
    example: str | None = None


COMMANDS = (
    Command("demo", "every foundation method on embedded real data", "kdtl_jax.cli.demo"),
    Command("distill", "teach a small model with a large one", "kdtl_jax.cli.distill"),
    Command("transfer", "reuse a trained model's weights on a new task", "kdtl_jax.cli.transfer"),
    Command("cache", "compute a teacher's outputs once, onto the disk", "kdtl_jax.cli.cache"),
    Command(
        "params",
        "weight surgery: safetensors in, safetensors out",
        "kdtl_jax.cli.params",
        "Example: kdtl params scale model.safetensors --alpha 0.1 --write small.safetensors",
    ),
    Command("sweep", "many settings and seeds as one program", "kdtl_jax.cli.sweep"),
    Command("bench", "train steps against the machine's ceilings", "kdtl_jax.cli.bench"),
    Command("env", "versions and devices, for reports", "kdtl_jax.cli.env"),
)


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler on the way swallows it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `kdtl` and returns its exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed help or the usage error
        return int(stop.code or 0)
    if args.print_config:
        print(_config.dump(args), end="")
        return 0
    previous = _on_terminate()
    try:
        code = importlib.import_module(args.module).run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `kdtl ... | head`
        _discard_output()
        return 141
    except _config.UsageError as error:
        print(f"{_name(args)}: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"{_name(args)}: {_config.spoken(_plain(error), args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{_name(args)}: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print(f"{_name(args)}: terminated", file=sys.stderr)
        return 143
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command, the values of its `--config` file filled in.

    Raises:
      SystemExit: with code 2 after a usage error, 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="kdtl",
        description="Knowledge distillation and transfer learning for JAX.",
        epilog="Start with: kdtl demo",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    words = [word for word in argv if not word.startswith("-")]
    chosen = _add_commands(parser, COMMANDS, words, "command")
    args, rest = parser.parse_known_args(argv)
    if args.version:
        from kdtl_jax import __version__

        print(f"kdtl_jax {__version__}")
        parser.exit()
    if chosen is None:
        parser.error(f"name a command: {', '.join(command.name for command in COMMANDS)}")
    if rest:
        chosen.error(_config.unknown_flag(rest[0], chosen))
    try:
        return _config.resolve(parser, chosen, argv, args)
    except _config.UsageError as error:
        chosen.error(str(error))


def _add_commands(
    parser: argparse.ArgumentParser, table: Sequence[Command], words: Sequence[str], dest: str
) -> argparse.ArgumentParser | None:
    """Adds a table's commands; the parser of the one that `words` asks for, with its flags."""
    commands = parser.add_subparsers(dest=dest, metavar=dest.upper(), required=dest == "action")
    chosen = None
    for command in table:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=command.example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if command.name != next(iter(words), None):
            continue
        module = importlib.import_module(command.module)  # only its module is imported
        if hasattr(module, "COMMANDS"):
            chosen = _add_commands(sub, module.COMMANDS, words[1:], "action") or sub
            continue
        module.add_arguments(sub)
        _config.add_arguments(sub)
        sub.set_defaults(module=command.module)
        chosen = sub
    return chosen


def _name(args: argparse.Namespace) -> str:
    """`kdtl params scale`, for messages."""
    return " ".join(["kdtl", args.command, *([args.action] if "action" in args else [])])


def _on_terminate() -> Any:
    def stop(signum: int, frame: object) -> None:
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: someone else handles signals
        return None


def _discard_output() -> None:
    """What is still buffered goes nowhere; else Python complains about it when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _plain(error: BaseException) -> str:
    """An OSError as "file: reason"; anything else as its text."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
