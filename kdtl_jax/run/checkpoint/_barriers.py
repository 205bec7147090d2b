"""Barriers of a multi-process save, at which a process that could not write tells the others.

At Orbax's own barriers, the others would wait for it for twenty minutes.
"""

import contextlib
import itertools
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

SECONDS = 1200  # to write one step, at most
BARRIERS = 2  # of a save: everything is written; process 0 has committed it
_folder_numbers = itertools.count()  # all processes open folders in the same order


class Barriers(NamedTuple):
    """The barriers of a folder's saves; `meet` is Orbax's `barrier_sync_fn`."""

    name: str  # of the folder, the same in all processes
    position: list[int]  # number of the save, and how many barriers this process has passed in it

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes, whatever Orbax calls the barrier.

        Raises:
          OSError: if another process could not write.
        """
        if failed := self._meet(timeout_ms, None):
            raise OSError(f"process {failed} could not write")

    def fail(self) -> None:
        """Tells the others, which wait at the next barrier, that this process could not write."""
        if jax.process_count() > 1 and self.position[1] < BARRIERS:
            with contextlib.suppress(Exception):  # the caller raises the first error
                self._meet(SECONDS * 1000, str(jax.process_index()))

    def _meet(self, timeout_ms: int, failed: str | None) -> str:
        """Waits; returns the process that could not write, or ""."""
        save, passed = self.position
        self.position[1] = BARRIERS  # if it fails, no process comes to the next barrier
        name = f"{self.name}/{save}/{passed}"
        client = ocp.multihost.get_jax_distributed_client()
        if failed is not None:
            client.key_value_set(f"{name}/failed/{failed}", failed)
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=timeout_ms)
        failures = client.key_value_dir_get(f"{name}/failed/")
        if not failures:
            self.position[1] = passed + 1
        return failures[0][1] if failures else ""


def begin() -> Barriers:
    """Makes the barriers of a folder that all processes open."""
    return Barriers(f"kdtl_jax/checkpoint/{next(_folder_numbers)}", [0, 0])


def next_save(barriers: Barriers) -> None:
    """Starts the next save; all processes call it."""
    barriers.position[:] = [barriers.position[0] + 1, 0]
