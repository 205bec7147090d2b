"""A command's run: its folder and terminal, the programs it compiles, and its final output."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from kdtl_jax import _files
from kdtl_jax.recipes import _folders, _progress, _tables
from kdtl_jax.run import record, report

MOST_NAMES = 8  # programs listed by name; the rest, mostly single operations, are summed
COMPILED = "/jax/core/compile/backend_compile_duration"
HIT = "/jax/compilation_cache/cache_hits"


class OpenRun(NamedTuple):
    """An open run of a command."""

    folder: Path
    run: str  # its identity
    say: _progress.Progress
    programs: Callable[[], str]  # a summary of the programs compiled so far


@contextlib.contextmanager
def open_run(
    settings: Any,
    command: str,
    files: Mapping[str, record.Paths],
    *,
    saves: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Iterator[OpenRun]:
    """Opens a run's folder and terminal; after a signal, prints how to resume the run."""
    with (
        _folders.run_folder(settings, command, files, saves=saves, models=models) as run,
        count_programs() as programs,
        _hint_resume(command, run.path),
        _progress.show_progress() as say,
    ):
        yield OpenRun(*run, say, programs)


@contextlib.contextmanager
def _hint_resume(command: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except SystemExit:
        print(
            f"kdtl {command}: stopped and saved. Resume with: kdtl {command} --config "
            f"{folder / 'config.yaml'} --resume --out {folder}",
            file=sys.stderr,
        )
        raise


@contextlib.contextmanager
def count_programs() -> Iterator[Callable[[], str]]:
    """`summary()`: how many programs were compiled or cached, and which took the longest.

    A program has the name of the jitted function. Its seconds are the time to compile it, or to
    read it from the cache.
    """
    cached = 0
    programs: dict[str, tuple[int, float]] = {}  # by name

    def on_event(event: str, **_: Any) -> None:
        nonlocal cached
        cached += event == HIT

    def on_duration(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            function = str(about.get("fun_name", ""))
            name = function.removeprefix("jit(").removesuffix(")") or "unnamed"
            count, seconds = programs.get(name, (0, 0.0))
            programs[name] = count + 1, seconds + duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield lambda: _summary(programs, cached)
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)


def _summary(programs: dict[str, tuple[int, float]], cached: int) -> str:
    slowest = sorted(programs.items(), key=lambda item: -item[1][1])
    requests = sum(count for count, _ in programs.values())
    seconds = sum(spent for _, spent in programs.values())
    parts = [_format_program(name, count, spent) for name, (count, spent) in slowest[:MOST_NAMES]]
    if remaining := [totals for _, totals in slowest[MOST_NAMES:]]:
        counts, spent = zip(*remaining, strict=True)
        parts.append(_format_program(f"{len(remaining)} other names", sum(counts), sum(spent)))
    by_name = f": {', '.join(parts)}" if parts else ""
    return (
        f"Programs: {requests - cached} compiled, {cached} from the compilation cache, "
        f"{seconds:.1f} s in all{by_name}."
    )


def _format_program(name: str, count: int, seconds: float) -> str:
    return f"{name} {seconds:.1f} s" if count == 1 else f"{name} ({count}) {seconds:.1f} s"


def write(folder: Path, record: Mapping[str, Any], page: str) -> None:
    """Writes `results.json` and `report.html`."""
    _files.write_json(folder / "results.json", record)
    _files.write_atomic(folder / "report.html", page.encode(errors="replace"))


def finish(folder: Path, results: report.Results, table: str | None = None) -> None:
    """Writes `results.json` and `report.html`, and prints the table."""
    results = results._replace(run=_folders.run_record(folder))
    write(folder, report.to_json(results), report.html_page(results))
    if table is None:
        print_table(results)
    else:
        print(table)
    print(f"report: {folder / 'report.html'}")


def print_table(results: report.Results) -> None:
    """Prints the table of methods, by family."""
    score = results.score
    test_heading = f"test {score.name} {score.unit}".rstrip()
    header = ("method", test_heading, "against the baseline", "parameters", "seconds")
    for family in dict.fromkeys(row.family for row in results.rows):
        rows = [row for row in results.rows if row.family == family]
        cells = [_cells(row, score) for row in rows]
        lines = [
            f"{family:12s} {row.method:26s} test {test:>18s} {score.unit:1s}  {versus:32s} "
            f"{count:>9} parameters {seconds:>6} s"
            for row, (_, test, versus, count, seconds) in zip(rows, cells, strict=True)
        ]
        bold = [i for i, x in enumerate(rows) if x.versus and x.versus.verdict == "better"]
        _tables.show(header, cells, lines, title=family.capitalize(), bold=bold)
    console = Console(highlight=False, markup=False)
    for note in results.notes:
        console.print(f"note: {note}", style="dim" if console.is_terminal else None, soft_wrap=True)


def _cells(row: report.Row, score: report.Score) -> tuple[str, ...]:
    versus = "–"
    if row.versus is not None:
        difference = score.number(row.versus.difference.mean, sign=True)
        versus = f"{difference}, {row.versus.verdict}"
    test = report.percent(row.test, score)
    return row.label, test, versus, f"{row.parameters:,}", f"{row.seconds:.1f}"
