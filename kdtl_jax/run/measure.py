"""What a compiled program costs, and how close it comes to the machine's measured limits.

Three separate sources: timing (`step_times`, `throughput`), the compiler's account of the
program (`cost`, `memory`), and the machine's measured ceilings (`ceilings`: a large matmul, a large
copy). `roofline` puts them together. Nothing here depends on the back end: results are awaited with
`block_until_ready`, and what a back end does not report is None.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks

# Where the search for a machine's limits ends: rows of a matrix, bytes of a copy.
LARGEST_MATMUL, LARGEST_COPY = 8192, 2**30


class Distribution(NamedTuple):
    """Seconds of repeated runs."""

    median: float
    p10: float
    p90: float
    maximum: float
    runs: int


class Cost(NamedTuple):
    """Work of one run as XLA's cost analysis counts it; None if the back end does not report it.

    Bytes are those that every operation reads and writes, as if there were no caches.
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
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


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

    Raises:
      ValueError: if `steps` is not positive.
    """
    _checks.count(1, steps=steps)
    for _ in range(warmup):
        jax.block_until_ready(once())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - start)
    return distribution(seconds)


def distribution(seconds: list[float]) -> Distribution:
    """Median, 10th and 90th percentile, maximum, and count."""
    low, mid, high = np.percentile(seconds, [10, 50, 90])
    return Distribution(float(mid), float(low), float(high), max(seconds), len(seconds))


def throughput(once: Callable[[], Any], steps: int, *, warmup: int = 3, rounds: int = 3) -> float:
    """Seconds per run when only the last of many is awaited: what a training loop sees.

    The median over several rounds, with at least `steps` runs in total.
    """
    each = -(-steps // rounds)
    for _ in range(warmup):
        jax.block_until_ready(once())
    seconds, last = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(each):
            last = once()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start) / each)
    return float(np.median(seconds))


def cost(program: Any) -> Cost:
    """FLOPs and bytes of a compiled program by XLA's own analysis."""
    try:
        found = program.cost_analysis()
    except Exception:  # back ends without an analysis raise errors of their own
        found = None
    if isinstance(found, (list, tuple)):
        found = found[0] if found else None
    found = found or {}
    return Cost(_positive(found.get("flops")), _positive(found.get("bytes accessed")))


def memory(program: Any, device: Any = None) -> Memory:
    """Bytes of a compiled program, and the device's peak if the device reports one."""
    try:
        found = program.memory_analysis()
    except Exception:
        found = None
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if found is None:
        return Memory(None, None, None, peak)
    fresh = int(found.output_size_in_bytes) - int(found.alias_size_in_bytes)
    return Memory(
        int(found.argument_size_in_bytes), max(fresh, 0), int(found.temp_size_in_bytes), peak
    )


def ceilings(dtype: Any = jnp.float32, *, quick: bool = False) -> Ceilings:
    """Measures the machine: square matmuls and copies, doubled until one takes long enough.

    Args:
      dtype: of the matmul's factors, at the same default precision as models.
      quick: small sizes, for a rough figure within a second.
    """
    enough = 0.004 if quick else 0.04
    matmul = cast(Callable[[Any, Any], Any], jax.jit(lambda x, y: x @ y))
    n, best, flops = 256, 0.0, 0.0
    while best < enough and n < LARGEST_MATMUL:
        n *= 2
        x = jnp.full((n, n), 0.5, dtype)
        best = _best(lambda x=x: matmul(x, x))
        flops = max(flops, 2 * n**3 / best)
    copy_bytes = 2**25 if quick else 2**28
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no new pages to map
    while True:
        buffer = jnp.zeros((copy_bytes // 4,), jnp.float32)

        def once() -> Any:
            nonlocal buffer
            buffer = add(buffer)
            return buffer

        seconds = _best(once)
        if seconds >= enough / 10 or copy_bytes >= LARGEST_COPY:
            break
        copy_bytes *= 2
    return Ceilings(flops, 2 * copy_bytes / seconds, jnp.dtype(dtype).name, n, copy_bytes)


def roofline(work: Cost, seconds: float, limits: Ceilings) -> Roofline | None:
    """Where a run is relative to the ceilings; None if its cost is unknown.

    The bandwidth bound takes XLA's bytes as memory traffic. A program whose arrays stay in the
    caches is faster, and its fraction exceeds 1.

    References:
      Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009.
    """
    if work.flops is None or work.bytes is None:
        return None
    compute, bandwidth = work.flops / limits.flops, work.bytes / limits.bytes
    bound = "compute" if compute >= bandwidth else "bandwidth"
    return Roofline(compute, bandwidth, bound, max(compute, bandwidth) / seconds)


def _best(once: Callable[[], Any]) -> float:
    """The shortest of five runs after one that compiles."""
    jax.block_until_ready(once())
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _positive(value: Any) -> float | None:
    return float(value) if value is not None and value > 0 else None
