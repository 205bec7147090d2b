"""Batch statistics of connectors: padding, running averages, evaluation, folding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import connectors
from kdtl_jax.connectors import Connector

KEY = jax.random.key(0)


def spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def affine(found: Any) -> Any:
    """Parameters that are not those of `init`, so that scales and offsets matter."""
    leaves, tree = jax.tree.flatten(found)
    rng = np.random.default_rng(7)
    return tree.unflatten(
        [leaf + jnp.asarray(rng.normal(0.3, 0.2, leaf.shape), leaf.dtype) for leaf in leaves]
    )


PADDED: dict[str, tuple[Connector, tuple[int, ...]]] = {
    "batch_norm": (connectors.batch_norm(), (5, 2, 2, 3)),
    "chain": (connectors.chain(connectors.linear(4), connectors.batch_norm()), (5, 3)),
    "nested": (
        connectors.chain(
            connectors.chain(connectors.conv3x3(4), connectors.batch_norm()),
            connectors.activation(jax.nn.relu),
            connectors.linear(2),
        ),
        (5, 2, 2, 3),
    ),
    "paraphraser": (connectors.paraphraser(3), (5, 1, 2, 3)),
    "simkd_projector": (connectors.simkd_projector(4), (5, 2, 1, 3)),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", PADDED)
def test_padding_enters_no_statistic_and_no_gradient(name: str, jit: bool) -> None:
    connector, shape = PADDED[name]
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, shape), jnp.float32)
    where = jnp.asarray([True, False, True, True, False])
    real, garbage = x[where], x.at[1].set(jnp.nan).at[4].set(1e5)
    params = affine(connector.init(KEY, x))

    def total(params: Any, x: Array, where: Array | None) -> tuple[Array, Any]:
        y, found = connector.measure(params, x, where=where)
        rows = jax.tree.leaves(y)
        if where is not None:
            rows = [jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for a in rows]
        return jnp.sum(jnp.stack([jnp.sum(a * a) for a in rows])), (y, found)

    run = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    run = jax.jit(run) if jit else run
    (value, (y, result)), (by_params, by_x) = run(params, garbage, where)
    (alone, (short, of_real)), (params_alone, x_alone) = run(params, real, None)
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: close(a[where], b), y, short)
    jax.tree.map(close, result, of_real)
    jax.tree.map(close, by_params, params_alone)
    close(by_x[where], x_alone)
    assert not by_x[~where].any()
    jax.tree.map(close, connector.apply(params, garbage, where=where), y)


def test_a_group_passes_the_mask_to_each_of_its_connectors() -> None:
    grouped = connectors.group({"a": connectors.batch_norm(), "b": connectors.linear(2)})
    x = {"a": jnp.asarray([[1.0], [3.0], [jnp.nan]]), "b": jnp.ones((3, 2)).at[2].set(jnp.inf)}
    where = jnp.asarray([True, True, False])
    params = grouped.init(KEY, x)
    y, actual = grouped.measure(params, x, where=where)
    np.testing.assert_allclose(y["a"][:2], [[-1], [1]], rtol=1e-4)
    np.testing.assert_allclose(actual["a"].mean, [2.0])
    np.testing.assert_allclose(actual["a"].var, [2.0])  # divisor n - 1
    assert actual["b"] == {} and bool(jnp.isfinite(y["b"]).all())


def test_evaluation_does_not_depend_on_the_batch_and_folds_into_convolutions() -> None:
    projector = connectors.simkd_projector(4)
    x = jnp.asarray(np.random.default_rng(1).normal(1, 2, (9, 2, 2, 3)), jnp.float32)
    params = affine(projector.init(KEY, spec(2, 2, 2, 3)))
    running = connectors.running_init(projector, params, spec(2, 2, 2, 3))
    for start in (0, 3, 6):
        _, measured = projector.measure(params, x[start : start + 3])
        running = connectors.running_update(running, measured)
    whole = projector.evaluate(params, running, x)
    one_by_one = jnp.concatenate([projector.evaluate(params, running, row[None]) for row in x])
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-5, atol=1e-5)
    folded = connectors.fold_batch_norm(params, running)
    np.testing.assert_allclose(projector.apply(folded, x), whole, rtol=1e-4, atol=1e-4)
    assert [sorted(own) for own in folded[:3]] == [["bias", "kernel"], [], []]
    assert float(jnp.abs(projector.apply(params, x) - whole).max()) > 1e-3


def test_running_statistics_by_hand() -> None:
    connector = connectors.batch_norm()
    params = connector.init(KEY, spec(2, 1))
    running = connectors.running_init(connector, params, spec(2, 1))
    np.testing.assert_array_equal([running.mean[0], running.var[0], running.size], [0, 1, 0])

    def seen(*rows: float, where: Array | None = None) -> Any:
        x = jnp.asarray(rows, jnp.float32)[:, None]
        return connector.measure(params, x, where=where)[1]

    first = connectors.running_update(running, seen(1.0, 3.0))
    np.testing.assert_allclose([first.mean[0], first.var[0], first.size], [2, 2, 2])
    second = connectors.running_update(first, seen(4.0, 8.0), momentum=0.25)
    np.testing.assert_allclose([second.mean[0], second.var[0], second.size], [3, 3.5, 4])
    padding = seen(5.0, 6.0, where=jnp.asarray([True, False]))
    np.testing.assert_array_equal(connectors.running_update(second, padding)[:2], second[:2])
    assert jax.tree.structure(second) == jax.tree.structure(running)
    gradient = jax.grad(lambda x: jnp.sum(connector.measure(params, x)[1].var))(jnp.ones((2, 1)))
    assert not gradient.any()
    plain = connectors.linear(2)
    assert connectors.running_init(plain, plain.init(KEY, spec(2, 1)), spec(2, 1)) == {}


def test_folding_takes_eps_from_the_statistics() -> None:
    connector = connectors.chain(
        connectors.linear(2), connectors.batch_norm(eps=0.5), connectors.batch_norm(eps=0.0)
    )
    first = connectors.chain(connectors.linear(2), connectors.batch_norm(eps=3.0))
    x = jnp.asarray([[1.0, -2.0], [0.5, 4.0], [3.0, 1.0]])
    params = first.init(KEY, x)
    running = connectors.running_init(first, params, x)
    assert float(running[1].eps) == 3.0  # before the first batch too
    running = connectors.running_update(running, first.measure(params, x)[1])
    folded = connectors.fold_batch_norm(params, running)
    np.testing.assert_allclose(
        first.apply(folded, x), first.evaluate(params, running, x), rtol=1e-5, atol=1e-6
    )
    eps = connectors.running_init(connector, connector.init(KEY, x), x)
    assert [float(actual.eps) for actual in eps[1:]] == [0.5, 0.0]


def test_folding_needs_a_linear_map_before() -> None:
    alone = connectors.batch_norm()
    params = alone.init(KEY, spec(2, 3))
    with pytest.raises(ValueError, match="only into a linear or conv just before it.*3 channels"):
        connectors.fold_batch_norm(params, connectors.running_init(alone, params, spec(2, 3)))
    fusion = connectors.abf(2, 3)
    x = (spec(2, 2, 2, 2), spec(2, 1, 1, 2))
    params = affine(fusion.init(KEY, x))
    running = affine(connectors.running_init(fusion, params, x))
    ones = jnp.ones((2, 2, 2, 2)), jnp.ones((2, 1, 1, 2))
    folded = fusion.apply(connectors.fold_batch_norm(params, running), ones)
    for got, want in zip(folded, fusion.evaluate(params, running, ones), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_channel_that_does_not_vary_becomes_its_offset_even_without_eps() -> None:
    connector = connectors.chain(connectors.linear(2), connectors.batch_norm(eps=0.0))
    x = jnp.asarray([[1.0, -2.0], [0.5, 4.0], [3.0, 1.0]])
    dead, norm = connector.init(KEY, x)
    dead = jax.tree.map(lambda leaf: leaf.at[..., 1].set(0), dead)
    params = dead, {**norm, "offset": jnp.asarray([0.0, 5.0])}
    (y, measured), pull = jax.vjp(lambda x: connector.measure(params, x), x)
    running = connectors.running_update(connectors.running_init(connector, params, x), measured)
    kept = connector.evaluate(params, running, x)
    folded = connector.apply(connectors.fold_batch_norm(params, running), x)
    np.testing.assert_array_equal(jnp.stack([y, kept, folded])[..., 1], 5)
    np.testing.assert_allclose(folded, kept, rtol=1e-5)
    (gradient,) = pull((jnp.ones_like(y), jax.tree.map(jnp.zeros_like, measured)))
    assert np.isfinite(gradient).all()
