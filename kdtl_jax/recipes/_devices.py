"""The device mesh for batches and weights, and multi-process setup."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import processes, sharding


@dataclass(frozen=True)
class Meshed:
    """The settings of a command that shards its batches."""

    mesh: Mapping[str, int] = setting(
        {}, "data=4,fsdp=2: split batches over 8 devices, weights over 2 of them",
        metavar="AXIS=N,...", parse=types.mesh_sizes, group="devices",
    )  # fmt: skip
    coordinator: str | None = setting(
        None,
        "address of process 0 in a multi-process run (see --process)",
        metavar="HOST:PORT",
        group="devices",
    )
    processes: int | None = setting(
        None, "number of processes", metavar="N", least=1, group="devices"
    )
    process: int | None = setting(
        None, "index of this process, from 0", metavar="I", least=0, group="devices"
    )


def make_mesh(settings: Meshed) -> Mesh | None:
    """Joins the other processes, if any, and makes the mesh of the settings."""
    process_settings = (settings.coordinator, settings.processes, settings.process)
    if any(value is not None for value in process_settings):
        try:
            processes.initialize(
                coordinator=settings.coordinator,
                processes=settings.processes,
                process=settings.process,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
    elif not settings.mesh:
        return None
    return sharding.make_mesh(**settings.mesh)


def first_devices(count: int | None) -> list[Any]:
    """The first `count` devices (None: all), virtual on a CPU; call before using any device.

    Raises:
      UsageError: if there are fewer devices.
    """
    if count is not None and count > 1:
        with contextlib.suppress(RuntimeError):  # the backend is already initialized
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if count is not None and count > len(devices):
        raise UsageError(f"--devices {count}: there are {len(devices)} devices here.")
    return devices[:count]
