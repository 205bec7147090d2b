"""Padded rows change no number of the real ones, in whatever mixes the rows of a batch.

The table's check (`testing.masks`) slices with zeros, large numbers and infinities; here the masked
rows lie between the real ones and hold NaN, eagerly and under `jit`, for values and gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LOSS_CASES
from jax import Array

from kdtl_jax import discrepancies, losses, temperatures, testing
from kdtl_jax import transferability as tr

WHERE = np.asarray([True, False, True, True, False, True, True])
REAL = np.flatnonzero(WHERE)
LABELS = np.asarray([0, 1, 2, 0, 7, 1, 2], np.int32)
CLASSES = 3


def padded(shape: tuple[int, ...], seed: int) -> Array:
    """Real rows from a seed; NaN, inf and large numbers in the others."""
    x = np.random.default_rng(seed).normal(size=(len(WHERE), *shape))
    x[1], x[4] = np.nan, 1e30
    return jnp.asarray(x, jnp.float32)


def table(name: str) -> Callable[..., Any]:
    case = LOSS_CASES[name]
    return functools.partial(case.fn, **case.hyper)


ROWS = [n for n, case in LOSS_CASES.items() if case.relational and case.where_rank == 1]


def arrays_of(name: str) -> list[Array]:
    example = LOSS_CASES[name].example(np.random.default_rng(0), len(WHERE))
    filled = []
    for a in example:
        a = np.array(a)
        a[1], a[4] = (np.nan, 1e30) if a.dtype.kind == "f" else (-100, 99)
        filled.append(jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32))
    return filled


def compare(fn: Callable[..., Any], args: list[Array], *, per_row: bool) -> None:
    """The masked batch against its real rows alone: value and gradient by every float argument."""
    floats = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]
    where, args = jnp.asarray(WHERE), jax.device_get(args)

    def total(weights: Array, where: Array | None, *args: Array) -> tuple[Array, Array]:
        value = fn(*args, where=where)
        return jnp.sum(weights * value), value

    graded = jax.value_and_grad(total, argnums=[i + 2 for i in floats], has_aux=True)
    shape = jax.eval_shape(fn, *args).shape
    weights = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    given = weights, where, *args
    program = testing.compiled(graded, *given)
    (_, got), gradients = jax.device_get(program(*given))
    rows = weights[REAL] if per_row else weights
    short = [a[REAL] for a in args]
    alone = functools.partial(graded, rows, None)
    (_, want), others = jax.device_get(testing.compiled(alone, *short)(*short))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
    close(got[REAL] if per_row else got, want)
    # Of known numbers, as one program: the Python code of an eager call in a twentieth of the time.
    known = jax.device_put(args)
    close(testing.compiled(lambda: fn(*known, where=where))(), got)
    for gradient, other in zip(gradients, others, strict=True):
        close(gradient[REAL], other)
        np.testing.assert_array_equal(gradient[~WHERE], 0)
    nothing = np.asarray(program(weights, jnp.zeros(len(WHERE), jnp.bool_), *args)[0][1])
    assert np.isfinite(nothing).all(), "a batch of padding alone"
    if per_row:
        np.testing.assert_array_equal(got[~WHERE], 0)
        assert not nothing.any()


def test_every_loss_whose_rows_interact_takes_the_mask() -> None:
    without = {
        name for name, case in LOSS_CASES.items() if case.relational and case.where_rank != 1
    }
    assert not without


@pytest.mark.parametrize("name", ROWS)
def test_losses(name: str) -> None:
    compare(table(name), arrays_of(name), per_row=True)


HEAD = {"class_weights": jnp.ones((4, CLASSES)) + jnp.eye(4, CLASSES), "class_bias": jnp.ones(3)}
THREE = [padded((3,), 0), padded((3,), 1)]
PIECES: dict[str, tuple[Callable[..., Any], list[Any], bool]] = {
    "feature_correlation": (losses.feature_correlation, THREE, False),
    "rrd": (functools.partial(losses.rrd, queue=jnp.eye(3)), THREE, True),
    "bi_tuning_classifier": (
        functools.partial(losses.bi_tuning_classifier, **HEAD),
        [padded((4,), 0), LABELS],
        True,
    ),
    "rkd_angle_in_parts": (functools.partial(losses.rkd_angle, anchors_at_once=2), THREE, True),
    "bss": (discrepancies.bss, THREE[:1], False),
    "bss_wide": (functools.partial(discrepancies.bss, k=2), [padded((6,), 0)], False),
    "coral": (discrepancies.coral, THREE, False),
    "mk_mmd": (functools.partial(discrepancies.mk_mmd, scale=2.0), THREE, False),
    "mk_mmd_linear": (functools.partial(discrepancies.mk_mmd_linear, scale=2.0), THREE, False),
    "mean_squared_distance": (discrepancies.mean_squared_distance, THREE, False),
    "mcc": (discrepancies.mcc, THREE[:1], False),
    "mcc_weighted": (
        lambda z, w, where=None: discrepancies.mcc(z, example_weights=w, where=where),
        [padded((3,), 0), padded((), 1)],
        False,
    ),
    "entropy_weights": (discrepancies.entropy_weights, THREE[:1], True),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_and_discrepancies(name: str) -> None:
    fn, args, per_row = PIECES[name]
    compare(fn, [jnp.asarray(a) for a in args], per_row=per_row)


def test_two_domains_may_have_masks_of_their_own() -> None:
    first, second = padded((3,), 0), padded((3,), 1)[:5]
    of_first, of_second = jnp.asarray(WHERE), jnp.asarray(WHERE[:5])
    for fn in (
        discrepancies.coral,
        discrepancies.mean_squared_distance,
        functools.partial(discrepancies.mk_mmd, scale=2.0),
    ):
        want = fn(first[REAL], second[REAL[:3]])
        np.testing.assert_allclose(
            fn(first, second, where=of_first, target_where=of_second), want, rtol=1e-4
        )
        with pytest.raises(ValueError, match="need a mask each, where and target_where"):
            fn(first, second, where=of_first)
    one = jnp.arange(7) == 0
    assert discrepancies.coral(first, padded((3,), 1), where=one) == 0


def probabilities() -> Array:
    return jax.nn.softmax(padded((4,), 2))


SCORES: dict[str, tuple[Callable[..., Any], Array]] = {
    "leep": (functools.partial(tr.leep, num_classes=CLASSES), probabilities()),
    "nce": (
        functools.partial(tr.nce, num_source_classes=4, num_classes=CLASSES),
        jnp.asarray([1, -1, 2, 0, 99, 3, 2], jnp.int32),
    ),
    "h_score": (functools.partial(tr.h_score, num_classes=CLASSES), padded((2,), 3)),
    "regularized_h_score": (
        functools.partial(tr.regularized_h_score, num_classes=CLASSES),
        padded((2,), 3),
    ),
    "transrate": (functools.partial(tr.transrate, num_classes=CLASSES), padded((2,), 3)),
    "category_relation": (
        functools.partial(tr.category_relation, num_classes=CLASSES),
        probabilities(),
    ),
    "fit_logit_scale": (temperatures.fit_logit_scale, padded((CLASSES,), 4)),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_sources(name: str, jit: bool) -> None:
    fn, x = SCORES[name]
    labels = jnp.asarray(LABELS)
    run = jax.jit(lambda x, y, where: fn(x, y, where=where)) if jit else fn
    got = run(x, labels, where=jnp.asarray(WHERE))
    np.testing.assert_allclose(got, fn(x[REAL], labels[REAL]), rtol=2e-4, atol=1e-5)
    if jit:  # label 7, no longer masked, is out of range
        x = x.at[jnp.asarray([1, 4])].set(x[0])
        labels = labels if name != "nce" else labels.at[4].set(7)
        assert bool(jnp.isnan(run(x, labels, where=jnp.ones(7, jnp.bool_))).all())


def test_logme() -> None:
    x, y = padded((2,), 3), padded((2,), 5)
    got = jax.jit(lambda x, y, w: tr.logme(x, y, where=w))(x, y, jnp.asarray(WHERE))
    np.testing.assert_allclose(got, tr.logme(x[REAL], y[REAL]), rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "nce"])
def test_not_a_number_in_a_sample_that_takes_part_is_seen(name: str) -> None:
    fn, x = SCORES[name]
    labels = jnp.asarray(LABELS) % CLASSES
    where = jnp.arange(len(WHERE)) != 4  # row 1, of NaN, takes part
    assert bool(jnp.isnan(fn(x, labels, where=where)).any())
