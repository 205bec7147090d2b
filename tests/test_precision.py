"""Microbatches, half precision, loss scaling, rematerialization, int8 teachers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses, train
from kdtl_jax.datasets import digits
from kdtl_jax.objective import Inputs, Masked
from kdtl_jax.train import precision

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
TX = optax.adam(1e-2)


@partial(jax.jit, static_argnums=1)
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


TEACHER, STUDENT = _init(jax.random.key(1), 8), _init(jax.random.key(2), 5)
BATCH = {
    "inputs": jax.random.normal(KEY, (8, 4)),
    "labels": jnp.asarray(np.arange(8, dtype=np.int32) % 3),
    "weights": jnp.asarray([1, 1, 0, 1, 1, 0, 0, 1], jnp.float32),
    "where": jnp.asarray(np.arange(8 * 3).reshape(8, 3) % 5 < 3),
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
    step = jax.jit(train.make_step(student, _terms, weights, tx, teacher=_model, **options))
    state, metrics = train.init_state(STUDENT, tx, key=KEY), None
    for _ in range(steps):
        state, metrics = step(state, BATCH, TEACHER)
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


def test_a_mask_may_ask_what_a_memory_holds() -> None:
    """Only examples whose neighbor was seen before count: of two parts the second's."""

    def terms(x: Inputs) -> Any:
        squares = jnp.sum(jnp.square(x.student["logits"]), axis=-1)
        return {"kd": Masked(squares, jnp.broadcast_to(x.memory, squares.shape))}, ~x.memory

    step = train.make_step(_model, terms, {"kd": 1.0}, TX, microbatches=2)
    state = train.init_state(STUDENT, TX, key=KEY, memory=jnp.asarray(False))
    _, metrics = step(state, {"inputs": BATCH["inputs"]})
    np.testing.assert_allclose(metrics["loss"].value(), metrics["kd"].value(), rtol=1e-6)
    assert metrics["kd"].weight == 4


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
    with pytest.raises(ValueError, match="factor must be above 1"):
        precision.loss_scaling(TX, factor=1.0)


def test_a_scale_does_not_grow_to_infinity() -> None:
    tx: Any = precision.loss_scaling(optax.sgd(1.0), initial=2.0**126, period=1)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"w": jnp.full(2, 2.0**100)}, state, params)
    assert state.scale == 2.0**127 and state.skipped == 0


def test_a_scale_beyond_float16_is_taken_out_of_its_gradients_exactly() -> None:
    tx: Any = precision.loss_scaling(TX, initial=2.0**17)  # infinite in float16
    params = {"w": jnp.ones(2, jnp.float16)}
    scaled = {"w": jnp.asarray([2.0**15, 2.0], jnp.float16)}
    updates, after = tx.update(scaled, tx.init(params), params)
    want: Any
    want, _ = TX.update({"w": jnp.asarray([2.0**-2, 2.0**-16], jnp.float16)}, TX.init(params))
    np.testing.assert_array_equal(updates["w"], want["w"])
    assert after.good_steps == 1 and bool(jnp.all(updates["w"] != 0))


