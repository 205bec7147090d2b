"""`kdtl env`: what a bug report needs."""

import argparse

from kdtl_jax.run import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`kdtl env` has no flags of its own."""
    parser.epilog = "Example: kdtl env"


def run(args: argparse.Namespace) -> int:
    """Prints versions, devices and processors; returns the exit code."""
    for name, value in report.environment().items():
        print(f"{name}: {value}")
    return 0
