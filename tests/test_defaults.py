"""Defaults that depend on the data: few labels of the digits, and enough steps to learn from."""

import pytest

from kdtl_jax import cli
from kdtl_jax.recipes import _training, distill


@pytest.mark.parametrize(
    ("words", "examples", "found"),
    [
        ([], 899, (10, 20, 200)),  # 100 examples: 5 steps per epoch, 1,000 in all
        (["--per-class", "0"], 899, (0, 64, 72)),
        (["--data", "x.npz"], 60_000, (0, 64, 60)),
        (["--data", "x.npz"], 30, (0, 6, 200)),
        (["--data", "x.npz"], 3, (0, 1, 334)),
        (["--per-class", "4", "--batch-size", "40", "--epochs", "7"], 899, (4, 40, 7)),
    ],
)
def test_few_examples_still_make_steps(
    words: list[str], examples: int, found: tuple[int, int, int]
) -> None:
    fixed = distill.resolved(cli.parse(["distill", *words]), examples, classes=10)
    assert (fixed.per_class, fixed.batch_size, fixed.epochs) == found


def test_batches_divide_among_devices_and_microbatches() -> None:
    assert _training.default_batch(100, 8) == 16 and _training.default_batch(10, 8) == 8
