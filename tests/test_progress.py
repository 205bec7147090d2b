"""The bar: what it knows of time, that it is on terminals alone, and that it leaves nothing."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Self

import pytest
from tiny import SHORT, kdtl, results

from kdtl_jax.recipes import _progress


class Terminal:
    """A pseudo-terminal as standard error while the block runs, and what it showed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        self.patch = monkeypatch
        self.written = bytearray()

    def __enter__(self) -> Self:
        self.end, file = os.openpty()
        self.file = os.fdopen(file, "w")
        self.patch.setattr(sys, "stderr", self.file)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def _read(self) -> None:
        while True:
            try:
                self.written += os.read(self.end, 2**16)
            except OSError:  # its only writer has closed it
                return

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.reader.join(10)
        os.close(self.end)

    def text(self) -> str:
        return self.written.decode()


def test_the_time_left_is_that_of_the_mean_rate() -> None:
    assert _progress.time_left((5.0, 2), (15.0, 7), 15.0, 10) == 6.0
    assert _progress.time_left((5.0, 2), (15.0, 7), 17.0, 10) == 4.0
    assert _progress.time_left((5.0, 2), (15.0, 7), 99.0, 10) == 0.0
    assert _progress.time_left((5.0, 2), (5.0, 2), 9.0, 10) is None, "one moment has no rate"
    assert _progress.time_left(None, None, 9.0, 10) is None
    words = [_progress.format_duration(s) for s in (0.4, 59.4, 59.6, 200.0, 7500.0)]
    assert words == ["0 s", "59 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]


def test_parts_add_up_to_the_whole() -> None:
    bars: list[tuple[Any, ...]] = []
    lines: list[str] = []
    say = _progress.Progress(lines.append, lambda *bar: bars.append(bar), lambda: None)
    moved = _progress.track_part(say, "kd", 2, 4)
    moved(5, 10)
    begins = _progress.announce_parts(say, 2)
    for text in ("source", "scratch", "one more"):
        begins(text)
    assert bars == [
        ("kd", None, 4), ("kd", 2.5, 4), ("source", 0, 2), ("scratch", 1, 2), ("one more", 2, 2),
    ]  # fmt: skip
    assert lines == ["source", "scratch", "one more"]


def test_a_bar_is_seldom_drawn_and_then_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with terminal, pytest.raises(RuntimeError, match="half"), _progress.show_progress() as say:
        for step in range(50_000):
            say.bar("steps", step, 100_000)
        say("a line")
        raise RuntimeError("half")
    text = terminal.text()
    assert "steps" in text and "%" in text and "a line" in text
    assert len(text) < 20_000, "drawn by the clock, not by the step"
    assert text.endswith("\x1b[2K"), "its line is cleared"
    assert "\x1b[?25l" not in text, "the cursor is never hidden"


def test_no_terminal_no_bar(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with _progress.show_progress() as say:
        for step in range(100):
            say.bar("steps", step, 100)
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("FORCE_COLOR")
    with _progress.show_progress() as say:
        say.bar("steps", 1, 100)
        say("a line")
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.strip() == "0.0 s  a line"


def test_a_command_on_a_terminal(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Standard output holds what it holds without a terminal; the run is the same."""
    monkeypatch.setattr(_progress, "REDRAW_SECONDS", 0.0)
    command = ["distill", "--data", file, *SHORT]
    with Terminal(monkeypatch) as terminal:
        assert kdtl(*command, "--out", tmp_path / "a") == 0
    shown, printed = terminal.text(), capsys.readouterr().out
    assert "teacher" in shown and "kd (2 of 2)" in shown and "100%" in shown
    assert " left" in shown
    assert "\x1b" not in printed and "report:" in printed
    rows = results(tmp_path / "a")["rows"]
    assert [row["method"] for row in rows] == ["teacher", "student_alone", "kd"]
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