GUARDS = {
    "loss_scaling": precision.loss_scaling(optax.sgd(0.1)),
    "apply_if_finite": optax.chain(
        optax.clip(1e3), optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=3)
    ),
    "MultiSteps": optax.MultiSteps(
        optax.sgd(0.1), 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


@pytest.mark.parametrize("tx", GUARDS.values(), ids=GUARDS)
def test_a_skipped_step_leaves_batch_statistics_and_memory_alone(tx: Any) -> None:
    def model(params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False):
        return {"y": inputs @ params}, {**model_state, "mean": jnp.mean(inputs, axis=0)}

    def terms(x: Any) -> Any:
        return {"y": jnp.sum(jnp.square(x.student["y"]), axis=-1)}, x.student["y"][0]

    step = train.make_step(model, terms, {"y": 1.0}, tx)
    state = train.init_state(
        jnp.eye(2),
        tx,
        key=jax.random.key(0),
        model_state={"mean": jnp.zeros(2), "key": jax.random.key(1), "steps": 3},
        memory=jnp.zeros(2),
    )
    state, _ = step(state, {"inputs": jnp.ones((3, 2))})
    np.testing.assert_array_equal(state.model_state["mean"], np.ones(2))
    after, _ = step(state, {"inputs": jnp.full((3, 2), jnp.inf)})
    assert after.model_state["steps"] == 3
    if isinstance(after.opt_state, precision.LossScaleState):
        assert after.opt_state.skipped == 1
    for one, other in ((after.params, state.params), (after.memory, state.memory)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(after.model_state["mean"], np.ones(2))


def test_float16_learns_where_unscaled_gradients_vanish() -> None:
    """A loss of 1e-7 gives float16 gradients of 0; scaled by 2^15 they survive."""
    model = precision.compute_in(_model, jnp.float16)

    def moved(tx: Any) -> float:
        tiny = {"kd": 1e-8, "masked": 0.0, "l2": 0.0}
        step = jax.jit(train.make_step(model, _terms, tiny, tx, teacher=_model))
        state = train.init_state(STUDENT, tx, key=KEY)
        after, _ = step(state, BATCH, TEACHER)
        change: Any = jax.tree.map(jnp.subtract, after.params, state.params)
        return float(jnp.abs(change["in"]["kernel"]).max())

    assert moved(optax.sgd(1e6)) == 0
    assert moved(precision.loss_scaling(optax.sgd(1e6))) > 0


def test_rematerialization_gives_the_same_gradient() -> None:
    plain, _ = _train(steps=2)
    again, _ = _train(steps=2, student=precision.rematerialized(_model))
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_int8_weights_are_close_and_state_their_fidelity() -> None:
    small = precision.quantize(TEACHER)
    assert small["in"]["kernel"].values.dtype == jnp.int8
    outputs, _ = jax.jit(precision.with_int8(_model))(small, None, BATCH["inputs"])
    reference, _ = _model(TEACHER, None, BATCH["inputs"])
    measured = precision.fidelity(outputs["logits"], reference["logits"])
    assert measured.agreement == 1 and 0 < measured.relative_error < 0.02
    with pytest.raises(ValueError, match="must have one shape"):
        precision.fidelity(reference["logits"], reference["logits"][:1])
    with pytest.raises(TypeError, match="must be floating"):
        precision.compute_in(_model, jnp.int8)


@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 6)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_weight_moves_by_more_than_half_a_step_of_its_channel(
    shape: tuple[int, ...], dtype: Any
) -> None:
    """Channels differ by a factor of 1000: with one scale for all, the small ones would vanish."""
    channels = jnp.logspace(-3, 0, shape[-1]).reshape((1,) * (len(shape) - 1) + (-1,))
    kernel = (jax.random.normal(KEY, shape) * channels).astype(dtype)
    kernel = kernel.at[..., 0].set(jnp.zeros((), dtype))
    small = precision.quantize({"kernel": kernel})["kernel"]
    wide = precision.dequantize({"kernel": small})["kernel"]
    exact = np.asarray(kernel, np.float32)
    step = np.abs(exact).reshape(-1, shape[-1]).max(axis=0) / 127
    assert wide.shape == shape and small.scale.shape == (1,) * (len(shape) - 1) + (shape[-1],)
    assert np.all(np.abs(wide - exact) <= 0.5001 * step)
    assert np.any(np.abs(wide - exact) > 0.3 * step) and not np.any(wide[..., 0])
    top = np.abs(np.asarray(small.values)).reshape(-1, shape[-1]).max(axis=0)
    assert np.all(top[1:] == 127), "every channel uses the whole range"


def test_only_selected_matrices_are_quantized_and_their_bytes_fall_to_a_quarter() -> None:
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 64, 64)), "bias": jnp.ones(64)},
        "norm": {"scale": jnp.ones(64), "kernel": jnp.ones(64)},
        "head": {"kernel": jnp.ones((64, 10)), "count": jnp.int32(3)},
    }

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    small = precision.quantize(params)
    assert 0.25 < size(small["conv"]["kernel"]) / size(params["conv"]["kernel"]) < 0.253
    for path in ("conv/bias", "norm/scale", "norm/kernel", "head/count"):
        outer, inner = path.split("/")
        assert small[outer][inner] is params[outer][inner]
    one = precision.quantize(params, where="head/kernel")
    assert one["conv"]["kernel"] is params["conv"]["kernel"]
    assert isinstance(one["head"]["kernel"], precision.Int8)
    with pytest.raises(ValueError, match=r"'head/kernel' holds NaN"):
        precision.quantize({"head": {"kernel": jnp.full((2, 2), jnp.nan)}})
    with pytest.raises(ValueError, match="matches"):
        precision.quantize(params, where="haed/kernel")


