"""Microbatches, half precision, loss scaling, rematerialization, int8 teachers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, precision, train
from kdtl_jax.objective import Inputs, Masked

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
TX = optax.adam(1e-2)


def _init(key: jax.Array, hidden: int) -> Any:
    a, b = jax.random.split(key)
    return {
        "in": {"kernel": jax.random.normal(a, (4, hidden)) / 2},
        "out": {"kernel": jax.random.normal(b, (hidden, 3)) / 2},
    }


def _model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    hidden = jnp.tanh(inputs @ params["in"]["kernel"])
    return {"logits": hidden @ params["out"]["kernel"], "hidden": hidden}, model_state


TEACHER, STUDENT = _init(jax.random.key(1), 8), {"student": _init(jax.random.key(2), 5)}
BATCH = {
    "inputs": jax.random.normal(KEY, (8, 4)),
    "labels": jnp.arange(8, dtype=jnp.int32) % 3,
    "weights": jnp.asarray([1, 1, 0, 1, 1, 0, 0, 1], jnp.float32),
    "where": jnp.arange(8 * 3).reshape(8, 3) % 5 < 3,
}


def _terms(x: Inputs) -> dict[str, Any]:
    s, t = x.student["logits"], x.teacher["logits"]
    return {
        "kd": losses.kd_kl(s, t, temperature=2.0),
        "masked": Masked(jnp.square(s - t), x.batch["where"]),
        "l2": optax.tree.norm(x.params, squared=True),
    }


def _train(steps: int = 5, tx: Any = TX, student: Any = _model, **options: Any) -> Any:
    weights = {"kd": 1.0, "masked": 0.5, "l2": 0.01}
    step = jax.jit(train.make_distill_step(student, _model, _terms, weights, tx, **options))
    state, metrics = train.init_state(STUDENT, tx, key=KEY), None
    for _ in range(steps):
        state, metrics = step(state, TEACHER, BATCH)
    return state, metrics


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_are_exactly_the_large_batch(microbatches: int) -> None:
    """Weights and masks are spread unevenly over the parts: a mean of means would differ."""
    whole, want = _train()
    parts, got = _train(microbatches=microbatches)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in want:
        np.testing.assert_allclose(got[name].value(), want[name].value(), rtol=1e-5)


def test_microbatches_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="microbatches=3 must divide the batch"):
        _train(microbatches=3)


def test_bfloat16_compute_keeps_float32_masters_and_learns_the_same() -> None:
    full, _ = _train()
    half, metrics = _train(student=precision.compute_in(_model, jnp.bfloat16))
    for a, b in zip(jax.tree.leaves(half.params), jax.tree.leaves(full.params), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=5e-3)
    assert metrics["kd"].value().dtype == jnp.float32


def test_loss_scaling_changes_nothing_while_gradients_are_finite() -> None:
    plain, _ = _train()
    scaled, _ = _train(tx=precision.loss_scaling(TX, initial=1024.0))
    for a, b in zip(jax.tree.leaves(scaled.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert scaled.opt_state.good_steps == 5 and scaled.opt_state.scale == 1024


def test_an_overflowing_gradient_only_lowers_the_scale() -> None:
    tx: Any = precision.loss_scaling(TX, initial=8.0, period=2)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    updates, after = tx.update({"w": jnp.asarray([jnp.inf, 1.0])}, state, params)
    assert after.scale == 4 and after.skipped == 1 and not jnp.any(updates["w"])
    for a, b in zip(jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True):
        np.testing.assert_array_equal(a, b)
    for _ in range(2):
        updates, after = tx.update({"w": jnp.ones(2)}, after, params)
    assert after.scale == 8 and jnp.all(updates["w"] != 0)
    with pytest.raises(ValueError, match="factor > 1"):
        precision.loss_scaling(TX, factor=1.0)


def test_float16_learns_where_unscaled_gradients_vanish() -> None:
    """A loss of 1e-7 gives float16 gradients of 0; scaled by 2^15 they survive."""
    model = precision.compute_in(_model, jnp.float16)

    def moved(tx: Any) -> float:
        tiny = {"kd": 1e-8, "masked": 0.0, "l2": 0.0}
        step = jax.jit(train.make_distill_step(model, _model, _terms, tiny, tx))
        state = train.init_state(STUDENT, tx, key=KEY)
        after, _ = step(state, TEACHER, BATCH)
        change: Any = jax.tree.map(jnp.subtract, after.params, state.params)
        return float(jnp.abs(change["student"]["in"]["kernel"]).max())

    assert moved(optax.sgd(1e6)) == 0
    assert moved(precision.loss_scaling(optax.sgd(1e6))) > 0


def test_rematerialization_gives_the_same_gradient() -> None:
    plain, _ = _train(steps=2)
    again, _ = _train(steps=2, student=precision.rematerialized(_model))
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_int8_weights_are_a_quarter_and_close() -> None:
    small = precision.quantize(TEACHER)
    assert small["in"]["kernel"].values.dtype == jnp.int8
    wide = precision.dequantize(small)
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(TEACHER), strict=True):
        # Half a quantization step per channel.
        assert bool(jnp.all(jnp.abs(a - b) <= 0.5001 * jnp.abs(b).max(axis=0) / 127))
    outputs, _ = precision.with_int8(_model)(small, None, BATCH["inputs"])
    reference, _ = _model(TEACHER, None, BATCH["inputs"])
    measured = precision.fidelity(outputs["logits"], reference["logits"])
    assert measured.agreement == 1 and 0 < measured.relative_error < 0.02
    with pytest.raises(ValueError, match="expected one shape"):
        precision.fidelity(reference["logits"], reference["logits"][:1])
    with pytest.raises(TypeError, match="must be floating"):
        precision.compute_in(_model, jnp.int8)
