"""SIGTERM and SIGINT as a flag that the loop looks at between steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """Raised within `interruptible` when a signal comes; nothing there may be half done."""


class Signals:
    """The signal that came first, if any. Use `caught()`."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.raising = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:  # asked twice: leave at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if self.raising:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal break off the block, which must not change anything."""
        if self.number is not None:
            raise Interrupted
        self.raising = True
        try:
            yield
        finally:
            self.raising = False


@contextlib.contextmanager
def caught() -> Iterator[Signals]:
    """Notes SIGTERM and SIGINT instead of dying; a second signal ends the process at once.

    Outside the main thread Python cannot set handlers; then nothing is caught.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signals.handle) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
