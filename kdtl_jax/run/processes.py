"""Multi-process runs: initialization, decisions by process 0, and signals.

Anything that changes a folder shared by the processes happens in process 0, between two
synchronization points: `decide` runs a function there and gives every process its result or error.
Signals are recorded, and all processes act on them together, at the next step at which they
synchronize. With one process, all of this is a plain function call.
"""

import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np

HEARTBEAT_SECONDS = 30  # when a process dies, the others end within about twice this time
TIMEOUT_SECONDS = 24 * 3600  # the longest that processes wait while one of them works
_barriers = itertools.count()  # all processes reach every barrier, in one order
# The type of an error in the other processes: the first one that it is an instance of.
ERROR_TYPES: tuple[type[Exception], ...] = (
    *(FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, OSError),
    *(TypeError, ValueError, RuntimeError),
)


def initialize(
    *, coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins a multi-process run; call before anything touches a device.

    Without arguments, JAX detects the cluster (SLURM, Open MPI, TPU pods, Kubernetes); otherwise,
    give the three of `jax.distributed.initialize`. If a process dies silently, the others end with
    an error within a minute.

    Raises:
      ValueError: if only some of the three are given.
    """
    is_given = [coordinator is not None, processes is not None, process is not None]
    if any(is_given) and not all(is_given):
        raise ValueError(
            "give all of coordinator ('host:port'), processes and process "
            f"(this one's number), or none for auto-detection; got {coordinator!r}, {processes}, "
            f"{process}."
        )
    handler = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
    )
    # JAX installs its own handler below Python's, which is then never called.
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def broadcast(value: Any) -> Any:
    """Gives process 0's JSON value to every process; all of them must call."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    _barrier()
    encoded = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def _barrier() -> None:
    """Waits for all processes, however long one of them works; if one dies, the others end.

    Without it, the first collective of a group of CPU devices would give up after 30 seconds.
    """
    import orbax.checkpoint as ocp

    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"kdtl_jax/meeting/{next(_barriers)}", timeout_ms=TIMEOUT_SECONDS * 1000)


def decide(choose: Callable[[], Any]) -> Any:
    """Calls `choose` in process 0 and gives its JSON result or error to every process.

    No process returns before process 0 is done, so all see what it changed on a shared disk.

    Raises:
      Exception: as `choose`; in other processes, an error of its kind with the same message.
    """
    if jax.process_count() == 1:
        return choose()
    result: Any = None
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            result = choose()
        except Exception as caught:
            error = caught
    message = None if error is None else str(error)
    type_index = next(
        (i for i, error_type in enumerate(ERROR_TYPES) if isinstance(error, error_type)), -1
    )
    result, type_index, message = broadcast([result, type_index, message])
    if error is not None:
        raise error
    if message is not None:
        raise ERROR_TYPES[type_index](f"process 0: {message}")
    return result


def largest(number: int) -> int:
    """Gives the largest of the processes' numbers to every process; all of them must call."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    _barrier()
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


class Interrupted(BaseException):
    """Raised on a signal within `Signals.interruptible`; code there must be safe to abort."""


class Signals:
    """The SIGTERM or SIGINT that came first, if any. Use `signals()`."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.breaks = False  # whether a signal aborts what is running
        self.polls = 0  # how many loops will call `asked`

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; `signals` installs it. A second signal ends the process at once.

        Raises:
          Interrupted: within `interruptible`.
          SystemExit: with 128 + number, if no loop will call `asked`.
        """
        if self.number is not None:  # second signal: exit at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if self.breaks:
            raise Interrupted
        if not self.polls and not jax.distributed.is_initialized():
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def polled(self) -> Iterator[None]:
        """Within the block, signals are only recorded; its owner must call `asked`."""
        self.polls += 1
        try:
            yield
        finally:
            self.polls -= 1

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal abort the block, which must not change anything.

        Only with a single process; otherwise, the others would wait for the one that aborted.

        Raises:
          Interrupted: if a signal arrived before, or arrives inside the block.
        """
        if jax.process_count() > 1:
            yield
            return
        if self.number is not None:
            raise Interrupted
        self.breaks = True
        try:
            yield
        finally:
            self.breaks = False

    def asked(self) -> bool:
        """Whether a signal came to any process; all of them must call."""
        self.number = largest(self.number or 0) or None
        return self.number is not None


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Handles SIGTERM and SIGINT; a second signal ends the process at once.

    Use it around a whole command. A single process then exits with 128 + number, except within a
    loop, which saves first. Multiple processes never leave each other waiting: they all stop
    together, in the current loop or the next one. Nested blocks share their signals. Outside the
    main thread Python cannot set handlers, so nothing is caught.
    """
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(outer, Signals) or threading.current_thread() is not threading.main_thread():
        yield outer if isinstance(outer, Signals) else Signals()
        return
    recorder = Signals()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, recorder.handle) for number in numbers]
    try:
        yield recorder
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
