"""The battery itself: a good loss passes, each kind of bad one fails with words that help."""

import doctest
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import losses, testing


def example(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 6)), rng.normal(size=(batch, 6))


def mismatched(student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"shapes {student.shape} and {teacher.shape} differ")


def checked(student: Array, teacher: Array) -> tuple[Array, Array]:
    """A good door: what the broken losses below do not break."""
    mismatched(student, teacher)
    return widened(student), widened(teacher)


def widened(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected floating point, got {x.dtype}")
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def good(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, teacher)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def good_oracle(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((student - teacher) ** 2).mean(axis=-1)


def reduced(student: Array, teacher: Array) -> Array:
    return jnp.mean(good(student, teacher))


def blind(student: Array, teacher: Array) -> Array:
    """A teacher that broke down looks as if it agreed."""
    return jnp.where(jnp.isnan(good(student, teacher)), 0, good(student, teacher))


def broadcasting(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, jnp.broadcast_to(teacher, student.shape))
    return jnp.mean((student - teacher) ** 2, axis=-1)


def silent(student: Array, teacher: Array) -> Array:
    if student.shape != teacher.shape:
        raise ValueError("bad shapes")
    return good(student, teacher)


def accepts_integers(student: Array, teacher: Array) -> Array:
    mismatched(student, teacher)
    return good(student.astype(jnp.result_type(float)), teacher.astype(jnp.result_type(float)))


def wrong_constant(student: Array, teacher: Array) -> Array:
    return good(student, teacher) * 1.0001


def never_zero(student: Array, teacher: Array) -> Array:
    return good(student, teacher) + 1e-6


def signed(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, teacher)
    return jnp.mean(student - teacher, axis=-1)


def root_at_zero(student: Array, teacher: Array) -> Array:
    return jnp.sqrt(good(student, teacher))


def log_of_softmax(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, teacher)
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)


def centered_on_the_batch(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, teacher)
    return good(student - jnp.mean(student, axis=0, keepdims=True), teacher)


def ordered(student: Array, teacher: Array) -> Array:
    loss = good(student, teacher)
    return loss * jnp.arange(loss.size, dtype=loss.dtype)


def half_carry(student: Array, teacher: Array) -> Array:
    """Accumulates in the inputs' precision, as a chunked loss with a bfloat16 carry does."""
    checked(student, teacher)
    squares = ((student - teacher) ** 2).T
    total, _ = jax.lax.scan(lambda sum, x: (sum + x, None), jnp.zeros_like(squares[0]), squares)
    return total if total.dtype == jnp.float64 else total.astype(jnp.float32)


def half_result(student: Array, teacher: Array) -> Array:
    return good(student, teacher).astype(student.dtype)


@jax.custom_jvp
def _half_slope(x: Array) -> Array:
    return x**2


@_half_slope.defjvp
def _half_slope_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0] ** 2, primals[0] * tangents[0]


def wrong_gradient(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, teacher)
    return jnp.mean(_half_slope(student - teacher), axis=-1)


def eager_only(student: Array, teacher: Array) -> Array:
    loss = good(student, teacher)
    try:
        return 2 * loss if np.asarray(student).size else loss
    except jax.errors.TracerArrayConversionError:
        return loss


def looks_at_values(student: Array, teacher: Array) -> Array:
    loss = good(student, teacher)
    return loss if float(loss[0]) >= 0 else -loss


def one_batch_size(student: Array, teacher: Array) -> Array:
    student, teacher = checked(student, teacher)
    return good(student, teacher) / (student.shape[0] - 1)


