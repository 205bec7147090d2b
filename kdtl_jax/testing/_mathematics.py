"""Is it the function that it claims to be: values, gradients, jit and vmap."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax.testing import _subject
from kdtl_jax.testing._subject import Subject


def values(subject: Subject) -> Iterator[str]:
    """Shape, oracle, zero at equality, sign, equivariance, independence; in float64."""
    with jax.enable_x64(True):
        args = _subject.arguments(subject, np.float64)
        function = partial(subject.loss, **_subject.hyper_of(subject, np.float64))
        loss = _subject.compiled(function, *args)
        got = np.asarray(loss(*args))
        if got.ndim == 0 or got.shape[0] != subject.batch:
            yield (
                f"must return one value per example, [{subject.batch}] or [{subject.batch}, L], "
                f"got {list(got.shape)}: leave the reduction to the caller"
            )
            return
        if subject.oracle is not None:
            want = np.asarray(subject.oracle(*args, **subject.hyper))
            yield from _subject.unequal("float64 oracle", got, want, subject.rtol)
        typical = max(1.0, float(np.max(np.abs(got))))
        if subject.nonnegative and got.min() < -1e-12 * typical:
            yield f"negative: {got.min()} (declare nonnegative=False if that is meant)"
        if subject.zero_at_equality:
            equals = (args[0], args[0], *args[2:])
            equal = np.asarray(
                (loss if _subject.alike(args) else _subject.compiled(function, *equals))(*equals)
            )
            if np.max(np.abs(equal)) > 1e-10 * typical or np.isnan(equal).any():
                yield f"must be 0 where teacher = student, got {equal.ravel()[:4]}"
        order = np.roll(np.arange(subject.batch), 1)
        order[:2] = order[1::-1]
        permuted = np.asarray(loss(*_subject.rows(args, order)))
        yield from _subject.unequal(
            "a permuted batch must give permuted values", permuted, got[order], 1e-9
        )
        if not subject.relational:
            other = _subject.arguments(subject, np.float64, seed=1)
            mixed = jax.tree.map(lambda a, b: np.concatenate([b[:1], a[1:]]), args, other)
            after = np.asarray(loss(*mixed))
            yield from _subject.unequal(
                "changing example 0 must not change the others (or declare relational=True)",
                after[1:], got[1:], 1e-12,
            )  # fmt: skip


def gradients(subject: Subject) -> Iterator[str]:
    """First and second derivatives against central differences, in float64.

    The same quantities as `jax.test_util.check_grads(order=2)`: jvp, vjp, and jvp of the vjp
    along a random direction, all from one compiled program.
    """
    if subject.frozen:
        return
    with jax.enable_x64(True):
        args = _subject.arguments(subject, np.float64)
        at = _subject.differentiable(args)
        rng = np.random.default_rng(3)
        x = tuple(args[i] for i in at)
        v = jax.tree.map(lambda a: rng.normal(size=a.shape), x)
        loss = _subject.along(subject, args, at, np.float64, {})
        c = rng.uniform(0.5, 1.5, size=jax.eval_shape(loss, *x).shape)

        def pulled(*x: Any) -> tuple[Any, Any]:
            value, pull = jax.vjp(loss, *x)
            return value, pull(jnp.asarray(c))

        def derivatives(x: Any, v: Any) -> Any:
            return jax.jvp(pulled, x, v) if subject.twice_differentiable else (pulled(*x), None)

        program = _subject.compiled(derivatives, x, v)
        eps = 1e-5
        above, below = (
            program(jax.tree.map(lambda a, b, e=e: a + e * b, x, v), v)[0] for e in (eps, -eps)
        )
        (_, gradient), tangents = program(x, v)
        slope = (np.asarray(above[0]) - np.asarray(below[0])) / (2 * eps)
        for a, g in zip(jax.tree.leaves(x), jax.tree.leaves(gradient), strict=True):
            if a.shape != g.shape or a.dtype != g.dtype:
                yield f"gradient {g.dtype}{list(g.shape)} for input {a.dtype}{list(a.shape)}"
        along = sum(
            np.sum(np.asarray(g) * b)
            for g, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(v), strict=True)
        )
        yield from _subject.unequal(
            "vjp against central differences", along, np.sum(c * slope), 1e-5
        )
        if tangents is not None:
            yield from _subject.unequal("jvp against central differences", tangents[0], slope, 1e-5)
            for up, down, second in zip(
                *(jax.tree.leaves(tree) for tree in (above[1], below[1], tangents[1])), strict=True
            ):
                bend = (np.asarray(up) - np.asarray(down)) / (2 * eps)
                yield from _subject.unequal(
                    "second derivative against central differences", second, bend, 1e-4
                )


def transformations(subject: Subject) -> Iterator[str]:
    """jit equals eager; vmap over an extra leading axis equals a loop."""
    with jax.enable_x64(True):
        args, other = (_subject.arguments(subject, np.float64, seed=seed) for seed in (0, 1))
        loss = partial(subject.loss, **_subject.hyper_of(subject, np.float64))
        eager = np.asarray(loss(*jax.tree.map(jnp.asarray, args)))
        jitted = _subject.compiled(loss, *args)
        yield from _subject.unequal("jit must equal eager", jitted(*args), eager, 1e-9)
        stacked = jax.tree.map(lambda a, b: np.stack([a, b]), args, other)
        mapped = _subject.compiled(jax.vmap(loss), *stacked)(*stacked)
        looped = np.stack([jitted(*args), jitted(*other)])
        yield from _subject.unequal("vmap must equal a loop", mapped, looped, 1e-9)
