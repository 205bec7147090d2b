"""`kdtl env`: what a bug report needs."""

import argparse

from kdtl_jax import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Example: kdtl env"


def run(args: argparse.Namespace) -> int:
    for name, value in report.environment().items():
        print(f"{name}: {value}")
    return 0