def mask_ignored(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    return good(student, teacher)


def mask_multiplied(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    student, teacher = checked(student, teacher)
    if where is None:
        return good(student, teacher)
    kept = where.astype(student.dtype)
    return jnp.sum((student - teacher) ** 2 * kept, axis=-1) / jnp.maximum(kept.sum(-1), 1)


def mask_selected(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    student, teacher = checked(student, teacher)
    if where is None:
        return good(student, teacher)
    difference = jnp.where(where, student, 0) - jnp.where(where, teacher, 0)
    count = jnp.sum(where, axis=-1).astype(student.dtype)
    return jnp.sum(difference**2, axis=-1) / jnp.maximum(count, 1)


def broadcasting_weight(student: Array, teacher: Array, *, weight: Any = 1.0) -> Array:
    return jnp.asarray(weight) * good(student, teacher)


def broadcasting_power(student: Array, teacher: Array, *, power: int = 2) -> Array:
    return good(student, teacher) ** jnp.asarray(power)


def test_a_good_loss_passes_everything() -> None:
    testing.check_loss(good, example, oracle=good_oracle)
    testing.check_loss(mask_selected, example, where_rank=2, checks=(testing.masks,))
    testing.check_loss(losses.kd_kl, example, where_rank=2, hyper={"temperature": 3.0})


BROKEN: list[tuple[Callable[..., Any], testing.Check, dict[str, Any], str]] = [
    (reduced, testing.values, {}, r"one value per example, \[4\] or \[4, L\], got \[\]"),
    (wrong_constant, testing.values, {"oracle": good_oracle}, "float64 oracle"),
    (never_zero, testing.values, {}, "0 where teacher = student"),
    (signed, testing.values, {}, "negative"),
    (ordered, testing.values, {}, "permuted"),
    (centered_on_the_batch, testing.values, {"zero_at_equality": False}, "relational=True"),
    (wrong_gradient, testing.gradients, {}, "central differences"),
    (eager_only, testing.transformations, {}, "jit must equal eager"),
    (looks_at_values, testing.transformations, {}, "raised ConcretizationTypeError"),
    (blind, testing.extremes, {}, "NaN in the student gives a finite value"),
    (root_at_zero, testing.extremes, {}, "teacher = student: the gradient is not finite"),
    (log_of_softmax, testing.extremes, {}, r"\+-1e4.*not finite"),
    (one_batch_size, testing.extremes, {}, "batch of one: value .inf. is not finite"),
    (half_carry, testing.precision, {}, "bfloat16 inputs"),
    (half_result, testing.precision, {}, "must give float32 or wider"),
    (mask_ignored, testing.masks, {"where_rank": 2}, "where must equal slicing"),
    (mask_multiplied, testing.masks, {"where_rank": 2}, "masked entries -inf"),
    (broadcasting_weight, testing.hyperparameters, {}, r"weight\[4, 1\]: must raise ValueError"),
    (broadcasting_power, testing.hyperparameters, {}, r"power\[1\]: must raise"),
    (broadcasting, testing.errors, {}, "teacher of length 1 on axis 0.*must raise ValueError"),
    (silent, testing.errors, {}, "must name both shapes"),
    (accepts_integers, testing.errors, {}, "student as integers: must raise TypeError"),
]


@pytest.mark.parametrize(
    ("loss", "check", "declared", "message"), BROKEN, ids=[row[0].__name__ for row in BROKEN]
)
def test_a_broken_loss_fails(
    loss: Callable[..., Any], check: testing.Check, declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=message) as failure:
        testing.check_loss(loss, example, checks=(check,), **declared)
    assert str(failure.value).startswith(loss.__name__)


def test_every_check_can_fail() -> None:
    assert {row[1] for row in BROKEN} == set(testing.ALL)


def test_a_relational_loss_may_depend_on_the_batch_but_not_on_its_order() -> None:
    declared = {"zero_at_equality": False, "relational": True, "checks": (testing.values,)}
    testing.check_loss(centered_on_the_batch, example, **declared)
    with pytest.raises(AssertionError, match="permuted"):
        testing.check_loss(ordered, example, **declared)


def test_axes_free_in_the_example_may_differ() -> None:
    def widths(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
        return rng.normal(size=(batch, 3)), rng.normal(size=(batch, 5))

    def means(student: Array, teacher: Array) -> Array:
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"batches of {student.shape} and {teacher.shape} differ")
        mean = [jnp.mean(x, axis=-1, keepdims=True) for x in (widened(student), widened(teacher))]
        return good(*mean)

    testing.check_loss(means, widths)


def test_all_failures_are_listed_at_once() -> None:
    with pytest.raises(AssertionError) as failure:
        testing.check_loss(never_zero, example, oracle=good_oracle, checks=(testing.values,))
    assert "2 failure(s)" in str(failure.value)
    assert "values: float64 oracle: at [0]" in str(failure.value)


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(testing).failed == 0
