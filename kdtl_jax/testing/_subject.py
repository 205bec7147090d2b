"""The loss under test, and the small tools that every check uses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# `(rng, batch size)` -> the arguments of a loss.
Example = Callable[[np.random.Generator, int], tuple[Any, ...]]


class Subject(NamedTuple):
    """A loss with its declared properties; the arguments of `check_loss`."""

    loss: Callable[..., Any]
    example: Example
    hyper: Mapping[str, Any]
    oracle: Callable[..., Any] | None
    relational: bool
    zero_at_equality: bool
    nonnegative: bool
    where_rank: int
    twice_differentiable: bool
    frozen: bool
    extreme: bool
    batch: int
    rtol: float
    programs: dict[str, Callable[..., Any]]  # traced or compiled once, keyed by what they compute


Check = Callable[[Subject], Iterator[str]]  # yields one line per failure


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compiles for the arguments' shapes; on CPU without optimization, which is faster."""
    lowered = jax.jit(fn).lower(*args)
    if jax.default_backend() != "cpu":
        return lowered.compile()
    quick = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        return lowered.compile(compiler_options=quick)
    except jax.errors.JaxRuntimeError:  # an option that this jaxlib no longer supports
        return lowered.compile()


def program(subject: Subject, name: str, fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`fn` compiled for the arguments' shapes, once per subject and name."""
    if name not in subject.programs:
        subject.programs[name] = compiled(fn, *args)
    return subject.programs[name]


def double(subject: Subject) -> Callable[..., Any]:
    """The loss with its hyper-parameters in float64: traced once, whatever it becomes part of."""
    if "double" not in subject.programs:
        loss = partial(subject.loss, **hyper_of(subject, np.float64))
        subject.programs["double"] = jax.jit(loss)
    return subject.programs["double"]


def arguments(subject: Subject, dtype: Any, *, seed: int = 0) -> tuple[Any, ...]:
    """The example's arguments, with floating-point ones as `dtype`."""
    return cast(tuple(subject.example(np.random.default_rng(seed), subject.batch)), dtype)


def hyper_of(subject: Subject, dtype: Any) -> dict[str, Any]:
    """The hyper-parameters, with arrays as `dtype`, like the arguments."""
    return {k: cast(v, dtype) if isinstance(v, np.ndarray) else v for k, v in subject.hyper.items()}


def cast(tree: Any, dtype: Any) -> Any:
    """Casts floating-point leaves to `dtype`, and all leaves to NumPy arrays."""

    def cast(a: Any) -> np.ndarray:
        a = np.asarray(a)
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(cast, tree)


def is_float(tree: Any) -> bool:
    """Whether every leaf is floating point."""
    return all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(tree))


def has_equal_forms(args: tuple[Any, ...]) -> bool:
    """Whether student and teacher have the same structure, leaf shapes and dtypes."""
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype.name), arg) for arg in args[:2]]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def rows(args: Any, index: np.ndarray) -> Any:
    """Examples `index` of every argument."""
    return jax.tree.map(lambda a: a[index], args)


def differentiable(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Positions of student and teacher, if they are floating point."""
    return tuple(i for i in range(min(2, len(args))) if is_float(args[i]))


def restrict(
    loss: Callable[..., Any], args: tuple[Any, ...], positions: tuple[int, ...]
) -> Callable[..., Any]:
    """The loss as a function of only the arguments at positions `positions`."""

    def partial_loss(*x: Any) -> Any:
        all_args = list(args)
        for i, value in zip(positions, x, strict=True):
            all_args[i] = value
        return loss(*all_args)

    return partial_loss


def value_and_gradient(
    subject: Subject, example: tuple[Any, ...], dtype: Any, extra: Mapping[str, Any]
) -> Callable[..., Any]:
    """The loss and its gradient for student and teacher, as one function of all arguments."""
    positions = differentiable(example)
    loss = partial(subject.loss, **hyper_of(subject, dtype) | dict(extra))

    def run(*args: Any) -> Any:
        value, pull = jax.vjp(restrict(loss, args, positions), *(args[i] for i in positions))
        return value, pull(jnp.ones_like(value))

    return run


def derivatives(
    subject: Subject, args: tuple[Any, ...]
) -> Callable[[tuple[Any, ...], Any, Any], tuple[Any, Any]]:
    """`(args, c, v) -> ((value, gradient of <c, value>), their derivatives along v)`, in float64.

    With respect to student and teacher, if they are floating point. One program serves every check
    of values and derivatives; the derivatives along v are None for a loss that is only once
    differentiable.
    """
    positions, loss = differentiable(args), double(subject)

    def run(args: tuple[Any, ...], c: Any, v: Any) -> tuple[Any, Any]:
        def pulled(*x: Any) -> tuple[Any, Any]:
            value, pull = jax.vjp(restrict(loss, args, positions), *x)
            return value, pull(jnp.asarray(c))

        x = tuple(args[i] for i in positions)
        return jax.jvp(pulled, x, v) if subject.twice_differentiable else (pulled(*x), None)

    x = tuple(args[i] for i in positions)
    c = np.ones(jax.eval_shape(loss, *args).shape)
    return program(subject, "derivatives", run, args, c, x)


def float64_values(subject: Subject, args: tuple[Any, ...]) -> Callable[..., np.ndarray]:
    """The loss's values as a function of arguments of these shapes."""
    run, positions = derivatives(subject, args), differentiable(args)
    c = np.ones(jax.eval_shape(double(subject), *args).shape)
    return lambda *args: np.asarray(run(args, c, tuple(args[i] for i in positions))[0][0])


def compare(label: str, actual: Any, expected: Any, rtol: float) -> Iterator[str]:
    """Yields a failure that states where and by how much, if the two are not close."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        yield f"{label}: shape {list(actual.shape)}, expected {list(expected.shape)}"
        return
    # The floor is relative to the largest value, so tiny and huge losses are treated alike.
    atol = rtol * max(float(np.max(np.abs(expected), initial=0.0)), 1e-6)
    with np.errstate(invalid="ignore"):
        differs = ~(np.abs(actual - expected) <= atol + rtol * np.abs(expected))
    differs &= actual != expected  # infinities of the same sign are equal; NaN never is
    if differs.any():
        i = tuple(int(k) for k in np.argwhere(differs)[0])
        yield (
            f"{label}: at {list(i)} {actual[i]!s}, expected {expected[i]!s} "
            f"({differs.sum()} of {differs.size} differ)"
        )


def not_finite(label: str, value: Any, gradient: Any) -> Iterator[str]:
    """Yields a failure for a value, and one for a gradient, with NaN or infinity."""
    for name, arrays in (("value", [value]), ("gradient", jax.tree.leaves(gradient))):
        if not all(np.isfinite(a).all() for a in arrays):
            yield f"{label}: the {name} is not finite"


def summarize(error: Exception | None) -> str:
    """An exception in one line."""
    return "no error" if error is None else f"{type(error).__name__}: {str(error).splitlines()[:1]}"


def names_shape(message: str, shape: Sequence[int]) -> bool:
    """Whether a message names a shape."""
    compact = message.replace(" ", "").replace(",)", ")")
    inner = ",".join(str(n) for n in shape)
    return f"[{inner}]" in compact or f"({inner})" in compact
