"""Versions, devices and processors: what a bug report needs."""

from dataclasses import dataclass

from kdtl_jax.run import report

EXAMPLES = "  kdtl env"


@dataclass(frozen=True)
class Settings:
    """Settings of `kdtl env`: none."""


def run(settings: Settings) -> None:
    """Prints the environment."""
    for name, value in report.environment().items():
        print(f"{name}: {value}")
