"""Measures which program is fastest and how many points fit in memory."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax.train.sweep._points import Points, size
from kdtl_jax.train.sweep._programs import Experiment, Program, all_points, select_rows


def timings(
    programs: Sequence[Program], points: Points, *shared: Any, probe: int = 16, repeats: int = 3
) -> list[float]:
    """Seconds per point of every program on the first `probe` points, excluding compilation.

    Programs take turns, and the shortest of `repeats` runs counts, so other load on the machine
    affects all programs alike. Pass programs of a shorter experiment (fewer steps): their order is
    the same. Batched convolutions become grouped ones, which some back ends run more slowly than
    one model after another; only a measurement can tell.
    """
    probe_points = select_rows(points, np.arange(min(probe, size(points))))
    best = [float("inf")] * len(programs)
    for turn in range(1 + repeats):
        for i, program in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(probe_points, *shared))
            if turn:  # the first run compiles
                best[i] = min(best[i], time.perf_counter() - start)
    return [seconds / size(probe_points) for seconds in best]


def fastest(
    programs: Sequence[Program], points: Points, *shared: Any, probe: int = 16, repeats: int = 3
) -> int:
    """The index of the program with the shortest of `timings`."""
    return int(np.argmin(timings(programs, points, *shared, probe=probe, repeats=repeats)))


def chunk_for_memory(experiment: Experiment, points: Points, *shared: Any, bytes: int) -> int:
    """The largest chunk of `sweep.vmap` that fits in `bytes` of temporaries and results.

    Extrapolates from the compiler's memory analysis of two small chunks, without running anything.

    Raises:
      ValueError: if not even one point fits, or the back end does not report its memory.
    """
    run_all = all_points(experiment)

    def bytes_for(n: int) -> int:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *np.shape(x)[1:]), jnp.asarray(x).dtype),
            dict(points),
        )
        memory = run_all.lower(shapes, *shared).compile().memory_analysis()
        if memory is None:
            raise ValueError("this back end reports no memory; pass chunk=.")
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)

    two, four = bytes_for(2), bytes_for(4)
    per_point = max((four - two) / 2, 1.0)
    fixed_bytes = max(two - 2 * per_point, 0.0)
    chunk = int((bytes - fixed_bytes) // per_point)
    if chunk < 1:
        raise ValueError(
            f"one point needs about {int(fixed_bytes + per_point)} bytes, "
            f"but {bytes} are allowed. Use smaller batches."
        )
    return min(chunk, size(points))
