"""A command at work, the programs it compiles, and what it writes and prints at the end."""

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

NAMED = 8  # programs listed by name; the others, mostly single operations, are summed up
COMPILED = "/jax/core/compile/backend_compile_duration"
HIT = "/jax/compilation_cache/cache_hits"


class Running(NamedTuple):
    """A command at work."""

    folder: Path
    run: str  # its identity
    say: _progress.Progress
    programs: Callable[[], str]  # what has been compiled so far, in words


@contextlib.contextmanager
def running(
    settings: Any,
    command: str,
    files: Mapping[str, record.Paths],
    *,
    saves: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Iterator[Running]:
    """A run's folder and terminal; after a signal, prints how to resume the run."""
    with (
        _folders.run_folder(settings, command, files, saves=saves, models=models) as where,
        counted_programs() as programs,
        _hint_of_resuming(command, where.path),
        _progress.shown() as say,
    ):
        yield Running(*where, say, programs)


@contextlib.contextmanager
def _hint_of_resuming(command: str, folder: Path) -> Iterator[None]:
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
def counted_programs() -> Iterator[Callable[[], str]]:
    """`said()`: how many programs were compiled or came from the cache, and which cost the most.

    A program has the name of the jitted function. Its seconds are those of compiling it, or of
    reading it from the cache.
    """
    cached = 0
    found: dict[str, tuple[int, float]] = {}  # by name

    def hit(event: str, **_: Any) -> None:
        nonlocal cached
        cached += event == HIT

    def compiled(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            called = str(about.get("fun_name", ""))
            name = called.removeprefix("jit(").removesuffix(")") or "unnamed"
            count, before = found.get(name, (0, 0.0))
            found[name] = count + 1, before + duration_secs

    jax.monitoring.register_event_listener(hit)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield lambda: _said(found, cached)
    finally:
        jax.monitoring.unregister_event_listener(hit)
        jax.monitoring.unregister_event_duration_listener(compiled)


def _said(found: dict[str, tuple[int, float]], cached: int) -> str:
    slowest = sorted(found.items(), key=lambda item: -item[1][1])
    requests = sum(count for count, _ in found.values())
    seconds = sum(spent for _, spent in found.values())
    listed = [_counted(name, count, spent) for name, (count, spent) in slowest[:NAMED]]
    if others := [known for _, known in slowest[NAMED:]]:
        counts, spent = zip(*others, strict=True)
        listed.append(_counted(f"{len(others)} other names", sum(counts), sum(spent)))
    by_name = f": {', '.join(listed)}" if listed else ""
    return (
        f"Programs: {requests - cached} compiled, {cached} from the compilation cache, "
        f"{seconds:.1f} s in all{by_name}."
    )


def _counted(name: str, count: int, seconds: float) -> str:
    return f"{name} {seconds:.1f} s" if count == 1 else f"{name} ({count}) {seconds:.1f} s"


def finish(folder: Path, results: report.Results, table: str | None = None) -> None:
    """Writes `results.json` and `report.html`, and prints the table."""
    results = results._replace(run=_folders.how_it_was_run(folder))
    _files.write_json(folder / "results.json", report.to_json(results))
    _files.write_atomic(folder / "report.html", report.html_page(results).encode(errors="replace"))
    if table is None:
        print_table(results)
    else:
        print(table)
    print(f"report: {folder / 'report.html'}")


def print_table(results: report.Results) -> None:
    """The table of methods, by family."""
    score = results.score
    header = (
        "method",
        f"test {score.name} {score.unit}".rstrip(),
        "against the baseline",
        "parameters",
        "seconds",
    )
    for family in dict.fromkeys(row.family for row in results.rows):
        rows = [row for row in results.rows if row.family == family]
        compared = [
            "–"
            if row.versus is None
            else f"{score.number(row.versus.difference.mean, sign=True)}, {row.versus.verdict}"
            for row in rows
        ]
        cells = [
            (
                x.label,
                report.percent(x.test, score),
                versus,
                f"{x.parameters:,}",
                f"{x.seconds:.1f}",
            )
            for x, versus in zip(rows, compared, strict=True)
        ]
        lines = [
            f"{family:12s} {row.method:26s} test {test:>18s} {score.unit:1s}  {versus:32s} "
            f"{count:>9} parameters {seconds:>6} s"
            for row, (_, test, versus, count, seconds) in zip(rows, cells, strict=True)
        ]
        better = [i for i, x in enumerate(rows) if x.versus and x.versus.verdict == "better"]
        _tables.show(header, cells, lines, title=family.capitalize(), bold=better)
    console = Console(highlight=False, markup=False)
    for note in results.notes:
        console.print(f"note: {note}", style="dim" if console.is_terminal else None, soft_wrap=True)
