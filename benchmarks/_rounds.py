"""Forms of one computation timed in alternating rounds, and compared with a peer's results."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

import kdtl_jax

ON_CPU = jax.default_backend() == "cpu"
CORES = len(os.sched_getaffinity(0))
Form = Callable[[], Any]  # runs to completion
Clock = Callable[[], float]  # seconds
Seconds = dict[str, list[float]]  # of every round, by form


def machine() -> str:
    """The machine and the versions, in a line."""
    versions = f"jax {jax.__version__}, numpy {np.__version__}, kdtl_jax {kdtl_jax.__version__}"
    return (
        f"{platform.machine()}, {CORES} cores, {jax.devices()[0].device_kind}; {versions}, "
        f"Python {platform.python_version()}"
    )


def measure(
    forms: Mapping[str, Form], rounds: int, clock: Clock = time.perf_counter, *, steps: int = 1
) -> Seconds:
    """Seconds per step of every form in every round, interleaved, after one warm-up.

    A form makes so many `steps`. Each round begins with another form: what runs after a large one
    finds colder caches.
    """
    for form in forms.values():
        form()
    seconds: Seconds = {name: [] for name in forms}
    names = list(forms)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            forms[name]()
            seconds[name].append((clock() - start) / steps)
    return seconds


def over(seconds: Seconds, name: str, base: str) -> float:
    """Median of the rounds' own ratios of times."""
    pairs = zip(seconds[name], seconds[base], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(seconds: Seconds, ours: str, notes: dict[str, str] | None = None) -> None:
    """A line per form: median and least time, and how many times that of the form `ours`."""
    for name, times in seconds.items():
        print(
            f"  {name:42s} {1e3 * statistics.median(times):9.1f} ms (least {1e3 * min(times):8.1f})"
            f"  {over(seconds, name, ours):5.2f} times ours  {(notes or {}).get(name, '')}"
        )


def agree(what: str, ours: Any, peer: Any, tolerance: float) -> None:
    """Stops the script where two libraries do not compute the same."""
    ours, peer = np.asarray(ours, np.float64), np.asarray(peer, np.float64)
    error = np.abs(ours - peer).max() / np.abs(peer).max()
    print(f"  {what}: {float(ours.ravel()[0]):.6g}, the peer's within {error:.1e}")
    if not error <= tolerance:
        raise SystemExit(f"{what} differs from the peer's by {error:.1e}, more than {tolerance}.")


def has_peer(name: str, hint: str) -> bool:
    """Whether a peer's package takes part: installed, and on a processor."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        print(f"  {name} is not installed: left out (pip install {hint})")
        return False
    return ON_CPU
