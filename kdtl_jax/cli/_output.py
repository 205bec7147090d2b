"""Run folders and the terminal: rich on a terminal, plain lines otherwise."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdtl_jax import _files
from kdtl_jax.cli import _config
from kdtl_jax.run import report

Progress = Callable[[str], None]
# What a run writes before its work: all that is left of one that failed before it trained anything.
SETTINGS = {"config.yaml", "env.json"}


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """`--out` and `--force`."""
    parser.add_argument("--out", default=default, metavar="FOLDER", help=f"default: {default}")
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that is not empty"
    )


def run_folder(args: argparse.Namespace) -> Path:
    """The output folder, made before any work is done; never one that holds something.

    What a run left that failed before any work is nothing: its correction goes to the same place.

    Raises:
      ValueError: if it is not empty and `--force` was not given, or is a file.
    """
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file. Name a folder.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {".lock"} not in (set(), SETTINGS) and not args.force:
        raise ValueError(
            f"--out {folder} is not empty, and nothing in it is overwritten. Name another folder, "
            "or pass --force."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_run(folder: Path, args: argparse.Namespace, results: report.Results) -> None:
    """`config.yaml`, `env.json`, `metrics.jsonl`, `results.json`, `report.html`."""
    write_settings(folder, args)
    _write(folder / "metrics.jsonl", "".join(_metric_lines(results)))
    write_results(folder, results)


def write_settings(folder: Path, args: argparse.Namespace) -> None:
    """`config.yaml` and `env.json`: what a run is about to do, and where."""
    _write(folder / "config.yaml", _config.dump(args))
    _write(folder / "env.json", _json(report.environment()))


def write_results(folder: Path, results: report.Results) -> None:
    """`results.json` and `report.html`."""
    _write(folder / "results.json", _json(report.to_json(results)))
    _write(folder / "report.html", report.html_page(results))


def progress() -> Progress:
    """Says which method is at work; the same lines on a terminal and in a log."""
    console, start = Console(stderr=True, highlight=False), time.perf_counter()

    def say(name: str) -> None:
        seconds = time.perf_counter() - start
        if console.is_terminal:
            console.print(f"[dim]{seconds:5.1f} s[/]  {name} …")
        else:
            print(f"{seconds:5.1f} s  {name}", file=sys.stderr, flush=True)

    return say


def seldom(say: Progress, seconds: float = 10.0) -> Callable[[str, bool], None]:
    """Passes a line on if none was for so long, and the last of a method: not every detail."""
    said = time.perf_counter()

    def maybe(text: str, last: bool) -> None:
        nonlocal said
        now = time.perf_counter()
        if last or now - said >= seconds:
            said = now
            say(text)

    return maybe


def print_table(results: report.Results) -> None:
    """The table of methods."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in results.rows:
            print(
                f"{row.family:12s} {row.method:26s} test {report.percent(row.test):>11s} %  "
                f"{_compared(row):32s} {row.parameters:>9,} parameters {row.seconds:6.1f} s"
            )
        for note in results.notes:
            print(f"note: {note}")
        return
    for family in dict.fromkeys(row.family for row in results.rows):
        console.print(_table(family, [row for row in results.rows if row.family == family]))
    for note in results.notes:
        console.print(f"[dim]{note}[/]")


def _table(family: str, rows: Sequence[report.Row]) -> Table:
    table = Table(title=family.capitalize(), title_justify="left")
    for name in ("method", "test accuracy %", "against the baseline", "parameters", "seconds"):
        table.add_column(name, justify="left" if name in ("method",) else "right")
    for row in rows:
        style = "bold" if row.versus and row.versus.verdict == "better" else ""
        table.add_row(
            row.label,
            report.percent(row.test),
            _compared(row),
            f"{row.parameters:,}",
            f"{row.seconds:.1f}",
            style=style,
        )
    return table


def _compared(row: report.Row) -> str:
    if row.versus is None:
        return "–"
    return f"{100 * row.versus.difference.mean:+.1f}, {row.versus.verdict}"


def _metric_lines(results: report.Results) -> list[str]:
    return [
        json.dumps({"step": epoch, "method": method, "eval/validation_accuracy": value}) + "\n"
        for method, curve in results.learning.items()
        for epoch, value in zip(curve["epoch"], curve["validation_accuracy"], strict=True)
    ]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    _files.write_atomic(path, text.encode())
