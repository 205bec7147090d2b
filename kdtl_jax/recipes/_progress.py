"""The progress of a command: lines, and on a terminal a bar with the time left.

Lines go to standard error and stay. A rich thread redraws the bar below them; it disappears when
the work is done, and there is none if standard error is not a terminal. Standard output is for
results.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

Say = Callable[[str], None]
Advance = Callable[[int, int], None]  # (done, total)
REDRAW_SECONDS = 0.25  # seconds


class Progress(NamedTuple):
    """Reports a command's progress; calling it prints a line."""

    line: Say
    bar: Callable[[str, float | None, float], None]  # (what, done, total); done is None at first
    hide: Callable[[], None]  # call before printing anything else

    def __call__(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        self.line(text)


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """The `Progress` of a command; its `bar` costs nothing between two redraws."""
    console, start = _Terminal(stderr=True, highlight=False), time.perf_counter()
    # With FORCE_COLOR, rich takes a file for a terminal, and a bar would fill it.
    draws = console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty()
    progress_bar: RichProgress | None = None
    last = 0.0

    def line(text: str) -> None:
        seconds = time.perf_counter() - start
        if console.is_terminal:
            console.print(Text.assemble((f"{seconds:5.1f} s  ", "dim"), f"{text} …"))
        else:
            print(f"{seconds:5.1f} s  {text}", file=sys.stderr, flush=True)

    def bar(text: str, done: float | None, total: float) -> None:
        nonlocal progress_bar, last
        now = time.perf_counter()
        if not draws or (done is not None and now - last < REDRAW_SECONDS and done < total):
            return
        last = now
        if progress_bar is None:
            progress_bar = _make_bar(console)
            progress_bar.add_task(text, total=total, first=None, last=None)
            progress_bar.start()
        [task] = progress_bar.tasks
        fields: dict[str, Any] = {}
        if done is not None and done != task.completed:
            fields["last"] = now, done
        if done is not None and task.fields["first"] is None:
            fields = {"first": (now, done), "last": (now, done)}
        progress_bar.update(task.id, description=text, completed=done, total=total, **fields)

    def hide() -> None:
        nonlocal progress_bar
        if progress_bar is not None:
            progress_bar.stop()
            progress_bar = None

    try:
        yield Progress(line, bar, hide)
    finally:
        hide()


def throttle(say: Say, seconds: float = 10.0) -> Callable[[str, bool], None]:
    """`say` limited to one line per `seconds`; a line marked as the last is always printed."""
    last_time = time.perf_counter()

    def say_throttled(text: str, last: bool) -> None:
        nonlocal last_time
        now = time.perf_counter()
        if last or now - last_time >= seconds:
            last_time = now
            say(text)

    return say_throttled


def track_part(say: Progress, text: str, number: int, parts: int) -> Advance:
    """Starts part `number` (from 0) of equal `parts`; returns `advance(done, total)` within it."""
    say.bar(text, None, parts)
    return lambda done, total: say.bar(text, number + done / max(total, 1), parts)


def announce_parts(say: Progress, parts: int) -> Say:
    """A `say` whose lines each announce the next of `parts` and advance the bar by one."""
    count = 0

    def announce(text: str) -> None:
        nonlocal count
        say.line(text)
        say.bar(text, min(count, parts), parts)
        count += 1

    return announce


def time_left(
    first: tuple[float, float] | None, last: tuple[float, float] | None, now: float, total: float
) -> float | None:
    """Seconds until `total` at the mean rate between two points `(time, done)`; None if unknown.

    The time before the first point includes compilation; progress after the last is not yet known.
    """
    if first is None or last is None:
        return None
    progress, elapsed = last[1] - first[1], last[0] - first[0]
    if progress <= 0 or elapsed <= 0:
        return None
    return max(0.0, (total - last[1]) * elapsed / progress - (now - last[0]))


def format_duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


class _TimeColumn(ProgressColumn):
    """The time since the start and the time left."""

    def render(self, task: Task) -> Text:
        now = time.perf_counter()
        remaining = time_left(task.fields["first"], task.fields["last"], now, task.total or 0.0)
        elapsed = format_duration(task.elapsed or 0.0)
        return Text(
            elapsed if remaining is None else f"{elapsed}, about {format_duration(remaining)} left",
            "dim",
        )


class _Terminal(Console):
    """A console that never hides the cursor, since a killed process could not restore it."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def _make_bar(console: Console) -> RichProgress:
    percent = TextColumn("{task.percentage:.0f}%")
    return RichProgress(
        TextColumn("{task.description}", markup=False), BarColumn(), percent, _TimeColumn(),
        console=console, transient=True, refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
