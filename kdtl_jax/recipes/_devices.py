"""Devices: the mesh that batches and weights are split over, and the processes that share it."""

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
    """The settings of a command that splits its batches."""

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


def joined(settings: Meshed) -> Mesh | None:
    """The mesh of the settings, after joining the other processes, if there are any."""
    several = (settings.coordinator, settings.processes, settings.process)
    if any(value is not None for value in several):
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


def first(asked: int | None) -> list[Any]:
    """The first `asked` devices (None: all), virtual ones on a CPU; call it before any is used.

    Raises:
      UsageError: if there are fewer devices.
    """
    if asked is not None and asked > 1:
        with contextlib.suppress(RuntimeError):  # the back end has started, with the devices it has
            jax.config.update("jax_num_cpu_devices", asked)
    have = jax.devices()
    if asked is not None and asked > len(have):
        raise UsageError(f"--devices {asked}: there are {len(have)} devices here.")
    return have[:asked]
