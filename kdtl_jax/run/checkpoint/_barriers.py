"""Barriers of a save in several processes, at which one that could not write tells the others.

Orbax's own barriers wait for twenty minutes for a process whose writing has failed.
"""

import contextlib
import itertools
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

SECONDS = 1200  # to write one step, at most
BARRIERS = 2  # of a save: everything is written; process 0 has committed it
_opened = itertools.count()  # every process opens folders in one order


class Barriers(NamedTuple):
    """The barriers of a folder's saves; `meet` is Orbax's `barrier_sync_fn`."""

    name: str  # the same in all processes, of no other folder
    at: list[int]  # the number of the save, and how many of its barriers this process has passed

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes, whatever Orbax calls the barrier.

        Raises:
          OSError: if another process could not write.
        """
        if failed := self._meet(timeout_ms, None):
            raise OSError(f"process {failed} could not write")

    def fail(self) -> None:
        """Tells the others, who wait at the next barrier, that this process could not write."""
        if jax.process_count() > 1 and self.at[1] < BARRIERS:
            with contextlib.suppress(Exception):  # what had failed before is raised
                self._meet(SECONDS * 1000, str(jax.process_index()))

    def _meet(self, timeout_ms: int, failed: str | None) -> str:
        """Which process could not write, "" if none."""
        save, passed = self.at
        self.at[1] = BARRIERS  # unless it is passed, no process comes to another one
        name = f"{self.name}/{save}/{passed}"
        client = ocp.multihost.get_jax_distributed_client()
        if failed is not None:
            client.key_value_set(f"{name}/failed/{failed}", failed)
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=timeout_ms)
        told = client.key_value_dir_get(f"{name}/failed/")
        if not told:
            self.at[1] = passed + 1
        return told[0][1] if told else ""


def begin() -> Barriers:
    """For a folder that all processes open."""
    return Barriers(f"kdtl_jax/checkpoint/{next(_opened)}", [0, 0])


def next_save(barriers: Barriers) -> None:
    """The next save begins, in all processes."""
    barriers.at[:] = [barriers.at[0] + 1, 0]
