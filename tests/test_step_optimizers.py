"""Optimizers that look at the loss, against loops written by hand; loss scaling in its place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from kdtl_jax import objective, train
from kdtl_jax.train import precision

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 2, 8), jnp.int32)
START = {"w": jnp.zeros((3, 2))}
BATCH = {"inputs": X, "labels": Y}
PADDED = {
    "inputs": jnp.concatenate([X, jnp.full((4, 3), jnp.nan)]),
    "labels": jnp.concatenate([Y, jnp.zeros(4, jnp.int32)]),
    "weights": jnp.concatenate([jnp.ones(8), jnp.zeros(4)]),
}


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    return {"logits": inputs @ params["w"]}, model_state


def seeking(search: Any) -> Any:
    return optax.chain(optax.sgd(1.0), search)


OPTIMIZERS = {
    "reduce_on_plateau": optax.chain(
        optax.sgd(2.0), contrib.reduce_on_plateau(patience=1, rtol=0.5, cooldown=0)
    ),
    "polyak_sgd": optax.polyak_sgd(),
    "momo": contrib.momo(),
    "momo_adam": contrib.momo_adam(),
    "backtracking": seeking(optax.scale_by_backtracking_linesearch(8)),
    "zoom": seeking(optax.scale_by_zoom_linesearch(8)),
    "lbfgs": optax.lbfgs(),
}


def loss(params: Any) -> jax.Array:
    logits = X @ params["w"]
    return 2 * jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, Y))


def by_hand(tx: Any, steps: int) -> np.ndarray:
    @jax.jit
    def one(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params, state = START, tx.init(START)
    for _ in range(steps):
        params, state = one(params, state)
    return np.asarray(params["w"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_looks_at_the_loss_sees_it(name: str) -> None:
    """With every batch padded, in parts, and with a scaled loss."""
    tx, steps = OPTIMIZERS[name], 4
    want = by_hand(tx, steps)
    cases = {
        "plain": (tx, BATCH, 1),
        "padded, in parts": (tx, PADDED, 3),
        "scaled": (precision.loss_scaling(tx, initial=128.0), BATCH, 2),
    }
    for case, (optimizer, batch, parts) in cases.items():
        step = train.jit_step(
            train.make_step(
                model, objective.classification, {"task": 2.0}, optimizer, microbatches=parts
            )
        )
        state = train.init_state(START, optimizer, key=jax.random.key(0))
        for _ in range(steps):
            before = jax.tree.map(jax.typeof, state)
            state, _ = step(state, batch)
            assert jax.tree.map(jax.typeof, state) == before, case
        np.testing.assert_allclose(state.params["w"], want, rtol=1e-4, atol=1e-5, err_msg=case)
    assert float(loss({"w": want})) < 0.96 * float(loss(START))


def test_a_line_search_runs_the_teacher_and_the_connectors_too() -> None:
    """`value_fn` is the whole objective as a function of what the optimizer sees."""
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra, params=params)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def terms(x: objective.Inputs) -> Any:
        error = x.student["logits"] * x.connectors["scale"] - x.teacher["logits"]
        return {"match": jnp.mean(jnp.square(error), axis=-1)}

    step = train.make_step(model, terms, {"match": 3.0}, tx, teacher=model)
    glue = {"scale": jnp.asarray(2.0)}
    state = train.init_state({"w": jnp.ones((3, 2))}, tx, key=jax.random.key(0), connectors=glue)
    after, metrics = step(state, BATCH, {"w": jnp.full((3, 2), -1.0)})
    assert seen["params"].keys() == {"params", "connectors"}
    np.testing.assert_allclose(seen["value"], metrics["loss"].value(), rtol=1e-6)
    np.testing.assert_allclose(seen["value_fn"](seen["params"]), seen["value"], rtol=1e-6)
    slope = jax.grad(seen["value_fn"])(seen["params"])
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(seen["grad"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert float(after.connectors["scale"]) != 2.0
    assert not np.array_equal(after.params["w"], state.params["w"])


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), precision.loss_scaling(optax.sgd(0.1))),
        optax.chain(precision.loss_scaling(optax.sgd(0.1)), optax.scale(0.5)),
        optax.masked(precision.loss_scaling(optax.sgd(0.1)), True),
        precision.loss_scaling(precision.loss_scaling(optax.sgd(0.1))),
        optax.MultiSteps(precision.loss_scaling(optax.sgd(0.1)), 2).gradient_transformation(),
    ],
    ids=["after clipping", "before scaling", "masked", "twice", "accumulated"],
)
def test_loss_scaling_within_another_transformation_is_refused(tx: Any) -> None:
    step = train.make_step(model, objective.classification, {"task": 1.0}, tx)
    state = train.init_state(START, tx, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"outermost.*loss_scaling\(optax.chain"):
        jax.eval_shape(step, state, BATCH)


@pytest.mark.parametrize("opaque", [True, False])
def test_sam_climbs_before_it_descends(opaque: bool) -> None:
    """optax's SAM takes `grad_fn` and no other extra argument."""
    tx = contrib.sam(optax.sgd(0.5), optax.sgd(0.1), opaque_mode=opaque)
    step = train.make_step(model, objective.classification, {"task": 2.0}, tx)
    state = train.init_state(START, tx, key=jax.random.key(0))
    for _ in range(1 if opaque else 2):
        state, _ = step(state, BATCH)
    climbed = jax.tree.map(lambda w, g: w + 0.1 * g, START, jax.grad(loss)(START))
    want = START["w"] - 0.5 * jax.grad(loss)(climbed)["w"]
    np.testing.assert_allclose(state.params["w"], want, rtol=1e-5, atol=1e-7)
