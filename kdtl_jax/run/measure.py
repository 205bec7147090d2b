"""The cost of a compiled program, and how close it comes to the machine's measured limits.

Three separate sources: timing (`step_times`, `throughput`), the compiler's account of the
program (`cost`, `memory`), and the machine's measured ceilings (`ceilings`: a large matmul, a large
copy). `roofline` puts them together. Nothing here depends on the back end: results are awaited with
`block_until_ready`, and what a back end does not report is None. Counts and seconds that are not
positive raise ValueError, arguments of another type TypeError.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks

# The sizes at which the search for a machine's limits ends: rows of a matrix, bytes of a copy.
LARGEST_MATMUL, LARGEST_COPY = 8192, 2**30


class Distribution(NamedTuple):
    """Seconds of repeated runs."""

    median: float
    p10: float
    p90: float
    maximum: float
    runs: int


class Cost(NamedTuple):
    """The work of one run by XLA's cost analysis; None if the back end does not report it.

    Bytes count the reads and writes of every operation, as if there were no caches.
    """

    flops: float | None
    bytes: float | None


class Memory(NamedTuple):
    """Bytes of one run as the compiler reports, and the device's own peak so far."""

    arguments: int | None
    outputs: int | None  # excluding those that reuse donated arguments
    temporaries: int | None
    device_peak: int | None  # of the whole process; None if the back end does not track it

    def compiled(self) -> int | None:
        """Arguments, outputs and temporaries together."""
        parts = (self.arguments, self.outputs, self.temporaries)
        reported = [part for part in parts if part is not None]
        return sum(reported) if len(reported) == len(parts) else None


class Ceilings(NamedTuple):
    """The best rates measured on this machine."""

    flops: float  # per second, an `n x n` matmul
    bytes: float  # per second, read and written by a copy
    dtype: str
    matmul_size: int
    copy_bytes: int


class Roofline(NamedTuple):
    """The shortest time that one run can take under the ceilings, and what limits it."""

    compute: float  # seconds at the matmul ceiling
    bandwidth: float  # seconds at the copy ceiling
    bound: str  # "compute" or "bandwidth", whichever takes longer
    fraction: float  # that bound divided by the measured seconds


def compiled(run: Any, *args: Any) -> tuple[Any, float]:
    """Compiles a jitted function for these arguments; also returns the seconds it took.

    With a persistent compilation cache, these are the seconds of a look-up.
    """
    start = time.perf_counter()
    program = run.lower(*args).compile()
    return program, time.perf_counter() - start


def step_times(once: Callable[[], Any], steps: int, *, warmup: int = 3) -> Distribution:
    """Seconds of single runs, each awaited before the next starts.

    Args:
      once: starts one run and returns its arrays; a closure that keeps its own state.
      steps: number of measured runs.
      warmup: number of runs before them.
    """
    _checks.count(1, steps=steps)
    _checks.count(0, warmup=warmup)
    return distribution(_seconds(once, steps, warmup))


def _seconds(once: Callable[[], Any], steps: int, warmup: int) -> list[float]:
    for _ in range(warmup):
        jax.block_until_ready(once())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - start)
    return seconds


def distribution(seconds: list[float]) -> Distribution:
    """Median, 10th and 90th percentile, maximum, and count."""
    low, mid, high = np.percentile(seconds, [10, 50, 90])
    return Distribution(float(mid), float(low), float(high), max(seconds), len(seconds))


def throughput(once: Callable[[], Any], steps: int, *, warmup: int = 3, rounds: int = 3) -> float:
    """Seconds per run when only the last of many is awaited: what a training loop sees.

    The median over several rounds, with at least `steps` runs in total.
    """
    _checks.count(1, steps=steps, rounds=rounds)
    _checks.count(0, warmup=warmup)
    steps_per_round = -(-steps // rounds)
    for _ in range(warmup):
        jax.block_until_ready(once())
    seconds, last = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps_per_round):
            last = once()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start) / steps_per_round)
    return float(np.median(seconds))


def cost(program: Any) -> Cost:
    """FLOPs and bytes of a compiled program by XLA's own analysis."""
    try:
        analysis = program.cost_analysis()
    except Exception:  # back ends without an analysis raise errors of their own
        analysis = None
    if isinstance(analysis, (list, tuple)):
        analysis = analysis[0] if analysis else None
    analysis = analysis or {}
    return Cost(_positive(analysis.get("flops")), _positive(analysis.get("bytes accessed")))


def memory(program: Any, device: Any = None) -> Memory:
    """Bytes of a compiled program, and the device's peak if the device reports one."""
    try:
        analysis = program.memory_analysis()
    except Exception:
        analysis = None
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if analysis is None:
        return Memory(None, None, None, peak)
    output_bytes = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    return Memory(
        int(analysis.argument_size_in_bytes),
        max(output_bytes, 0),
        int(analysis.temp_size_in_bytes),
        peak,
    )


def ceilings(dtype: Any = jnp.float32, *, quick: bool = False) -> Ceilings:
    """Measures the machine: square matmuls and copies, doubled until one takes long enough.

    Args:
      dtype: of the matmul's factors, at JAX's default precision, as for models.
      quick: small sizes, for a rough figure within a second.
    """
    min_seconds = 0.004 if quick else 0.04
    matmul = cast(Callable[[Any, Any], Any], jax.jit(lambda x, y: x @ y))
    size, seconds, flops = 256, 0.0, 0.0
    while seconds < min_seconds and size < LARGEST_MATMUL:
        size *= 2
        x = jnp.full((size, size), 0.5, dtype)
        seconds = _shortest(lambda x=x: matmul(x, x))
        flops = max(flops, 2 * size**3 / seconds)
    copy_bytes = 2**25 if quick else 2**28
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no new pages to map
    while True:
        buffer = jnp.zeros((copy_bytes // 4,), jnp.float32)

        def copy() -> Any:
            nonlocal buffer
            buffer = increment(buffer)
            return buffer

        copy_seconds = _shortest(copy)
        if copy_seconds >= min_seconds / 10 or copy_bytes >= LARGEST_COPY:
            break
        copy_bytes *= 2
    return Ceilings(flops, 2 * copy_bytes / copy_seconds, jnp.dtype(dtype).name, size, copy_bytes)


def roofline(work: Cost, seconds: float, limits: Ceilings) -> Roofline | None:
    """Compares a run with the ceilings; None if its cost is unknown.

    The bandwidth bound takes XLA's bytes as memory traffic. A program whose arrays stay in the
    caches is faster, and its fraction exceeds 1.

    References:
      Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009.
    """
    _checks.instance(Cost, work=work)
    _checks.instance(Ceilings, limits=limits)
    _checks.scalar(seconds=seconds)
    _checks.positive(seconds=seconds)
    if work.flops is None or work.bytes is None:
        return None
    compute, bandwidth = work.flops / limits.flops, work.bytes / limits.bytes
    bound = "compute" if compute >= bandwidth else "bandwidth"
    return Roofline(compute, bandwidth, bound, max(compute, bandwidth) / seconds)


def _shortest(once: Callable[[], Any]) -> float:
    """The shortest of five runs after one that compiles."""
    return min(_seconds(once, 5, warmup=1))


def _positive(value: Any) -> float | None:
    return float(value) if value is not None and value > 0 else None
