"""Checks both sides of a feature loss and casts them to one dtype, float32 or wider.

The function that a loss calls here determines which axes of student and teacher must agree.
"""

from collections.abc import Sequence

import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics


def _check_and_upcast(at_least: int, at_most: int | None, **arrays: Array) -> tuple[Array, ...]:
    _checks.floating(**arrays)
    _checks.rank(at_least, at_most, **arrays)
    _checks.nonempty(**arrays)
    upcast = [_numerics.upcast(array) for array in arrays.values()]
    # NumPy's rule: under strict promotion, JAX's own refuses even to name the wider of two dtypes.
    dtype = np.result_type(*[array.dtype for array in upcast])
    return tuple(array.astype(dtype) for array in upcast)


def same_shape(
    student: Array,
    teacher: Array,
    *,
    at_least: int = 2,
    at_most: int | None = None,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[Array, Array]:
    """For sides of one shape `[B, ..., C]`, with `at_least` to `at_most` axes."""
    named = dict(zip(names, (student, teacher), strict=True))
    _checks.same_shape(**named)
    student, teacher = _check_and_upcast(at_least, at_most, **named)
    return student, teacher


def same_positions(
    student: Array,
    teacher: Array,
    *,
    at_least: int = 3,
    at_most: int | None = None,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[Array, Array]:
    """For sides that may differ in the last axis: `[B, H, W, Cs]` and `[B, H, W, Ct]`."""
    named = dict(zip(names, (student, teacher), strict=True))
    sides = _check_and_upcast(at_least, at_most, **named)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{' and '.join(names)} must agree in all axes but the last, got "
            f"{_checks.described(**named)}. Pool the larger map first (connectors.pool)."
        )
    return sides[0], sides[1]


def same_channels(
    student: Array, teacher: Array, *, at_least: int = 3, at_most: int | None = None
) -> tuple[Array, Array]:
    """For sides with equal batch and last axis: `[B, Hs, Ws, C]` and `[B, Ht, Wt, C]`."""
    sides = _check_and_upcast(at_least, at_most, student=student, teacher=teacher)
    signatures = [(side.ndim, side.shape[0], side.shape[-1]) for side in sides]
    if signatures[0] != signatures[1]:
        raise ValueError(
            f"student and teacher must agree in rank, batch and channels, got "
            f"{_checks.described(student=student, teacher=teacher)}. "
            "Project the student to the teacher's width first (connectors.conv1x1)."
        )
    return sides[0], sides[1]


def same_batch(
    student: Array, teacher: Array, *, at_least: int = 2, at_most: int | None = None
) -> tuple[Array, Array]:
    """For sides with equal batch that may differ otherwise: `[B, ...]` and `[B, ...]`."""
    sides = _check_and_upcast(at_least, at_most, student=student, teacher=teacher)
    _checks.same_batch(student=student, teacher=teacher)
    return sides[0], sides[1]


def single(x: Array, name: str, *, at_least: int, at_most: int | None = None) -> Array:
    """A single array `[B, ...]`, the argument `name`, with `at_least` to `at_most` axes."""
    return _check_and_upcast(at_least, at_most, **{name: x})[0]


def check_sequences(at_most: int | None = None, **sides: Sequence[Array]) -> None:
    """Checks that both sides are equally long sequences of two to `at_most` arrays."""
    for name, side in sides.items():
        if not isinstance(side, Sequence) or isinstance(side, str):
            raise TypeError(f"{name} must be a sequence of arrays, got {type(side).__name__}.")
    lengths = [len(side) for side in sides.values()]
    low, high = min(lengths), max(lengths)
    if low != high or low < 2 or (at_most is not None and high > at_most):
        expected = "two arrays each" if at_most == 2 else "equally many arrays, two or more"
        raise ValueError(
            f"{' and '.join(sides)} must hold {expected}, got {' and '.join(map(str, lengths))}."
        )


def zero_masked(where: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """Zeros the rows that `where` (`[B]`) masks."""
    _checks.mask(where, arrays[0].shape[:1])
    return tuple(_numerics.kept(array, where) for array in arrays)


def flat(where: Array | None, *sides: Array) -> tuple[Array, ...]:
    """`[B, ...] -> [B, D]` of every side, with the rows that `where` masks zeroed."""
    return zero_masked(where, *map(_numerics.batch_flat, sides))