def test_fidelity_in_any_unit_of_what_is_no_model_and_of_one_class() -> None:
    reference, changed = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[3.0, 3.0]])
    for scale in (1e-30, 1.0, 1e30):
        actual = precision.fidelity(scale * changed, scale * reference)
        np.testing.assert_allclose(actual.relative_error, 0.2, rtol=1e-5)
    broken = precision.fidelity(jnp.full((1, 2), jnp.nan), jnp.asarray([[2.0, 1.0]]))
    assert all(bool(jnp.isnan(number)) for number in broken)
    with pytest.raises(ValueError, match="softmax over one class"):
        precision.fidelity(reference[:, :1], changed[:, :1])


def test_fidelity_against_hand_computed_values() -> None:
    reference = jnp.log(jnp.asarray([[0.5, 0.5], [0.8, 0.2], [0.25, 0.75]]))
    logits = jnp.log(jnp.asarray([[0.5, 0.5], [0.2, 0.8], [0.25, 0.75]]))
    actual = precision.fidelity(logits, reference)
    np.testing.assert_allclose(actual.agreement, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(actual.kl, 0.6 * np.log(4) / 3, rtol=1e-5)
    np.testing.assert_allclose(actual.largest_error, np.log(4), rtol=1e-6)
    norm = np.linalg.norm(np.asarray(reference))
    np.testing.assert_allclose(actual.relative_error, np.sqrt(2) * np.log(4) / norm, rtol=1e-6)


def _digits_teacher() -> tuple[Any, np.ndarray, np.ndarray]:
    """Random features and a least-squares head: a fair classifier of digits without training."""
    result = digits()
    x = result.inputs.reshape(len(result.inputs), -1) / 16 - 0.5
    rng = np.random.default_rng(0)
    into = (rng.normal(size=(64, 256)) / 4).astype(np.float32)
    hidden = np.tanh(x @ into)
    head = np.linalg.lstsq(hidden, np.eye(10)[result.labels] * 10, rcond=None)[0]
    params = {"in": {"kernel": jnp.asarray(into)}, "out": {"kernel": jnp.float32(head)}}
    return params, x.astype(np.float32), result.labels


def test_int8_and_bfloat16_teachers_of_digits_are_the_same_teacher() -> None:
    params, x, labels = _digits_teacher()
    full = jax.jit(_model)(params, None, x)[0]["logits"]
    int8 = jax.jit(precision.with_int8(_model))(precision.quantize(params), None, x)[0]["logits"]
    half = jax.jit(precision.compute_in(_model, jnp.bfloat16))(params, None, x)[0]["logits"]
    assert np.mean(np.argmax(full, axis=-1) == labels) > 0.95
    for logits, agreement, kl in ((int8, 0.995, 2e-3), (half, 0.998, 2e-4)):
        actual = precision.fidelity(logits, full)
        assert agreement < actual.agreement <= 1 and 0 < actual.kl < kl
        accuracy = np.mean(np.argmax(logits, axis=-1) == labels)
        assert abs(accuracy - np.mean(np.argmax(full, axis=-1) == labels)) < 0.003


def test_an_int8_teacher_teaches_in_the_step() -> None:
    teacher = precision.with_int8(_model)
    small = precision.quantize(TEACHER)

    def trained(model: Any, params: Any) -> Any:
        weights = {"kd": 1.0, "masked": 0.5, "l2": 0.01}
        step = jax.jit(train.make_step(_model, _terms, weights, TX, teacher=model))
        state = train.init_state(STUDENT, TX, key=KEY)
        return step(state, BATCH, params)[0].params

    from_int8 = trained(teacher, small)
    from_wide = trained(_model, precision.dequantize(small))
    for a, b in zip(jax.tree.leaves(from_int8), jax.tree.leaves(from_wide), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
