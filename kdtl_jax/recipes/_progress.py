"""The progress of a command: lines, and on a terminal a bar with the time left.

Lines go to standard error and stay. The bar is redrawn below them by a rich thread and disappears
when the work is done; if standard error is not a terminal, there is no bar. Standard output is for
results.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Drawn
from rich.text import Text

Say = Callable[[str], None]
Moved = Callable[[int, int], None]  # (done, total)
REDRAWN = 0.25  # seconds


class Progress(NamedTuple):
    """Reports a command's progress; calling it prints a line."""

    line: Say
    bar: Callable[[str, float | None, float], None]  # (what, done, total); done is None at first
    hide: Callable[[], None]  # call before printing anything else

    def __call__(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        self.line(text)


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """`say` of a command; `say.bar(text, done, total)` costs nothing between two drawings."""
    console, start = _Terminal(stderr=True, highlight=False), time.perf_counter()
    # With FORCE_COLOR, rich mistakes a file for a terminal, and a bar would fill it.
    draws = console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty()
    drawn: Drawn | None = None
    last = 0.0

    def line(text: str) -> None:
        seconds = time.perf_counter() - start
        if console.is_terminal:
            console.print(Text.assemble((f"{seconds:5.1f} s  ", "dim"), f"{text} …"))
        else:
            print(f"{seconds:5.1f} s  {text}", file=sys.stderr, flush=True)

    def bar(text: str, done: float | None, total: float) -> None:
        nonlocal drawn, last
        now = time.perf_counter()
        if not draws or (done is not None and now - last < REDRAWN and done < total):
            return
        last = now
        if drawn is None:
            drawn = _drawn(console)
            drawn.add_task(text, total=total, first=None, last=None)
            drawn.start()
        [task] = drawn.tasks
        told: dict[str, Any] = {}
        if done is not None and done != task.completed:
            told["last"] = now, done
        if done is not None and task.fields["first"] is None:
            told = {"first": (now, done), "last": (now, done)}
        drawn.update(task.id, description=text, completed=done, total=total, **told)

    def hide() -> None:
        nonlocal drawn
        if drawn is not None:
            drawn.stop()
            drawn = None

    try:
        yield Progress(line, bar, hide)
    finally:
        hide()


def seldom(say: Say, seconds: float = 10.0) -> Callable[[str, bool], None]:
    """Prints at most one line per `seconds`, and every line marked as the last."""
    said = time.perf_counter()

    def maybe(text: str, last: bool) -> None:
        nonlocal said
        now = time.perf_counter()
        if last or now - said >= seconds:
            said = now
            say(text)

    return maybe


def part(say: Progress, text: str, number: int, parts: int) -> Moved:
    """`moved(done, total)` within part `number` (from 0) of equal `parts`, which starts now."""
    say.bar(text, None, parts)
    return lambda done, total: say.bar(text, number + done / max(total, 1), parts)


def by_part(say: Progress, parts: int) -> Say:
    """`say` that advances the bar by one of `parts`: each line announces the next part."""
    begun = 0

    def begins(text: str) -> None:
        nonlocal begun
        say.line(text)
        say.bar(text, min(begun, parts), parts)
        begun += 1

    return begins


def time_left(
    first: tuple[float, float] | None, last: tuple[float, float] | None, now: float, total: float
) -> float | None:
    """Seconds until `total`, at the mean rate between two `(time, done)`; None if that is unknown.

    The time before the first includes compilation; that after the last is not yet reported.
    """
    if first is None or last is None:
        return None
    made, spent = last[1] - first[1], last[0] - first[0]
    if made <= 0 or spent <= 0:
        return None
    return max(0.0, (total - last[1]) * spent / made - (now - last[0]))


def in_words(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Left(ProgressColumn):
    """The time since the start and the time left."""

    def render(self, task: Task) -> Text:
        now = time.perf_counter()
        left = time_left(task.fields["first"], task.fields["last"], now, task.total or 0.0)
        spent = in_words(task.elapsed or 0.0)
        return Text(spent if left is None else f"{spent}, about {in_words(left)} left", "dim")


class _Terminal(Console):
    """A console that keeps its cursor, which a killed process could not restore."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def _drawn(console: Console) -> Drawn:
    percent = TextColumn("{task.percentage:.0f}%")
    return Drawn(
        TextColumn("{task.description}", markup=False), BarColumn(), percent, _Left(),
        console=console, transient=True, refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
