"""Silences what Orbax prints besides raising an error: long tracebacks without more detail."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import PurePath
from typing import Any


@contextlib.contextmanager
def logs() -> Iterator[None]:
    """Drops tracebacks that Orbax logs within the block, and its messages below warnings."""

    def is_wanted(record: logging.LogRecord) -> bool:
        is_warning = record.levelno >= logging.WARNING and not record.exc_info
        return is_warning or not _is_orbax(record.pathname)

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def late_writes() -> None:
    """After a failed save: drops the messages of its other writes, which outlive it.

    Their tasks are collected without being awaited, and their threads find the event loop closed,
    at any later time. Other errors are printed as before. A closed event loop reported within
    asyncio alone names no library, and is dropped whatever its origin.
    """
    logger = logging.getLogger("asyncio")
    if _is_relevant not in logger.filters:
        logger.addFilter(_is_relevant)
    hook: Any = sys.unraisablehook
    if not (isinstance(hook, partial) and hook.func is _print):
        sys.unraisablehook = partial(_print, hook)


def _is_relevant(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    is_unretrieved = "exception was never retrieved" in record.getMessage()
    return not (is_unretrieved and any(_is_orbax(f.filename) for f in traceback.extract_tb(trace)))


def _is_orbax(path: str) -> bool:
    """Whether a file is in the orbax package; a user's folder may be called orbax-runs."""
    return "orbax" in PurePath(path).parts


def _print(hook: Any, args: Any) -> None:
    is_late = args.exc_type is RuntimeError and str(args.exc_value) == "Event loop is closed"
    frames = traceback.extract_tb(args.exc_traceback)
    if not (is_late and frames and all("asyncio" in PurePath(f.filename).parts for f in frames)):
        hook(args)
