"""The tests that every loss of this library passes, for use on your own losses.

    >>> import jax.numpy as jnp
    >>> from kdtl_jax import testing
    >>> def squared(student, teacher):
    ...     if student.shape != teacher.shape:
    ...         raise ValueError(f"squared: {student.shape} and {teacher.shape} differ")
    ...     if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (student, teacher)):
    ...         raise TypeError("squared: expected floating point")
    ...     difference = student - teacher
    ...     if jnp.finfo(difference.dtype).bits < 32:
    ...         difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    ...     return jnp.mean(difference**2, axis=-1)
    >>> def example(rng, batch):
    ...     return rng.normal(size=(batch, 5)), rng.normal(size=(batch, 5))
    >>> testing.check_loss(squared, example, oracle=lambda s, t: ((s - t) ** 2).mean(-1))

The tests check the contract of `kdtl_jax.losses`: one value per example, accurate in float64 and in
half precision, differentiable, finite in extreme situations, and with errors for bad input. Each
check is a function from the `Subject` to the failures it found, so a test can run a single check.
Checks that run together share their compiled programs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kdtl_jax.testing import _subject
from kdtl_jax.testing._battery import errors as errors
from kdtl_jax.testing._battery import extremes as extremes
from kdtl_jax.testing._battery import gradients as gradients
from kdtl_jax.testing._battery import hyperparameters as hyperparameters
from kdtl_jax.testing._battery import masks as masks
from kdtl_jax.testing._battery import precision as precision
from kdtl_jax.testing._battery import transformations as transformations
from kdtl_jax.testing._battery import values as values
from kdtl_jax.testing._subject import Check as Check
from kdtl_jax.testing._subject import Example as Example
from kdtl_jax.testing._subject import Subject as Subject
from kdtl_jax.testing._subject import compiled as compiled

# All checks of `check_loss`, in order.
ALL: tuple[Check, ...] = (
    values,
    gradients,
    transformations,
    extremes,
    precision,
    masks,
    hyperparameters,
    errors,
)


def check_loss(
    loss: Callable[..., Any],
    example: Example,
    *,
    hyper: Mapping[str, Any] | None = None,
    oracle: Callable[..., Any] | None = None,
    relational: bool = False,
    zero_at_equality: bool = True,
    nonnegative: bool = True,
    where_rank: int = 0,
    twice_differentiable: bool = True,
    frozen: bool = False,
    extreme: bool = True,
    batch: int = 4,
    rtol: float = 1e-8,
    checks: Sequence[Check] | None = None,
) -> None:
    """Checks `loss(student, teacher, ..., **hyper) -> [B]` or `[B, L]` against the contract.

    Args:
      loss: the function; student first. The first axis of every positional argument is the batch.
      example: `example(rng, batch)` makes float64 NumPy arguments (labels as int32). Axes on which
        its student and teacher differ in size are considered free; a mismatch on any other axis
        must raise.
      hyper: keyword arguments of both the loss and the oracle.
      oracle: the same function in NumPy and float64, from the paper's equation.
      relational: the loss gives one value per anchor, which depends on the other examples.
      zero_at_equality: the loss is 0 if the teacher equals the student.
      nonnegative: the loss is never negative.
      where_rank: number of dimensions of the mask `where=` (True means included), which are the
        student's first ones; 0 if the loss takes no mask.
      twice_differentiable: False for losses with kinks, and for losses that define their own VJP.
      frozen: part of the loss is constant by design (a stop_gradient inside), so the gradient is
        not the derivative of the value and is not compared with differences.
      extreme: the loss is finite at +-1e4; False only if the mathematics itself overflows.
      batch: examples in a batch.
      rtol: relative tolerance against the oracle in float64.
      checks: the checks to run; `ALL` by default.

    Raises:
      AssertionError: listing every failure found, by check.
    """
    subject = Subject(
        loss, example, hyper or {}, oracle, relational, zero_at_equality, nonnegative, where_rank,
        twice_differentiable, frozen, extreme, batch, rtol, {},
    )  # fmt: skip
    failures = [
        f"{check.__name__}: {text}" for check in checks or ALL for text in _run(check, subject)
    ]
    if failures:
        name = getattr(loss, "__name__", repr(loss))
        raise AssertionError("\n  ".join([f"{name}: {len(failures)} failure(s)", *failures]))


def _run(check: Check, subject: Subject) -> Iterator[str]:
    try:
        yield from check(subject)
    except Exception as error:  # a loss that raises fails the check but does not stop the others
        yield f"raised {_subject.summarize(error)}"
