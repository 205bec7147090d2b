"""Does it hold where training goes wrong: extremes, half precision, masks, bad input."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax.testing import _subject
from kdtl_jax.testing._subject import Subject


def extremes(subject: Subject) -> Iterator[str]:
    """Finite value and gradient in float32 at equality, +-1e4, zeros, duplicates, batch of one.

    And not finite where an argument is NaN: whoever looks for a broken model looks at the loss.
    """
    args = _subject.arguments(subject, np.float32)
    student, teacher, rest = args[0], args[1:2], args[2:]
    floats = bool(teacher) and _subject.is_float(teacher)
    big = tuple(
        jax.tree.map(lambda a: np.copysign(np.float32(1e4), a), arg)
        if _subject.is_float(arg)
        else arg
        for arg in args
    )
    negative = jax.tree.map(lambda a: -a, big[0])
    zeros = jax.tree.map(np.zeros_like, student)
    no_teacher = jax.tree.map(np.zeros_like, teacher) if floats else teacher
    situations = {
        "ordinary arguments": args,
        "duplicate rows": _subject.rows(args, np.zeros(subject.batch, np.int32)),
        "student zero": (zeros, *teacher, *rest),
        "teacher zero": (student, *no_teacher, *rest),
        "both zero": (zeros, *no_teacher, *rest),
    }
    if floats and _subject.alike(args):
        situations["teacher = student"] = (student, student, *rest)
    if subject.extreme:
        situations["student +-1e4"] = (big[0], *teacher, *rest)
        situations["teacher +-1e4"] = (student, *big[1:2], *rest)
        situations["both +-1e4, opposite signs"] = (negative, *big[1:2], *rest)
        if floats and _subject.alike(args):
            situations["both +-1e4, equal"] = (big[0], big[0], *rest)
    one = _subject.rows(args, np.zeros(1, np.int32))
    program = None
    for name, given in {**situations, "batch of one": one, "batch of one, zero": None}.items():
        if name == "batch of one":
            program = None
        if given is None:
            given = tuple(
                jax.tree.map(np.zeros_like, a) if _subject.is_float(a) else a for a in one
            )
        if program is None:
            program = _subject.compiled(
                _subject.value_and_gradient(subject, given, np.float32, {}), *given
            )
        value, gradient = program(*given)
        if not np.isfinite(value).all():
            yield f"{name}: value {np.asarray(value).ravel()[:4]} is not finite"
        elif subject.nonnegative and np.min(value) < -1e-5 * max(1.0, float(np.max(value))):
            yield f"{name}: negative, {np.min(value)}"
        for g in jax.tree.leaves(gradient):
            if not np.isfinite(g).all():
                yield f"{name}: the gradient is not finite (value {np.asarray(value).ravel()[:4]})"
                break
        if name == "ordinary arguments":
            for which in range(2 if floats else 1):
                broken = [jax.tree.map(_nan, a) if i == which else a for i, a in enumerate(args)]
                if np.isfinite(np.asarray(program(*broken)[0])).all():
                    yield f"NaN in the {('student', 'teacher')[which]} gives a finite value"


def _nan(x: np.ndarray) -> np.ndarray:
    return np.full_like(x, np.nan) if x.dtype.kind == "f" else x


def precision(subject: Subject) -> Iterator[str]:
    """bfloat16 and float16 inputs give float32, within 1 % of float64 on the same numbers."""
    names = (jnp.bfloat16, jnp.float16)
    rounded = [_subject.arguments(subject, dtype) for dtype in names]
    hyper = [_subject.hyper_of(subject, dtype) for dtype in names]

    def both(*given: Any) -> list[Any]:
        return [subject.loss(*a, **h) for a, h in zip(given, hyper, strict=True)]

    halves = _subject.compiled(both, *rounded)(*rounded)
    with jax.enable_x64(True):
        wide = [_subject.cast(args, np.float64) for args in rounded]
        exact = subject.oracle and partial(subject.oracle, **subject.hyper)
        if exact is None:
            exact = _subject.compiled(
                partial(subject.loss, **_subject.hyper_of(subject, np.float64)), *wide[0]
            )
        for dtype, half, args in zip(names, halves, wide, strict=True):
            name = jnp.dtype(dtype).name
            if jnp.finfo(half.dtype).bits < 32:
                yield f"{name} inputs must give float32 or wider, got {half.dtype}: upcast first"
            want = np.asarray(exact(*args))
            half = np.asarray(half, np.float64)
            worst = np.max(np.abs(half - want)) / max(float(np.max(np.abs(want))), 1e-6)
            # Upcast inputs agree to 1e-6 of the largest value; half arithmetic is seldom
            # within 5e-4 of it, although single values may happen to be.
            if not worst <= 5e-4 or not np.allclose(half, want, rtol=1e-2, atol=1e-5):
                yield f"{name} inputs: {half.ravel()[:4]}, in float64 {want.ravel()[:4]}"


def masks(subject: Subject) -> Iterator[str]:
    """`where` equals slicing; what is masked cannot matter, not even as -inf."""
    if not subject.where_rank:
        return
    with jax.enable_x64(True):
        axis = subject.where_rank - 1
        args = _subject.arguments(subject, np.float64)
        leading = jax.tree.leaves(args[0])[0].shape[: subject.where_rank]
        size = leading[axis]
        keep = (size + 1) // 2
        args = jax.tree.map(lambda a: a if a.dtype.kind == "f" else np.minimum(a, keep - 1), args)

        def masked(tree: Any, fill: float) -> Any:
            def fill_in(a: np.ndarray) -> np.ndarray:
                if a.dtype.kind != "f" or a.shape[: axis + 1] != leading:
                    return a
                a = np.moveaxis(a.copy(), axis, 0)
                a[keep:] = fill
                return np.moveaxis(a, 0, axis)

            return jax.tree.map(fill_in, tree)

        where = np.broadcast_to(
            (np.arange(size) < keep).reshape((1,) * axis + (size,)), leading
        ).copy()
        hyper = _subject.hyper_of(subject, np.float64)
        program = _subject.compiled(
            lambda a, w: _subject.value_and_gradient(subject, a, np.float64, {"where": w})(*a),
            args,
            where,
        )
        sliced = jax.tree.map(
            lambda a: np.take(a, np.arange(keep), axis) if a.shape[: axis + 1] == leading else a,
            args,
        )
        want, plain = _subject.compiled(
            lambda *given: [subject.loss(*a, **hyper) for a in given], sliced, args
        )(sliced, args)
        for fill in (0.0, 1e4, -np.inf):
            value, gradient = program(masked(args, fill), where)
            value = np.asarray(value)
            seen = np.take(value, np.arange(keep), axis) if value.ndim > axis else value
            yield from _subject.unequal(
                f"where must equal slicing ({fill} where masked)", seen, want, 1e-9
            )
            yield from _subject.not_finite(f"masked entries {fill}", value, gradient)
        everything = np.ones_like(where)
        yield from _subject.unequal(
            "where=True throughout is no mask", program(args, everything)[0], plain, 1e-9
        )
        nothing = where.copy()
        nothing[0] = False
        yield from _subject.not_finite("an example masked entirely", *program(args, nothing))


def errors(subject: Subject) -> Iterator[str]:
    """Mismatched shapes raise ValueError naming both shapes; integers raise TypeError."""
    args = _subject.arguments(subject, np.float32)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    hyper = _subject.hyper_of(subject, np.float32)

    def outcome(*given: Any) -> Exception | None:
        try:
            jax.eval_shape(partial(subject.loss, **hyper), *given)
        except Exception as error:  # whatever a user's loss raises is what we look at
            return error
        return None

    students, teachers = jax.tree.leaves(shapes[0]), jax.tree.leaves(shapes[1:2])
    paired = [(s, t) for s, t in zip(students, teachers, strict=False) if _subject.is_float(t)]
    for what, change in _mismatches(paired):
        wrong = jax.tree.map(change, shapes[1])
        error = outcome(shapes[0], wrong, *shapes[2:])
        before, after = paired[0][0].shape, jax.tree.leaves(wrong)[0].shape
        told = f"{what}, student{list(before)}, teacher{list(after)}"
        if not isinstance(error, ValueError):
            yield f"{told}: must raise ValueError, got {_subject.summary(error)}"
        elif not all(_names(str(error), s) for s in (before, after)):
            yield f"{told}: the message must name both shapes, got {error}"
    for i in range(min(2, len(shapes))):
        side = ("student", "teacher")[i]
        is_float = _subject.is_float(shapes[i])
        dtype = jnp.int32 if is_float else jnp.float32
        wrong = jax.tree.map(lambda a, dtype=dtype: jax.ShapeDtypeStruct(a.shape, dtype), shapes[i])
        error = outcome(*shapes[:i], wrong, *shapes[i + 1 :])
        if not isinstance(error, TypeError):
            got = "integers" if is_float else "floating point"
            yield f"{side} as {got}: must raise TypeError, got {_subject.summary(error)}"


def _mismatches(pairs: list[tuple[Any, Any]]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Ways to spoil the teacher's shape on axes where the example's two sides agree."""
    if not pairs:
        return

    def resized(axis: int, size: Callable[[int], int]) -> Callable[[Any], Any]:
        def change(a: Any) -> Any:
            shape = (*a.shape[:axis], size(a.shape[axis]), *a.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, a.dtype)

        return change

    ndim = min(len(a.shape) for pair in pairs for a in pair)
    for axis in range(ndim):
        if all(s.shape[axis] == t.shape[axis] for s, t in pairs):
            yield f"teacher longer on axis {axis}", resized(axis, lambda n: n + 1)
            if all(t.shape[axis] > 1 for _, t in pairs):
                yield f"teacher of length 1 on axis {axis}", resized(axis, lambda n: 1)
    if all(s.shape == t.shape for s, t in pairs):
        yield (
            "teacher with an extra axis",
            lambda a: jax.ShapeDtypeStruct((a.shape[0], 1, *a.shape[1:]), a.dtype),
        )


def _names(message: str, shape: Sequence[int]) -> bool:
    plain = message.replace(" ", "").replace(",)", ")")
    inner = ",".join(str(n) for n in shape)
    return f"[{inner}]" in plain or f"({inner})" in plain
