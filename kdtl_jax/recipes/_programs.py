"""The programs that a run compiled, by name, with their counts and seconds."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

NAMED = 8  # programs listed by name; the others, mostly single operations, are summed up
COMPILED = "/jax/core/compile/backend_compile_duration"
HIT = "/jax/compilation_cache/cache_hits"


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], str]]:
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
