"""A step that one of two processes cannot write, as on a full disk; each of them calls it."""

import contextlib
import errno
import time
from typing import Any
from unittest import mock

import orbax.checkpoint as ocp
import pytest

from kdtl_jax.run import checkpoint


class _Refused:
    """A write in progress on a full disk."""

    def result(self, timeout: float | None = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def cannot_write(folder: str, states: Any, part: str, is_victim: bool) -> None:
    """In two processes: what Orbax cannot write in one ends the save in both, not in 20 minutes."""
    handler = ocp.PyTreeCheckpointHandler
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[Any]:
        return [*(await save(*args, **kwargs) or []), _Refused()]

    def finalize(*args: Any) -> None:
        _Refused().result()

    broken = {"async_save": async_save, "finalize": finalize}[part]
    message, start = "No space left" if is_victim else "process [01] could not", time.monotonic()
    with contextlib.ExitStack() as stack:
        if is_victim:
            stack.enter_context(mock.patch.object(handler, part, broken))
        with pytest.raises(OSError, match=message), checkpoint.open_folder(folder) as checkpoints:
            checkpoint.save(checkpoints, 1, states)
    assert time.monotonic() - start < 90
    assert not checkpoint.steps(folder), "neither process may take the step for whole"
