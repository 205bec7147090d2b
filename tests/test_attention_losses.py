"""Masks of the transformer losses, which the table of losses cannot slice, and layer maps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kdtl_jax import losses

WHERE = jnp.asarray([[True, True, False], [True, True, True]])


def scores() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 2, 3, 3))), jnp.asarray(rng.normal(size=(2, 2, 3, 3)))


@pytest.mark.parametrize("name", ["attention_mse", "attention_kl"])
def test_attention_masks_slice(x64: None, name: str) -> None:
    loss: Any = getattr(losses, name)
    student, teacher = scores()
    padding = (slice(0, 1), slice(None), slice(2, 3)), (slice(0, 1), slice(None), slice(None), 2)

    @jax.jit
    def masked(student: Array, teacher: Array) -> tuple[Array, tuple[Array, Array]]:
        value, pull = jax.vjp(lambda s, t: loss(s, t, where=WHERE), student, teacher)
        return value, pull(jnp.ones_like(value))

    plain = jax.jit(loss)
    short = plain(student[:1, :, :2, :2], teacher[:1, :, :2, :2])[0]
    for fill in (0.0, 1e4, -jnp.inf):
        filled = [x.at[padding[0]].set(fill).at[padding[1]].set(fill) for x in (student, teacher)]
        value, gradients = masked(*filled)
        np.testing.assert_allclose(value[0, :2], short, rtol=1e-10)
        np.testing.assert_allclose(value[1], plain(student, teacher)[1], rtol=1e-10)
        assert value[0, 2] == 0
        assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    with pytest.raises(ValueError, match=r"where must have shape \[2, 3\]"):
        loss(student, teacher, where=WHERE[:1])


@pytest.mark.parametrize("name", ["attention_mse", "attention_kl"])
def test_causal_masks_are_finite(name: str) -> None:
    loss: Any = getattr(losses, name)
    causal = jnp.tril(jnp.ones((3, 3), jnp.bool_))
    student, teacher = (jnp.where(causal, x.astype(jnp.float32), -jnp.inf) for x in scores())

    @jax.jit
    def both(student: Array, teacher: Array) -> tuple[Array, tuple[Array, Array]]:
        value, pull = jax.vjp(loss, student, teacher)
        return value, pull(jnp.ones_like(value))

    value, gradients = both(student, teacher)
    assert bool(jnp.isfinite(value).all())
    assert float(value[0, 1]) > 0
    for gradient in gradients:
        assert bool(jnp.isfinite(gradient).all())
        np.testing.assert_array_equal(gradient[..., 0, 1:], 0)
    np.testing.assert_allclose(value[:, 0] if name == "attention_kl" else 0, 0, atol=1e-6)


def test_attention_mse_counts_hidden_keys_as_equal(x64: None) -> None:
    student = jnp.asarray([[2.0, -jnp.inf], [0.0, 1.0]]).reshape(1, 1, 2, 2)
    teacher = jnp.asarray([[0.0, -jnp.inf], [0.0, 4.0]]).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(losses.attention_mse(student, teacher), [[2.0, 4.5]])


def test_fsp_masks_slice(x64: None) -> None:
    rng = np.random.default_rng(1)
    first, second, *others = (jnp.asarray(rng.normal(size=(2, 3, 4))) for _ in range(4))
    teacher = others[0], others[1]
    broken = first.at[0, 2].set(jnp.inf), second.at[0, 2].set(-jnp.inf)
    value, pull = jax.vjp(lambda pair: losses.fsp(pair, teacher, where=WHERE), broken)
    sliced = losses.fsp((first[:1, :2], second[:1, :2]), (teacher[0][:1, :2], teacher[1][:1, :2]))
    np.testing.assert_allclose(value[0], sliced[0], rtol=1e-12)
    np.testing.assert_allclose(value[1], losses.fsp((first, second), teacher)[1], rtol=1e-12)
    for gradient in jax.tree.leaves(pull(jnp.ones(2))):
        assert bool(jnp.isfinite(gradient).all())
        np.testing.assert_array_equal(gradient[0, 2], 0)


def test_relations_on_one_layer_are_their_gram(x64: None) -> None:
    """One relation head of width d is attention between scaled states."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)))
    y = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 9)))
    direct = jax.jit(losses.attention_kl)(
        (jnp.einsum("bid,bjd->bij", x, x) / 2)[:, None],
        (jnp.einsum("bid,bjd->bij", y, y) / 3)[:, None],
    )
    got = losses.minilm_relation((x, x), (y, y), relation_heads=1)
    np.testing.assert_allclose(got, direct, rtol=1e-10)
    np.testing.assert_allclose(
        losses.minilm_v2({"query": x, "key": x}, {"query": y, "key": y}, relation_heads=1),
        2 * direct,
        rtol=1e-10,
    )


def test_relation_errors_say_what_to_do() -> None:
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"relation_heads=3 must divide the width"):
        losses.minilm_relation((x, x), (x, x), relation_heads=3)
    with pytest.raises(ValueError, match="only in student: \\['key'\\]"):
        losses.minilm_v2({"key": x, "query": x}, {"query": x}, relation_heads=2)
    with pytest.raises(ValueError, match="at least one of query, key, value"):
        losses.minilm_v2({}, {}, relation_heads=2)
    with pytest.raises(ValueError, match=r"must be \[B, heads, L, L\]"):
        losses.attention_kl(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4)))


def test_layers_spread_evenly() -> None:
    assert losses.uniform_layers(4, 12) == (0, 3, 6, 9, 12)
    assert losses.uniform_layers(2, 2) == (0, 1, 2)
    with pytest.raises(ValueError, match="must divide the teacher's, got 5 and 12"):
        losses.uniform_layers(5, 12)
