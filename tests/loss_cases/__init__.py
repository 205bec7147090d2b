"""Rows of the table of losses, one module per module of `kdtl_jax.losses`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class LossCase(NamedTuple):
    """One row.

    `example(rng, batch)` makes float64 arguments: student, teacher, then whatever else the loss
    takes by position (labels as int32), each with the batch as leading dimension. Axes on which
    its student and teacher differ in size are free: the loss need not refuse a mismatch there.
    `oracle` takes the same arguments and hyper-parameters and returns `[B]` or `[B, L]` in float64,
    written in NumPy from the paper's equation.
    """

    fn: Callable[..., Any]
    example: Callable[[np.random.Generator, int], tuple[Any, ...]]
    oracle: Callable[..., np.ndarray]
    hyper: dict[str, Any] = {}  # a row is never mutated
    relational: bool = False  # one value per anchor; permutation equivariant, not independent
    zero_at_equality: bool = True
    nonnegative: bool = True
    has_where: bool = False  # takes where= of the student's shape (True takes part)
    twice_differentiable: bool = True
    extreme: bool = True  # finite at +-1e4; False only where the mathematics overflows
    frozen: bool = False  # a part is a constant of the method (a stop_gradient inside), so that
    # the gradient is not the derivative of the value: no check_grads
    note: str = ""  # why a flag departs from its default
    where_rank: int = 0  # dimensions of where= when fewer than the student's ([B, L] tokens: 2)
    rtol: float = 1e-8  # against the oracle, in float64
