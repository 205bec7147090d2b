"""Limits on what a reader of foreign bytes may cost, and the values that break careless ones."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

SECONDS, MEGABYTES = 2.0, 300
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What a hand or an attacker puts where JSON or YAML has something else.
HOSTILE = (
    *(None, True, 0, -1, 1.5, 9_999, 10**9, 2**31, 10**12, 10**400, float("nan"), float("inf")),
    *("", "a\nb\x1b[2J\ud800", "x" * 10_000, [], {}, [[1]], [10**9], {"": None}, [None] * 1000),
)
values = st.sampled_from(HOSTILE) | st.integers(-3, 3) | st.text(max_size=3)


def _memory(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) // 1024
    return 0


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Fails where the block takes longer (processor time) or more memory at any moment."""
    watched = _RESET.exists()
    if watched:
        _RESET.write_text("5")  # the peak is counted anew
    before, start = _memory("VmRSS") if watched else 0, time.process_time()
    yield
    took = time.process_time() - start
    assert took < seconds, f"{took:.1f} s of processor time"
    if watched:
        grown = _memory("VmHWM") - before
        assert grown < megabytes, f"{grown} MB of memory"


def lines_of(message: str) -> int:
    """How many lines a message may have: what does not fit a model is told leaf by leaf."""
    return 40 if message.startswith("source and target do not match.") else 1


def is_plain(message: str, lines: int = 1) -> bool:
    """Whether a message is so many bounded lines in which nothing moves the cursor."""
    said = message.split("\n")
    return 0 < len(message) < 4000 and len(said) <= lines and all(map(str.isprintable, said))
