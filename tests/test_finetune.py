"""Fine-tuning policies: rates that cover everything, gates, carried state, Fisher information."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import normalization, penalties
from kdtl_jax.train import finetune, fisher


def updated(tx: optax.GradientTransformation, tree: Any) -> tuple[Any, Any]:
    """Updates and state after one step whose gradients are the parameters themselves."""
    return tx.update(tree, tx.init(tree), tree)


def network(depth: int) -> dict[str, Any]:
    blocks = {f"block_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in range(depth)}
    return {
        "embed": jnp.ones((3, 2)),
        "norm": jnp.ones(2),
        "head": {"kernel": jnp.ones((2, 4))},
    } | blocks


def ids(params: Any, **more: Any) -> Any:
    rules = {"stem": "embed", "block": r"block_(\d+)/.*", "head": "head/.*", "last": "norm"}
    return finetune.layer_ids(params, **(rules | more))


def test_layer_decay_counts_from_the_head_with_blocks_in_natural_order() -> None:
    params = network(12)
    rates = finetune.layer_decay(ids(params), decay=0.5)
    assert rates["head"]["kernel"] == 1.0
    assert rates["embed"] == 0.5**13
    assert rates["block_11"]["bias"] == rates["norm"] == 0.5
    assert rates["block_2"]["kernel"] == 0.5**10 < rates["block_10"]["kernel"] == 0.5**2
    assert len(set(jax.tree.leaves(rates))) == 12 + 2
    slow = finetune.discriminative_rates(ids(params))
    assert slow["block_11"]["bias"] == pytest.approx(1 / 2.6)
    assert finetune.layer_decay(ids(params), decay=0.5, min_scale=0.1)["embed"] == 0.1


def test_layers_that_no_rule_covers_raise() -> None:
    with pytest.raises(ValueError, match="no rule covers 'norm'"):
        ids(network(2), last=None)
    with pytest.raises(ValueError, match="matches no path"):
        ids(network(2), block=r"blocks_(\d+)/.*")
    with pytest.raises(ValueError, match="one group"):
        ids(network(2), block=r"block_\d+/.*")
    with pytest.raises(ValueError, match=r"block must be a regular .*'\('"):
        ids(network(2), block="(")
    with pytest.raises(ValueError, match=r"must be the number, got 'block_0' from 'block_0/bias'"):
        ids(network(2), block=r"(block_\d+)/.*")
    with pytest.raises(ValueError, match="ids must have leaves"):
        finetune.layer_decay({})
    for factor in (0.0, 0.5, float("inf")):
        with pytest.raises(ValueError, match="^factor must"):
            finetune.discriminative_rates({"w": 1}, factor=factor)
    with pytest.raises(ValueError, match="labels no leaf"):
        ids(network(2), last="nrom")
    with pytest.raises(ValueError, match="above top=1"):
        finetune.layer_decay(ids(network(2)), top=1)


def test_scanned_blocks_have_a_rate_per_layer() -> None:
    params = {"embed": jnp.ones(2), "blocks": jnp.ones((3, 2, 2)), "head": jnp.ones(2)}
    layers = finetune.layer_ids(
        params, stem="embed", block="none/(.)", head="head", stacked="blocks"
    )
    rates = finetune.layer_decay(layers, decay=0.5)
    tx = finetune.scale_by_multipliers(rates)
    updates, _ = updated(tx, params)
    np.testing.assert_allclose(updates["blocks"][:, 0, 0], [0.125, 0.25, 0.5])
    assert (float(updates["embed"][0]), float(updates["head"][0])) == (0.0625, 1.0)


def test_multipliers_cover_every_leaf_and_fit_a_trainable_partition() -> None:
    params = network(2)
    rates = finetune.multipliers(params, [("head/.*", 1.0), (".*", 0.1)])
    tx = finetune.scale_by_multipliers(rates)
    part = jax.tree.map(lambda leaf: None, params) | {"head": params["head"]}
    updates, _ = updated(tx, part)
    assert float(updates["head"]["kernel"][0, 0]) == 1.0 and updates["embed"] is None
    with pytest.raises(ValueError, match="no rule covers"):
        finetune.multipliers(params, [("head/.*", 1.0)])
    with pytest.raises(ValueError, match="no rule was made for 'haed'"):
        tx.init({"haed": jnp.ones(2)})


def test_lora_plus_is_a_rule() -> None:
    weights = {"dense/kernel": {"a": jnp.ones(2), "b": jnp.ones(2)}}
    rates = finetune.multipliers(weights, [(".*/b", 16.0), (".*/a", 1.0)])
    assert rates == {"dense/kernel": {"a": 1.0, "b": 16.0}}


def test_one_optimizer_per_rule(standard_promotion: None) -> None:
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    rules = [("head", optax.sgd(1.0)), ("body", optax.sgd(0.1))]
    tx = finetune.optimizers(params, rules)
    updates, _ = updated(tx, params)
    np.testing.assert_allclose(updates["head"], -1.0)
    np.testing.assert_allclose(updates["body"], -0.1, rtol=1e-6)
    part = {"body": None, "head": params["head"]}
    updates, _ = updated(tx, part)
    np.testing.assert_allclose(updates["head"], -1.0)
    with pytest.raises(ValueError, match="no rule covers 'body'"):
        finetune.optimizers(params, rules[:1])


@pytest.mark.parametrize("policy", ["gate", "lp_ft"])
def test_gradual_unfreezing_compiles_once_and_keeps_the_moments(
    policy: str, standard_promotion: None
) -> None:
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    gate = (
        finetune.unfreeze_gate(params, [("head", 0), (".*", 3)])
        if policy == "gate"
        else finetune.lp_ft(params, head="head", probe_steps=3)
    )
    inner = optax.adamw(0.1, weight_decay=0.1)
    tx, traces = optax.chain(inner, gate), 0

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        nonlocal traces
        traces += 1
        grads = jax.tree.map(lambda p: 2 * p, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, now = tx.init(params), params
    for i in range(5):
        before = now
        now, state = step(now, state)
        assert bool(jnp.all(now["body"] == params["body"])) == (i < 3)  # bit-identical till then
        assert bool(jnp.all(now["head"] != before["head"]))
    assert traces == 1
    # Warm moments: the first open step is of the usual size, not 3.2 times it.
    assert float(jnp.abs(now["body"] - params["body"]).max()) < 2 * 0.1 * 1.2


def test_optimizer_state_is_carried_to_another_partition(standard_promotion: None) -> None:
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    tx: Any = optax.adam(0.1)
    head = {"body": None, "head": params["head"]}
    _, old = updated(tx, head)
    state, carried, fresh = finetune.carry_opt_state(old, tx.init(params))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    np.testing.assert_array_equal(state[0].mu["head"], old[0].mu["head"])
    np.testing.assert_array_equal(state[0].mu["body"], 0)
    assert int(state[0].count) == 1
    assert set(fresh) == {"0/mu/body", "0/nu/body"} and "0/mu/head" in carried
    with pytest.raises(ValueError, match="'0/mu/head' is old"):
        finetune.carry_opt_state(old, tx.init({"head": jnp.ones(3), "body": None}))
    with pytest.raises(ValueError, match="share no path"):
        finetune.carry_opt_state({"x": jnp.ones(1)}, {"y": jnp.ones(1)})


def batch_norm(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[Any, Any]:
    state = model_state
    mean = jnp.mean(inputs, axis=0) if train else state["mean"]
    new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "steps": state["steps"] + 1.0}
    return {"logits": inputs - mean[None, :]}, new if train else state


def test_batch_statistics_freeze() -> None:
    state, x = {"mean": jnp.zeros(2), "steps": jnp.zeros(())}, jnp.full((3, 2), 2.0)
    outputs, after = normalization.with_frozen_stats(batch_norm, where="mean")(
        None, state, x, train=True
    )
    np.testing.assert_array_equal(after["mean"], 0)
    assert float(after["steps"]) == 1 and bool(jnp.all(outputs["logits"] == 0))
    outputs, after = normalization.in_evaluation_mode(batch_norm)(None, state, x, train=True)
    assert after is state and bool(jnp.all(outputs["logits"] == 2))
    with pytest.raises(ValueError, match="matches no leaf"):
        normalization.freeze_stats(state, state, where="maen")


def linear_data() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.integers(0, 2, 7)
    params = {
        "w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "n": jnp.asarray(1, jnp.int32),
    }
    return params, {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}, x, y


def logits(params: Any, example: Any) -> jax.Array:
    return example["x"] @ params["w"]


def loss(params: Any, example: Any) -> jax.Array:
    return -jax.nn.log_softmax(logits(params, example))[example["y"]]


def test_fisher_by_hand_per_example_per_model_and_per_batch() -> None:
    params, data, x, y = linear_data()
    z = x @ np.asarray(params["w"], np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    grads = x[:, :, None] * (p - np.eye(2)[y])[:, None, :]
    got = fisher.empirical_fisher(loss, params, data, chunk=3)  # 7 examples: a remainder of 1
    np.testing.assert_allclose(got["w"], (grads**2).mean(0), rtol=1e-4)
    assert got["n"].dtype == jnp.int32
    by_label = np.stack([x[:, :, None] * (p - np.eye(2)[c])[:, None, :] for c in range(2)])
    want = np.sum([p[:, c, None, None] * by_label[c] ** 2 for c in range(2)], axis=0).mean(0)
    np.testing.assert_allclose(fisher.true_fisher(logits, params, data)["w"], want, rtol=1e-4)
    whole = fisher.batch_fisher(loss, params, data, batch_size=7)
    np.testing.assert_allclose(whole["w"], grads.mean(0) ** 2, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="not a multiple of 2"):
        fisher.batch_fisher(loss, params, data, batch_size=2)
    with pytest.raises(ValueError, match="softmax over one class"):
        fisher.true_fisher(lambda params, example: logits(params, example)[:1], params, data)


def test_ewc_takes_the_fisher_as_it_comes() -> None:
    params, data, _, _ = linear_data()
    information = fisher.true_fisher(logits, params, data)
    moved = params | {"w": params["w"] + 1.0}
    value = penalties.ewc(moved, params, information)
    np.testing.assert_allclose(value, jnp.sum(information["w"]) / 2, rtol=1e-5)
