"""The source document's two examples do what its text says: bit for bit, with its own numbers."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import trees
from kdtl_jax.interop import linen
from kdtl_jax.models import mlp
from kdtl_jax.recipes import worked_examples
from kdtl_jax.recipes.worked_examples import Example

pytestmark = pytest.mark.usefixtures("standard_promotion")


@cache
def distilled() -> Example:
    return worked_examples.parameter_distillation()


@cache
def transferred() -> Example:
    return worked_examples.parameter_transfer()


def shapes(params: object) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in trees.flatten(params).items()}


def test_the_numbers_are_the_documents():
    assert (worked_examples.ALPHA, worked_examples.RATE, worked_examples.EPOCHS) == (0.1, 0.01, 100)
    large = {"dense_0/kernel": (10, 20), "dense_0/bias": (20,), "head/kernel": (20, 1)}
    small = {"dense_0/kernel": (10, 10), "dense_0/bias": (10,), "head/kernel": (10, 1)}
    assert shapes(distilled().source) == large | {"head/bias": (1,)}
    assert shapes(distilled().start) == small | {"head/bias": (1,)}
    assert shapes(transferred().start) == large | {"head/bias": (1,)}
    assert len(distilled().losses) == len(transferred().losses) == 100


def test_the_student_starts_as_alpha_times_the_teachers_first_ten_units():
    """Written out by hand: what a unit reads, its bias, and what reads it."""
    source, start = distilled().source, distilled().start
    alpha = np.float32(0.1)
    hidden, head = source["dense_0"], source["head"]
    np.testing.assert_array_equal(start["dense_0"]["kernel"], alpha * hidden["kernel"][:, :10])
    np.testing.assert_array_equal(start["dense_0"]["bias"], alpha * hidden["bias"][:10])
    np.testing.assert_array_equal(start["head"]["kernel"], alpha * head["kernel"][:10])
    np.testing.assert_array_equal(start["head"]["bias"], alpha * head["bias"])
    assert all(np.abs(leaf).max() > 0 for leaf in trees.flatten(start).values())
    report = distilled().report
    assert {leaf.path for leaf in report.adapted} == {
        "dense_0/kernel",
        "dense_0/bias",
        "head/kernel",
    }
    assert report.scaled == ("head/bias",) and report.fraction == 1


def test_the_target_starts_as_the_source():
    source, start = trees.flatten(transferred().source), trees.flatten(transferred().start)
    assert source.keys() == start.keys() == set(transferred().report.copied)
    for path, leaf in source.items():
        np.testing.assert_array_equal(start[path], leaf)


# Two layers times 0.1 are 0.01 of the teacher's outputs: a start from which this rate moves slowly.
@pytest.mark.parametrize(("example", "left"), [(distilled, 0.96), (transferred, 0.9)])
def test_a_hundred_epochs_of_fine_tuning_reduce_the_loss(
    example: Callable[[], Example], left: float
):
    result = example()
    curve = np.asarray(result.losses)
    assert np.all(np.isfinite(curve)) and curve[-1] < left * curve[0]
    assert np.all(np.diff(curve) < 0)  # full-batch gradient descent at a small rate
    tuned, start = trees.flatten(result.tuned), trees.flatten(result.start)
    assert all(not np.array_equal(tuned[path], start[path]) for path in start)


def test_the_copy_helps_on_the_target():
    """The tasks are related: the source's weights start lower than fresh ones, and end lower."""
    data = worked_examples.regression(jax.random.key(0), shift=0.5)
    model = linen.model(mlp((20,), 1))
    fresh = model.init(jax.random.key(5), data["inputs"]).params
    _, alone = worked_examples.fit(model, fresh, data, 100)
    copied = transferred().losses
    assert float(copied[0]) < float(alone[0])
    assert jnp.all(copied < alone)
